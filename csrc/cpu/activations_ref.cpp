// Activations to integers, as docs/numerics.md defines it:  x[m][k] ~ step[m][c] * v[m][k],  v = 256*high + low.
// The plain transcription that the other ISAs are tested against, for both layouts.
#include <math.h>
#include <string.h>

#include "cpu/float_types.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace {

struct Place {
  int64_t digit, digit_stride, statistic, statistic_stride;
};

// Where token m begins, and how far apart its codes of 4 and its chunks lie.
Place place(const Activations* a, int64_t m) {
  if (a->layout == Activations::kRows) return {m * a->cols_padded, 4, m * a->chunks_padded, 1};
  const int64_t tile = m / kLanes, lane = m % kLanes;
  return {tile * kLanes * a->cols_padded + lane * 4, 4 * kLanes, tile * a->chunks_padded * kLanes + lane, kLanes};
}

// The step of a chunk (token_step: of a token) whose largest magnitude is a, and the factor that turns x into v before
// rounding.
void find_step(float a, bool two_digits, bool token_step, float* step, float* inverse) {
  if (token_step && a < 1e-5f) a = 1e-5f;
  if (!isfinite(a)) {
    *step = NAN;
    *inverse = 0;
  } else if (a < 0x1p-100f) {
    *step = *inverse = 0;
  } else if (two_digits) {
    int exponent = ilogbf(a) - 14;
    if (a > ldexpf(32639.0f, exponent)) exponent++;
    *step = ldexpf(1.0f, exponent);
    *inverse = ldexpf(1.0f, -exponent);
  } else {
    *step = a / 127.0f;
    *inverse = 127.0f / a;
  }
}

}  // namespace

void activations__ref(const void* x, lowbit_dtype dtype, int64_t stride, const int32_t* perm, int64_t m0, int64_t m1,
                      const Activations* out) {
  const Activations& a = *out;
  const int64_t token_end =
      a.layout == Activations::kTiles ? ceil_div(m1, kLanes) * kLanes : m1;  // absent ones are zero
  for (int64_t m = m0; m < token_end; m++) {
    const Place at = place(&a, m);
    auto value = [&](int64_t k) { return load_float(x, dtype, m * stride + (perm ? perm[k] : k)); };
    auto digit = [&](int64_t k) { return at.digit + k / 4 * at.digit_stride + k % 4; };
    for (int64_t c = 0; c < a.chunks_padded; c++) {
      const int64_t begin = c * a.chunk, end = m < m1 ? (begin + a.chunk < a.cols ? begin + a.chunk : a.cols) : begin;
      float largest = 0;
      const bool whole = a.token_step && begin < end;
      for (int64_t k = whole ? 0 : begin; k < (whole ? a.cols : end); k++) {
        const float magnitude = fabsf(value(k));
        if (!(magnitude <= largest)) largest = magnitude;  // a NaN is kept: nothing compares greater
        if (isnan(largest)) break;
      }
      float step, inverse;
      find_step(largest, a.high != nullptr, whole, &step, &inverse);
      int32_t sum = 0;
      for (int64_t k = begin; k < end; k++) {
        const int v = inverse == 0 ? 0 : int(lrintf(value(k) * inverse));
        const int low = a.high ? ((v + 128) & 255) - 128 : v;
        if (a.high) a.high[digit(k)] = int8_t((v - low) / 256);
        a.low[digit(k)] = int8_t(low);
        sum += v;
      }
      a.step[at.statistic + c * at.statistic_stride] = step;
      a.sum[at.statistic + c * at.statistic_stride] = sum;
    }
    for (int64_t k = m < m1 ? a.cols : 0; k < a.cols_padded; k++) {
      if (a.high) a.high[digit(k)] = 0;
      a.low[digit(k)] = 0;
    }
  }
}

}  // namespace lowbit
