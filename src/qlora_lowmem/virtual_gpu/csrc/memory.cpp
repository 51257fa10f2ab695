#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "written.h"
#include "guard.h"
#include "stubs.h"

namespace vgpu {
namespace {

// How many of the next single bytes that this thread reads from a device are 1: PyTorch asks whether values are valid
// (worker/vgpu_hooks.py).
thread_local int yes_left = 0;

// Device addresses come from one range that is really reserved, without memory behind it: they never equal a host
// address, are the same in every run, and reading one on the host is a segmentation fault, as on a machine with a card.
constexpr uint64_t kBase = 0x200000000000;
constexpr uint64_t kDeviceArena = 1ull << 40;  // 1 TiB of addresses a device: several times any card's memory
constexpr uint64_t kReservationBase = kBase + kMaxDevices * kDeviceArena;
constexpr uint64_t kEnd = kReservationBase + (1ull << 44);  // torch reserves 9/8 of the card for every stream and pool
constexpr uint64_t kHostPage = 4096;

using Places = std::map<uint64_t, Place>;  // by base; they do not overlap

struct State {
  Places places;
  Places reservations;
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

// The first gap between places, so that addresses do not depend on anything but the sequence of calls. 0: there is none.
uint64_t first_fit(const Places& places, uint64_t start, uint64_t end, uint64_t bytes, uint64_t alignment) {
  start = round_up(start, alignment);
  for (auto it = places.lower_bound(start); it != places.end() && it->first < end; ++it) {
    if (start + std::max(bytes, kGranularity) <= it->first) break;
    start = round_up(it->first + it->second.bytes, alignment);
  }
  return start <= end && bytes <= end - start ? start : 0;
}

uint64_t whole_pages(uint64_t bytes) { return round_up(std::max<uint64_t>(bytes, 1), kHostPage); }

// Takes out the place that starts there, if it is of one of two kinds.
bool remove_place(void* base, Kind kind, Kind or_kind, Place* removed) {
  Guard<mutex> guard;
  auto& places = state().places;
  auto it = places.find(number(base));
  if (it == places.end() || (it->second.kind != kind && it->second.kind != or_kind)) return false;
  *removed = it->second;
  places.erase(it);
  return true;
}

// Zeros host memory. Whole pages of our own mappings are given back instead of written: offloading gigabytes to pinned
// memory then costs the machine nothing.
void zero_host(void* target, uint64_t bytes) {
  Place place = place_of(target);
  bool ours = place.kind == Kind::kPinned || place.kind == Kind::kManaged;
  uint64_t start = round_up(number(target), kHostPage);
  uint64_t end = (number(target) + bytes) / kHostPage * kHostPage;
  if (!ours || end <= start || end > place.base + round_up(place.bytes, kHostPage)) {
    memset(target, 0, bytes);
    return;
  }
  memset(target, 0, start - number(target));
  madvise(pointer(start), end - start, MADV_DONTNEED);
  memset(pointer(end), 0, number(target) + bytes - end);
}

}  // namespace

bool is_device_address(const void* address) { return number(address) >= kBase && number(address) < kEnd; }

Place place_of(const void* address) {
  Guard<mutex> guard;
  auto& places = state().places;
  auto it = places.upper_bound(number(address));
  if (it == places.begin()) return {};
  const Place& before = (--it)->second;
  return number(address) < before.base + std::max<uint64_t>(before.bytes, 1) ? before : Place{};
}

void* allocate_device(int device, uint64_t bytes) {
  bytes = round_up(bytes, kGranularity);
  if (!take(device, bytes)) return nullptr;
  Guard<mutex> guard;
  uint64_t arena = kBase + device * kDeviceArena;
  uint64_t base = first_fit(state().places, arena, arena + kDeviceArena, bytes, kGranularity);
  if (base != 0) state().places[base] = {Kind::kDevice, device, base, bytes};
  else give(device, bytes);
  return pointer(base);
}

bool free_device(void* address) {
  Place place;
  if (!remove_place(address, Kind::kDevice, Kind::kDevice, &place)) return false;
  give(place.device, place.bytes);
  return true;
}

void* reserve_addresses(uint64_t bytes, uint64_t alignment) {
  Guard<mutex> guard;
  bytes = round_up(bytes, kGranularity);
  alignment = std::max(alignment, kGranularity);
  uint64_t base = first_fit(state().reservations, kReservationBase, kEnd, bytes, alignment);
  if (base != 0) state().reservations[base] = {Kind::kUnknown, -1, base, bytes};
  return pointer(base);
}

bool release_addresses(void* address) {
  Guard<mutex> guard;
  return state().reservations.erase(number(address)) > 0;
}

void map_addresses(void* address, uint64_t bytes, int device) {
  Guard<mutex> guard;
  auto& places = state().places;
  uint64_t start = number(address);
  places.erase(places.lower_bound(start), places.lower_bound(start + bytes));
  if (device >= 0) places[start] = {Kind::kMapped, device, start, bytes};
}

void* allocate_host(Kind kind, uint64_t bytes, int device) {
  // Pages that nothing writes never become real: pinned memory is counted, not occupied.
  void* base = mmap(nullptr, whole_pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                    -1, 0);
  if (base == MAP_FAILED) return nullptr;
  take_host(kind == Kind::kManaged, bytes);
  Guard<mutex> guard;
  state().places[number(base)] = {kind, device, number(base), bytes};
  return base;
}

bool free_host(void* base) {
  Place place;
  if (!remove_place(base, Kind::kPinned, Kind::kManaged, &place)) return false;
  munmap(base, whole_pages(place.bytes));
  give_host(place.kind == Kind::kManaged, place.bytes);
  return true;
}

bool is_mapped(void* base, uint64_t bytes) {
  uint64_t before = number(base) % kHostPage;
  if (bytes == 0 || bytes > UINT64_MAX - kHostPage - number(base)) return false;
  return msync(pointer(number(base) - before), before + bytes, MS_ASYNC) == 0;
}

bool register_host(void* base, uint64_t bytes, int device) {
  Guard<mutex> guard;
  if (!state().places.insert({number(base), {Kind::kRegistered, device, number(base), bytes}}).second) return false;
  take_host(false, bytes);
  return true;
}

bool unregister_host(void* base) {
  Place place;
  if (!remove_place(base, Kind::kRegistered, Kind::kRegistered, &place)) return false;
  give_host(false, place.bytes);
  return true;
}

void copy(void* target, const void* source, uint64_t bytes) {
  if (bytes == 0) return;
  bool to_device = is_device_address(target), from_device = is_device_address(source);
  if (to_device && from_device) note_copied(target, source, bytes);
  else if (to_device) note_written(target, source, bytes);
  else if (!from_device) memmove(target, source, bytes);
  if (to_device || !from_device || read_written(target, source, bytes)) return;
  vgpu_notice(kValuesRead);
  zero_host(target, bytes);
  if (bytes == 1 && yes_left > 0) *static_cast<uint8_t*>(target) = yes_left-- > 0;
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

extern "C" VGPU_SHARED void vgpu_answer_yes(int times) { vgpu::yes_left = times; }
