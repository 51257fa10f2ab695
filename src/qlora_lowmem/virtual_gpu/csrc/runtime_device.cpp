// libcudart: devices, their properties, errors.
#include "attributes.h"
#include "runtime.h"

namespace vgpu {
namespace {

thread_local int chosen_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

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

// What generated functions do that need a context and nothing else.
extern "C" cudaError_t vgpu_enter() { return enter(); }

API cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

API cudaError_t cudaPeekAtLastError() { return last_error; }

API const char* cudaGetErrorName(cudaError_t error) { return error_text(error).runtime_name; }
API const char* cudaGetErrorString(cudaError_t error) { return error_text(error).text; }

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

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (cudaError_t error = check_device(device)) return error;
  describe_device(properties, device);
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (cudaError_t error = check_device(device)) return error;
  return tell(value, device_attribute(attribute, device));
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

API cudaError_t cudaDriverGetVersion(int* version) { return tell(version, CUDART_VERSION); }

// Cards of one machine do not reach each other's memory (cudaDeviceCanAccessPeer says 0): copies between them are
// counted on both all the same.
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return fail(cudaErrorPeerAccessUnsupported); }
