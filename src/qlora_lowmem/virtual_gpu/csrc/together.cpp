// What all processes of the machine use together: PyTorch tells what its caching allocator counts, and the one process
// that measures asks.
#include <dlfcn.h>

#include "stubs.h"

namespace c10 {

struct Device {
  int8_t type;
  int8_t index;
};
constexpr int8_t kCuda = 1;

// The allocator calls this function of libc10.so after every change, under its lock, for a profiler that may be there.
// Preloaded, this one comes first.
VGPU_SHARED void reportMemoryUsageToProfiler(void* block, int64_t bytes, size_t allocated, size_t reserved,
                                             Device device) {
  if (device.type == kCuda) vgpu::count_torch(device.index, allocated, reserved);
  using Report = void (*)(void*, int64_t, size_t, size_t, Device);
  static Report torchs = [] {
    void* library = dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Report>(
        library == nullptr ? nullptr : dlsym(library, "_ZN3c1027reportMemoryUsageToProfilerEPvlmmNS_6DeviceE"));
  }();
  if (torchs != nullptr) torchs(block, bytes, allocated, reserved, device);
}

}  // namespace c10

API void vgpu_begin_together() { vgpu::begin_together(); }

// Since then: peaks of what is allocated, reserved and used on the device; of the first, what the process that began had;
// how many other processes have used a card.
API void vgpu_read_together(int device, uint64_t* numbers) {
  if (device >= vgpu::device_count()) return;
  const vgpu::Device& row = vgpu::device_row(device);
  numbers[0] = row.allocated.peak;
  numbers[1] = row.reserved_segments.peak;
  numbers[2] = row.used_peak;
  numbers[3] = row.allocated_by_first;
  numbers[4] = vgpu::account()->others;
}
