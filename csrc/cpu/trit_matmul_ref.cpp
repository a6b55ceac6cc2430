// trit matmul, reference: see matmul_ref.h.
#include "cpu/matmul_ref.h"

namespace lowbit {

void trit_matmul__ref(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                      int64_t out_stride) {
  matmul_ref<kTrit>(w, x, n0, n1, out, out_stride);
}

}  // namespace lowbit
