// One lane in plain C++: the arithmetic that the 16 lanes of gptq_ref.cpp repeat, a GPU's thread performs, and the
// vector versions imitate.
#ifndef LOWBIT_SOLVER_LANES_SCALAR_H
#define LOWBIT_SOLVER_LANES_SCALAR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "solver/grid.h"

namespace lowbit {

struct Scalar {
  using T = float;

  static LOWBIT_HD T load(const float* p) { return *p; }
  static LOWBIT_HD T set(float x) { return x; }
  static LOWBIT_HD T add(T a, T b) { return a + b; }
  static LOWBIT_HD T sub(T a, T b) { return a - b; }
  static LOWBIT_HD T mul(T a, T b) {  // on a GPU: never fused with a sum that it goes into
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
  }
  static LOWBIT_HD T div(T a, T b) { return a / b; }
  static LOWBIT_HD T fma(T a, T b, T c) { return ::fmaf(a, b, c); }
  static LOWBIT_HD T abs(T a) { return ::fabsf(a); }
  static LOWBIT_HD T round(T a) { return ::nearbyintf(a); }
  static LOWBIT_HD T min(T a, T b) { return a < b ? a : b; }  // b when either is NaN, as minps
  static LOWBIT_HD T max(T a, T b) { return a > b ? a : b; }
  static LOWBIT_HD T if_less(T a, T b, T yes, T no) { return a < b ? yes : no; }

  // x >= 0 to the nearest value of dtype (ties to even), at most the largest finite one.
  static LOWBIT_HD T round_to(T x, lowbit_dtype dtype) {
    if (dtype == LOWBIT_F16) {
      x = min(x, 65504.0f);
      // fp16 has 11 significant bits above 2^-14 and a fixed quantum of 2^-24 below.
      const float quantum = x < 6.103515625e-05f ? 5.9604644775390625e-08f : from_bits(bits(x) & 0x7f800000) * 0x1p-10f;
      return min(::nearbyintf(x / quantum) * quantum, 65504.0f);
    }
    if (dtype == LOWBIT_BF16) {
      x = min(x, from_bits(0x7f7f0000));
      return from_bits((bits(x) + 0x7fff + (bits(x) >> 16 & 1)) & 0xffff0000);
    }
    return min(x, from_bits(0x7f7fffff));
  }

  static LOWBIT_HD T inverse_fifth_root_seed(T t) {
    return from_bits(uint32_t(int32_t(::nearbyintf(::fmaf(float(int32_t(bits(t))), -0.2f, kFifthRootMagic)))));
  }

  static LOWBIT_HD uint32_t bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
  }
  static LOWBIT_HD float from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
  }
};

}  // namespace lowbit
#endif
