#include "account.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "guard.h"
#include "identity.h"

namespace vgpu {
namespace {

// Everything here is plain data that no destructor touches: libraries free device memory while the process exits.
pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
Account* mapped = nullptr;
bool looked = false;
char path[4096];
Process* own = nullptr;  // this process' row, from its first context on
int visible[kMaxDevices];  // devices of the machine, in the order that this process numbers them
int visible_count = 0;
bool context_in_parent = false;
bool torch_counts = false;  // where not, what this process takes from a card counts as tensors

// A forked child has no context, whatever its parent had; which account it uses is looked up afresh.
void after_fork_in_child() {
  context_in_parent = context_in_parent || (own != nullptr && own->contexts != 0);
  own = nullptr;
  mapped = nullptr;
  looked = false;
}

__attribute__((constructor)) void register_fork_handler() { pthread_atfork(nullptr, nullptr, after_fork_in_child); }

// Reads CUDA_VISIBLE_DEVICES as the driver does: a list of numbers that ends at the first that is not a device.
void find_visible_devices() {
  const char* list = getenv("CUDA_VISIBLE_DEVICES");
  int count = static_cast<int>(mapped->device_count);
  visible_count = 0;
  if (list == nullptr) {
    while (visible_count < count) visible[visible_count] = visible_count, ++visible_count;
    return;
  }
  while (visible_count < count) {
    char* end;
    long device = strtol(list, &end, 10);
    if (end == list || device < 0 || device >= count) return;
    visible[visible_count++] = static_cast<int>(device);
    if (*end != ',') return;
    list = end + 1;
  }
}

void map_account() {
  looked = true;
  const char* name = getenv("VGPU_ACCOUNT");
  if (name == nullptr || strlen(name) >= sizeof path) {
    fprintf(stderr, "virtual GPU: VGPU_ACCOUNT is gone from the environment; no device is visible\n");
    return;
  }
  strcpy(path, name);
  int fd = open(path, O_RDWR | O_CLOEXEC);
  struct stat status;
  if (fd < 0 || fstat(fd, &status) != 0 || static_cast<size_t>(status.st_size) < sizeof(Account)) {
    fprintf(stderr, "virtual GPU: %s is not a virtual machine's account; no device is visible\n", path);
    if (fd >= 0) close(fd);
    return;
  }
  void* memory = mmap(nullptr, sizeof(Account), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (memory == MAP_FAILED) return;
  auto* found = static_cast<Account*>(memory);
  if (memcmp(found->magic, "VGPUACC", 8) != 0 || found->layout_version != kLayoutVersion) {
    fprintf(stderr, "virtual GPU: %s was written by another version; no device is visible\n", path);
    munmap(memory, sizeof(Account));
    return;
  }
  mapped = found;
  __atomic_fetch_or(&mapped->notices, kReached, __ATOMIC_RELAXED);
  find_visible_devices();
}

// Holds the account against other threads and other processes. The file lock is taken on a descriptor of its own, which
// the kernel drops when the process dies, and which no program that closes all descriptors can take from us.
class Lock {
 public:
  Lock() {
    if (!looked) map_account();
    if (mapped == nullptr) return;
    fd_ = open(path, O_RDWR | O_CLOEXEC);
    while (fd_ >= 0 && flock(fd_, LOCK_EX) != 0 && errno == EINTR) {
    }
  }
  ~Lock() {
    if (fd_ >= 0) close(fd_);
  }

 private:
  Guard<mutex> guard_;
  int fd_ = -1;
};

void grow(Use& use, uint64_t bytes) {
  use.bytes += bytes;
  if (use.bytes > use.peak) use.peak = use.bytes;
}

bool is_loaded(const char* library) {
  void* found = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return found != nullptr && dlclose(found) == 0;
}

void hold(Device& row, uint64_t bytes) {
  grow(row.used, bytes);
  row.used_peak = std::max(row.used_peak, row.used.bytes);
}

// A process' figure and the sum of all change without the lock: PyTorch's allocator calls it for every tensor.
// Returns the sum.
uint64_t move(uint64_t& figure, Use& sum, uint64_t now) {
  uint64_t change = now - figure;
  figure = now;
  return __atomic_add_fetch(&sum.bytes, change, __ATOMIC_RELAXED);
}

// Takes a process' bytes off the account: it ended, or is ending.
void clear_process(Process& process) {
  for (int d = 0; d < kMaxDevices; ++d) {
    uint64_t bytes = process.device_bytes[d];
    if (process.contexts >> d & 1) bytes += mapped->devices[d].context_bytes;
    mapped->devices[d].used.bytes -= bytes;
    move(process.allocated[d], mapped->devices[d].allocated, 0);
    move(process.reserved_segments[d], mapped->devices[d].reserved_segments, 0);
  }
  for (int kind = 0; kind < 2; ++kind) mapped->host[kind].bytes -= process.host_bytes[kind];
  for (int kind = 0; kind < kLaunchKinds; ++kind) mapped->launches[kind] += process.launches[kind];
  memset(&process, 0, sizeof process);
  --mapped->process_count;
}

// Most processes end without freeing anything. A zombie has no memory either, but still answers kill(pid, 0).
void clear_dead_processes() {
  for (Process& process : mapped->processes) {
    if (process.pid == 0 || &process == own) continue;
    ProcessIdentity identity = identify(process.pid);
    bool gone = identity.state == 'X' || identity.state == 'Z' || identity.start_ticks != process.start_ticks;
    gone = gone || (identity.image != 0 && identity.image != process.image);
    if (gone) clear_process(process);
  }
}

Process* own_row() {
  if (own != nullptr) return own;
  clear_dead_processes();
  for (Process& process : mapped->processes) {
    if (process.pid == getpid()) clear_process(process);  // what this process held before it called exec
    if (process.pid == 0 && own == nullptr) own = &process;
  }
  if (own == nullptr) {
    fprintf(stderr, "virtual GPU: more than %d processes use this machine at once\n", kMaxProcesses);
    return nullptr;
  }
  ProcessIdentity identity = identify(getpid());
  own->pid = getpid();
  own->start_ticks = identity.start_ticks;
  own->image = identity.image;
  ++mapped->process_count;
  return own;
}

Process* first_process() {
  if (own != nullptr && own->pid == mapped->first) return own;
  for (Process& process : mapped->processes) {
    if (process.pid != 0 && process.pid == mapped->first) return &process;
  }
  return nullptr;
}

// Called under the lock, or in the only process that there is.
void note_peaks(int device, uint64_t allocated, uint64_t reserved_segments) {
  Device& row = mapped->devices[device];
  row.reserved_segments.peak = std::max(row.reserved_segments.peak, reserved_segments);
  if (allocated <= row.allocated.peak) return;
  row.allocated.peak = allocated;
  Process* first = first_process();
  row.allocated_by_first = first == nullptr ? 0 : first->allocated[device];
}

// What this process' allocator holds of a device.
void hold_tensors(int device, uint64_t allocated, uint64_t reserved_segments, bool locked) {
  Device& row = mapped->devices[device];
  allocated = move(own->allocated[device], row.allocated, allocated);
  reserved_segments = move(own->reserved_segments[device], row.reserved_segments, reserved_segments);
  if (allocated <= row.allocated.peak && reserved_segments <= row.reserved_segments.peak) return;
  if (mapped->process_count == 1 || locked) return note_peaks(device, allocated, reserved_segments);
  Lock lock;
  clear_dead_processes();  // what they held is no part of the sum
  note_peaks(device, row.allocated.bytes, row.reserved_segments.bytes);
}

bool take_context(int device) {
  Process* process = own_row();
  if (process == nullptr) return false;
  if (process->contexts >> device & 1) return true;
  clear_dead_processes();
  Device& row = mapped->devices[device];
  if (row.used.bytes + row.context_bytes > row.total_bytes) return false;
  if (process->contexts == 0 && process->pid != mapped->first) ++mapped->others;
  process->contexts |= 1u << device;
  hold(row, row.context_bytes);
  return true;
}

__attribute__((destructor)) void leave() {
  if (!looked) {  // it asked for no card, and is not to seem to
    looked = true;
    return;
  }
  Lock lock;
  if (mapped != nullptr && own != nullptr && own->pid == getpid()) clear_process(*own);
  own = nullptr;
  mapped = nullptr;  // looked stays true: what is freed after this point is no longer booked
}

}  // namespace

bool first_notice(uint32_t notice) {
  if (account() == nullptr) return false;
  return (__atomic_fetch_or(&mapped->notices, notice, __ATOMIC_RELAXED) & notice) == 0;
}

uint64_t round_up(uint64_t bytes, uint64_t granularity) {
  if (bytes > UINT64_MAX - granularity) return UINT64_MAX / granularity * granularity;
  return (bytes + granularity - 1) / granularity * granularity;
}

const Account* account() {
  if (mapped == nullptr && !looked) Lock lock;
  return mapped;
}

int device_count() { return account() == nullptr ? 0 : visible_count; }

const Device& device_row(int device) { return account()->devices[visible[device]]; }

int machine_index(int device) { return visible[device]; }

bool forked_after_use() { return context_in_parent; }

bool has_context(int device) { return own != nullptr && (own->contexts >> visible[device] & 1); }

bool ensure_context(int device) {
  if (has_context(device)) return true;
  tell_if_without_hooks();
  torch_counts = torch_counts || is_loaded("libc10.so");
  Lock lock;
  return mapped != nullptr && take_context(visible[device]);
}

bool take(int device, uint64_t bytes) {
  Lock lock;
  if (mapped == nullptr) return false;
  device = visible[device];
  if (!take_context(device)) return false;
  clear_dead_processes();
  Device& row = mapped->devices[device];
  if (bytes > row.total_bytes - row.used.bytes) return false;  // the sum may not fit 64 bits
  own->device_bytes[device] += bytes;
  hold(row, bytes);
  if (!torch_counts) hold_tensors(device, own->device_bytes[device], own->device_bytes[device], true);
  return true;
}

void give(int device, uint64_t bytes) {
  Lock lock;
  device = visible[device];
  if (mapped == nullptr || own == nullptr || own->device_bytes[device] < bytes) return;
  uint64_t left = own->device_bytes[device] -= bytes;
  mapped->devices[device].used.bytes -= bytes;
  // PyTorch does not tell of segments that it gives back.
  uint64_t segments = std::min(left, own->reserved_segments[device]);
  hold_tensors(device, torch_counts ? own->allocated[device] : left, segments, true);
}

void count_torch(int device, uint64_t allocated, uint64_t reserved_segments) {
  if (mapped == nullptr || own == nullptr || device < 0 || device >= visible_count) return;
  hold_tensors(visible[device], allocated, reserved_segments, false);
}

namespace {
int tuning = 0;  // tuners at work in this process, one in the other
}

void count_launch(Launch kind) {
  if (own != nullptr && __atomic_load_n(&tuning, __ATOMIC_RELAXED) == 0) __atomic_fetch_add(&own->launches[kind], 1, __ATOMIC_RELAXED);
}

void tune(int more) { __atomic_fetch_add(&tuning, more, __ATOMIC_RELAXED); }

void read_launches(bool of_all, uint64_t* counts) {
  memset(counts, 0, sizeof(uint64_t) * kLaunchKinds);
  auto add = [&](const uint64_t* launches) {
    for (int kind = 0; kind < kLaunchKinds; ++kind) counts[kind] += __atomic_load_n(&launches[kind], __ATOMIC_RELAXED);
  };
  if (!of_all) {
    if (own != nullptr) add(own->launches);
    return;
  }
  Lock lock;
  if (mapped == nullptr) return;
  add(mapped->launches);
  for (const Process& process : mapped->processes) add(process.launches);
}

void begin_together() {
  Lock lock;
  if (mapped == nullptr) return;
  clear_dead_processes();
  mapped->first = getpid();
  mapped->others = 0;
  for (const Process& process : mapped->processes) mapped->others += process.contexts != 0 && process.pid != getpid();
  for (uint32_t d = 0; d < mapped->device_count; ++d) {
    Device& row = mapped->devices[d];
    row.used_peak = row.used.bytes;
    row.allocated.peak = row.reserved_segments.peak = 0;
    note_peaks(d, row.allocated.bytes, row.reserved_segments.bytes);
  }
}

uint64_t free_bytes(int device) {
  return device_row(device).total_bytes - machine::used_bytes(machine_index(device));
}

void take_host(bool managed, uint64_t bytes) {
  Lock lock;
  if (mapped == nullptr || own_row() == nullptr) return;
  own->host_bytes[managed] += bytes;
  grow(mapped->host[managed], bytes);
}

void give_host(bool managed, uint64_t bytes) {
  Lock lock;
  if (mapped == nullptr || own == nullptr || own->host_bytes[managed] < bytes) return;
  own->host_bytes[managed] -= bytes;
  mapped->host[managed].bytes -= bytes;
}

bool first_call_of_missing(const char* name) {
  Lock lock;
  if (mapped == nullptr) return true;
  for (uint32_t i = 0; i < mapped->missing_count; ++i) {
    if (strncmp(mapped->missing[i], name, kNameBytes - 1) == 0) return false;
  }
  if (mapped->missing_count < kMaxMissing) {
    strncpy(mapped->missing[mapped->missing_count++], name, kNameBytes - 1);
  }
  return true;
}

namespace machine {

int device_count() { return account() == nullptr ? 0 : static_cast<int>(mapped->device_count); }

const Device& device_row(int device) { return account()->devices[device]; }

uint64_t used_bytes(int device) {
  Lock lock;
  if (mapped == nullptr) return 0;
  clear_dead_processes();
  return mapped->devices[device].used.bytes;
}

int processes_on(int device, int32_t* pids, uint64_t* bytes) {
  Lock lock;
  if (mapped == nullptr) return 0;
  clear_dead_processes();
  int found = 0;
  for (const Process& process : mapped->processes) {
    if (process.pid == 0 || !(process.contexts >> device & 1)) continue;
    pids[found] = process.pid;
    bytes[found++] = process.device_bytes[device] + mapped->devices[device].context_bytes;
  }
  return found;
}

}  // namespace machine

}  // namespace vgpu
