// y[m][n] = tile[m][n] + bias[n], rounded once to the output dtype. Bound by the bytes written.
#include "cpu/float_types.h"
#include "cpu/kernel.h"

namespace lowbit {

void store__ref(const float* tile, int64_t tile_stride, const float* bias, int64_t tokens, int64_t rows, void* y,
                lowbit_dtype dtype, int64_t y_stride) {
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t n = 0; n < rows; n++) {
      const float value = tile[m * tile_stride + n];
      store_float(y, dtype, m * y_stride + n, bias ? value + bias[n] : value);
    }
}

}  // namespace lowbit
