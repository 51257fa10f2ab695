// libcublas and libcublasLt: settings. Products themselves are generated no-ops (stubs.py): PyTorch allocates their
// workspaces itself, through its own allocator, so nothing that they need is missing from the peak.
#include <cstring>

#include "stubs.h"

using vgpu::tell;

namespace {

constexpr int kSuccess = 0, kInvalidValue = 7;

const char* status_name(int status) {
  switch (status) {
    case 0: return "CUBLAS_STATUS_SUCCESS";
    case 1: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case 3: return "CUBLAS_STATUS_ALLOC_FAILED";
    case 7: return "CUBLAS_STATUS_INVALID_VALUE";
    case 15: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "CUBLAS_STATUS_INTERNAL_ERROR";
  }
}

}  // namespace

// What both libraries say about themselves.
#define DESCRIBE(library) \
  API int library##GetProperty(int type, int* value) { \
    return vgpu_version_part(VGPU_CUBLAS_VERSION, type, value, kInvalidValue); \
  } \
  API size_t library##GetCudartVersion() { return VGPU_CUDART_VERSION; } \
  API const char* library##GetStatusName(int status) { return status_name(status); } \
  API const char* library##GetStatusString(int status) { return status_name(status); }

#ifdef VGPU_LIBRARY_cublas

DESCRIBE(cublas)

API int cublasGetVersion_v2(void*, int* version) { return tell(version, VGPU_CUBLAS_VERSION); }

struct Handle {
  void* stream;
  int math_mode, pointer_mode, atomics_mode, sm_count_target;
};
static_assert(sizeof(Handle) <= vgpu::kObjectBytes, "vgpu_make makes them");

#define SETTING(name, type, field) \
  API int cublasSet##name(Handle* handle, type value) { \
    handle->field = value; \
    return kSuccess; \
  } \
  API int cublasGet##name(Handle* handle, type* value) { \
    *value = handle->field; \
    return kSuccess; \
  }
SETTING(Stream_v2, void*, stream)
SETTING(MathMode, int, math_mode)
SETTING(PointerMode_v2, int, pointer_mode)
SETTING(AtomicsMode, int, atomics_mode)
SETTING(SmCountTarget, int, sm_count_target)

// Factorisations of batches tell the host whether their arguments were in order: 0, they were.
#define BATCHED(T) \
  API int cublas##T##geqrfBatched(void*, int, int, void*, int, void*, int* info, int) { \
    *info = 0; \
    return vgpu_launched(); \
  } \
  API int cublas##T##getrsBatched(void*, int, int, int, void*, int, void*, void*, int, int* info, int) { \
    *info = 0; \
    return vgpu_launched(); \
  } \
  API int cublas##T##gelsBatched(void*, int, int, int, int, void*, int, void*, int, int* info, void*, int) { \
    *info = 0; \
    return vgpu_launched(); \
  }
BATCHED(S)
BATCHED(D)
BATCHED(C)
BATCHED(Z)

#endif

#ifdef VGPU_LIBRARY_cublasLt

DESCRIBE(cublasLt)

// Attributes of descriptors are not remembered: nothing reads a product's settings back.
API int cublasLtMatmulDescGetAttribute(void*, int, void* value, size_t bytes, size_t* written) {
  if (value != nullptr) memset(value, 0, bytes);
  if (written != nullptr) *written = bytes;
  return kSuccess;
}

// cublasLtMatmulHeuristicResult_t (cublasLt.h).
struct HeuristicResult {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(HeuristicResult) == 96, "the library's layout");

// One algorithm is offered, and it needs no workspace beyond what the caller brings.
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, HeuristicResult* results,
                                       int* found) {
  *results = {};
  results->waves = 1.0f;
  return tell(found, 1);
}

#endif
