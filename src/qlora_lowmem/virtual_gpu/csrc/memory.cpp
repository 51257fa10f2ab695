#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>

#include "exchanged.h"
#include "guard.h"

namespace vgpu {
namespace {

// Device addresses come from one range that is really reserved, without memory behind it: they never equal a host
// address, are the same in every run, and reading one on the host is a segmentation fault, as on a machine with a card.
constexpr uint64_t kBase = 0x200000000000;
constexpr uint64_t kDeviceArena = 1ull << 40;  // 1 TiB of addresses a device: several times any card's memory
constexpr uint64_t kReservationArena = 1ull << 44;  // torch reserves 9/8 of the card for every stream and pool
constexpr uint64_t kReservationBase = kBase + kMaxDevices * kDeviceArena;
constexpr uint64_t kEnd = kReservationBase + kReservationArena;
constexpr uint64_t kHostPage = 4096;

// First fit by address, so that addresses do not depend on anything but the sequence of calls.
class Arena {
 public:
  Arena(uint64_t start, uint64_t bytes) { free_[start] = bytes; }

  uint64_t take(uint64_t bytes, uint64_t alignment) {
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      uint64_t start = it->first, end = it->first + it->second;
      uint64_t place = round_up(start, alignment);
      if (place + bytes > end) continue;
      free_.erase(it);
      if (place > start) free_[start] = place - start;
      if (end > place + bytes) free_[place + bytes] = end - place - bytes;
      return place;
    }
    return 0;
  }

  void give(uint64_t start, uint64_t bytes) {
    auto next = free_.lower_bound(start);
    if (next != free_.end() && next->first == start + bytes) {
      bytes += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      auto before = std::prev(next);
      if (before->first + before->second == start) {
        before->second += bytes;
        return;
      }
    }
    free_[start] = bytes;
  }

 private:
  std::map<uint64_t, uint64_t> free_;  // start -> bytes
};

struct Allocation {
  uint64_t bytes;
  int device;
};

struct State {
  std::map<uint64_t, Allocation> allocations;
  std::map<uint64_t, uint64_t> reservations;
  std::map<uint64_t, Allocation> mappings;
  std::map<uint64_t, HostBlock> host;
  Arena* arenas[kMaxDevices] = {};
  Arena reserved{kReservationBase, kReservationArena};
};

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

// Leaked on purpose: memory is still freed while static destructors run.
State& state() {
  static State* instance = [] {
    // Where addresses are limited (ulimit -v) the range stays unreserved; the kernel places nothing there by itself.
    mmap(reinterpret_cast<void*>(kBase), kEnd - kBase, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    return new State;
  }();
  return *instance;
}

uint64_t number(const void* address) { return reinterpret_cast<uint64_t>(address); }
void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

// The entry of an ordered map of ranges that holds the address, or end().
template <typename Map, typename Size>
typename Map::iterator containing(Map& map, uint64_t address, Size size) {
  auto it = map.upper_bound(address);
  if (it == map.begin()) return map.end();
  --it;
  return address < it->first + size(it->second) ? it : map.end();
}

HostKind booked_as(HostOrigin origin) {
  return origin == HostOrigin::kManaged ? HostKind::kManaged : HostKind::kPinned;
}

// Zeros host memory. Whole pages of our own mappings are given back instead of written: offloading gigabytes to pinned
// memory then costs the machine nothing.
void zero_host(void* target, uint64_t bytes) {
  HostBlock block;
  bool ours = find_host_block(target, &block) && block.origin != HostOrigin::kRegistered;
  uint64_t start = round_up(number(target), kHostPage);
  uint64_t end = (number(target) + bytes) / kHostPage * kHostPage;
  if (!ours || end <= start || end > number(block.base) + round_up(block.bytes, kHostPage)) {
    memset(target, 0, bytes);
    return;
  }
  memset(target, 0, start - number(target));
  madvise(pointer(start), end - start, MADV_DONTNEED);
  memset(pointer(end), 0, number(target) + bytes - end);
}

}  // namespace

bool is_device_address(const void* address) { return number(address) >= kBase && number(address) < kEnd; }

void* allocate_device(int device, uint64_t bytes) {
  bytes = round_up(bytes, kGranularity);
  if (!take(device, bytes)) return nullptr;
  Guard<mutex> guard;
  State& s = state();
  if (s.arenas[device] == nullptr) s.arenas[device] = new Arena(kBase + device * kDeviceArena, kDeviceArena);
  uint64_t place = s.arenas[device]->take(bytes, kGranularity);
  if (place != 0) s.allocations[place] = {bytes, device};
  else give(device, bytes);
  return pointer(place);
}

bool free_device(void* address) {
  Guard<mutex> guard;
  State& s = state();
  auto it = s.allocations.find(number(address));
  if (it == s.allocations.end()) return false;
  Allocation allocation = it->second;
  s.arenas[allocation.device]->give(it->first, allocation.bytes);
  s.allocations.erase(it);
  give(allocation.device, allocation.bytes);
  return true;
}

void* reserve_addresses(uint64_t bytes, uint64_t alignment) {
  Guard<mutex> guard;
  State& s = state();
  bytes = round_up(bytes, kGranularity);
  uint64_t place = s.reserved.take(bytes, std::max(alignment, kGranularity));
  if (place != 0) s.reservations[place] = bytes;
  return pointer(place);
}

bool release_addresses(void* address) {
  Guard<mutex> guard;
  State& s = state();
  auto it = s.reservations.find(number(address));
  if (it == s.reservations.end()) return false;
  s.reserved.give(it->first, it->second);
  s.reservations.erase(it);
  return true;
}

void map_addresses(void* address, uint64_t bytes, int device) {
  Guard<mutex> guard;
  auto& mappings = state().mappings;
  uint64_t start = number(address), end = start + bytes;
  for (auto it = mappings.lower_bound(start); it != mappings.end() && it->first < end;) it = mappings.erase(it);
  if (device >= 0) mappings[start] = {bytes, device};
}

bool find_device_block(const void* address, Block* block) {
  if (!is_device_address(address)) return false;
  Guard<mutex> guard;
  State& s = state();
  auto size = [](const Allocation& allocation) { return allocation.bytes; };
  auto it = containing(s.allocations, number(address), size);
  if (it != s.allocations.end()) {
    *block = {pointer(it->first), it->second.bytes, it->second.device};
    return true;
  }
  auto mapping = containing(s.mappings, number(address), size);
  if (mapping != s.mappings.end()) {
    *block = {pointer(mapping->first), mapping->second.bytes, mapping->second.device};
    return true;
  }
  *block = {const_cast<void*>(address), 0, -1};
  return true;
}

void* allocate_host(HostOrigin origin, uint64_t bytes, int device) {
  // Pages that nothing writes never become real: pinned memory is counted, not occupied.
  void* base = mmap(nullptr, round_up(std::max<uint64_t>(bytes, 1), kHostPage), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  take_host(booked_as(origin), bytes);
  Guard<mutex> guard;
  state().host[number(base)] = {base, bytes, origin, device};
  return base;
}

bool register_host(void* base, uint64_t bytes, int device) {
  {
    Guard<mutex> guard;
    if (!state().host.insert({number(base), {base, bytes, HostOrigin::kRegistered, device}}).second) return false;
  }
  take_host(HostKind::kPinned, bytes);
  return true;
}

bool unregister_host(void* base) {
  HostBlock block;
  {
    Guard<mutex> guard;
    auto& host = state().host;
    auto it = host.find(number(base));
    if (it == host.end() || it->second.origin != HostOrigin::kRegistered) return false;
    block = it->second;
    host.erase(it);
  }
  give_host(HostKind::kPinned, block.bytes);
  return true;
}

bool free_host(void* base) {
  HostBlock block;
  {
    Guard<mutex> guard;
    auto& host = state().host;
    auto it = host.find(number(base));
    if (it == host.end() || it->second.origin == HostOrigin::kRegistered) return false;
    block = it->second;
    host.erase(it);
  }
  munmap(block.base, round_up(std::max<uint64_t>(block.bytes, 1), kHostPage));
  give_host(booked_as(block.origin), block.bytes);
  return true;
}

bool find_host_block(const void* address, HostBlock* block) {
  Guard<mutex> guard;
  auto& host = state().host;
  auto it = containing(host, number(address), [](const HostBlock& b) { return std::max<uint64_t>(b.bytes, 1); });
  if (it == host.end()) return false;
  *block = it->second;
  return true;
}

void copy(void* target, const void* source, uint64_t bytes) {
  if (bytes == 0) return;
  bool to_device = is_device_address(target), from_device = is_device_address(source);
  if (to_device && from_device) note_copied(target, source, bytes);
  else if (to_device) note_written(target, source, bytes);
  else if (!from_device) memmove(target, source, bytes);
  if (to_device || !from_device || read_exchanged(target, source, bytes)) return;
  note_value_read();
  zero_host(target, bytes);
}

void fill(void* target, int value, uint64_t bytes) {
  if (bytes == 0) return;
  if (is_device_address(target)) {
    forget_written();
    return;
  }
  if (value == 0) zero_host(target, bytes);
  else memset(target, value, bytes);
}

}  // namespace vgpu
