// libcudart: kernels. None is loaded and none runs; what libraries ask about them is answered.
#include <algorithm>
#include <cstring>
#include <vector>

#include "guard.h"
#include "runtime.h"

using namespace vgpu;

namespace {

// CUB refuses to launch a kernel whose PTX version is not one that the file was compiled for, so the answer must come
// from the file: the header of a fat binary lists the architectures in it.
struct FatBinaryWrapper {
  int magic;  // 0x466243b1
  int version;
  const unsigned char* data;
  void* file_name;
};
constexpr int kWrapperMagic = 0x466243b1;
constexpr uint32_t kFatBinaryMagic = 0xba55ed50;
constexpr int kArchitectureOffset = 28;  // in an entry's header

struct Kernel {
  const void* host_function;
  void** module;
};

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
auto& kernels = *new std::vector<Kernel>;  // leaked on purpose
bool sorted = false;

template <typename T>
T read_at(const unsigned char* address) {
  T value;
  memcpy(&value, address, sizeof value);
  return value;
}

// The highest architecture in the fat binary that runs on compute capability `card` (89 for 8.9): the same major
// version and not above it. 0: none, or not a fat binary.
int architecture_for(const FatBinaryWrapper* wrapper, int card) {
  if (wrapper == nullptr || wrapper->magic != kWrapperMagic) return 0;
  const unsigned char* header = wrapper->data;
  if (read_at<uint32_t>(header) != kFatBinaryMagic) return 0;
  const unsigned char* entry = header + read_at<uint16_t>(header + 6);
  const unsigned char* end = entry + read_at<uint64_t>(header + 8);
  int best = 0;
  while (entry + kArchitectureOffset + 4 <= end) {
    int architecture = static_cast<int>(read_at<uint32_t>(entry + kArchitectureOffset));
    if (architecture / 10 == card / 10 && architecture <= card) best = std::max(best, architecture);
    entry += read_at<uint32_t>(entry + 4) + read_at<uint64_t>(entry + 8);
  }
  return best;
}

const FatBinaryWrapper* module_of(const void* host_function) {
  Guard<mutex> guard;
  auto before = [](const Kernel& a, const Kernel& b) { return a.host_function < b.host_function; };
  if (!sorted) std::sort(kernels.begin(), kernels.end(), before);
  sorted = true;
  auto it = std::lower_bound(kernels.begin(), kernels.end(), Kernel{host_function, nullptr}, before);
  bool found = it != kernels.end() && it->host_function == host_function;
  return found ? reinterpret_cast<const FatBinaryWrapper*>(it->module) : nullptr;
}

struct CallConfiguration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local CallConfiguration pushed;

}  // namespace

// The handle of a module is its own wrapper: nothing is loaded.
API void** __cudaRegisterFatBinary(void* wrapper) { return static_cast<void**>(wrapper); }
API char __cudaInitModule(void**) { return 1; }

API void __cudaRegisterFunction(void** module, const char* host_function, char*, const char*, int, void*, void*, void*,
                                void*, int*) {
  Guard<mutex> guard;
  kernels.push_back({host_function, module});
  sorted = false;
}

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}

// A kernel's handle is its host function's address, so that attributes find its module.
API_NAMED(get_kernel(void** kernel, const void* host_function), "__cudaGetKernel") {
  return tell(kernel, const_cast<void*>(host_function));
}

API cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  if (cudaError_t error = enter()) return error;
  vgpu_launched();
  return cudaSuccess;
}

API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  if (cudaError_t error = enter()) return error;
  const Device& device = device_row(current_device());
  int card = static_cast<int>(device.compute_major * 10 + device.compute_minor);
  int architecture = architecture_for(module_of(function), card);
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  // Consumer cards of 8.9 run what was compiled for 8.6, as wheels have it, where the file does not say.
  attributes->ptxVersion = architecture != 0 ? architecture : card == 89 ? 86 : card;
  attributes->binaryVersion = attributes->ptxVersion;
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(device.shared_per_block);
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int block_size, size_t,
                                                                       unsigned) {
  if (cudaError_t error = enter()) return error;
  int threads = static_cast<int>(device_row(current_device()).threads_per_sm);
  return tell(blocks, std::max(1, threads / std::max(1, block_size) / 2));
}
API_NAMED(max_active_clusters(int* clusters), "cudaOccupancyMaxActiveClusters") {
  *clusters = 1;
  return enter();
}
API_NAMED(max_cluster_size(int* size), "cudaOccupancyMaxPotentialClusterSize") {
  *size = 8;
  return enter();
}

// Driver functions come from our own libcuda.so.1, which is loaded already: it is preloaded.
extern "C" void* vgpu_driver_function(const char* name);

API_NAMED(entry_point_by_version(const char* name, void** function, unsigned, unsigned long long, int* result),
          "cudaGetDriverEntryPointByVersion") {
  *function = vgpu_driver_function(name);
  if (result != nullptr) *result = *function != nullptr ? 0 : 1;  // cudaDriverEntryPointSymbolNotFound
  return cudaSuccess;
}
API_NAMED(entry_point(const char* name, void** function, unsigned long long flags, int* result),
          "cudaGetDriverEntryPoint") {
  return entry_point_by_version(name, function, 0, flags, result);
}
