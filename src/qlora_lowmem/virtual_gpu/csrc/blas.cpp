// libcublas and libcublasLt: handles and settings. Products themselves are generated no-ops (stubs.py): PyTorch
// allocates their workspaces itself, through its own allocator, so nothing that they need is missing from the peak.
#include <pthread.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "account.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kSuccess = 0;

struct Handle {
  void* stream;
  int math_mode;
  int pointer_mode;
  int atomics_mode;
  int sm_count_target;
};

int create(void** object, size_t bytes) {
  *object = calloc(1, bytes);
  return *object != nullptr ? kSuccess : 3;  // CUBLAS_STATUS_ALLOC_FAILED
}

int destroy(void* object) {
  free(object);
  return kSuccess;
}

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

// 130101 -> 13, 1, 1: libraryPropertyType counts major, minor, patch.
int property(int type, int* value) {
  int parts[] = {VGPU_CUBLAS_VERSION / 10000, VGPU_CUBLAS_VERSION / 100 % 100, VGPU_CUBLAS_VERSION % 100};
  if (type < 0 || type > 2) return 7;
  *value = parts[type];
  return kSuccess;
}

}  // namespace

#ifdef VGPU_LIBRARY_cublas

API int cublasCreate_v2(void** handle) { return create(handle, sizeof(Handle)); }
API int cublasDestroy_v2(void* handle) { return destroy(handle); }
API int cublasGetVersion_v2(void*, int* version) {
  *version = VGPU_CUBLAS_VERSION;
  return kSuccess;
}
API int cublasGetProperty(int type, int* value) { return property(type, value); }
API size_t cublasGetCudartVersion() { return VGPU_CUDART_VERSION; }
API const char* cublasGetStatusName(int status) { return status_name(status); }
API const char* cublasGetStatusString(int status) { return status_name(status); }

API int cublasSetStream_v2(Handle* handle, void* stream) {
  handle->stream = stream;
  return kSuccess;
}
API int cublasGetStream_v2(Handle* handle, void** stream) {
  *stream = handle->stream;
  return kSuccess;
}
API int cublasSetMathMode(Handle* handle, int mode) {
  handle->math_mode = mode;
  return kSuccess;
}
API int cublasGetMathMode(Handle* handle, int* mode) {
  *mode = handle->math_mode;
  return kSuccess;
}
API int cublasSetPointerMode_v2(Handle* handle, int mode) {
  handle->pointer_mode = mode;
  return kSuccess;
}
API int cublasGetPointerMode_v2(Handle* handle, int* mode) {
  *mode = handle->pointer_mode;
  return kSuccess;
}
API int cublasSetAtomicsMode(Handle* handle, int mode) {
  handle->atomics_mode = mode;
  return kSuccess;
}
API int cublasGetAtomicsMode(Handle* handle, int* mode) {
  *mode = handle->atomics_mode;
  return kSuccess;
}
API int cublasSetSmCountTarget(Handle* handle, int count) {
  handle->sm_count_target = count;
  return kSuccess;
}
API int cublasGetSmCountTarget(Handle* handle, int* count) {
  *count = handle->sm_count_target;
  return kSuccess;
}

#endif

#ifdef VGPU_LIBRARY_cublasLt

namespace {

// Big enough for every opaque descriptor; attributes are remembered by none: nothing reads a product's settings back.
constexpr size_t kDescriptorBytes = 512;

// cublasLtMatmulHeuristicResult_t (cublasLt.h).
struct HeuristicResult {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(HeuristicResult) == 96, "the library's layout");

}  // namespace

API int cublasLtCreate(void** handle) { return create(handle, sizeof(Handle)); }
API int cublasLtDestroy(void* handle) { return destroy(handle); }
API size_t cublasLtGetVersion() { return VGPU_CUBLAS_VERSION; }
API size_t cublasLtGetCudartVersion() { return VGPU_CUDART_VERSION; }
API int cublasLtGetProperty(int type, int* value) { return property(type, value); }
API const char* cublasLtGetStatusName(int status) { return status_name(status); }
API const char* cublasLtGetStatusString(int status) { return status_name(status); }

API int cublasLtMatmulDescCreate(void** descriptor, int, int) { return create(descriptor, kDescriptorBytes); }
API int cublasLtMatmulDescDestroy(void* descriptor) { return destroy(descriptor); }
API int cublasLtMatmulDescGetAttribute(void*, int, void* value, size_t bytes, size_t* written) {
  if (value != nullptr) memset(value, 0, bytes);
  if (written != nullptr) *written = bytes;
  return kSuccess;
}
API int cublasLtMatrixLayoutCreate(void** layout, int, uint64_t, uint64_t, int64_t) {
  return create(layout, kDescriptorBytes);
}
API int cublasLtMatrixLayoutDestroy(void* layout) { return destroy(layout); }
API int cublasLtMatmulPreferenceCreate(void** preference) { return create(preference, kDescriptorBytes); }
API int cublasLtMatmulPreferenceDestroy(void* preference) { return destroy(preference); }
API int cublasLtMatrixTransformDescCreate(void** descriptor, int) { return create(descriptor, kDescriptorBytes); }
API int cublasLtMatrixTransformDescDestroy(void* descriptor) { return destroy(descriptor); }

// One algorithm is offered, and it needs no workspace beyond what the caller brings.
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, HeuristicResult* results,
                                       int* found) {
  memset(results, 0, sizeof *results);
  results->waves = 1.0f;
  *found = 1;
  return kSuccess;
}

#endif
