// libcudnn's graph interface, which PyTorch's convolutions and attention are planned with: descriptors remember what they
// were given, the heuristics offer one engine, and its plan computes nothing.
//
// The plan's workspace is 0 bytes. cuDNN's own depends on the engine that it would choose on the card, which is not known
// here: a program whose convolutions need a workspace needs that much more than a virtual GPU says.
#include <cstring>
#include <map>
#include <vector>

#include "stubs.h"

using vgpu::tell;

namespace {

// Of cudnn_graph.h (cuDNN 9); written out because the headers are not installed everywhere.
constexpr int kSuccess = 0, kBadParam = 2000;
enum Type { kHandle, kBoolean = 2, kInt64, kDouble = 5, kVoidPointer, kDescriptor = 15, kChar = 24, kFraction = 26 };
enum Attribute {
  kHeuristicsResults = 202,
  kConfigEngine = 300,
  kConfigWorkspace = 303,
  kConfigSharedMemory = 304,
  kPlanConfig = 401,
  kPlanWorkspace = 402,
  kGraphEngineCount = 802,
  kEngineIndex = 1301,
};

struct Value {
  int64_t count;
  std::vector<char> bytes;
};
using Descriptor = std::map<int, Value>;  // by attribute

size_t element_size(int type) {
  if (type == kBoolean || type == kChar) return 1;
  if (type == kFraction) return 16;  // two int64
  bool wide = type == kHandle || type == kInt64 || type == kDouble || type == kVoidPointer || type == kDescriptor;
  return wide ? 8 : 4;  // 4: enumerations, float, int32
}

}  // namespace

API int cudnnBackendCreateDescriptor(int, Descriptor** descriptor) { return tell(descriptor, new Descriptor); }

API int cudnnBackendDestroyDescriptor(Descriptor* descriptor) {
  delete descriptor;
  return kSuccess;
}

API int cudnnBackendSetAttribute(Descriptor* descriptor, int name, int type, int64_t count, const char* elements) {
  if (descriptor == nullptr || (count > 0 && elements == nullptr)) return kBadParam;
  (*descriptor)[name] = {count, std::vector<char>(elements, elements + count * element_size(type))};
  return kSuccess;
}

API int cudnnBackendGetAttribute(Descriptor* descriptor, int name, int type, int64_t requested, int64_t* given,
                                 void* elements) {
  if (descriptor == nullptr) return kBadParam;
  auto give = [&](int64_t number, size_t bytes) {
    if (given != nullptr) *given = 1;
    if (requested > 0 && elements != nullptr) memcpy(elements, &number, bytes);
    return kSuccess;
  };
  switch (name) {
    case kPlanWorkspace:
    case kConfigWorkspace: return give(0, sizeof(int64_t));
    case kConfigSharedMemory: return give(0, sizeof(int32_t));  // plans that need more than allowed are left out
    case kGraphEngineCount: return give(1, sizeof(int64_t));
    case kHeuristicsResults: return give(0, 0);  // one configuration: the descriptor that the caller made for it
  }
  auto found = descriptor->find(name);
  if (found == descriptor->end()) {
    if (name == kEngineIndex) return give(0, sizeof(int64_t));
    if (name == kConfigEngine || name == kPlanConfig) return give(0, 0);  // exists, with nothing in it
    if (given != nullptr) *given = 0;
    return kSuccess;
  }
  const Value& value = found->second;
  int64_t count = value.count < requested ? value.count : requested;
  if (given != nullptr) *given = value.count;
  if (elements == nullptr || count <= 0) return kSuccess;
  if (type != kDescriptor) {
    memcpy(elements, value.bytes.data(), count * element_size(type));
    return kSuccess;
  }
  // cuDNN copies the descriptors that it hands out into those that the caller has made.
  auto* targets = static_cast<Descriptor**>(elements);
  auto* sources = reinterpret_cast<const Descriptor* const*>(value.bytes.data());
  for (int64_t i = 0; i < count; ++i) {
    if (targets[i] != nullptr && sources[i] != nullptr) *targets[i] = *sources[i];
  }
  return kSuccess;
}
