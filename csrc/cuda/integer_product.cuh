// A unit's product on int8 tensor cores: codes of any format as they are, activations as digits (quantize.cuh).
//
//   trit         float mode: two digits, int8 mode: one; a row with one scale is ONE integer, equal to the CPU's bit for bit
//   int2 .. 8    int8 mode: one digit
//   Whole: part += codes v, the scale once at the end.   Planes, Fine: part += scale * step * (codes v - zero * sum v).
//
// Trits come out of the top of products by 3 (formats.h): with X = 3^p b in 16-bit lanes (243 * 255 fits) and G its high
// bytes, digit p is G - 3 * (the G before), four bytes at once and never with a borrow: 5.5 operations a byte of weights.
// Lane c takes bytes 16c .. 16c+15 of a line; mma.m16n8k32's slots follow them in natural order, so that digits of
// activations lie in shared memory as they come. Per plane and digit: 1 LDS.128, 2 mma for 8 tokens.
#ifndef LOWBIT_CUDA_INTEGER_PRODUCT_CUH
#define LOWBIT_CUDA_INTEGER_PRODUCT_CUH

#include "cuda/decode.cuh"

namespace lowbit {
namespace cuda {

// The codes of a word's four bytes, plane after plane, as bytes.
template <int Bits>
struct CodeBytes {
  static constexpr int kLines = Format<Bits>::kLines;
  uint32_t line[kLines];

  __device__ __forceinline__ void start(const uint32_t (&lines)[kLines]) {
    for (int l = 0; l < kLines; l++) line[l] = lines[l];
  }
  __device__ __forceinline__ uint32_t plane(int p) {
    const uint32_t mask = (1u << Bits) - 1;
    return Terms<Bits, false>::plane_word(line, p) >> Terms<Bits, false>::position(p, 0) & mask * 0x01010101u;
  }
};

template <>
struct CodeBytes<kTrit> {
  uint32_t even, odd, before;  // X of bytes 0, 2 and 1, 3 in 16-bit lanes; the G of the plane before

  __device__ __forceinline__ void start(const uint32_t (&lines)[1]) {
    even = lines[0] & 0x00ff00ffu;
    odd = lines[0] >> 8 & 0x00ff00ffu;
    before = 0;
  }
  __device__ __forceinline__ uint32_t plane(int) {
    even *= 3;
    odd *= 3;
    const uint32_t top = byte_perm(even, odd, 0x7351), digits = top - 3 * before;
    before = top;
    return digits;
  }
};

template <Spans S>
struct SumOf {
  using Type = float;
  using Type4 = float4;
};
template <>
struct SumOf<Spans::whole> {
  using Type = uint32_t;  // an integer modulo 2^32; the last of them fits int32
  using Type4 = uint4;
};

template <int Bits, int Digits, int TokenTiles, Spans S>
class IntegerProduct {
 public:
  using Sum = typename SumOf<S>::Type;
  using Sum4 = typename SumOf<S>::Type4;
  static constexpr int kBits = Bits, kTokenTiles = TokenTiles, kLines = Format<Bits>::kLines;
  static constexpr int kPlanes = Format<Bits>::kPlanes;
  static constexpr Scales kScales = S == Spans::plane ? Scales::plane : Scales::fine;
  static constexpr int kResident = resident_blocks(Bits, TokenTiles, true, S);
  static constexpr int kSpanCols = S == Spans::plane ? 64 : 16;

  // Digits [digit][token][x_stride], then for every span of the staged columns [span][8 * TokenTiles] {step, sum}.
  __device__ static void stage(const DecodeArguments& a, int32_t tokens, int32_t first_unit, int32_t units) {
    const int32_t first_col = first_unit * 64 * kPlanes, cols = units * 64 * kPlanes;
    const int32_t pieces = cols / 16;
    for (int32_t i = int32_t(threadIdx.x); i < Digits * tokens * pieces; i += kThreads) {
      const int32_t line = i / pieces, piece = i - line * pieces;  // line: digit * tokens + token
      const int32_t digit = line / tokens, token = line - digit * tokens;
      const int8_t* from = a.digits + (digit * int64_t(a.o.tokens) + a.first_token + token) * a.x_cols + first_col;
      sts<uint4>(uint32_t((digit * a.plan.pass_tokens + token) * a.plan.x_stride + 16 * piece),
                 ldg(reinterpret_cast<const uint4*>(from + 16 * piece)));
    }
    if (S == Spans::whole) return;  // finish() reads the token's step and sum
    const int32_t spans = cols / kSpanCols;
    for (int32_t i = int32_t(threadIdx.x); i < spans * 8 * TokenTiles; i += kThreads) {
      const int32_t span = i / (8 * TokenTiles), token = i % (8 * TokenTiles);
      const int64_t from = (a.first_token + token) * a.spans + first_col / kSpanCols + span;
      const bool present = token < tokens;
      sts<uint2>(a.plan.sums_at + 8 * uint32_t(i),
                 {present ? as_bits(ldg(a.steps + from)) : 0u, present ? uint32_t(ldg(a.sums + from)) : 0u});
    }
  }

  __device__ __forceinline__ IntegerProduct(const DecodeArguments& a, int lane, int32_t tokens) : lane_(lane) {
#pragma unroll
    for (int n = 0; n < TokenTiles; n++)
#pragma unroll
      for (int d = 0; d < Digits; d++) {
        const int32_t token = min(8 * n + (lane >> 2), tokens - 1);
        x_at_[n][d] = uint32_t((d * a.plan.pass_tokens + token) * a.plan.x_stride + 16 * (lane & 3));
      }
    sums_at_ = a.plan.sums_at + 16 * uint32_t(lane & 3);
  }

  __device__ __forceinline__ void multiply_unit(const MatrixArguments& w, const LaneRows& rows, uint32_t slot,
                                                int32_t first_plane, int32_t staged_plane,
                                                Sum (&part)[TokenTiles][4]) const {
    CodeBytes<Bits> bytes[2][4];
    {
      uint4 line[kLines][2];
#pragma unroll
      for (int l = 0; l < kLines; l++)
#pragma unroll
        for (int r = 0; r < 2; r++) line[l][r] = lds<uint4>(slot + uint32_t((l * 2 + r) * 512 + lane_ * 16));
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int v = 0; v < 4; v++) {
          uint32_t of_lines[kLines];
#pragma unroll
          for (int l = 0; l < kLines; l++) {
            const uint4& q = line[l][r];
            of_lines[l] = v == 0 ? q.x : v == 1 ? q.y : v == 2 ? q.z : q.w;
          }
          bytes[r][v].start(of_lines);
        }
    }
    int32_t acc[TokenTiles][Digits][4] = {};
#pragma unroll
    for (int p = 0; p < kPlanes; p++) {
      uint32_t codes[2][4];
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int v = 0; v < 4; v++) codes[r][v] = bytes[r][v].plane(p);
      uint4 b[TokenTiles][Digits];
#pragma unroll
      for (int n = 0; n < TokenTiles; n++)
#pragma unroll
        for (int d = 0; d < Digits; d++) b[n][d] = lds<uint4>(x_at_[n][d] + uint32_t(64 * (staged_plane + p)));
      if constexpr (S == Spans::whole) {
        multiply_plane(codes, b, ~0u, acc);
      } else if constexpr (S == Spans::plane) {
        multiply_plane(codes, b, ~0u, acc);
        const int32_t group = unit_group<kScales>(w, first_plane + p);
        float scale[2];
        int zero[2];
        read_words<Bits>(w, rows, slot + uint32_t(kLines * 1024 + 128 * p), group, lane_, scale, zero);
        add_span(acc, uint32_t(staged_plane + p), scale, zero, part);
      } else {
#pragma unroll 1
        for (int q = 0; q < 4; q++) {
          multiply_plane(codes, b, (lane_ & 3) == q ? ~0u : 0, acc);
          const int32_t group = column_group(w, 64 * (first_plane + p) + 16 * q);
          float scale[2];
          int zero[2];
          load_scales<Bits>(w, rows, group, scale, zero);
          add_span(acc, uint32_t(4 * (staged_plane + p) + q), scale, zero, part);
        }
      }
    }
    if constexpr (S == Spans::whole) {
#pragma unroll
      for (int n = 0; n < TokenTiles; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) part[n][i] += Sum(joined(acc[n], i));
    }
  }

  // Whole: (sum of codes v - middle * sum v) * (scale * step), the product of docs/numerics.md with one chunk.
  __device__ __forceinline__ static float finish(const DecodeArguments& a, int64_t row, int32_t token, Sum total) {
    if (S != Spans::whole) return float(total);
    const int64_t t = a.first_token + token;
    const uint32_t product = uint32_t(total) - uint32_t(middle_code(Bits)) * uint32_t(ldg(a.sums + t));
    return float(int32_t(product)) * (load_scale(a.w, row, 0) * ldg(a.steps + t));
  }

 private:
  // 256 * high + low, modulo 2^32.
  __device__ __forceinline__ static uint32_t joined(const int32_t (&acc)[Digits][4], int i) {
    return uint32_t(acc[0][i]) + (Digits == 2 ? 256u * uint32_t(acc[Digits - 1][i]) : 0u);
  }

  __device__ __forceinline__ void multiply_plane(const uint32_t (&codes)[2][4], const uint4 (&b)[TokenTiles][Digits],
                                                 uint32_t mask, int32_t (&acc)[TokenTiles][Digits][4]) const {
#pragma unroll
    for (int v = 0; v < 2; v++) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = codes[i & 1][2 * v + (i >> 1)] & mask;
#pragma unroll
      for (int n = 0; n < TokenTiles; n++)
#pragma unroll
        for (int d = 0; d < Digits; d++) mma_u8s8(acc[n][d], a, v ? b[n][d].z : b[n][d].x, v ? b[n][d].w : b[n][d].y);
    }
  }

  // part += scale * step * (acc - zero * sum) of one span; acc is zero afterwards.
  __device__ __forceinline__ void add_span(int32_t (&acc)[TokenTiles][Digits][4], uint32_t span,
                                           const float (&scale)[2], const int (&zero)[2],
                                           Sum (&part)[TokenTiles][4]) const {
#pragma unroll
    for (int n = 0; n < TokenTiles; n++) {
      const uint4 two = lds<uint4>(sums_at_ + 64 * TokenTiles * span + 64 * uint32_t(n));  // tokens 2c and 2c + 1
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float step = as_float(i & 1 ? two.z : two.x);
        const uint32_t sum = i & 1 ? two.w : two.y;
        const int32_t product = int32_t(joined(acc[n], i) - uint32_t(zero[i >> 1]) * sum);
        part[n][i] = Sum(fmaf(float(product), scale[i >> 1] * step, float(part[n][i])));
#pragma unroll
        for (int d = 0; d < Digits; d++) acc[n][d][i] = 0;
      }
    }
  }

  int lane_;
  uint32_t x_at_[TokenTiles][Digits];  // of token 8n + g (absent: the last), at byte 16c of a plane
  uint32_t sums_at_;                   // of token 2c
};

}  // namespace cuda
}  // namespace lowbit
#endif
