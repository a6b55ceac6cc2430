// int2 matmul, AMX: see matmul_amx.h. Few tokens go to the kernel of avx512vnni, whose rows need no tiles.
#include "cpu/matmul_amx.h"

namespace lowbit {

void int2_matmul__avx512vnni(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                             int64_t out_stride);

void int2_matmul__amx(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                      int64_t out_stride) {
  if (x->layout == Activations::kRows) return int2_matmul__avx512vnni(w, x, n0, n1, out, out_stride);
  matmul_amx<2>(w, x, n0, n1, out, out_stride);
}

}  // namespace lowbit
