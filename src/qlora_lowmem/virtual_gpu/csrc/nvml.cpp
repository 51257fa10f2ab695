// libnvidia-ml.so.1: what PyTorch, pynvml and the project's own readings ask. Used memory is the account's, so a
// process that only watches sees what the others hold.
#include <cstdio>
#include <cstring>

#include "attributes.h"
#include "stubs.h"

// A function that another answers: it has the same first parameters, or there is nothing to be told.
#define SAME(name, as) API int name() __attribute__((alias(#as)));

using namespace vgpu;
using machine::processes_on;
using machine::used_bytes;

namespace {

constexpr int kSuccess = 0, kInvalidArgument = 2, kNotSupported = 3, kNotFound = 6, kInsufficientSize = 7;
constexpr int kDriverNotLoaded = 9;

// A handle is the device's number plus one.
using Handle = uintptr_t;
int device_of(Handle handle) { return static_cast<int>(handle) - 1; }
bool valid(Handle handle) { return handle >= 1 && device_of(handle) < machine::device_count(); }
const Device& row(Handle handle) { return machine::device_row(device_of(handle)); }

int write_text(char* text, unsigned capacity, const char* value) {
  if (strlen(value) + 1 > capacity) return kInsufficientSize;
  strcpy(text, value);
  return kSuccess;
}

void format_uuid(int device, char* text, size_t capacity) {
  const uint8_t* u = machine::device_row(device).uuid;
  snprintf(text, capacity, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1], u[2],
           u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
}

struct Memory {
  unsigned long long total, free, used;
};
struct MemoryV2 {
  unsigned version;
  unsigned long long total, reserved, free, used;
};
struct Utilization {
  unsigned gpu, memory;
};
struct ProcessInfoV1 {
  unsigned pid;
  unsigned long long used;
};
struct ProcessInfo {  // nvmlProcessInfo_v2_t, and v3 under CUDA 12 and later
  unsigned pid;
  unsigned long long used;
  unsigned gpu_instance, compute_instance;
};
struct PciInfo {
  char bus_id_legacy[16];
  unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
  char bus_id[32];
};

template <typename Info>
int running_processes(Handle handle, unsigned* count, Info* infos) {
  if (!valid(handle)) return kInvalidArgument;
  int32_t pids[kMaxProcesses];
  uint64_t bytes[kMaxProcesses];
  unsigned found = static_cast<unsigned>(processes_on(device_of(handle), pids, bytes));
  unsigned capacity = *count;
  *count = found;
  if (found > capacity) return kInsufficientSize;
  for (unsigned i = 0; i < found; ++i) {
    memset(&infos[i], 0xff, sizeof infos[i]);  // not divided into instances
    infos[i].pid = static_cast<unsigned>(pids[i]);
    infos[i].used = bytes[i];
  }
  return kSuccess;
}

}  // namespace

API int nvmlInit() { return machine::device_count() > 0 ? kSuccess : kDriverNotLoaded; }
SAME(nvmlInit_v2, nvmlInit)
SAME(nvmlInitWithFlags, nvmlInit)
API int nvmlShutdown() { return kSuccess; }

API const char* nvmlErrorString(int error) {
  switch (error) {
    case kSuccess: return "Success";
    case kInvalidArgument: return "Invalid Argument";
    case kNotSupported: return "Not Supported";
    case kNotFound: return "Not Found";
    case kInsufficientSize: return "Insufficient Size";
    case kDriverNotLoaded: return "Driver Not Loaded";
    default: return "Unknown Error";
  }
}

API int nvmlSystemGetDriverVersion(char* text, unsigned capacity) {
  return write_text(text, capacity, VGPU_CUDART_VERSION >= 13000 ? "580.00.virtual" : "550.00.virtual");
}
SAME(nvmlSystemGetNVMLVersion, nvmlSystemGetDriverVersion)
API int nvmlSystemGetCudaDriverVersion(int* version) { return tell(version, VGPU_CUDART_VERSION); }
SAME(nvmlSystemGetCudaDriverVersion_v2, nvmlSystemGetCudaDriverVersion)

API int nvmlDeviceGetCount(unsigned* count) { return tell(count, machine::device_count()); }
SAME(nvmlDeviceGetCount_v2, nvmlDeviceGetCount)

API int nvmlDeviceGetHandleByIndex_v2(unsigned index, Handle* handle) {
  if (index >= static_cast<unsigned>(machine::device_count())) return kInvalidArgument;
  return tell(handle, index + 1);
}
SAME(nvmlDeviceGetHandleByIndex, nvmlDeviceGetHandleByIndex_v2)
API int nvmlDeviceGetHandleByPciBusId_v2(const char* bus_id, Handle* handle) {
  int device = machine_index_of_pci_bus_id(bus_id);
  return device < 0 ? kNotFound : tell(handle, device + 1);
}
SAME(nvmlDeviceGetHandleByPciBusId, nvmlDeviceGetHandleByPciBusId_v2)
API int nvmlDeviceGetHandleByUUID(const char* uuid, Handle* handle) {
  for (int device = 0; device < machine::device_count(); ++device) {
    char text[64];
    format_uuid(device, text, sizeof text);
    if (strcmp(text, uuid) == 0) return tell(handle, device + 1);
  }
  return kNotFound;
}

API int nvmlDeviceGetIndex(Handle handle, unsigned* index) {
  if (!valid(handle)) return kInvalidArgument;
  return tell(index, device_of(handle));
}
API int nvmlDeviceGetName(Handle handle, char* text, unsigned capacity) {
  return valid(handle) ? write_text(text, capacity, row(handle).name) : kInvalidArgument;
}
API int nvmlDeviceGetUUID(Handle handle, char* text, unsigned capacity) {
  if (!valid(handle)) return kInvalidArgument;
  char uuid[64];
  format_uuid(device_of(handle), uuid, sizeof uuid);
  return write_text(text, capacity, uuid);
}
API int nvmlDeviceGetPciInfo_v3(Handle handle, PciInfo* info) {
  if (!valid(handle)) return kInvalidArgument;
  memset(info, 0, sizeof *info);
  pci_bus_id(device_of(handle), info->bus_id_legacy, sizeof info->bus_id_legacy);
  snprintf(info->bus_id, sizeof info->bus_id, "0000%s", info->bus_id_legacy);
  info->bus = static_cast<unsigned>(device_of(handle)) + 1;
  return kSuccess;
}
API int nvmlDeviceGetCudaComputeCapability(Handle handle, int* major, int* minor) {
  if (!valid(handle)) return kInvalidArgument;
  *major = static_cast<int>(row(handle).compute_major);
  *minor = static_cast<int>(row(handle).compute_minor);
  return kSuccess;
}

API int nvmlDeviceGetMemoryInfo(Handle handle, Memory* memory) {
  if (!valid(handle)) return kInvalidArgument;
  uint64_t total = row(handle).total_bytes, used = used_bytes(device_of(handle));
  return tell(memory, Memory{total, total - used, used});
}
API int nvmlDeviceGetMemoryInfo_v2(Handle handle, MemoryV2* memory) {
  Memory plain;
  if (int error = nvmlDeviceGetMemoryInfo(handle, &plain)) return error;
  return tell(memory, MemoryV2{memory->version, plain.total, 0, plain.free, plain.used});
}

API int nvmlDeviceGetComputeRunningProcesses(Handle handle, unsigned* count, ProcessInfoV1* infos) {
  return running_processes(handle, count, infos);
}
API int nvmlDeviceGetComputeRunningProcesses_v2(Handle handle, unsigned* count, ProcessInfo* infos) {
  return running_processes(handle, count, infos);
}
SAME(nvmlDeviceGetComputeRunningProcesses_v3, nvmlDeviceGetComputeRunningProcesses_v2)
API int nvmlDeviceGetGraphicsRunningProcesses_v3(Handle handle, unsigned* count, ProcessInfo*) {
  *count = 0;
  return valid(handle) ? kSuccess : kInvalidArgument;
}

API int nvmlDeviceGetUtilizationRates(Handle handle, Utilization* rates) {
  *rates = {0, 0};  // nothing ever runs
  return valid(handle) ? kSuccess : kInvalidArgument;
}

// What these would tell does not exist here; NVML has an answer for that.
API int nvmlDeviceGetTemperature() { return kNotSupported; }
SAME(nvmlDeviceGetPowerUsage, nvmlDeviceGetTemperature)
SAME(nvmlDeviceGetClockInfo, nvmlDeviceGetTemperature)
SAME(nvmlDeviceGetP2PStatus, nvmlDeviceGetTemperature)
SAME(nvmlDeviceGetGpuFabricInfo, nvmlDeviceGetTemperature)
SAME(nvmlDeviceGetGpuFabricInfoV, nvmlDeviceGetTemperature)
SAME(nvmlDeviceGetNvLinkState, nvmlDeviceGetTemperature)
SAME(nvmlDeviceGetNvLinkRemoteDeviceType, nvmlDeviceGetTemperature)
SAME(nvmlDeviceGetNvLinkRemotePciInfo_v2, nvmlDeviceGetTemperature)
SAME(nvmlDeviceGetMigMode, nvmlDeviceGetTemperature)
