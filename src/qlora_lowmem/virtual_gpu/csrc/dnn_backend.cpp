// libcudnn's graph interface, which PyTorch's convolutions and attention are planned with: descriptors remember what they
// were given, the heuristics offer one engine, and its plan computes nothing.
//
// The plan's workspace is 0 bytes. cuDNN's own depends on the engine that it would choose on the card, which is not known
// here: a program whose convolutions need a workspace needs that much more than a virtual GPU says.
#include <cstring>
#include <map>
#include <vector>

#include "stubs.h"

namespace {

// Of cudnn_graph.h (cuDNN 9); written out because the headers are not installed everywhere.
enum Status { kSuccess = 0, kBadParam = 2000 };
enum Type { kInt64 = 3, kDescriptor = 15, kVoidPointer = 6 };
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
  int type;
  int64_t count;
  std::vector<char> bytes;
};

struct Descriptor {
  int kind;
  std::map<int, Value> attributes;
};

size_t element_size(int type) {
  switch (type) {
    case 0:   // handle
    case 3:   // int64
    case 5:   // double
    case 6:   // void pointer
    case 15:  // descriptor
      return 8;
    case 26:  // fraction: two int64
      return 16;
    case 2:   // boolean
    case 24:  // char
      return 1;
    default:  // enumerations, float, int32
      return 4;
  }
}

// Copies one descriptor's attributes into another that the caller has made, as cuDNN does for descriptors it hands out.
void fill(void* to, const void* from) {
  if (to != nullptr && from != nullptr) {
    static_cast<Descriptor*>(to)->attributes = static_cast<const Descriptor*>(from)->attributes;
  }
}

int give_number(int64_t number, int64_t requested, int64_t* given, void* out) {
  if (given != nullptr) *given = 1;
  if (requested > 0 && out != nullptr) memcpy(out, &number, sizeof number);
  return kSuccess;
}

}  // namespace

API int cudnnBackendCreateDescriptor(int kind, void** descriptor) {
  *descriptor = new Descriptor{kind, {}};
  return kSuccess;
}

API int cudnnBackendDestroyDescriptor(void* descriptor) {
  delete static_cast<Descriptor*>(descriptor);
  return kSuccess;
}

API int cudnnBackendSetAttribute(void* descriptor, int name, int type, int64_t count, const void* elements) {
  if (descriptor == nullptr || (count > 0 && elements == nullptr)) return kBadParam;
  const char* begin = static_cast<const char*>(elements);
  std::vector<char> bytes(begin, begin + count * element_size(type));
  static_cast<Descriptor*>(descriptor)->attributes[name] = Value{type, count, bytes};
  return kSuccess;
}

API int cudnnBackendGetAttribute(
    void* descriptor, int name, int type, int64_t requested, int64_t* given, void* elements) {
  if (descriptor == nullptr) return kBadParam;
  switch (name) {
    case kPlanWorkspace:
    case kConfigWorkspace:
      return give_number(0, requested, given, elements);
    case kConfigSharedMemory:  // int32; plans that need more than the frontend allows are left out
      if (given != nullptr) *given = 1;
      if (requested > 0 && elements != nullptr) memset(elements, 0, sizeof(int32_t));
      return kSuccess;
    case kGraphEngineCount:
      return give_number(1, requested, given, elements);
    case kHeuristicsResults:  // one engine configuration, into the descriptor that the caller made for it
      if (given != nullptr) *given = 1;
      return kSuccess;
  }
  auto& attributes = static_cast<Descriptor*>(descriptor)->attributes;
  auto found = attributes.find(name);
  if (found == attributes.end()) {
    if (name == kEngineIndex) return give_number(0, requested, given, elements);
    bool one = name == kConfigEngine || name == kPlanConfig;  // exists, with nothing in it
    if (given != nullptr) *given = one ? 1 : 0;
    return kSuccess;
  }
  const Value& value = found->second;
  int64_t count = value.count < requested ? value.count : requested;
  if (given != nullptr) *given = value.count;
  if (elements == nullptr || count <= 0) return kSuccess;
  if (type == kDescriptor) {
    void** targets = static_cast<void**>(elements);
    void* const* sources = reinterpret_cast<void* const*>(value.bytes.data());
    for (int64_t i = 0; i < count; ++i) fill(targets[i], sources[i]);
  } else {
    memcpy(elements, value.bytes.data(), count * element_size(type));
  }
  return kSuccess;
}
