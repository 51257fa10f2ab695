#include "attributes.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdio>
#include <cstring>

namespace vgpu {
namespace {

// A figure, where cudaDeviceProp has it, and what it is on a card.
struct Attribute {
  int number;
  size_t offset, bytes;  // 0 bytes: no field
  int (*value)(const Device& card, int device);
};

#define FIELD(name) offsetof(cudaDeviceProp, name), sizeof(cudaDeviceProp::name)
#define ELEMENT(name, index) offsetof(cudaDeviceProp, name) + index * sizeof(int), sizeof(int)
#define NO_FIELD 0, 0
#if CUDART_VERSION < 13000
#define FIELD_UNTIL_12(name) FIELD(name)
#else
#define FIELD_UNTIL_12(name) NO_FIELD
#endif
#define ATTRIBUTE(name, field, value) \
  {CU_DEVICE_ATTRIBUTE_##name, field, \
   []([[maybe_unused]] const Device& card, [[maybe_unused]] int device) { return static_cast<int>(value); }}

// What is not in the table is 0. What is refused is also not announced: multicast, memory pools, peer access, fabric
// handles, GPUDirect.
constexpr Attribute kAttributes[] = {
    ATTRIBUTE(COMPUTE_CAPABILITY_MAJOR, FIELD(major), card.compute_major),
    ATTRIBUTE(COMPUTE_CAPABILITY_MINOR, FIELD(minor), card.compute_minor),
    ATTRIBUTE(MULTIPROCESSOR_COUNT, FIELD(multiProcessorCount), card.sm_count),
    ATTRIBUTE(MAX_SHARED_MEMORY_PER_BLOCK, FIELD(sharedMemPerBlock), card.shared_per_block),
    ATTRIBUTE(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, FIELD(sharedMemPerBlockOptin), card.shared_per_block_optin),
    ATTRIBUTE(MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, FIELD(sharedMemPerMultiprocessor), card.shared_per_sm),
    ATTRIBUTE(RESERVED_SHARED_MEMORY_PER_BLOCK, FIELD(reservedSharedMemPerBlock), card.compute_major >= 8 ? 1024 : 0),
    ATTRIBUTE(MAX_REGISTERS_PER_MULTIPROCESSOR, FIELD(regsPerMultiprocessor), card.registers_per_sm),
    ATTRIBUTE(MAX_THREADS_PER_MULTIPROCESSOR, FIELD(maxThreadsPerMultiProcessor), card.threads_per_sm),
    ATTRIBUTE(MAX_BLOCKS_PER_MULTIPROCESSOR, FIELD(maxBlocksPerMultiProcessor), card.blocks_per_sm),
    ATTRIBUTE(L2_CACHE_SIZE, FIELD(l2CacheSize), card.l2_bytes),
    ATTRIBUTE(GLOBAL_MEMORY_BUS_WIDTH, FIELD(memoryBusWidth), card.bus_width_bits),
    ATTRIBUTE(CLOCK_RATE, FIELD_UNTIL_12(clockRate), card.clock_khz),
    ATTRIBUTE(MEMORY_CLOCK_RATE, FIELD_UNTIL_12(memoryClockRate), card.memory_clock_khz),
    ATTRIBUTE(PCI_BUS_ID, FIELD(pciBusID), machine_index(device) + 1),
    // The same on every card of the table (CUDA C++ Programming Guide, table of technical specifications).
    ATTRIBUTE(WARP_SIZE, FIELD(warpSize), 32),
    ATTRIBUTE(MAX_REGISTERS_PER_BLOCK, FIELD(regsPerBlock), 65536),
    ATTRIBUTE(MAX_THREADS_PER_BLOCK, FIELD(maxThreadsPerBlock), 1024),
    ATTRIBUTE(MAX_BLOCK_DIM_X, ELEMENT(maxThreadsDim, 0), 1024),
    ATTRIBUTE(MAX_BLOCK_DIM_Y, ELEMENT(maxThreadsDim, 1), 1024),
    ATTRIBUTE(MAX_BLOCK_DIM_Z, ELEMENT(maxThreadsDim, 2), 64),
    ATTRIBUTE(MAX_GRID_DIM_X, ELEMENT(maxGridSize, 0), 2147483647),
    ATTRIBUTE(MAX_GRID_DIM_Y, ELEMENT(maxGridSize, 1), 65535),
    ATTRIBUTE(MAX_GRID_DIM_Z, ELEMENT(maxGridSize, 2), 65535),
    ATTRIBUTE(TOTAL_CONSTANT_MEMORY, FIELD(totalConstMem), 65536),
    ATTRIBUTE(MAX_PITCH, FIELD(memPitch), 2147483647),
    ATTRIBUTE(TEXTURE_ALIGNMENT, FIELD(textureAlignment), 512),
    ATTRIBUTE(TEXTURE_PITCH_ALIGNMENT, FIELD(texturePitchAlignment), 32),
    ATTRIBUTE(ASYNC_ENGINE_COUNT, FIELD(asyncEngineCount), 2),
    ATTRIBUTE(GPU_OVERLAP, FIELD_UNTIL_12(deviceOverlap), 1),
    ATTRIBUTE(CAN_MAP_HOST_MEMORY, FIELD(canMapHostMemory), 1),
    ATTRIBUTE(CONCURRENT_KERNELS, FIELD(concurrentKernels), 1),
    ATTRIBUTE(UNIFIED_ADDRESSING, FIELD(unifiedAddressing), 1),
    ATTRIBUTE(STREAM_PRIORITIES_SUPPORTED, FIELD(streamPrioritiesSupported), 1),
    ATTRIBUTE(GLOBAL_L1_CACHE_SUPPORTED, FIELD(globalL1CacheSupported), 1),
    ATTRIBUTE(LOCAL_L1_CACHE_SUPPORTED, FIELD(localL1CacheSupported), 1),
    ATTRIBUTE(MANAGED_MEMORY, FIELD(managedMemory), 1),
    ATTRIBUTE(CONCURRENT_MANAGED_ACCESS, FIELD(concurrentManagedAccess), 1),
    ATTRIBUTE(COMPUTE_PREEMPTION_SUPPORTED, FIELD(computePreemptionSupported), 1),
    ATTRIBUTE(COOPERATIVE_LAUNCH, FIELD(cooperativeLaunch), 1),
    ATTRIBUTE(HOST_REGISTER_SUPPORTED, FIELD(hostRegisterSupported), 1),
    ATTRIBUTE(CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, FIELD(canUseHostPointerForRegisteredMem), 1),
    ATTRIBUTE(VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, NO_FIELD, 1),
    ATTRIBUTE(HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, NO_FIELD, 1),
};

}  // namespace

int device_attribute(int number, int device) {
  for (const Attribute& attribute : kAttributes) {
    if (attribute.number == number) return attribute.value(device_row(device), device);
  }
  return 0;
}

void describe_device(cudaDeviceProp* properties, int device) {
  const Device& card = device_row(device);
  memset(properties, 0, sizeof *properties);
  snprintf(properties->name, sizeof properties->name, "%s", card.name);
  memcpy(properties->uuid.bytes, card.uuid, sizeof card.uuid);
  properties->totalGlobalMem = card.total_bytes;
  for (const Attribute& attribute : kAttributes) {
    int64_t value = attribute.value(card, device);  // a field is an int or a size_t
    memcpy(reinterpret_cast<char*>(properties) + attribute.offset, &value, attribute.bytes);
  }
}

void pci_bus_id(int machine_index, char* text, int capacity) {
  snprintf(text, static_cast<size_t>(capacity), "0000:%02X:00.0", machine_index + 1);
}

int machine_index_of_pci_bus_id(const char* text) {
  unsigned domain = 0, bus = 0;
  bool read = sscanf(text, "%x:%x:", &domain, &bus) == 2;
  int device = static_cast<int>(bus) - 1;
  return read && domain == 0 && device >= 0 && device < machine::device_count() ? device : -1;
}

}  // namespace vgpu
