// Addresses: which belong to a device, which to host memory that CUDA knows, and what a copy between them does.
#pragma once

#include "account.h"

namespace vgpu {

// Device memory of at least `bytes`, booked on the account; nullptr: the card is full.
VGPU_SHARED void* allocate_device(int device, uint64_t bytes);
// False: no allocation starts there.
VGPU_SHARED bool free_device(void* address);

// Device addresses without memory behind them (cuMemAddressReserve). nullptr: no room.
VGPU_SHARED void* reserve_addresses(uint64_t bytes, uint64_t alignment);
VGPU_SHARED bool release_addresses(void* address);
// Says which device's memory is mapped at reserved addresses (cuMemMap), or -1 for none.
VGPU_SHARED void map_addresses(void* address, uint64_t bytes, int device);

struct Block {
  void* base;
  uint64_t bytes;
  int device;  // -1: none mapped there
};
// The device allocation or reservation that an address lies in. False: it is a host address.
VGPU_SHARED bool find_device_block(const void* address, Block* block);
VGPU_SHARED bool is_device_address(const void* address);

enum class HostOrigin { kPinned, kManaged, kRegistered };
struct HostBlock {
  void* base;
  uint64_t bytes;
  HostOrigin origin;
  int device;
};
VGPU_SHARED void* allocate_host(HostOrigin origin, uint64_t bytes, int device);
VGPU_SHARED bool register_host(void* base, uint64_t bytes, int device);
VGPU_SHARED bool unregister_host(void* base);
VGPU_SHARED bool free_host(void* base);
VGPU_SHARED bool find_host_block(const void* address, HostBlock* block);

// What a copy does to host memory: host to host is real, device to host writes zeros (but see exchanged.h).
VGPU_SHARED void copy(void* target, const void* source, uint64_t bytes);
VGPU_SHARED void fill(void* target, int value, uint64_t bytes);

}  // namespace vgpu
