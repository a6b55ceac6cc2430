// int8 matmul, AVX-VNNI: see matmul_avx2.h.
#include "cpu/matmul_avx2.h"

namespace lowbit {

void int8_matmul__avxvnni(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                          int64_t out_stride) {
  matmul<8>(w, x, n0, n1, out, out_stride);
}

}  // namespace lowbit
