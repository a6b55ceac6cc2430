// sum[k] = fma(weights[i], rows[i][k], sum[k]), row after row. Bound by the rows read.
#include <math.h>

#include "cpu/kernel.h"

namespace lowbit {

void accumulate__ref(const float* rows, int64_t stride, const float* weights, int64_t count, int64_t cols, float* sum) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t k = 0; k < cols; k++) sum[k] = fmaf(weights ? weights[i] : 1.0f, rows[i * stride + k], sum[k]);
}

}  // namespace lowbit
