// Products without tensor cores: any format, activations and device; what runs before sm_75, and for fp32 activations,
// whose 24 bits no tensor core keeps.
//
//   y[m][n] = sum_k x[m][k] (scale * (code - zero)) + bias[n], every product and sum in fp32
//
// A warp takes a row and up to 4 tokens: lane l has bytes 2l, 2l+1 of every line, so columns 64p + 2l, 64p + 2l + 1 of
// every plane, whose activations it reads as they lie. Bound by its fma; lanes are added as a tree, in one order.
#ifndef LOWBIT_CUDA_PLAIN_CUH
#define LOWBIT_CUDA_PLAIN_CUH

#include "cuda/arguments.cuh"

namespace lowbit {
namespace cuda {

struct PlainArguments {
  MatrixArguments w;
  Operands o;
  // int8 mode: activations as digits (quantize.cuh), x = step * digit; else NULL.
  const int8_t* digits;
  const float* steps;
  int32_t x_cols, span, spans;
};

constexpr int kPlainTokens = 4;

template <int Bits>
__global__ void __launch_bounds__(kThreads, 3) plain(const PlainArguments a) {
  constexpr int kLines = Format<Bits>::kLines, kPlanes = Format<Bits>::kPlanes;
  const MatrixArguments& w = a.w;
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  const int64_t first = int64_t(blockIdx.y) * kPlainTokens;
  const int tokens = int(min(int64_t(kPlainTokens), a.o.tokens - first));
  if (row >= w.rows) return;
  auto activation = [&](int64_t token, int32_t k) {
    if (a.digits) return ldg(a.steps + token * a.spans + k / a.span) * float(ldg(a.digits + token * a.x_cols + k));
    const int32_t from = w.perm ? int32_t(min(uint32_t(ldg(w.perm + k)), uint32_t(w.cols - 1))) : k;
    return load_float(a.o.x, a.o.dtype, token * a.o.x_stride + from);
  };
  float sum[kPlainTokens] = {};
  const uint8_t* lines = w.codes + row * w.row_lines * kLineBytes + 2 * lane;
  const int32_t units = (w.row_lines + kLines - 1) / kLines;
  for (int32_t unit = 0; unit < units; unit++) {
    const bool is_short = Bits == 3 && (unit + 1) * kLines > w.row_lines;  // one low line, then the high line
    uint32_t line[kLines];
#pragma unroll
    for (int l = 0; l < kLines; l++)
      line[l] = ldg(reinterpret_cast<const uint16_t*>(lines + (int64_t(unit) * kLines + (is_short && l ? l - 1 : l)) *
                                                                  kLineBytes));
#pragma unroll
    for (int p = 0; p < kPlanes; p++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int32_t k = (unit * kPlanes + p) * 64 + 2 * lane + i;
        if (k >= w.cols) continue;
        int code;
        if constexpr (Bits == kTrit)
          code = trit_digit(int(line[0] >> 8 * i & 255), p);
        else
          code = int(Terms<Bits, false>::plane_word(line, p) >> (8 * i + Terms<Bits, false>::position(p, 0)) &
                     ((1u << Bits) - 1));
        const int32_t group = column_group(w, k);
        const int zero = w.zeros ? int(ldg(w.zeros + row * w.scale_row_stride + group)) : middle_code(Bits);
        const float weight = load_scale(w, row, group) * float(code - zero);
#pragma unroll
        for (int t = 0; t < kPlainTokens; t++)
          if (t < tokens) sum[t] = fmaf(activation(first + t, k), weight, sum[t]);
      }
  }
#pragma unroll
  for (int t = 0; t < kPlainTokens; t++)
    for (int mask = 16; mask; mask >>= 1) sum[t] += shuffle_xor(sum[t], mask);
  if (lane >= tokens) return;
  float y = 0;
#pragma unroll
  for (int t = 0; t < kPlainTokens; t++)
    if (t == lane) y = sum[t];
  if (a.o.bias) y += load_float(a.o.bias, a.o.bias_dtype, row);
  store_float(a.o.y, a.o.dtype, (first + lane) * a.o.y_stride + row, y);
}

}  // namespace cuda
}  // namespace lowbit
#endif
