// libcudnn: what it says about itself, and its RNNs: where each weight lies in the one buffer that holds them, and how
// much a run needs beside it.
//
// The weights' size is exact: all matrices by layer, direction and gate, then all biases. What a run needs (workspace and
// reserve) is an estimate, since cuDNN does not document it: the reserve holds what the backward pass cannot do without,
// the gates, the cell and the output of every layer and step.
#include <cstdio>
#include <cstring>

#include "stubs.h"

using vgpu::tell;

namespace {

constexpr int kSuccess = 0, kBadParam = 2000;
constexpr int kMostDimensions = 8;

enum Cell { kRelu, kTanh, kLstm, kGru };

struct Tensor {
  int type;
  int dimensions;
  int sizes[kMostDimensions];
  int strides[kMostDimensions];
};

struct Rnn {
  int cell, type;
  int biases;  // of a gate: 0, 1 or 2
  int directions;
  int input, hidden, output;  // sizes of vectors; output differs from hidden where an LSTM projects
  int layers;

  int gates() const { return cell == kLstm ? 4 : cell == kGru ? 3 : 1; }
  bool projects() const { return output != hidden; }
  // Of the matrices of a gate, the first `gates()` take the layer's input, the others the recurrent one; then the
  // projection, if any. `layer` counts directions too.
  int64_t columns(int layer, int matrix) const {
    if (matrix >= gates()) return matrix == 2 * gates() ? hidden : output;
    return layer < directions ? input : static_cast<int64_t>(output) * directions;
  }
  int64_t rows(int matrix) const { return matrix == 2 * gates() ? output : hidden; }
  int matrices() const { return 2 * gates() + (projects() ? 1 : 0); }
  int64_t matrix_elements(int layer, int end) const {
    int64_t sum = 0;
    for (int matrix = 0; matrix < end; ++matrix) sum += rows(matrix) * columns(layer, matrix);
    return sum;
  }
  int64_t all_matrices(int end_layer) const {
    int64_t sum = 0;
    for (int layer = 0; layer < end_layer; ++layer) sum += matrix_elements(layer, matrices());
    return sum;
  }
  int64_t layer_biases() const { return static_cast<int64_t>(gates()) * biases * hidden; }
};

struct Sequence {
  int steps, batch;
};

int64_t element_bytes(int type) {
  return type == 1 ? 8 : type == 2 || type == 9 ? 2 : 4;  // double; half and bfloat16; float
}

void describe(Tensor* tensor, int type, int rows, int columns) {
  *tensor = {type, 3, {1, rows, columns}, {rows * columns, columns, 1}};
}

static_assert(sizeof(Tensor) <= vgpu::kObjectBytes && sizeof(Rnn) <= vgpu::kObjectBytes, "vgpu_make makes them");

}  // namespace

API int cudnnSetStream(void** handle, void* stream) {
  *handle = stream;  // all that a handle holds
  return kSuccess;
}
API int cudnnGetStream(void** handle, void** stream) { return tell(stream, *handle); }

API size_t cudnnGetCudartVersion() { return VGPU_CUDART_VERSION; }
API int cudnnGetProperty(int type, int* value) {
  return vgpu_version_part(VGPU_LIBRARY_VERSION, type, value, kBadParam);
}
API const char* cudnnGetErrorString(int status) {
  return status == 0 ? "CUDNN_STATUS_SUCCESS" : "CUDNN_STATUS_NOT_SUPPORTED (on a virtual GPU)";
}
API void cudnnGetLastErrorString(char* text, size_t capacity) {
  snprintf(text, capacity, "cuDNN's older interface is not implemented on a virtual GPU");
}

API int cudnnSetTensorNdDescriptor(Tensor* tensor, int type, int dimensions, const int* sizes, const int* strides) {
  if (dimensions < 0 || dimensions > kMostDimensions) return kBadParam;
  tensor->type = type;
  tensor->dimensions = dimensions;
  memcpy(tensor->sizes, sizes, sizeof(int) * dimensions);
  memcpy(tensor->strides, strides, sizeof(int) * dimensions);
  return kSuccess;
}
API int cudnnGetTensorNdDescriptor(const Tensor* tensor, int requested, int* type, int* dimensions, int* sizes,
                                   int* strides) {
  int count = requested < tensor->dimensions ? requested : tensor->dimensions;
  *type = tensor->type;
  *dimensions = tensor->dimensions;
  memcpy(sizes, tensor->sizes, sizeof(int) * count);
  memcpy(strides, tensor->strides, sizeof(int) * count);
  return kSuccess;
}

API int cudnnSetRNNDescriptor_v8(Rnn* rnn, int, int cell, int bias_mode, int direction, int, int type, int, int,
                                 int32_t input, int32_t hidden, int32_t output, int32_t layers, void*, uint32_t) {
  int biases = bias_mode == 2 ? 2 : bias_mode == 0 ? 0 : 1;  // none; one on either side; both
  return tell(rnn, Rnn{cell, type, biases, direction == 1 ? 2 : 1, input, hidden, output, layers});
}

API int cudnnSetRNNDataDescriptor(Sequence* sequence, int, int, int steps, int batch, int, const int*, void*) {
  return tell(sequence, Sequence{steps, batch});
}

API int cudnnGetRNNWeightSpaceSize(void*, const Rnn* rnn, size_t* bytes) {
  int layers = rnn->layers * rnn->directions;
  return tell(bytes, (rnn->all_matrices(layers) + layers * rnn->layer_biases()) * element_bytes(rnn->type));
}

API int cudnnGetRNNWeightParams(void*, const Rnn* rnn, int32_t layer, size_t, const void* weights, int32_t number,
                                Tensor* matrix, void** matrix_address, Tensor* bias, void** bias_address) {
  int layers = rnn->layers * rnn->directions;
  if (layer < 0 || layer >= layers || number < 0 || number >= rnn->matrices()) return kBadParam;
  int64_t width = element_bytes(rnn->type);
  char* base = static_cast<char*>(const_cast<void*>(weights));
  if (matrix != nullptr) {
    describe(matrix, rnn->type, rnn->rows(number), rnn->columns(layer, number));
    *matrix_address = base + (rnn->all_matrices(layer) + rnn->matrix_elements(layer, number)) * width;
  }
  if (bias == nullptr) return kSuccess;
  *bias = {};
  *bias_address = nullptr;
  if (number >= rnn->gates() * rnn->biases) return kSuccess;
  describe(bias, rnn->type, rnn->hidden, 1);
  int64_t before = rnn->all_matrices(layers) + layer * rnn->layer_biases() + static_cast<int64_t>(number) * rnn->hidden;
  return tell(bias_address, base + before * width);
}

API int cudnnGetRNNTempSpaceSizes(void*, const Rnn* rnn, int training, const Sequence* sequence, size_t* workspace,
                                  size_t* reserve) {
  int64_t step = static_cast<int64_t>(sequence->batch) * rnn->hidden * rnn->directions * element_bytes(rnn->type);
  int64_t kept = rnn->gates() + 1 + (rnn->cell == kLstm ? 1 : 0);  // gates, output, cell
  // The gates of one layer are computed for all steps at once before the recurrence.
  if (workspace != nullptr) *workspace = step * sequence->steps * rnn->gates();
  if (reserve != nullptr) *reserve = training != 0 ? step * sequence->steps * rnn->layers * kept : 0;
  return vgpu_notice(vgpu::kDnnWorkspaces);
}
