// trit matmul, AVX-VNNI: see trit_matmul_avx2.h.
#include "cpu/trit_matmul_avx2.h"

namespace lowbit {

void trit_matmul__avxvnni(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                          int64_t out_stride) {
  trit_matmul(w, x, n0, n1, out, out_stride);
}

}  // namespace lowbit
