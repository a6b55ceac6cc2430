// s = x + residual,  y[k] = weight[k] * (s[k] / sqrt(mean(s^2) + eps)): s, the quotient and y each rounded to the dtype, as
// Llama's LlamaRMSNorm and the addition before it round them. Sums are fp32: lane l has elements l, l + 16, ..., then
// halves (lanes_ref.h). Bound by the caches: a token's row of 4 to 16 KB is read twice and written twice.
#ifndef LOWBIT_LAYER_RMS_NORM_H
#define LOWBIT_LAYER_RMS_NORM_H

#include <math.h>

#include "layer/elements.h"

namespace lowbit {
namespace {

template <class L, lowbit_dtype D>
void rms_norm(const RmsNorm& n, int64_t token_begin, int64_t token_end) {
  using T = typename L::T;
  for (int64_t m = token_begin; m < token_end; m++) {
    const void* from = element<D>(n.x, m * n.x_stride);
    T squares = L::set(0.0f);
    if (n.residual) {
      const void* residual = element<D>(n.residual, m * n.residual_stride);
      void* sum = element<D>(n.sum, m * n.sum_stride);
      for (int64_t k = 0; k < n.size; k += kVector) {
        const int64_t count = n.size - k;
        const T s =
            L::template rounded<D>(L::add(load_part<L, D>(from, k, count), load_part<L, D>(residual, k, count)));
        store_part<L, D>(sum, k, count, s);
        squares = L::fma(s, s, squares);
      }
      if (!n.y) continue;
      from = sum;
    } else {
      for (int64_t k = 0; k < n.size; k += kVector) {
        const T s = load_part<L, D>(from, k, n.size - k);
        squares = L::fma(s, s, squares);
      }
    }
    const T scale = L::set(1.0f / sqrtf(L::sum(squares) / float(n.size) + n.eps));
    void* to = element<D>(n.y, m * n.y_stride);
    for (int64_t k = 0; k < n.size; k += kVector) {
      const int64_t count = n.size - k;
      const T normed = L::template rounded<D>(L::mul(load_part<L, D>(from, k, count), scale));
      store_part<L, D>(to, k, count, L::mul(load_part<L, D>(n.weight, k, count), normed));
    }
  }
}

}  // namespace
}  // namespace lowbit
#endif
