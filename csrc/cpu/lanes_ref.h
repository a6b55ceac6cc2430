// Sixteen fp32 lanes in plain C++: what kernels that are written once over a lane type (solver/solve_panel.h, layer/) are
// compiled with as `ref`. lanes_avx2.h and lanes_avx512.h have the same functions and give the same bits.
#ifndef LOWBIT_CPU_LANES_REF_H
#define LOWBIT_CPU_LANES_REF_H

#include <math.h>

#include "cpu/float_types.h"

namespace lowbit {
namespace {  // internal linkage: each instruction set's files have their own

struct LanesRef {
  static constexpr int kAccumulators = 4;  // that a loop may hold beside its operands
  struct T {
    float lane[16];
  };

  template <class F>
  static T each(F f) {
    T out;
    for (int i = 0; i < 16; i++) out.lane[i] = f(i);
    return out;
  }
  static T load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  static void store(float* p, T x) {
    for (int i = 0; i < 16; i++) p[i] = x.lane[i];
  }
  static T set(float x) {
    return each([&](int) { return x; });
  }
  static T add(T x, T y) {
    return each([&](int i) { return x.lane[i] + y.lane[i]; });
  }
  static T sub(T x, T y) {
    return each([&](int i) { return x.lane[i] - y.lane[i]; });
  }
  static T mul(T x, T y) {
    return each([&](int i) { return x.lane[i] * y.lane[i]; });
  }
  static T div(T x, T y) {
    return each([&](int i) { return x.lane[i] / y.lane[i]; });
  }
  static T fma(T x, T y, T z) {
    return each([&](int i) { return fmaf(x.lane[i], y.lane[i], z.lane[i]); });
  }
  static T fnma(T x, T y, T z) {
    return each([&](int i) { return fmaf(-x.lane[i], y.lane[i], z.lane[i]); });
  }
  static T abs(T x) {
    return each([&](int i) { return fabsf(x.lane[i]); });
  }
  static T round(T x) {  // to the nearest integer, ties to even
    return each([&](int i) { return nearbyintf(x.lane[i]); });
  }
  static T min(T x, T y) {  // y when either is NaN, as minps
    return each([&](int i) { return x.lane[i] < y.lane[i] ? x.lane[i] : y.lane[i]; });
  }
  static T max(T x, T y) {
    return each([&](int i) { return x.lane[i] > y.lane[i] ? x.lane[i] : y.lane[i]; });
  }
  static T if_less(T x, T y, T yes, T no) {
    return each([&](int i) { return x.lane[i] < y.lane[i] ? yes.lane[i] : no.lane[i]; });
  }

  // 16 elements of a dtype from element `index` on.
  template <lowbit_dtype D>
  static T load_as(const void* p, int64_t index) {
    return each([&](int i) { return load_float(p, D, index + i); });
  }
  template <lowbit_dtype D>
  static void store_as(void* p, int64_t index, T x) {
    for (int i = 0; i < 16; i++) store_float(p, D, index + i, x.lane[i]);
  }

  // To the nearest value of a dtype.
  template <lowbit_dtype D>
  static T rounded(T x) {
    if (D == LOWBIT_F32) return x;
    return each([&](int i) {
      return D == LOWBIT_F16 ? float_from_f16(f16_from_float(x.lane[i])) : float_from_bf16(bf16_from_float(x.lane[i]));
    });
  }

  // x * 2^n for whole n in [-252, 252], rounded once: n's halves are exponents of their own.
  static T scale_by_power(T x, T n) {
    return each([&](int i) {
      const int whole = n.lane[i] == n.lane[i] ? int(n.lane[i]) : 0, half = whole >> 1;
      return x.lane[i] * float_from_bits(uint32_t(half + 127) << 23) *
             float_from_bits(uint32_t(whole - half + 127) << 23);
    });
  }

  // The sum of the lanes, by halves: lane l and l + 8, then l + 4, l + 2, l + 1.
  static float sum(T x) {
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; i++) x.lane[i] += x.lane[i + width];
    return x.lane[0];
  }
  // Lane i: sum(x[i]).
  static T sums(const T x[16]) {
    return each([&](int i) { return sum(x[i]); });
  }
  static float largest(T x) {
    for (int i = 1; i < 16; i++) x.lane[0] = x.lane[i] > x.lane[0] ? x.lane[i] : x.lane[0];
    return x.lane[0];
  }
};

}  // namespace
}  // namespace lowbit
#endif
