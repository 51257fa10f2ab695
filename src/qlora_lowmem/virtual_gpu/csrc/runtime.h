// What the files of libcudart share: errors, and the device that a thread has chosen.
#pragma once

#include <cuda_runtime_api.h>

#include "memory.h"
#include "stubs.h"

// Defines functions whose parameters differ between CUDA versions and do not matter here, under their binary name.
#define API_NAMED(function, symbol) \
  API cudaError_t function __asm__(symbol); \
  API cudaError_t function

namespace vgpu {

// Sets the thread's last error, as every failing call of the runtime does.
cudaError_t fail(cudaError_t error);

int current_device();

// cudaSuccess if the device can be used: there is a machine, the ordinal is in range, the process may use CUDA.
cudaError_t check_device(int device);

// The same for the current device, with a context made on it: what a call that does work begins with.
cudaError_t enter();

}  // namespace vgpu
