// libcudart: devices, their properties, errors.
#include <cstdio>
#include <cstring>

#include "attributes.h"
#include "runtime.h"

namespace vgpu {
namespace {

thread_local int chosen_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

struct ErrorText {
  cudaError_t error;
  const char* name;
  const char* text;  // the runtime's own wording: people search for it
};

constexpr ErrorText kErrorTexts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorSymbolNotFound, "cudaErrorSymbolNotFound", "named symbol not found"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {cudaErrorPeerAccessUnsupported, "cudaErrorPeerAccessUnsupported",
     "peer access is not supported between these two devices"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
};

void fill_properties(cudaDeviceProp* p, int device) {
  const Device& d = device_row(device);
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", d.name);
  memcpy(p->uuid.bytes, d.uuid, sizeof d.uuid);
  p->totalGlobalMem = d.total_bytes;
  p->sharedMemPerBlock = d.shared_per_block;
  p->sharedMemPerBlockOptin = d.shared_per_block_optin;
  p->sharedMemPerMultiprocessor = d.shared_per_sm;
  p->reservedSharedMemPerBlock = d.compute_major >= 8 ? 1024 : 0;
  p->regsPerBlock = 65536;
  p->regsPerMultiprocessor = static_cast<int>(d.registers_per_sm);
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = static_cast<int>(d.compute_major);
  p->minor = static_cast<int>(d.compute_minor);
  p->textureAlignment = 512;
  p->texturePitchAlignment = 32;
  p->multiProcessorCount = static_cast<int>(d.sm_count);
  p->canMapHostMemory = 1;
  p->concurrentKernels = 1;
  p->pciBusID = machine_index(device) + 1;
  p->asyncEngineCount = 2;
  p->unifiedAddressing = 1;
  p->memoryBusWidth = static_cast<int>(d.bus_width_bits);
  p->l2CacheSize = static_cast<int>(d.l2_bytes);
  p->maxThreadsPerMultiProcessor = static_cast<int>(d.threads_per_sm);
  p->maxBlocksPerMultiProcessor = static_cast<int>(d.blocks_per_sm);
  p->streamPrioritiesSupported = 1;
  p->globalL1CacheSupported = p->localL1CacheSupported = 1;
  p->managedMemory = p->concurrentManagedAccess = 1;
  p->computePreemptionSupported = 1;
  p->canUseHostPointerForRegisteredMem = p->hostRegisterSupported = 1;
  p->cooperativeLaunch = 1;
#if CUDART_VERSION < 13000
  p->clockRate = static_cast<int>(d.clock_khz);
  p->memoryClockRate = static_cast<int>(d.memory_clock_khz);
#endif
}

const ErrorText* text_of(cudaError_t error) {
  for (const ErrorText& entry : kErrorTexts) {
    if (entry.error == error) return &entry;
  }
  return nullptr;
}

}  // namespace

cudaError_t fail(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

int current_device() { return chosen_device; }

cudaError_t check_device(int device) {
  if (device_count() == 0) return fail(cudaErrorNoDevice);
  if (forked_after_use()) return fail(cudaErrorInitializationError);
  return device < 0 || device >= device_count() ? fail(cudaErrorInvalidDevice) : cudaSuccess;
}

cudaError_t enter() {
  if (has_context(chosen_device)) return cudaSuccess;
  if (cudaError_t error = check_device(chosen_device)) return error;
  return ensure_context(chosen_device) ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}

}  // namespace vgpu

using namespace vgpu;

API cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

API cudaError_t cudaPeekAtLastError() { return last_error; }

API const char* cudaGetErrorName(cudaError_t error) {
  const ErrorText* entry = text_of(error);
  return entry != nullptr ? entry->name : "cudaErrorUnknown";
}

API const char* cudaGetErrorString(cudaError_t error) {
  const ErrorText* entry = text_of(error);
  return entry != nullptr ? entry->text : "unknown error";
}

API cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  if (*count > 0 && forked_after_use()) return fail(cudaErrorInitializationError);
  return *count == 0 ? fail(cudaErrorNoDevice) : cudaSuccess;
}

API cudaError_t cudaGetDevice(int* device) {
  *device = chosen_device;
  return device_count() == 0 ? fail(cudaErrorNoDevice) : cudaSuccess;
}

// From CUDA 12 on, choosing a device makes its context.
API cudaError_t cudaSetDevice(int device) {
  if (cudaError_t error = check_device(device)) return error;
  chosen_device = device;
  return enter();
}

API cudaError_t cudaInitDevice(int device, unsigned, unsigned) {
  if (cudaError_t error = check_device(device)) return error;
  return ensure_context(device) ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}

API cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
API cudaError_t cudaGetDeviceFlags(unsigned* flags) {
  *flags = 0;
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (cudaError_t error = check_device(device)) return error;
  fill_properties(properties, device);
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (cudaError_t error = check_device(device)) return error;
  *value = device_attribute(attribute, device);
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char* text, int capacity, int device) {
  if (cudaError_t error = check_device(device)) return error;
  pci_bus_id(machine_index(device), text, capacity);
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetByPCIBusId(int* device, const char* text) {
  int wanted = machine_index_of_pci_bus_id(text);
  for (*device = 0; *device < device_count(); ++*device) {
    if (machine_index(*device) == wanted) return cudaSuccess;
  }
  return fail(cudaErrorInvalidDevice);
}

API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

API cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
API cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
API cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit) {
  *value = 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceSetCacheConfig(cudaFuncCache) { return cudaSuccess; }

API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return cudaSuccess;
}

// Cards of one machine do not reach each other's memory: copies between them are counted on both all the same.
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return fail(cudaErrorPeerAccessUnsupported); }

// Profilers bracket their region with these.
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }
