// out[i][k] = scale[n][g] * (code[n][k] - zero[n][g]), n = ids[i], in original column order; a negative id gives zeros.
// bags: sum[j] = fma(weights[i], that, sum[j]), row after row, in packed order.
#ifndef LOWBIT_CPU_GATHER_REF_H
#define LOWBIT_CPU_GATHER_REF_H

#include <math.h>

#include "cpu/float_types.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace {

// Column k of a row, in packed order.
template <int Bits>
float row_value(const lowbit_matrix* w, int64_t row, int64_t k) {
  if (row < 0) return 0;
  const int64_t at = scale_index(w, row, k / w->group_size);
  const int zero = w->zeros ? w->zeros[at] : middle_code(Bits);
  const int code = get_code(Bits, w->cols, w->codes + row * row_lines(Bits, w->cols) * kLineBytes, k);
  return load_float(w->scales, w->scale_dtype, at) * float(code - zero);
}

template <int Bits>
void gather_ref(const lowbit_matrix* w, const int64_t* ids, int64_t count, void* out, lowbit_dtype out_dtype,
                int64_t out_stride) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t k = 0; k < w->cols; k++)
      store_float(out, out_dtype, i * out_stride + (w->perm ? w->perm[k] : k), row_value<Bits>(w, ids[i], k));
}

template <int Bits>
void bags_ref(const lowbit_matrix* w, const int64_t* ids, const float* weights, int64_t count, int64_t plane_begin,
              int64_t plane_end, float* sum) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t k = plane_begin * 64; k < plane_end * 64 && k < w->cols; k++)
      sum[k] = fmaf(weights ? weights[i] : 1.0f, row_value<Bits>(w, ids[i], k), sum[k]);
}

}  // namespace
}  // namespace lowbit
#endif
