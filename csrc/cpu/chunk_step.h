// The step of a chunk of activations from its largest magnitude: the scalar part of docs/numerics.md that the vector
// kernels share.
#ifndef LOWBIT_CPU_CHUNK_STEP_H
#define LOWBIT_CPU_CHUNK_STEP_H

#include <string.h>

#include "cpu/float_types.h"
#include "cpu/inline.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace {

struct ChunkStep {
  float step, inverse;  // v = round(x * inverse); inverse 0: every v is 0, whatever x is
};

// `largest`: the bits of max|x|, compared as integers so that a NaN counts as larger than infinity.
LOWBIT_INLINE ChunkStep chunk_step(uint32_t largest, bool two_digits) {
  if (largest >= 0x7F800000u) return {float_from_bits(0x7FC00000u), 0};
  if (largest < (127u - 100) << 23) return {0, 0};
  if (!two_digits) {
    const float a = float_from_bits(largest);
    return {a / 127.0f, 127.0f / a};
  }
  // 2^(f-14), twice that if a > 32639 * 2^(f-14): 32639 = 2^14 + 16255, whose last bit is bit 9 of the mantissa.
  const uint32_t exponent = (largest >> 23) - 14 + ((largest & 0x7FFFFFu) > 16255u << 9);
  return {float_from_bits(exponent << 23), float_from_bits((254 - exponent) << 23)};
}

// Activations are quantized in pieces of at most 128 columns: what one call holds in registers or on the stack.
constexpr int64_t kPiece = 128;

// The step that the piece of a token at column k shares with other pieces, kept in *wide; NULL when a piece is a chunk
// and has its own. largest_of(begin, end): the bits of the largest magnitude of those columns of the token.
template <class LargestOf>
LOWBIT_INLINE const ChunkStep* shared_step(const Activations& a, int64_t k, ChunkStep* wide, LargestOf largest_of) {
  if (a.token_step) {
    constexpr uint32_t kLeast = 0x3727C5ACu;  // 1e-5
    const uint32_t largest = k == 0 ? largest_of(0, a.cols) : 0;
    if (k == 0) *wide = chunk_step(largest < kLeast ? kLeast : largest, false);
    return wide;
  }
  if (a.chunk <= kPiece) return nullptr;
  if (k % a.chunk == 0)
    *wide = chunk_step(largest_of(k, k + a.chunk < a.cols ? k + a.chunk : a.cols), a.high != nullptr);
  return wide;
}

// Walks token m of the rows layout piece by piece, its chunks' sums gathered on the way.
// quantize_piece(k, count, given step or NULL, high, low, sum) -> ChunkStep; largest_of as above.
template <class QuantizePiece, class LargestOf>
LOWBIT_INLINE void walk_row(const Activations& a, int64_t m, QuantizePiece quantize_piece, LargestOf largest_of) {
  int8_t* low = a.low + m * a.cols_padded;
  int8_t* high = a.high ? a.high + m * a.cols_padded : nullptr;
  float* step = a.step + m * a.chunks_padded;
  int32_t* sum = a.sum + m * a.chunks_padded;
  memset(step, 0, size_t(a.chunks_padded) * 4);
  memset(sum, 0, size_t(a.chunks_padded) * 4);
  const int64_t piece = a.chunk < kPiece ? a.chunk : kPiece;
  ChunkStep wide{};
  int64_t k = 0;
  for (; k < a.cols; k += piece) {
    const int64_t c = k / a.chunk;
    const ChunkStep* given = shared_step(a, k, &wide, largest_of);
    step[c] = quantize_piece(k, int(piece), given, high ? high + k : nullptr, low + k, sum + c).step;
  }
  memset(low + k, 0, size_t(a.cols_padded - k));
  if (high) memset(high + k, 0, size_t(a.cols_padded - k));
}

}  // namespace
}  // namespace lowbit
#endif
