// Addresses: which belong to a device, which to host memory that CUDA knows, and what a copy between them does.
#pragma once

#include "account.h"

namespace vgpu {

enum class Kind { kUnknown, kDevice, kMapped, kPinned, kRegistered, kManaged };

inline uint64_t number(const void* address) { return reinterpret_cast<uint64_t>(address); }
inline void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

// The allocation that an address lies in.
struct Place {
  Kind kind;  // kUnknown: an ordinary host address, or a device's with no memory behind it
  int device;
  uint64_t base;
  uint64_t bytes;

  bool on_device() const { return kind == Kind::kDevice || kind == Kind::kMapped; }
};
VGPU_SHARED Place place_of(const void* address);
VGPU_SHARED bool is_device_address(const void* address);

// Device memory of at least `bytes`, booked on the account; nullptr: the card is full.
VGPU_SHARED void* allocate_device(int device, uint64_t bytes);
// False, as of all that free: no such allocation starts there.
VGPU_SHARED bool free_device(void* address);

// Device addresses without memory behind them (cuMemAddressReserve). nullptr: no room.
VGPU_SHARED void* reserve_addresses(uint64_t bytes, uint64_t alignment);
VGPU_SHARED bool release_addresses(void* address);
// Says which device's memory is mapped at reserved addresses (cuMemMap), or -1 for none.
VGPU_SHARED void map_addresses(void* address, uint64_t bytes, int device);

VGPU_SHARED void* allocate_host(Kind kind, uint64_t bytes, int device);
VGPU_SHARED bool free_host(void* base);
// Whether all of these are addresses of host memory.
VGPU_SHARED bool is_mapped(void* base, uint64_t bytes);
VGPU_SHARED bool register_host(void* base, uint64_t bytes, int device);
VGPU_SHARED bool unregister_host(void* base);

// What a copy does to host memory: host to host is real, device to host writes zeros (but see written.h).
VGPU_SHARED void copy(void* target, const void* source, uint64_t bytes);
VGPU_SHARED void fill(void* target, int value, uint64_t bytes);

}  // namespace vgpu
