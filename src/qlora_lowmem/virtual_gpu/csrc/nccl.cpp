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

#include "account.h"
#include "exchanged.h"

#define API extern "C" __attribute__((visibility("default")))

// What is defined here under NCCL's name is also what its profiling name does.
#define NCCL_FUNCTION(name, parameters) \
  API int p##name parameters __attribute__((alias(#name))); \
  API int name parameters

extern "C" int vgpu_notice(uint32_t notice);
extern "C" int cudaGetDevice(int*) __attribute__((weak));
extern "C" int cudaMalloc(void**, size_t) __attribute__((weak));
extern "C" int cudaFree(void*) __attribute__((weak));

namespace {

constexpr int kSuccess = 0, kCudaError = 1, kInvalidArgument = 4;
constexpr int kFirstOwnOperation = 5;  // ncclNumOps

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
  *communicator = made;
  return kSuccess;
}

uint64_t element_bytes(int type) {
  static const uint8_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // ncclDataType_t, int8 to float8e5m2
  return type >= 0 && type < static_cast<int>(sizeof sizes) ? sizes[type] : 0;
}

}  // namespace

NCCL_FUNCTION(ncclGetUniqueId, (UniqueId * id)) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  static uint32_t number = 0;
  uint64_t parts[] = {static_cast<uint64_t>(getpid()), static_cast<uint64_t>(now.tv_sec) * 1000000000 + now.tv_nsec,
                      __atomic_add_fetch(&number, 1, __ATOMIC_RELAXED)};
  memset(id, 0, sizeof *id);
  memcpy(id->internal, parts, sizeof parts);
  return kSuccess;
}
NCCL_FUNCTION(ncclCommGetUniqueId, (Communicator*, UniqueId* id)) { return ncclGetUniqueId(id); }

NCCL_FUNCTION(ncclCommInitRankConfig, (Communicator** made, int ranks, UniqueId, int rank, void*)) {
  return make(made, ranks, rank);
}
NCCL_FUNCTION(ncclCommInitRank, (Communicator** made, int ranks, UniqueId, int rank)) { return make(made, ranks, rank); }
NCCL_FUNCTION(ncclCommInitRankScalable, (Communicator** made, int ranks, int rank, int, UniqueId*, void*)) {
  return make(made, ranks, rank);
}
NCCL_FUNCTION(ncclCommInitAll, (Communicator** made, int count, const int* devices)) {
  for (int rank = 0; rank < count; ++rank) {
    if (int error = make(&made[rank], count, rank)) return error;
    made[rank]->device = devices != nullptr ? devices[rank] : rank;
  }
  return kSuccess;
}
// The members of the new communicator are not known in this process: it counts as many as its parent.
NCCL_FUNCTION(ncclCommSplit, (Communicator * from, int color, int key, Communicator** made, void*)) {
  *made = nullptr;
  return color < 0 ? kSuccess : make(made, from->ranks, key >= 0 && key < from->ranks ? key : from->rank);
}
NCCL_FUNCTION(ncclCommShrink, (Communicator * from, int*, int excluded, Communicator** made, void*, int)) {
  int ranks = from->ranks - excluded;
  return make(made, ranks, from->rank < ranks ? from->rank : ranks - 1);
}

NCCL_FUNCTION(ncclCommFinalize, (Communicator*)) { return kSuccess; }
NCCL_FUNCTION(ncclCommDestroy, (Communicator * communicator)) {
  free(communicator);
  return kSuccess;
}
NCCL_FUNCTION(ncclCommAbort, (Communicator * communicator)) { return ncclCommDestroy(communicator); }
NCCL_FUNCTION(ncclCommGetAsyncError, (Communicator*, int* error)) {
  *error = kSuccess;
  return kSuccess;
}
NCCL_FUNCTION(ncclCommCount, (const Communicator* communicator, int* count)) {
  *count = communicator->ranks;
  return kSuccess;
}
NCCL_FUNCTION(ncclCommUserRank, (const Communicator* communicator, int* rank)) {
  *rank = communicator->rank;
  return kSuccess;
}
NCCL_FUNCTION(ncclCommCuDevice, (const Communicator* communicator, int* device)) {
  *device = communicator->device;
  return kSuccess;
}
NCCL_FUNCTION(ncclCommMemStats, (Communicator*, int, uint64_t* value)) {
  *value = 0;  // of NCCL's own memory, none is known
  return kSuccess;
}

NCCL_FUNCTION(ncclMemAlloc, (void** address, size_t bytes)) {
  return cudaMalloc != nullptr && cudaMalloc(address, bytes) == 0 ? kSuccess : kCudaError;
}
NCCL_FUNCTION(ncclMemFree, (void* address)) {
  return cudaFree != nullptr && cudaFree(address) == 0 ? kSuccess : kCudaError;
}
NCCL_FUNCTION(ncclCommRegister, (const Communicator*, void* buffer, size_t, void** handle)) {
  *handle = buffer;
  return kSuccess;
}
NCCL_FUNCTION(ncclCommDeregister, (const Communicator*, void*)) { return kSuccess; }
NCCL_FUNCTION(ncclCommWindowRegister, (Communicator*, void* buffer, size_t, void** window, int)) {
  *window = buffer;
  return kSuccess;
}
NCCL_FUNCTION(ncclCommWindowDeregister, (Communicator*, void*)) { return kSuccess; }
NCCL_FUNCTION(ncclWinGetUserPtr, (Communicator*, void* window, void** buffer)) {
  *buffer = window;
  return kSuccess;
}

NCCL_FUNCTION(ncclRedOpCreatePreMulSum, (int* operation, void*, int, int, Communicator*)) {
  *operation = kFirstOwnOperation;
  return kSuccess;
}
NCCL_FUNCTION(ncclRedOpDestroy, (int, Communicator*)) { return kSuccess; }

// Every rank is taken to have sent what this one did (exchanged.h).
NCCL_FUNCTION(ncclBroadcast, (const void* from, void* to, size_t count, int type, int, Communicator*, void*)) {
  vgpu::note_exchanged(to, from, count * element_bytes(type));
  return kSuccess;
}
NCCL_FUNCTION(ncclBcast, (void* buffer, size_t count, int type, int root, Communicator* communicator, void* stream)) {
  return ncclBroadcast(buffer, buffer, count, type, root, communicator, stream);
}
NCCL_FUNCTION(ncclAllGather, (const void* from, void* to, size_t count, int type, Communicator* communicator, void*)) {
  uint64_t bytes = count * element_bytes(type);
  for (int rank = 0; rank < communicator->ranks; ++rank) {
    vgpu::note_exchanged(static_cast<char*>(to) + rank * bytes, from, bytes);
  }
  return kSuccess;
}

// What these deliver is computed from several ranks, or another's.
#define NCCL_COMPUTES(name) \
  NCCL_FUNCTION(name, ()) { \
    vgpu::forget_written(); \
    return kSuccess; \
  }
NCCL_COMPUTES(ncclAllReduce)
NCCL_COMPUTES(ncclReduce)
NCCL_COMPUTES(ncclReduceScatter)
NCCL_COMPUTES(ncclAlltoAll)
NCCL_COMPUTES(ncclGather)
NCCL_COMPUTES(ncclScatter)
NCCL_COMPUTES(ncclRecv)
NCCL_FUNCTION(ncclSend, ()) { return kSuccess; }
NCCL_FUNCTION(ncclGroupStart, ()) { return kSuccess; }
NCCL_FUNCTION(ncclGroupEnd, ()) { return kSuccess; }
