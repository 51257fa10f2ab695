#include <cuda.h>
#include <cuda_runtime_api.h>

#include "stubs.h"

namespace vgpu {
namespace {

#define ERROR(runtime, driver, text) {runtime, #runtime, #driver, text}

// The texts are CUDA's own wording: people search for it.
constexpr ErrorText kErrors[] = {
    ERROR(cudaSuccess, CUDA_SUCCESS, "no error"),
    ERROR(cudaErrorInvalidValue, CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    ERROR(cudaErrorMemoryAllocation, CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    ERROR(cudaErrorInitializationError, CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    ERROR(cudaErrorNoDevice, CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    ERROR(cudaErrorInvalidDevice, CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    ERROR(cudaErrorPeerAccessUnsupported, CUDA_ERROR_PEER_ACCESS_UNSUPPORTED,
          "peer access is not supported between these two devices"),
    ERROR(cudaErrorInvalidResourceHandle, CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    ERROR(cudaErrorSymbolNotFound, CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    ERROR(cudaErrorNotReady, CUDA_ERROR_NOT_READY, "device not ready"),
    ERROR(cudaErrorHostMemoryAlreadyRegistered, CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
          "part or all of the requested memory range is already mapped"),
    ERROR(cudaErrorHostMemoryNotRegistered, CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED,
          "pointer does not correspond to a registered memory region"),
    ERROR(cudaErrorNotSupported, CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    ERROR(cudaErrorStreamCaptureUnsupported, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
          "operation not permitted when stream is capturing"),
    ERROR(cudaErrorUnknown, CUDA_ERROR_UNKNOWN, "unknown error"),
};

}  // namespace

const ErrorText& error_text(int error) {
  const ErrorText* found = kErrors;
  while (found->error != error && found->error != cudaErrorUnknown) ++found;
  return *found;
}

}  // namespace vgpu
