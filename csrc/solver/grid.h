// The quantization grid of a group of weights, and the code of a weight on it: w ~ scale * (code - zero).
//
// One text for every machine: the functions below are written over a lane type V, 16 rows on a CPU (gptq_*.cpp), one
// row on a GPU (gptq_cuda.cu), so all give the same bits, and packing by rounding is solving with no errors pushed. Two
// rules make the arithmetic worth storing: a scale is rounded to its stored dtype BEFORE it is used, and a weight
// becomes an integer code, so what was evaluated is what is stored.
//
//   lo = min(x, 0), hi = max(x, 0); symmetric: hi = max|x|, lo = -hi
//   scale = (hi - lo) / (2^bits - 1), rounded to scale_dtype, at most its largest finite value
//   zero  = clamp(round(-lo / scale), 0, 2^bits - 1); symmetric: 2^(bits-1)
//   a scale of 0 (a group of zeros, or one that underflows scale_dtype): scale 1, zero 2^(bits-1)
//   code  = clamp(round(w / scale) + zero, 0, 2^bits - 1), round half to even
// clip: the same grid from p*lo, p*hi for p = 1, .99, ..., .21; the first that minimises sum |error|^2.4 (the
// search of the GPTQ reference code).
//
// Ternary (codes 0, 1, 2 for -s, 0, s): scale = mean|x|, at least 1e-5 (the quantizer that ternary models are trained
// with); clip: the scale p * max|x|, p = 1, .99, ..., .02, that minimises the same sum. But a group whose nonzero |x|
// are all one number is ternary already and keeps it: the mean would shrink it by the share of its zeros.
#ifndef LOWBIT_SOLVER_GRID_H
#define LOWBIT_SOLVER_GRID_H

#include <stdint.h>

#include "lowbit/formats.h"
#include "lowbit/lowbit.h"

namespace lowbit {

// Seed of t^(-1/5): the exponent and mantissa bits of t read as an integer are nearly linear in log2 t, so
// as_float(kFifthRootMagic - 0.2 * bits(t)) is within 4%. The exact line would start at 1.2 * bits(1.0f) = 1.2784e9;
// the constant was chosen by search to make the largest error of pow_2_4 smallest.
constexpr float kFifthRootMagic = 1277950000.0f;

struct GridRule {
  int bits;
  bool symmetric;
  bool clip;
  lowbit_dtype scale_dtype;
};

template <class V>
struct Lanes {
  using T = typename V::T;

  struct LaneGrid {
    T scale, zero;
  };

  // clamp(round(w / scale) + zero) as a float. max(t, 0) is 0 when t is NaN, on every ISA.
  static LOWBIT_HD inline T code(T w, const LaneGrid& grid, T max_code) {
    const T t = V::add(V::round(V::div(w, grid.scale)), grid.zero);
    return V::min(V::max(t, V::set(0.0f)), max_code);
  }

  static LOWBIT_HD inline T decode(T code, const LaneGrid& grid) { return V::mul(grid.scale, V::sub(code, grid.zero)); }

  static LOWBIT_HD inline T largest_code(const GridRule& rule) { return V::set(float(code_count(rule.bits) - 1)); }

  // A ternary scale to its stored dtype; 1 for a group of zeros.
  static LOWBIT_HD inline LaneGrid trit_grid(T scale, T largest, const GridRule& rule) {
    const T zero = V::set(0.0f), rounded = V::round_to(scale, rule.scale_dtype);
    const T lives = V::if_less(zero, largest, rounded, zero);
    return {V::if_less(zero, lives, rounded, V::set(1.0f)), V::set(float(middle_code(kTrit)))};
  }

  static LOWBIT_HD inline LaneGrid grid_of_range(T lo, T hi, const GridRule& rule) {
    if (rule.bits == kTrit) return trit_grid(hi, hi, rule);
    const T max_code = largest_code(rule), middle = V::set(float(middle_code(rule.bits)));
    const T zero = V::set(0.0f);
    const T scale = V::round_to(V::div(V::sub(hi, lo), max_code), rule.scale_dtype);
    const T offset = V::min(V::max(V::round(V::div(V::sub(zero, lo), scale)), zero), max_code);
    return {V::if_less(zero, scale, scale, V::set(1.0f)),
            rule.symmetric ? middle : V::if_less(zero, scale, offset, middle)};
  }

  // d^2.4 for d >= 0, as t^2 * y^4 with t = d^2 and y = t^(-1/5) by three Newton steps y += y * (1 - t * y^5) / 5.
  // Relative error below 1e-6; the steps are written out because a library's pow differs between machines.
  static LOWBIT_HD inline T pow_2_4(T d) {
    const T t = V::mul(d, d), fifth = V::set(-0.2f), six_fifths = V::set(1.2f);
    T y = V::inverse_fifth_root_seed(t);
    for (int step = 0; step < 3; ++step) {
      const T y2 = V::mul(y, y), y4 = V::mul(y2, y2);
      y = V::mul(y, V::fma(V::mul(V::mul(t, y), y4), fifth, six_fifths));
    }
    const T y2 = V::mul(y, y), ty2 = V::mul(t, y2);
    return V::mul(ty2, ty2);
  }

  static LOWBIT_HD inline T clipping_loss(const float* x, int64_t n, int64_t stride, const LaneGrid& grid, T max_code,
                                          T unit) {
    T sum = V::set(0.0f);
    for (int64_t k = 0; k < n; ++k) {
      const T w = V::load(x + k * stride);
      const T error = V::sub(decode(code(w, grid, max_code), grid), w);
      sum = V::add(sum, pow_2_4(V::mul(V::abs(error), unit)));
    }
    return sum;
  }

  // mean|x|, or the one magnitude of a group that is ternary already.
  static LOWBIT_HD inline T mean_scale(const float* x, int64_t n, int64_t stride, T largest) {
    const T zero = V::set(0.0f), one = V::set(1.0f);
    T sum = zero, others = zero;
    for (int64_t k = 0; k < n; ++k) {
      const T magnitude = V::abs(V::load(x + k * stride));
      sum = V::add(sum, magnitude);
      others = V::add(others, V::if_less(zero, magnitude, V::if_less(magnitude, largest, one, zero), zero));
    }
    const T mean = V::max(V::div(sum, V::set(float(n))), V::set(1e-5f));
    return V::if_less(zero, others, mean, largest);
  }

  // What the grid spans, and the largest weight.
  struct Range {
    T lo, hi, largest;
  };

  static LOWBIT_HD inline Range range(const float* x, int64_t n, int64_t stride, const GridRule& rule) {
    const T zero = V::set(0.0f);
    T lo = zero, hi = zero;
    for (int64_t k = 0; k < n; ++k) {
      const T w = V::load(x + k * stride);
      lo = V::min(w, lo);
      hi = V::max(w, hi);
    }
    const T largest = V::max(V::sub(zero, lo), hi);
    if (rule.symmetric || rule.bits == kTrit) lo = V::sub(zero, largest), hi = largest;
    return {lo, hi, largest};
  }

  // The candidates of the search: i = 0 is the plain grid.
  static LOWBIT_HD inline int clip_candidates(const GridRule& rule) { return rule.bits == kTrit ? 99 : 80; }

  static LOWBIT_HD inline LaneGrid clipped_grid(const Range& r, int i, const GridRule& rule) {
    const T p = V::set(float(100 - i) / 100.0f);
    return grid_of_range(V::mul(p, r.lo), V::mul(p, r.hi), rule);
  }

  // Errors are measured in units of the largest weight so that their powers neither overflow nor vanish; a group
  // below 2^-100 keeps the plain grid.
  static LOWBIT_HD inline T clip_unit(T largest) {
    return V::if_less(V::set(7.8886091e-31f), largest, V::div(V::set(1.0f), largest), V::set(0.0f));
  }

  static LOWBIT_HD inline LaneGrid find_grid(const float* x, int64_t n, int64_t stride, const GridRule& rule) {
    const Range r = range(x, n, stride, rule);
    if (rule.bits == kTrit && !rule.clip) return trit_grid(mean_scale(x, n, stride, r.largest), r.largest, rule);
    LaneGrid best = clipped_grid(r, 0, rule);
    if (!rule.clip) return best;

    const T max_code = largest_code(rule), unit = clip_unit(r.largest);
    T best_loss = clipping_loss(x, n, stride, best, max_code, unit);
    for (int i = 1; i < clip_candidates(rule); ++i) {
      const LaneGrid grid = clipped_grid(r, i, rule);
      const T loss = clipping_loss(x, n, stride, grid, max_code, unit);
      best.scale = V::if_less(loss, best_loss, grid.scale, best.scale);
      best.zero = V::if_less(loss, best_loss, grid.zero, best.zero);
      best_loss = V::min(loss, best_loss);
    }
    return best;
  }
};

}  // namespace lowbit
#endif
