// y[k] = silu(gate[k]) * up[k],  silu(x) = x / (1 + e^-x), rounded to the dtype before the product, as LlamaMLP rounds it.
// Bound by the exponential, some 20 instructions for 16 elements.
#ifndef LOWBIT_LAYER_SILU_MUL_H
#define LOWBIT_LAYER_SILU_MUL_H

#include "layer/elements.h"

namespace lowbit {
namespace {

template <class L, lowbit_dtype D>
void silu_mul(const SiluMul& s, int64_t token_begin, int64_t token_end) {
  using T = typename L::T;
  for (int64_t m = token_begin; m < token_end; m++) {
    const void* gate = element<D>(s.gate, m * s.gate_stride);
    const void* up = element<D>(s.up, m * s.up_stride);
    void* y = element<D>(s.y, m * s.y_stride);
    for (int64_t k = 0; k < s.size; k += kVector) {
      const int64_t count = s.size - k;
      const T x = load_part<L, D>(gate, k, count);
      const T divisor = L::add(L::set(1.0f), exponential<L>(L::sub(L::set(0.0f), x)));
      store_part<L, D>(y, k, count, L::mul(L::template rounded<D>(L::div(x, divisor)), load_part<L, D>(up, k, count)));
    }
  }
}

}  // namespace
}  // namespace lowbit
#endif
