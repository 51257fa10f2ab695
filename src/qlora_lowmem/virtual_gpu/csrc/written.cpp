#include "written.h"

#include <cstring>
#include <map>
#include <vector>

#include "guard.h"
#include "memory.h"

namespace vgpu {
namespace {

constexpr uint64_t kMostBytes = 1 << 20;  // the bucket plan of a model with 100,000 parameters has 400 kB
constexpr size_t kMostRanges = 64;

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
auto& ranges = *new std::map<uint64_t, std::vector<char>>;  // leaked on purpose; by start address, not overlapping
uint32_t count = 0;  // read without the lock: launches are frequent, and mostly there is nothing to forget

// Holds the ranges, and counts them at the end.
class Held {
 public:
  ~Held() { __atomic_store_n(&count, static_cast<uint32_t>(ranges.size()), __ATOMIC_RELAXED); }

 private:
  Guard<mutex> guard_;
};

void erase_overlapping(uint64_t start, uint64_t bytes) {
  for (auto it = ranges.begin(); it != ranges.end();) {
    bool overlaps = it->first < start + bytes && start < it->first + it->second.size();
    it = overlaps ? ranges.erase(it) : std::next(it);
  }
}

void put(uint64_t start, const char* bytes, uint64_t length) {
  std::vector<char> kept(bytes, bytes + length);  // `bytes` may lie in a range that is erased
  erase_overlapping(start, length);
  if (ranges.size() >= kMostRanges) ranges.clear();
  ranges[start] = std::move(kept);
}

const char* find(uint64_t address, uint64_t bytes) {
  auto it = ranges.upper_bound(address);
  if (it == ranges.begin()) return nullptr;
  --it;
  uint64_t offset = address - it->first;
  return offset + bytes > it->second.size() ? nullptr : it->second.data() + offset;
}

}  // namespace

void note_written(const void* device_address, const void* source, uint64_t bytes) {
  Held held;
  // What is longer is not kept, but what was known of its place is no longer true.
  if (bytes > kMostBytes) erase_overlapping(number(device_address), bytes);
  else put(number(device_address), static_cast<const char*>(source), bytes);
}

void note_copied(const void* target, const void* source, uint64_t bytes) {
  Held held;
  const char* known = find(number(source), bytes);
  if (known == nullptr) erase_overlapping(number(target), bytes);
  else put(number(target), known, bytes);
}

void forget_written() {
  if (__atomic_load_n(&count, __ATOMIC_RELAXED) == 0) return;
  Held held;
  ranges.clear();
}

bool read_written(void* target, const void* source, uint64_t bytes) {
  if (__atomic_load_n(&count, __ATOMIC_RELAXED) == 0) return false;
  Held held;
  const char* known = find(number(source), bytes);
  if (known == nullptr) return false;
  memcpy(target, known, bytes);
  return true;
}

}  // namespace vgpu
