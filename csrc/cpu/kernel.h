// What a CPU kernel is: its arguments, its signature and its row in the table (dispatch/kernels.inc).
// Kernels see raw pointers and sizes that api/ has validated; they allocate nothing and know no threads.
// Kernel files include this, formats.h, intrinsics and C headers only: an inline std:: template instantiated in a
// file compiled for AVX-512 may be the copy the linker keeps for every CPU.
#ifndef LOWBIT_CPU_KERNEL_H
#define LOWBIT_CPU_KERNEL_H

#include <stdint.h>

#include "lowbit/formats.h"
#include "lowbit/lowbit.h"

namespace lowbit {

constexpr int kSlots = 16;  // partial sums of an output element: chunk c goes to slot c % 16 (docs/numerics.md)
constexpr int kLanes = 16;  // tokens of one tile of the token-interleaved layout

// Activations as integers: x[m][k] ~ step[m][c] * (256 * high + low), c = k / chunk. Both digits are int8; in int8
// mode there is only `low`. Zero beyond cols, up to cols_padded, so kernels work on whole planes.
// Rows (layout == kRows):   digit[m * cols_padded + k].
// Tiles (layout == kTiles): tokens in tiles of 16,
//                           digit[(m / 16) * 16 * cols_padded + (k / 4) * 64 + (m % 16) * 4 + k % 4],
//                           step and sum [(m / 16)][c][m % 16]; absent tokens of the last tile are zero.
struct Activations {
  enum Layout { kRows, kTiles };
  Layout layout;
  int64_t tokens, cols, cols_padded;  // cols_padded: a multiple of 512
  int64_t chunk;                      // codes a chunk: 16, 32, 64 or 128, or kTritChunk
  int64_t chunks;                     // ceil(cols / chunk)
  int64_t chunks_padded;              // a multiple of 16; step and sum are zero beyond chunks
  bool rows_share;                    // rows: their digits leave little of the L1 (dispatch/blocking.h)
  bool token_step;                    // int8 mode as BitNet defines it: one step a token, of at least 1e-5 / 127
  int8_t* high;                       // NULL in int8 mode
  int8_t* low;
  float* step;   // rows: [tokens][chunks_padded]; tiles: [tiles][chunks_padded][16]
  int32_t* sum;  // same shape: sum of 256 * high + low over the chunk
};

// Quantizes tokens [m0, m1) of x (dtype, stride in elements; column j of the matrix is column perm[j] of x) into `out`
// in either layout. With kTiles m0 is a multiple of 16 and m1 is one too or the number of tokens.
typedef void (*ActivationsKernel)(const void* x, lowbit_dtype dtype, int64_t stride, const int32_t* perm, int64_t m0,
                                  int64_t m1, const Activations* out);

// out[m * out_stride + n - n0] = x . W[n] for rows [n0, n1) and every token; n1 - n0 <= kRowBlock. fp32, no bias.
typedef void (*MatmulKernel)(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                             int64_t out_stride);
constexpr int64_t kRowBlock = 64;

// out[0 .. cols) = row n of W in original column order, in out_dtype (f32, f16, bf16). ids: see below.
// Decodes rows ids[0..count) (every id already checked; a negative one gives a row of zeros).
typedef void (*GatherKernel)(const lowbit_matrix* w, const int64_t* ids, int64_t count, void* out,
                             lowbit_dtype out_dtype, int64_t out_stride);

// y[m * y_stride + n] = tile[m * tile_stride + n] + bias[n] for m < tokens, n < rows, rounded once to dtype. bias: fp32
// or NULL.
typedef void (*StoreKernel)(const float* tile, int64_t tile_stride, const float* bias, int64_t tokens, int64_t rows,
                            void* y, lowbit_dtype dtype, int64_t y_stride);

// sum[j] = fma(weights[i], v, sum[j]) for i = 0, 1, ... count - 1, v being column j of row ids[i] in fp32, in the order
// that the matrix is packed in (perm is not read); a negative id is a row of zeros. weights NULL: all 1, which makes it a
// plain addition. For the columns of planes [plane_begin, plane_end): plane_begin is a multiple of kPlaneGrain, plane_end
// one too or the end. sum has places for whole planes; those beyond cols are left with anything.
typedef void (*BagsKernel)(const lowbit_matrix* w, const int64_t* ids, const float* weights, int64_t count,
                           int64_t plane_begin, int64_t plane_end, float* sum);
constexpr int64_t kPlaneGrain = 20;  // what every format's kernels walk by: 4 planes, or the 5 of a line of trits

// The index of the scale of (row, group), for [rows][G], [rows][1] and [1][1] scales alike.
inline int64_t scale_index(const lowbit_matrix* w, int64_t row, int64_t group) {
  return (w->scale_rows == 1 ? 0 : row) * w->scale_cols + (w->scale_cols == 1 ? 0 : group);
}

}  // namespace lowbit
#endif
