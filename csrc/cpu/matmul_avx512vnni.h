// y[m,n] = sum_c fma chain of float(I[m,n,c]) * (s[n,g(c)] * step[m,c])   on AVX-512 VNNI, for every integer format.
//
// I[m,n,c] = sum over a chunk of (code - zero) * v, v = 256*high + low, is one exact integer (docs/numerics.md), so rows
// (few tokens) and tiles (many) may sum it in any order; both then add chunk c to slot c % 16 in fp32 and end in the
// same tree.
#ifndef LOWBIT_CPU_MATMUL_AVX512VNNI_H
#define LOWBIT_CPU_MATMUL_AVX512VNNI_H

#include "cpu/rows_avx512vnni.h"
#include "cpu/tiles_avx512vnni.h"

namespace lowbit {
namespace {

template <int kBits, int kChunk>
LOWBIT_INLINE void matmul_chunk(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                                int64_t out_stride) {
  if (x->layout == Activations::kRows)
    (x->high ? matmul_rows<kBits, kChunk, true> : matmul_rows<kBits, kChunk, false>)(w, x, n0, n1, out, out_stride);
  else
    (x->high ? matmul_tiles<kBits, kChunk, true> : matmul_tiles<kBits, kChunk, false>)(w, x, n0, n1, out, out_stride);
}

template <int kBits>
LOWBIT_INLINE void matmul(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                          int64_t out_stride) {
  if (x->chunk == 128) return matmul_chunk<kBits, 128>(w, x, n0, n1, out, out_stride);
  if (x->chunk == 64) return matmul_chunk<kBits, 64>(w, x, n0, n1, out, out_stride);
  if (x->chunk == 32) return matmul_chunk<kBits, 32>(w, x, n0, n1, out, out_stride);
  return matmul_chunk<kBits, 16>(w, x, n0, n1, out, out_stride);
}

}  // namespace
}  // namespace lowbit
#endif
