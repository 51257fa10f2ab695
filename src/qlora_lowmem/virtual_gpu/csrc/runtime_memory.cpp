// libcudart: allocations and copies.
#include <cstring>

#include "runtime.h"

using namespace vgpu;

namespace {

cudaError_t allocate(void** address, Kind kind, size_t bytes) {
  *address = nullptr;
  if (cudaError_t error = enter()) return error;
  if (bytes == 0 && kind == Kind::kDevice) return cudaSuccess;
  int device = current_device();
  *address = kind == Kind::kDevice ? allocate_device(device, bytes) : allocate_host(kind, bytes, device);
  return *address != nullptr ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}

}  // namespace

API cudaError_t cudaMalloc(void** address, size_t bytes) { return allocate(address, Kind::kDevice, bytes); }
API cudaError_t cudaMallocManaged(void** address, size_t bytes, unsigned) {
  return allocate(address, Kind::kManaged, bytes);
}
API cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  return allocate(address, Kind::kPinned, bytes);
}

API cudaError_t cudaFree(void* address) {
  // cudaFree(nullptr) is how programs make a context on purpose.
  if (address == nullptr) return enter();
  if (free_device(address) || free_host(address)) return cudaSuccess;
  return forked_after_use() ? cudaSuccess : fail(cudaErrorInvalidValue);
}

API cudaError_t cudaMallocPitch(void** address, size_t* pitch, size_t width, size_t height) {
  *pitch = round_up(width, 512);
  size_t bytes;
  bool too_large = __builtin_mul_overflow(*pitch, height, &bytes);
  return cudaMalloc(address, too_large ? SIZE_MAX : bytes);
}

API cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  if (cudaError_t error = enter()) return error;
  *available = free_bytes(current_device());
  *total = device_row(current_device()).total_bytes;
  return cudaSuccess;
}

API cudaError_t cudaFreeHost(void* address) {
  if (address == nullptr || free_host(address)) return cudaSuccess;
  return fail(cudaErrorInvalidValue);
}

API cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  if (cudaError_t error = enter()) return error;
  if (!is_mapped(address, bytes)) return fail(cudaErrorInvalidValue);
  if (register_host(address, bytes, current_device())) return cudaSuccess;
  return fail(cudaErrorHostMemoryAlreadyRegistered);
}

API cudaError_t cudaHostUnregister(void* address) {
  return unregister_host(address) ? cudaSuccess : fail(cudaErrorHostMemoryNotRegistered);
}

API cudaError_t cudaHostGetDevicePointer(void** device_address, void* address, unsigned) {
  Place place = place_of(address);
  if (place.kind == Kind::kUnknown || place.on_device()) return fail(cudaErrorInvalidValue);
  return tell(device_address, address);
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  if (cudaError_t error = check_device(current_device())) return error;
  memset(attributes, 0, sizeof *attributes);
  Place place = place_of(address);
  bool known = place.kind != Kind::kUnknown;
  attributes->type = place.on_device()              ? cudaMemoryTypeDevice
                     : place.kind == Kind::kManaged ? cudaMemoryTypeManaged
                     : known                        ? cudaMemoryTypeHost
                                                    : cudaMemoryTypeUnregistered;
  attributes->device = known ? place.device : -1;
  attributes->devicePointer = known ? const_cast<void*>(address) : nullptr;
  // Freed device memory, or reserved with nothing mapped, is no memory that CUDA knows, and no host memory either.
  attributes->hostPointer = is_device_address(address) ? nullptr : const_cast<void*>(address);
  return cudaSuccess;
}

API cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  if (cudaError_t error = enter()) return error;
  copy(target, source, bytes);
  if (bytes != 0) count_launch(kCopy);
  return cudaSuccess;
}

API cudaError_t cudaMemcpyPeer(void* target, int, const void* source, int, size_t bytes) {
  return cudaMemcpy(target, source, bytes, cudaMemcpyDefault);
}

API cudaError_t cudaMemcpy2D(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width,
                             size_t height, cudaMemcpyKind) {
  if (cudaError_t error = enter()) return error;
  for (size_t row = 0; row < height; ++row) {
    copy(static_cast<char*>(target) + row * target_pitch, static_cast<const char*>(source) + row * source_pitch, width);
  }
  if (width != 0 && height != 0) count_launch(kCopy);
  return cudaSuccess;
}

// A __device__ variable is known by the address of its host shadow; its value on the device does not exist.
API cudaError_t cudaMemcpyFromSymbol(void* target, const void*, size_t bytes, size_t, cudaMemcpyKind) {
  if (cudaError_t error = enter()) return error;
  vgpu_notice(kValuesRead);
  fill(target, 0, bytes);
  if (bytes != 0) count_launch(kCopy);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t bytes, size_t, cudaMemcpyKind) {
  if (cudaError_t error = enter()) return error;
  if (bytes != 0) count_launch(kCopy);
  return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  *address = const_cast<void*>(symbol);
  return enter();
}

API cudaError_t cudaMemset(void* target, int value, size_t bytes) {
  if (cudaError_t error = enter()) return error;
  fill(target, value, bytes);
  if (bytes != 0) count_launch(kFill);
  return cudaSuccess;
}

API cudaError_t cudaMemset2DAsync(void* target, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  if (cudaError_t error = enter()) return error;
  for (size_t row = 0; row < height; ++row) fill(static_cast<char*>(target) + row * pitch, value, width);
  if (width != 0 && height != 0) count_launch(kFill);
  return cudaSuccess;
}
