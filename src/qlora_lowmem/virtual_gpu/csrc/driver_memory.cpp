// libcuda.so.1: memory. Virtual memory management is what PyTorch's expandable segments are made of.
#include <cuda.h>

#include <cstring>
#include <map>

#include "guard.h"
#include "memory.h"
#include "stubs.h"

using namespace vgpu;

namespace {

struct Physical {
  uint64_t bytes;
  int device;
  int references;  // one of the handle, one of every mapping: memory is freed with the last
  CUmemAllocationProp properties;
};

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
// Leaked: allocators unmap while the process exits.
auto& handles = *new std::map<CUmemGenericAllocationHandle, Physical>;
auto& mappings = *new std::map<CUdeviceptr, CUmemGenericAllocationHandle>;
CUmemGenericAllocationHandle next_handle = 1;

void drop_reference(std::map<CUmemGenericAllocationHandle, Physical>::iterator it) {
  if (--it->second.references > 0) return;
  give(it->second.device, it->second.bytes);
  handles.erase(it);
}

CUresult refuse(const char* name, const char* why) {
  note_missing(name, why);
  return CUDA_ERROR_NOT_SUPPORTED;
}

int current_device() {
  CUdevice device = 0;
  return cuCtxGetDevice(&device) == CUDA_SUCCESS ? device : 0;
}

}  // namespace

API CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  return tell(bytes, kGranularity);
}

API CUresult cuMemAddressReserve(CUdeviceptr* address, size_t bytes, size_t alignment, CUdeviceptr,
                                 unsigned long long) {
  void* place = reserve_addresses(bytes, alignment);
  if (place == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
  return tell(address, reinterpret_cast<CUdeviceptr>(place));
}

API CUresult cuMemAddressFree(CUdeviceptr address, size_t) {
  return release_addresses(pointer(address)) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp* properties,
                         unsigned long long) {
  if (properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE) {
    return refuse("cuMemCreate", "memory that is not on a device");
  }
  int device = properties->location.id;
  if (device < 0 || device >= device_count()) return CUDA_ERROR_INVALID_DEVICE;
  if (properties->requestedHandleTypes == CU_MEM_HANDLE_TYPE_FABRIC) return CUDA_ERROR_NOT_PERMITTED;
  bytes = round_up(bytes, kGranularity);
  if (!take(device, bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  Guard<mutex> guard;
  *handle = next_handle++;
  handles[*handle] = {bytes, device, 1, *properties};
  return CUDA_SUCCESS;
}

API CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  Guard<mutex> guard;
  auto it = handles.find(handle);
  if (it == handles.end()) return CUDA_ERROR_INVALID_VALUE;
  drop_reference(it);
  return CUDA_SUCCESS;
}

API CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t, CUmemGenericAllocationHandle handle,
                      unsigned long long) {
  Guard<mutex> guard;
  auto it = handles.find(handle);
  if (it == handles.end() || !is_device_address(pointer(address))) return CUDA_ERROR_INVALID_VALUE;
  ++it->second.references;
  mappings[address] = handle;
  map_addresses(pointer(address), bytes, it->second.device);
  return CUDA_SUCCESS;
}

API CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
  Guard<mutex> guard;
  map_addresses(pointer(address), bytes, -1);
  for (auto it = mappings.lower_bound(address); it != mappings.end() && it->first < address + bytes;) {
    auto handle = handles.find(it->second);
    if (handle != handles.end()) drop_reference(handle);
    it = mappings.erase(it);
  }
  return CUDA_SUCCESS;
}

API CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* address) {
  Guard<mutex> guard;
  auto it = mappings.upper_bound(reinterpret_cast<CUdeviceptr>(address));
  if (it == mappings.begin()) return CUDA_ERROR_INVALID_VALUE;
  auto physical = handles.find((--it)->second);
  if (physical == handles.end()) return CUDA_ERROR_INVALID_VALUE;
  ++physical->second.references;
  return tell(handle, it->second);
}

API CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* properties,
                                                    CUmemGenericAllocationHandle handle) {
  Guard<mutex> guard;
  auto it = handles.find(handle);
  if (it == handles.end()) return CUDA_ERROR_INVALID_VALUE;
  return tell(properties, it->second.properties);
}

API CUresult cuMemExportToShareableHandle(void*, CUmemGenericAllocationHandle, CUmemAllocationHandleType,
                                          unsigned long long) {
  return refuse("cuMemExportToShareableHandle", "device memory shared between processes");
}

API CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
  void* place = allocate_device(current_device(), bytes);
  *address = reinterpret_cast<CUdeviceptr>(place);
  return place != nullptr ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

API CUresult cuMemFree(CUdeviceptr address) {
  return address == 0 || free_device(pointer(address)) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuMemGetInfo(size_t* available, size_t* total) {
  *available = free_bytes(current_device());
  *total = device_row(current_device()).total_bytes;
  return CUDA_SUCCESS;
}

API CUresult cuMemGetAddressRange(CUdeviceptr* base, size_t* bytes, CUdeviceptr address) {
  Place place = place_of(pointer(address));
  if (!place.on_device()) return CUDA_ERROR_NOT_FOUND;
  if (base != nullptr) *base = place.base;
  if (bytes != nullptr) *bytes = place.bytes;
  return CUDA_SUCCESS;
}

// Copies in other directions are this function too: an address says whose it is.
API CUresult cuMemcpyDtoH(void* target, CUdeviceptr source, size_t bytes) {
  copy(target, pointer(source), bytes);
  if (bytes != 0) count_launch(kCopy);
  return CUDA_SUCCESS;
}
API CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char, size_t bytes, CUstream) {
  fill(pointer(target), 0, bytes);
  if (bytes != 0) count_launch(kFill);
  return CUDA_SUCCESS;
}
API CUresult cuMemsetD32Async(CUdeviceptr target, unsigned, size_t count, CUstream) {
  fill(pointer(target), 0, count * 4);
  if (count != 0) count_launch(kFill);
  return CUDA_SUCCESS;
}

API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  Place place = place_of(pointer(address));
  if (place.kind == Kind::kUnknown) return CUDA_ERROR_INVALID_VALUE;
  bool managed = place.kind == Kind::kManaged;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      cuDevicePrimaryCtxRetain(static_cast<CUcontext*>(value), place.device);
      break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *static_cast<unsigned*>(value) = place.on_device() || managed ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *static_cast<CUdeviceptr*>(value) = address; break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      if (place.on_device()) return CUDA_ERROR_INVALID_VALUE;
      *static_cast<void**>(value) = pointer(address);
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *static_cast<int*>(value) = place.device; break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *static_cast<unsigned*>(value) = managed ? 1 : 0; break;
    case CU_POINTER_ATTRIBUTE_MAPPED: *static_cast<unsigned*>(value) = 1; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *static_cast<uint64_t*>(value) = place.base; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *static_cast<size_t*>(value) = place.bytes; break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *static_cast<uint64_t*>(value) = place.base / kGranularity; break;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS: *static_cast<unsigned*>(value) = 0; break;
    default: return refuse("cuPointerGetAttribute", "an attribute that is not known here");
  }
  return CUDA_SUCCESS;
}

API CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** values,
                                    CUdeviceptr address) {
  for (unsigned i = 0; i < count; ++i) {
    // An address that CUDA does not know gets zeros here, not an error.
    if (cuPointerGetAttribute(values[i], attributes[i], address) != CUDA_SUCCESS) memset(values[i], 0, 4);
  }
  return CUDA_SUCCESS;
}
