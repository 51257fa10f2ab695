// What cuda_runtime_api.h and cuda.h expect of the CUDA compiler's own header, for a plain C++ compiler.
// The nvidia-* wheels carry the API headers but not the crt/ folder of the toolkit; found after it (-idirafter).
#pragma once

// Execution and memory spaces have no meaning on the host.
#define __host__
#define __device__
#define __global__
#define __shared__
#define __constant__
#define __managed__
#define __grid_constant__
#define __cluster_dims__(...)

// Layout matters: these must be what nvcc's own header says.
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __forceinline__ inline
#define __specialization_static static

// Markers that only the CUDA front end reads.
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_surface_type__
#define __device_builtin_texture_type__
#define CUDARTAPI
#define CUDARTAPI_CDECL
