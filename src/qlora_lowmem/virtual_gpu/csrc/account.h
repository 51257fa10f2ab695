// The account: one file, mapped by every process on the virtual machine, that says which cards there are and how many
// of their bytes are in use. The launcher (account.py mirrors this layout) creates it, and reads the peaks from it
// even when a process was killed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vgpu {

constexpr int kMaxDevices = 16;
constexpr int kMaxProcesses = 256;
constexpr int kMaxMissing = 256;
constexpr int kNameBytes = 96;
constexpr uint32_t kLayoutVersion = 4;
constexpr uint64_t kGranularity = 2u << 20;  // cudaMalloc and cuMemCreate hand out whole 2 MiB pages

// What a program submits to a card. Each costs the host time, whatever its size.
enum Launch { kKernel, kCopy, kFill };
constexpr int kLaunchKinds = 3;

struct Use {
  uint64_t bytes;
  uint64_t peak;  // the most there ever was
};

struct Device {
  char name[kNameBytes];
  uint8_t uuid[16];
  uint64_t total_bytes;
  uint64_t context_bytes;
  Use used;  // of all living processes, their contexts included: what NVML shows
  uint32_t compute_major;
  uint32_t compute_minor;
  uint32_t sm_count;
  uint32_t threads_per_sm;
  uint32_t blocks_per_sm;
  uint32_t shared_per_block;
  uint32_t shared_per_block_optin;
  uint32_t shared_per_sm;
  uint32_t registers_per_sm;
  uint32_t l2_bytes;
  uint32_t bus_width_bits;
  uint32_t clock_khz;
  uint32_t memory_clock_khz;
  uint8_t padding[4];
  // Of all processes together, the peaks those since begin_together: what their tensors take, and the segments of
  // their caching allocators.
  Use allocated;
  Use reserved_segments;
  uint64_t used_peak;
  uint64_t allocated_by_first;  // of the allocated peak: what the process had that called begin_together
  uint8_t reserved[8];
};
static_assert(sizeof(Device) == 256, "account.py reads this layout");

struct Process {
  int32_t pid;  // 0: a free row
  uint32_t contexts;  // bit d: this process has a context on device d
  uint64_t start_ticks;  // with the pid, tells a process from a later one of the same number
  uint64_t host_bytes[2];  // pinned, managed
  uint64_t device_bytes[kMaxDevices];  // without contexts
  uint64_t allocated[kMaxDevices];  // of these, as its caching allocator counts
  uint64_t reserved_segments[kMaxDevices];
  uint64_t image;  // tells a process from what it was before it called exec
  uint64_t launches[kLaunchKinds];
};
static_assert(sizeof(Process) == 448, "account.py reads this layout");

struct Account {
  char magic[8];  // "VGPUACC\0"
  uint32_t layout_version;
  uint32_t device_count;
  uint32_t missing_count;
  uint32_t notices;  // bits of Notice that were told
  Use host[2];  // pinned, managed
  uint32_t process_count;  // rows in use, also of processes that have ended since
  int32_t first;  // the process that called begin_together
  uint32_t others;  // how many others have had a context since
  uint64_t launches[kLaunchKinds];  // of processes that have ended
  uint8_t reserved[32];
  Device devices[kMaxDevices];
  Process processes[kMaxProcesses];
  char missing[kMaxMissing][kNameBytes];
};
static_assert(offsetof(Account, devices) == 128, "account.py reads this layout");

#define VGPU_SHARED __attribute__((visibility("default")))

// What a user should know of a run, each told once (account.py has the names that the report gives them).
enum Notice : uint32_t {
  kNcclBuffers = 1,
  kDnnWorkspaces = 2,
  kSolverWorkspaces = 4,
  kSparseWorkspaces = 8,
  kFftWorkspaces = 16,
  kNoHooks = 32,
  kStaticRuntime = 64,
  kValuesRead = 128,
  kReached = 256,  // not told: a process has asked for a card
  kInForce = 512,  // not told: a process has these libraries
};

// The account of this process, mapped at the first call. nullptr: there is none (VGPU_ACCOUNT is not set or names no
// account), which the caller reports as "no device".
VGPU_SHARED const Account* account();

// The number of devices that CUDA_VISIBLE_DEVICES leaves; 0 without an account. Devices are numbered among these
// everywhere but in `machine`.
VGPU_SHARED int device_count();

// Row of a device; the caller has checked the ordinal.
VGPU_SHARED const Device& device_row(int device);

// True in a child that was forked after its parent had made a context: CUDA does not work there.
VGPU_SHARED bool forked_after_use();

// Gives the process a context on the device. False: it does not fit.
VGPU_SHARED bool ensure_context(int device);
VGPU_SHARED bool has_context(int device);

// Books bytes on a device. False: the card is full, and nothing is booked.
VGPU_SHARED bool take(int device, uint64_t bytes);
VGPU_SHARED void give(int device, uint64_t bytes);
VGPU_SHARED uint64_t free_bytes(int device);

// What PyTorch's caching allocator of this process counts now. Called for every tensor that comes or goes.
VGPU_SHARED void count_torch(int device, uint64_t allocated, uint64_t reserved_segments);

// Counts one of what this process submits; without a context, where nothing can be submitted, nothing. No lock is taken.
VGPU_SHARED void count_launch(Launch kind);

// How many there were of each kind: of this process, or of all that are and were on the machine.
VGPU_SHARED void read_launches(bool of_all, uint64_t* counts);
// A tuner begins (1) or ends (-1): what it launches meanwhile is not counted, for how often depends on time.
VGPU_SHARED void tune(int more);

// Starts the peaks of all processes together afresh, from what they hold now.
VGPU_SHARED void begin_together();

// Host memory that CUDA knows: managed, or pinned.
VGPU_SHARED void take_host(bool managed, uint64_t bytes);
VGPU_SHARED void give_host(bool managed, uint64_t bytes);

// Which of the machine's devices it is.
VGPU_SHARED int machine_index(int device);

// Says once that the program called a function that is not implemented, and keeps its name for the report.
VGPU_SHARED void note_missing(const char* name, const char* why);

// Says once that a library asks for the card through a CUDA runtime of its own.
VGPU_SHARED void note_linked_runtime(const char* library);

// Both true the first time on this machine.
bool first_notice(uint32_t notice);
bool first_call_of_missing(const char* name);

// Says once if this process uses PyTorch without the hooks in Python.
void tell_if_without_hooks();

// Of what cannot be rounded up in 64 bits the largest multiple, which no machine has.
VGPU_SHARED uint64_t round_up(uint64_t bytes, uint64_t granularity);

// All devices of the machine, as NVML numbers them: CUDA_VISIBLE_DEVICES hides nothing from it.
namespace machine {
VGPU_SHARED int device_count();
VGPU_SHARED const Device& device_row(int device);
VGPU_SHARED uint64_t used_bytes(int device);
// Processes with a context on the device, at most kMaxProcesses: pids and bytes (context included). Returns how many.
VGPU_SHARED int processes_on(int device, int32_t* pids, uint64_t* bytes);
}  // namespace machine

}  // namespace vgpu
