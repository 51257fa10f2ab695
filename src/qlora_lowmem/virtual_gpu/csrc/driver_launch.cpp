// libcuda.so.1: modules, kernels, streams and events, as Triton, Inductor and NVRTC users call them.
// Modules and functions are numbers: nothing is loaded and nothing runs.
#include <cuda.h>

#include "account.h"
#include "exchanged.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

const CUmodule kModule = reinterpret_cast<CUmodule>(0x20);
const CUlibrary kLibrary = reinterpret_cast<CUlibrary>(0x28);
const CUfunction kFunction = reinterpret_cast<CUfunction>(0x30);
const CUkernel kKernel = reinterpret_cast<CUkernel>(0x38);

CUresult launch() {
  vgpu::forget_written();
  return CUDA_SUCCESS;
}

}  // namespace

API CUresult cuModuleLoad(CUmodule* module, const char*) {
  *module = kModule;
  return CUDA_SUCCESS;
}
API CUresult cuModuleLoadData(CUmodule* module, const void*) { return cuModuleLoad(module, nullptr); }
API CUresult cuModuleLoadDataEx(CUmodule* module, const void*, unsigned, CUjit_option*, void**) {
  return cuModuleLoad(module, nullptr);
}
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char*) {
  *function = kFunction;
  return CUDA_SUCCESS;
}
API CUresult cuLibraryLoadData(CUlibrary* library, const void*, CUjit_option*, void**, unsigned, CUlibraryOption*,
                               void**, unsigned) {
  *library = kLibrary;
  return CUDA_SUCCESS;
}
API CUresult cuLibraryUnload(CUlibrary) { return CUDA_SUCCESS; }
API CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary, const char*) {
  *kernel = kKernel;
  return CUDA_SUCCESS;
}
API CUresult cuKernelGetFunction(CUfunction* function, CUkernel) {
  *function = kFunction;
  return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  bool threads = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
  bool registers = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS;
  *value = threads ? 1024 : registers ? 32 : 0;  // no spills, no static shared memory
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

API CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                            void**, void**) { return launch(); }
API CUresult cuLaunchKernelEx(const CUlaunchConfig*, CUfunction, void**, void**) { return launch(); }
API CUresult cuLaunchCooperativeKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                       CUstream, void**) { return launch(); }

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int, size_t) {
  *blocks = 2;
  return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

API CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                    const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                    CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;
}

// Streams made by the runtime come through here as well; everything submitted is done.
API CUresult cuCtxSynchronize() { return CUDA_SUCCESS; }
API CUresult cuStreamSynchronize(CUstream) { return CUDA_SUCCESS; }
API CUresult cuStreamQuery(CUstream) { return CUDA_SUCCESS; }
API CUresult cuStreamWaitEvent(CUstream, CUevent, unsigned) { return CUDA_SUCCESS; }
API CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
API CUresult cuEventSynchronize(CUevent) { return CUDA_SUCCESS; }
API CUresult cuEventQuery(CUevent) { return CUDA_SUCCESS; }

// The driver logs nothing here, so the callback is never called.
extern "C" __attribute__((visibility("default"))) CUresult logs_register() __asm__("cuLogsRegisterCallback");
extern "C" __attribute__((visibility("default"))) CUresult logs_register() { return CUDA_SUCCESS; }
extern "C" __attribute__((visibility("default"))) CUresult logs_unregister() __asm__("cuLogsUnregisterCallback");
extern "C" __attribute__((visibility("default"))) CUresult logs_unregister() { return CUDA_SUCCESS; }
