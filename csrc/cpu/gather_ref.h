// out[i][k] = scale[n][g] * (code[n][k] - zero[n][g]), n = ids[i], in original column order; a negative id gives zeros.
#ifndef LOWBIT_CPU_GATHER_REF_H
#define LOWBIT_CPU_GATHER_REF_H

#include "cpu/float_types.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace {

template <int Bits>
void gather_ref(const lowbit_matrix* w, const int64_t* ids, int64_t count, void* out, lowbit_dtype out_dtype,
                int64_t out_stride) {
  const int64_t row_bytes = row_lines(Bits, w->cols) * kLineBytes;
  for (int64_t i = 0; i < count; i++)
    for (int64_t k = 0; k < w->cols; k++) {
      float value = 0;
      if (ids[i] >= 0) {
        const int64_t at = scale_index(w, ids[i], k / w->group_size);
        const int zero = w->zeros ? w->zeros[at] : middle_code(Bits);
        const int code = get_code(Bits, w->cols, w->codes + ids[i] * row_bytes, k);
        value = load_float(w->scales, w->scale_dtype, at) * float(code - zero);
      }
      store_float(out, out_dtype, i * out_stride + (w->perm ? w->perm[k] : k), value);
    }
}

}  // namespace
}  // namespace lowbit
#endif
