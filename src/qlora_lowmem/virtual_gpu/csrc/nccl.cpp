// libnccl: communicators and collectives between the cards of a virtual machine, one process a card.
//
// A collective moves nothing and waits for nobody: it has no effect on PyTorch's memory, whose buffers PyTorch allocates
// itself. NCCL's own buffers (channels, connections, NVLS) are not among those: they come straight from the driver,
// depend on the machine's links and topology, are not known here, and are not in any peak.
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "stubs.h"
#include "written.h"

using vgpu::tell;

extern "C" int cudaGetDevice(int*) __attribute__((weak));
extern "C" int cudaMalloc(void**, size_t) __attribute__((weak));
extern "C" int cudaFree(void*) __attribute__((weak));

namespace {

constexpr int kSuccess = 0, kCudaError = 1, kInvalidArgument = 4;

struct UniqueId {
  char internal[128];
};

struct Communicator {
  int ranks;
  int rank;
  int device;
};

int make(Communicator** communicator, int ranks, int rank) {
  if (communicator == nullptr || ranks < 1 || rank < 0 || rank >= ranks) return kInvalidArgument;
  int device = 0;
  if (cudaGetDevice != nullptr) cudaGetDevice(&device);
  vgpu_notice(vgpu::kNcclBuffers);
  auto* made = static_cast<Communicator*>(malloc(sizeof(Communicator)));
  *made = {ranks, rank, device};
  return tell(communicator, made);
}

uint64_t element_bytes(int type) {
  static const uint8_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // ncclDataType_t, int8 to float8e5m2
  return type >= 0 && type < static_cast<int>(sizeof sizes) ? sizes[type] : 0;
}

}  // namespace

API int ncclGetUniqueId(UniqueId* id) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  static uint32_t number = 0;
  uint64_t parts[] = {static_cast<uint64_t>(getpid()), static_cast<uint64_t>(now.tv_sec) * 1000000000 + now.tv_nsec,
                      __atomic_add_fetch(&number, 1, __ATOMIC_RELAXED)};
  memset(id, 0, sizeof *id);
  memcpy(id->internal, parts, sizeof parts);
  return kSuccess;
}
API int ncclCommGetUniqueId(Communicator*, UniqueId* id) { return ncclGetUniqueId(id); }

API int ncclCommInitRank(Communicator** made, int ranks, UniqueId, int rank) { return make(made, ranks, rank); }
API int ncclCommInitRankScalable(Communicator** made, int ranks, int rank, int, UniqueId*, void*) {
  return make(made, ranks, rank);
}
API int ncclCommInitAll(Communicator** made, int count, const int* devices) {
  for (int rank = 0; rank < count; ++rank) {
    if (int error = make(&made[rank], count, rank)) return error;
    made[rank]->device = devices != nullptr ? devices[rank] : rank;
  }
  return kSuccess;
}
// The members of the new communicator are not known in this process: it counts as many as its parent.
API int ncclCommSplit(Communicator* from, int color, int key, Communicator** made, void*) {
  *made = nullptr;
  return color < 0 ? kSuccess : make(made, from->ranks, key >= 0 && key < from->ranks ? key : from->rank);
}
API int ncclCommShrink(Communicator* from, int*, int excluded, Communicator** made, void*, int) {
  int ranks = from->ranks - excluded;
  return make(made, ranks, from->rank < ranks ? from->rank : ranks - 1);
}

API int ncclCommCount(const Communicator* communicator, int* count) { return tell(count, communicator->ranks); }
API int ncclCommUserRank(const Communicator* communicator, int* rank) { return tell(rank, communicator->rank); }
API int ncclCommCuDevice(const Communicator* communicator, int* device) { return tell(device, communicator->device); }

API int ncclMemAlloc(void** address, size_t bytes) {
  return cudaMalloc != nullptr && cudaMalloc(address, bytes) == 0 ? kSuccess : kCudaError;
}
API int ncclMemFree(void* address) { return cudaFree != nullptr && cudaFree(address) == 0 ? kSuccess : kCudaError; }
API int ncclCommRegister(const Communicator*, void* buffer, size_t, void** handle) { return tell(handle, buffer); }
API int ncclCommWindowRegister(Communicator*, void* buffer, size_t, void** window, int) { return tell(window, buffer); }
API int ncclWinGetUserPtr(Communicator*, void* window, void** buffer) { return tell(buffer, window); }

// Every rank is taken to have sent what this one did (written.h).
API int ncclBroadcast(const void* from, void* to, size_t count, int type, int, Communicator*, void*) {
  vgpu::count_launch(vgpu::kKernel);
  vgpu::note_copied(to, from, count * element_bytes(type));
  return kSuccess;
}
API int ncclBcast(void* buffer, size_t count, int type, int root, Communicator* communicator, void* stream) {
  return ncclBroadcast(buffer, buffer, count, type, root, communicator, stream);
}
API int ncclAllGather(const void* from, void* to, size_t count, int type, Communicator* communicator, void*) {
  uint64_t bytes = count * element_bytes(type);
  vgpu::count_launch(vgpu::kKernel);
  for (int rank = 0; rank < communicator->ranks; ++rank) {
    vgpu::note_copied(static_cast<char*>(to) + rank * bytes, from, bytes);
  }
  return kSuccess;
}
