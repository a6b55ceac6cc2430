// y[m][n] = sum_k x[m][k] W[n][k]: the plain transcription of docs/numerics.md, one code at a time, in either layout of
// the activations. Bound by everything; it exists to be read and to be compared with.
#ifndef LOWBIT_CPU_MATMUL_REF_H
#define LOWBIT_CPU_MATMUL_REF_H

#include <math.h>

#include "cpu/float_types.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace {

template <int Bits>
void matmul_ref(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out, int64_t out_stride) {
  const bool tiles = x->layout == Activations::kTiles;
  const int64_t row_bytes = row_lines(Bits, w->cols) * kLineBytes;
  for (int64_t n = n0; n < n1; n++)
    for (int64_t m = 0; m < x->tokens; m++) {
      const uint8_t* row = w->codes + n * row_bytes;
      const int64_t tile = m / kLanes, lane = m % kLanes;
      float slot[kSlots] = {};
      for (int64_t c = 0; c < x->chunks_padded; c++) {
        float scale = 0;
        int32_t product = 0;
        if (c < x->chunks) {
          const int64_t begin = c * x->chunk, end = begin + x->chunk < w->cols ? begin + x->chunk : w->cols;
          const int64_t at = scale_index(w, n, begin / w->group_size);
          const int zero = w->zeros ? w->zeros[at] : middle_code(Bits);
          scale = load_float(w->scales, w->scale_dtype, at);
          for (int64_t k = begin; k < end; k++) {
            const int64_t digit =
                tiles ? tile * kLanes * x->cols_padded + k / 4 * 64 + lane * 4 + k % 4 : m * x->cols_padded + k;
            const int v = x->low[digit] + (x->high ? 256 * x->high[digit] : 0);
            product += (get_code(Bits, w->cols, row, k) - zero) * v;
          }
        }
        const float step =
            tiles ? x->step[(tile * x->chunks_padded + c) * kLanes + lane] : x->step[m * x->chunks_padded + c];
        slot[c % kSlots] = fmaf(float(product), scale * step, slot[c % kSlots]);
      }
      for (int half = kSlots / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++) slot[j] += slot[j + half];
      out[m * out_stride + n - n0] = slot[0];
    }
}

}  // namespace
}  // namespace lowbit
#endif
