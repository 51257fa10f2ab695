// libcudnn: what it says about itself. Its older interface (RNNs, batch norm) is refused by the generated stubs.
#include <cstddef>
#include <cstdio>
#include <cstdlib>

#define API extern "C" __attribute__((visibility("default")))

struct Handle {
  void* stream;
};

API int cudnnCreate(Handle** handle) {
  *handle = static_cast<Handle*>(calloc(1, sizeof(Handle)));
  return 0;
}
API int cudnnDestroy(Handle* handle) {
  free(handle);
  return 0;
}
API int cudnnSetStream(Handle* handle, void* stream) {
  handle->stream = stream;
  return 0;
}
API int cudnnGetStream(Handle* handle, void** stream) {
  *stream = handle->stream;
  return 0;
}

API size_t cudnnGetVersion() { return VGPU_LIBRARY_VERSION; }
API size_t cudnnGetCudartVersion() { return VGPU_CUDART_VERSION; }

// 92400 -> 9, 24, 0: libraryPropertyType counts major, minor, patch.
API int cudnnGetProperty(int type, int* value) {
  int parts[] = {VGPU_LIBRARY_VERSION / 10000, VGPU_LIBRARY_VERSION / 100 % 100, VGPU_LIBRARY_VERSION % 100};
  if (type < 0 || type > 2) return 2000;  // CUDNN_STATUS_BAD_PARAM
  *value = parts[type];
  return 0;
}

API const char* cudnnGetErrorString(int status) {
  return status == 0 ? "CUDNN_STATUS_SUCCESS" : "CUDNN_STATUS_NOT_SUPPORTED (on a virtual GPU)";
}

API void cudnnGetLastErrorString(char* text, size_t capacity) {
  snprintf(text, capacity, "cuDNN's older interface is not implemented on a virtual GPU");
}
