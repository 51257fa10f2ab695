#include "exchanged.h"

#include <cstring>
#include <map>
#include <vector>

#include "guard.h"

namespace vgpu {
namespace {

constexpr uint64_t kMostBytes = 1 << 20;  // the bucket plan of a model with 100,000 parameters has 400 kB
constexpr size_t kMostRanges = 64;

struct Range {
  std::vector<char> bytes;
  bool exchanged;
};

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
std::map<uint64_t, Range>* ranges = nullptr;  // leaked on purpose; by start address, not overlapping
uint32_t count = 0;  // read without the lock: launches are frequent, and mostly there is nothing to forget

uint64_t number(const void* address) { return reinterpret_cast<uint64_t>(address); }

void update_count() { __atomic_store_n(&count, static_cast<uint32_t>(ranges->size()), __ATOMIC_RELAXED); }

void erase_overlapping(uint64_t start, uint64_t bytes) {
  for (auto it = ranges->begin(); it != ranges->end();) {
    bool overlaps = it->first < start + bytes && start < it->first + it->second.bytes.size();
    it = overlaps ? ranges->erase(it) : std::next(it);
  }
}

void put(uint64_t start, const char* bytes, uint64_t length, bool exchanged) {
  if (ranges == nullptr) ranges = new std::map<uint64_t, Range>;
  std::vector<char> held(bytes, bytes + length);  // `bytes` may lie in a range that is erased
  erase_overlapping(start, length);
  if (ranges->size() >= kMostRanges) ranges->clear();
  (*ranges)[start] = Range{std::move(held), exchanged};
  update_count();
}

const Range* find(uint64_t address, uint64_t bytes, const char** at) {
  if (ranges == nullptr) return nullptr;
  auto it = ranges->upper_bound(address);
  if (it == ranges->begin()) return nullptr;
  --it;
  uint64_t offset = address - it->first;
  if (offset + bytes > it->second.bytes.size()) return nullptr;
  *at = it->second.bytes.data() + offset;
  return &it->second;
}

// Nothing that is longer is kept, but what was known of its place is no longer true.
bool too_long(uint64_t start, uint64_t bytes) {
  if (bytes <= kMostBytes) return false;
  if (ranges != nullptr) {
    erase_overlapping(start, bytes);
    update_count();
  }
  return true;
}

void pass_on(const void* target, const void* source, uint64_t bytes, bool by_collective) {
  Guard<mutex> guard;
  if (too_long(number(target), bytes)) return;
  const char* at = nullptr;
  if (const Range* range = find(number(source), bytes, &at)) {
    put(number(target), at, bytes, range->exchanged || by_collective);
  } else if (ranges != nullptr) {
    erase_overlapping(number(target), bytes);
    update_count();
  }
}

}  // namespace

void note_written(const void* device_address, const void* source, uint64_t bytes) {
  Guard<mutex> guard;
  if (too_long(number(device_address), bytes)) return;
  put(number(device_address), static_cast<const char*>(source), bytes, false);
}

void note_copied(const void* target, const void* source, uint64_t bytes) { pass_on(target, source, bytes, false); }

void note_exchanged(const void* target, const void* source, uint64_t bytes) { pass_on(target, source, bytes, true); }

void forget_written() {
  if (__atomic_load_n(&count, __ATOMIC_RELAXED) == 0) return;
  Guard<mutex> guard;
  ranges->clear();
  update_count();
}

bool read_exchanged(void* target, const void* source, uint64_t bytes) {
  if (__atomic_load_n(&count, __ATOMIC_RELAXED) == 0) return false;
  Guard<mutex> guard;
  const char* at = nullptr;
  const Range* range = find(number(source), bytes, &at);
  if (range == nullptr || !range->exchanged) return false;
  memcpy(target, at, bytes);
  return true;
}

}  // namespace vgpu
