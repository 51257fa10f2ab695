// libcudart: streams and events. Work is done the moment it is submitted, so everything is always finished.
#include <time.h>

#include <cstdlib>

#include "runtime.h"

using namespace vgpu;

namespace {

struct Stream {
  int device;
  int priority;
  unsigned flags;
  unsigned long long id;
};

unsigned long long next_stream_id = 16;

double now_ms() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_nsec) * 1e-6;
}

// All that an event is.
double& recorded_ms(cudaEvent_t event) { return *reinterpret_cast<double*>(event); }

// Three streams are numbers instead of objects: default, legacy, per thread.
bool is_object(cudaStream_t stream) { return reinterpret_cast<uintptr_t>(stream) > 2; }

Stream describe(cudaStream_t stream) {
  if (is_object(stream)) return *reinterpret_cast<Stream*>(stream);
  return {current_device(), 0, 0, reinterpret_cast<uintptr_t>(stream)};
}

cudaError_t refuse_capture(const char* name) {
  note_missing(name, "CUDA graphs hold real kernels, and there are none here. Run without them: no torch.cuda.graph, no "
               "torch.compile(mode=\"reduce-overhead\" or \"max-autotune\"); without graphs the peak is not lower");
  return fail(cudaErrorNotSupported);
}

}  // namespace

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  if (cudaError_t error = enter()) return error;
  auto* object = static_cast<Stream*>(malloc(sizeof(Stream)));
  *object = {current_device(), priority, flags, __atomic_add_fetch(&next_stream_id, 1, __ATOMIC_RELAXED)};
  return tell(stream, reinterpret_cast<cudaStream_t>(object));
}

API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (is_object(stream)) free(stream);
  return cudaSuccess;
}

API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* out) { return tell(out, describe(stream).priority); }
API cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* out) { return tell(out, describe(stream).flags); }
API_NAMED(stream_get_id(cudaStream_t stream, unsigned long long* out), "cudaStreamGetId") {
  return tell(out, describe(stream).id);
}
API_NAMED(stream_get_device(cudaStream_t stream, int* out), "cudaStreamGetDevice") {
  return tell(out, describe(stream).device);
}

// What would run on the host once the stream is done runs at once.
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
  callback(stream, cudaSuccess, data);
  return cudaSuccess;
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  return refuse_capture("cudaStreamBeginCapture");
}
API_NAMED(begin_capture_to_graph(), "cudaStreamBeginCaptureToGraph") {
  return refuse_capture("cudaStreamBeginCaptureToGraph");
}

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  recorded_ms(event) = now_ms();
  return cudaSuccess;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (cudaError_t error = enter()) return error;
  *event = static_cast<cudaEvent_t>(malloc(sizeof(double)));
  return cudaEventRecord(*event, nullptr);
}

// Host time, which says nothing about a card, but is not zero: tuners divide by it.
API_NAMED(elapsed_time(float* milliseconds, cudaEvent_t start, cudaEvent_t end), "cudaEventElapsedTime") {
  double elapsed = recorded_ms(end) - recorded_ms(start);
  return tell(milliseconds, elapsed > 1e-3 ? static_cast<float>(elapsed) : 1e-3f);
}
