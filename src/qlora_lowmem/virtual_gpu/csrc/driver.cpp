// libcuda.so.1: devices, contexts, errors, and how functions are looked up. Modules, kernels, streams and events, as
// Triton, Inductor and NVRTC users call them, are generated (stubs.py): nothing is loaded and nothing runs.
#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "attributes.h"
#include "stubs.h"

using namespace vgpu;

// "cuMemGetAddressRange" -> "cuMemGetAddressRange_v2": what cuda.h renames, generated from it.
struct Alias {
  const char* name;
  const char* symbol;
};
extern "C" const Alias vgpu_driver_aliases[];

namespace {

// A context is a number: there is one per device, its primary context.
CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(static_cast<uintptr_t>(0x10 + device)); }
int device_of(CUcontext context) { return static_cast<int>(reinterpret_cast<uintptr_t>(context)) - 0x10; }

constexpr int kStackDepth = 32;
thread_local CUcontext stack[kStackDepth];
thread_local int depth = 0;

bool valid(int device) { return device >= 0 && device < device_count(); }

CUresult ready() {
  if (device_count() == 0) return CUDA_ERROR_NO_DEVICE;
  return forked_after_use() ? CUDA_ERROR_NOT_INITIALIZED : CUDA_SUCCESS;
}

CUresult push(CUcontext context) {
  if (depth == kStackDepth) return CUDA_ERROR_OUT_OF_MEMORY;
  stack[depth++] = context;
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" VGPU_SHARED void* vgpu_driver_function(const char* name) {
  static void* self = [] {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&vgpu_driver_function), &info);
    return dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  }();
  for (const Alias* alias = vgpu_driver_aliases; alias->name != nullptr; ++alias) {
    if (strcmp(alias->name, name) == 0) {
      if (void* found = dlsym(self, alias->symbol)) return found;
    }
  }
  return dlsym(self, name);
}

API CUresult cuGetProcAddress(const char* name, void** function, int, cuuint64_t,
                              CUdriverProcAddressQueryResult* result) {
  *function = vgpu_driver_function(name);
  bool found = *function != nullptr;
  if (result != nullptr) *result = found ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

// Tables of functions that have no names, which the runtimes here do without: a runtime that is linked into a library
// asks for them with its first call, and ends with this error. So does NVIDIA's profiler.
API CUresult cuGetExportTable(const void**, const CUuuid*) {
  Dl_info caller;
  const char* library = dladdr(__builtin_return_address(0), &caller) != 0 ? caller.dli_fname : "a library";
  if (strstr(library, "libcupti") != nullptr) note_missing("cuGetExportTable", nullptr);
  else note_linked_runtime(library);
  return CUDA_ERROR_NOT_SUPPORTED;
}

API CUresult cuInit(unsigned) { return ready(); }

API CUresult cuDriverGetVersion(int* version) { return tell(version, CUDA_VERSION); }

API CUresult cuGetErrorName(CUresult error, const char** text) { return tell(text, error_text(error).driver_name); }
API CUresult cuGetErrorString(CUresult error, const char** text) { return tell(text, error_text(error).text); }

API CUresult cuDeviceGetCount(int* count) {
  *count = device_count();
  return ready();
}

API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (!valid(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  return tell(device, ordinal);
}

API CUresult cuDeviceGetName(char* text, int capacity, CUdevice device) {
  if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  snprintf(text, static_cast<size_t>(capacity), "%s", device_row(device).name);
  return CUDA_SUCCESS;
}

API CUresult cuDeviceTotalMem(size_t* bytes, CUdevice device) {
  if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  return tell(bytes, device_row(device).total_bytes);
}

API CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  memcpy(uuid->bytes, device_row(device).uuid, 16);
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetPCIBusId(char* text, int capacity, CUdevice device) {
  if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  pci_bus_id(machine_index(device), text, capacity);
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  return tell(value, device_attribute(attribute, device));
}

API CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice device) {
  if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  *major = static_cast<int>(device_row(device).compute_major);
  *minor = static_cast<int>(device_row(device).compute_minor);
  return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  if (CUresult error = ready()) return error;
  if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  if (!ensure_context(device)) return CUDA_ERROR_OUT_OF_MEMORY;
  return tell(context, context_of(device));
}

API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  if (!valid(device)) return CUDA_ERROR_INVALID_DEVICE;
  *flags = 0;
  *active = has_context(device) ? 1 : 0;
  return CUDA_SUCCESS;
}

// Programs that use the runtime have its context current without asking; which device that is, cudart knows.
extern "C" int cudaGetDevice(int*) __attribute__((weak));

API CUresult cuCtxGetCurrent(CUcontext* context) {
  int device = 0;
  if (depth > 0) device = device_of(stack[depth - 1]);
  else if (cudaGetDevice != nullptr) cudaGetDevice(&device);
  return tell(context, has_context(device) || depth > 0 ? context_of(device) : nullptr);
}

API CUresult cuCtxGetDevice(CUdevice* device) {
  CUcontext context;
  cuCtxGetCurrent(&context);
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return tell(device, device_of(context));
}

API CUresult cuCtxSetCurrent(CUcontext context) {
  if (depth > 0) --depth;
  return context != nullptr ? push(context) : CUDA_SUCCESS;
}
API CUresult cuCtxPushCurrent(CUcontext context) { return push(context); }
API CUresult cuCtxPopCurrent(CUcontext* context) {
  if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
  --depth;
  if (context != nullptr) *context = stack[depth];
  return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  bool threads = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
  bool registers = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS;
  *value = threads ? 1024 : registers ? 32 : 0;  // no spills, no static shared memory
  return CUDA_SUCCESS;
}
