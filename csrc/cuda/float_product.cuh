// A unit's product on fp16 or bf16 tensor cores: int2, int3, int4, int8, activations as they are.
//
//   part[row][token] += scale * (worth * acc),  acc = sum codes' numbers * x - zero point's number * sum x, a plane at a time
//
// Per unit of 16 rows: 2 * lines LDS.128 of codes; per plane 2 LDS.128 of activations, 4 mma, 4 fma for 8 tokens.
#ifndef LOWBIT_CUDA_FLOAT_PRODUCT_CUH
#define LOWBIT_CUDA_FLOAT_PRODUCT_CUH

#include "cuda/decode.cuh"
#include "cuda/stage.cuh"

namespace lowbit {
namespace cuda {

// part[n][i] += (codes - zeros) scales x over one plane of 16 rows, or over the columns of it that lie in one group:
// A is masked to the lanes whose 16 columns do.
template <int Bits, bool Bf16, int TokenTiles>
__device__ __forceinline__ void multiply_plane(const uint32_t (&words)[2][4], int p, const uint4 (&b)[TokenTiles][2],
                                               const float (&sums)[TokenTiles][2], const float (&scale)[2],
                                               const int (&zero)[2], uint32_t mask, float (*part)[4]) {
  using T = Terms<Bits, Bf16>;
#pragma unroll
  for (int t = 0; t < T::kTerms; t++) {
    float acc[TokenTiles][4];
#pragma unroll
    for (int n = 0; n < TokenTiles; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        acc[n][i] = -(T::kBase + T::step(p, t) * float(T::zero_part(zero[i >> 1], t))) * sums[n][i & 1];
#pragma unroll
    for (int v = 0; v < 4; v++) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = T::pair(words[i & 1][v], p, t, i >> 1) & mask;
#pragma unroll
      for (int n = 0; n < TokenTiles; n++) {
        const uint4& x = b[n][v >> 1];
        mma<Bf16>(acc[n], a, v & 1 ? x.z : x.x, v & 1 ? x.w : x.y);
      }
    }
#pragma unroll
    for (int n = 0; n < TokenTiles; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) part[n][i] = fmaf(acc[n][i], scale[i >> 1] * T::worth(p, t), part[n][i]);
  }
}

// The sums of a lane's tokens 8n + 2c and 8n + 2c + 1.
template <int TokenTiles>
__device__ __forceinline__ void read_sums(uint32_t at, float (&sums)[TokenTiles][2]) {
#pragma unroll
  for (int n = 0; n < TokenTiles; n++) {
    const float2 two = lds<float2>(at + uint32_t(32 * n));
    sums[n][0] = two.x;
    sums[n][1] = two.y;
  }
}

// The four words of plane p of both of a lane's rows.
template <class T>
__device__ __forceinline__ void plane_words(const uint4 (&line)[T::kLines][2], int p, uint32_t (&words)[2][4]) {
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int v = 0; v < 4; v++) {
      uint32_t of_lines[T::kLines];
#pragma unroll
      for (int l = 0; l < T::kLines; l++) {
        const uint4& q = line[l][r];
        of_lines[l] = v == 0 ? q.x : v == 1 ? q.y : v == 2 ? q.z : q.w;
      }
      words[r][v] = T::plane_word(of_lines, p);
    }
}

// part += one unit of RowTiles * 16 rows. slot: the unit of the first 16, slot_bytes apart; first_plane: of the unit in
// its row; x_at: shared memory of the unit's first plane for token 8n + g, at byte 32c; sums_at: its sums, of token 2c.
template <int Bits, bool Bf16, int RowTiles, int TokenTiles, Scales Groups>
__device__ __forceinline__ void multiply_unit(const MatrixArguments& w, const LaneRows (&rows)[RowTiles], uint32_t slot,
                                              uint32_t slot_bytes, int lane, int32_t first_plane,
                                              const uint32_t (&x_at)[TokenTiles], uint32_t sums_at,
                                              float (&part)[RowTiles][TokenTiles][4]) {
  using T = Terms<Bits, Bf16>;
  uint4 line[RowTiles][T::kLines][2];
  float scale[RowTiles][2];
  int zero[RowTiles][2];
#pragma unroll
  for (int tile = 0; tile < RowTiles; tile++) {
    const uint32_t at = slot + uint32_t(tile) * slot_bytes;
#pragma unroll
    for (int l = 0; l < T::kLines; l++)
#pragma unroll
      for (int r = 0; r < 2; r++) line[tile][l][r] = lds<uint4>(at + uint32_t((l * 2 + r) * 512 + lane * 16));
    if constexpr (Groups == Scales::unit)
      read_words<Bits>(w, rows[tile], at + uint32_t(T::kLines * 1024), plane_group(w, first_plane), lane, scale[tile],
                       zero[tile]);
  }
  constexpr int kAtOnce = TokenTiles < 4 ? TokenTiles : 4;  // tiles of tokens whose fragments are in registers
  constexpr int kShared = shared_planes(Groups, T::kPlanes);
#pragma unroll
  for (int p = 0; p < T::kPlanes; p++) {
    const int32_t plane = first_plane + p;
#pragma unroll
    for (int first = 0; first < TokenTiles; first += kAtOnce) {
      uint4 b[kAtOnce][2];
#pragma unroll
      for (int n = 0; n < kAtOnce; n++)
#pragma unroll
        for (int v = 0; v < 2; v++) b[n][v] = lds<uint4>(x_at[first + n] + uint32_t(128 * p + 16 * v));
      if constexpr (Groups != Scales::fine) {
        float sums[kAtOnce][2];
        read_sums(sums_at + uint32_t(32 * TokenTiles * p + 32 * first), sums);
#pragma unroll
        for (int tile = 0; tile < RowTiles; tile++) {
          uint32_t words[2][4];
          plane_words<T>(line[tile], p, words);
          // Scales are kept for the planes that share them, unless sums take the registers.
          if (Groups != Scales::unit && (TokenTiles > 2 || p % kShared == 0))
            read_words<Bits>(w, rows[tile],
                             slot + uint32_t(tile) * slot_bytes + uint32_t(T::kLines * 1024 + 128 * (p / kShared)),
                             unit_group<Groups>(w, plane), lane, scale[tile], zero[tile]);
          multiply_plane<Bits, Bf16, kAtOnce>(words, p, b, sums, scale[tile], zero[tile], ~0u, &part[tile][first]);
        }
      } else {
        static_assert(Groups != Scales::fine || (RowTiles == 1 && TokenTiles == kAtOnce),
                      "finer groups: one tile at a time");
        uint32_t words[2][4];
        plane_words<T>(line[0], p, words);
        int32_t done = -1;
#pragma unroll 1
        for (int q = 0; q < 4; q++) {  // each group that has columns here, in order
          const int32_t group = column_group(w, 64 * plane + 16 * q);
          if (group == done) continue;
          done = group;
          float sums[kAtOnce][2] = {};
          for (int s = q; s < 4 && column_group(w, 64 * plane + 16 * s) == group; s++) {
            float more[kAtOnce][2];
            read_sums(sums_at + uint32_t(32 * TokenTiles * (4 * p + s)), more);
#pragma unroll
            for (int n = 0; n < kAtOnce; n++) sums[n][0] += more[n][0], sums[n][1] += more[n][1];
          }
          load_scales<Bits>(w, rows[0], group, scale[0], zero[0]);
          const uint32_t mask = column_group(w, 64 * plane + 16 * (lane & 3)) == group ? ~0u : 0;
          multiply_plane<Bits, Bf16, kAtOnce>(words, p, b, sums, scale[0], zero[0], mask, part[0]);
        }
      }
    }
  }
}

template <int Bits, bool Bf16, int TokenTiles, Scales Groups>
class FloatProduct {
 public:
  using Sum = float;
  using Sum4 = float4;
  static constexpr int kBits = Bits, kTokenTiles = TokenTiles;
  static constexpr Scales kScales = Groups;
  static constexpr int kResident = resident_blocks(Bits, TokenTiles, false, Spans::whole);

  __device__ static void stage(const DecodeArguments& a, int32_t tokens, int32_t first_unit, int32_t units) {
    constexpr int32_t kCols = 64 * Format<Bits>::kPlanes;
    stage_activations<Bf16, Groups == Scales::fine>(a.w, a.o, a.first_token, tokens, kTileTokens * TokenTiles,
                                                    first_unit * kCols, units * kCols, 0, a.plan.x_stride,
                                                    a.plan.sums_at);
  }

  __device__ __forceinline__ FloatProduct(const DecodeArguments& a, int lane, int32_t tokens) : lane_(lane) {
#pragma unroll
    for (int n = 0; n < TokenTiles; n++)
      x_at_[n] = uint32_t(min(8 * n + (lane >> 2), tokens - 1) * a.plan.x_stride + 32 * (lane & 3));
    sums_at_ = a.plan.sums_at + 8 * uint32_t(lane & 3);
  }

  __device__ __forceinline__ void multiply_unit(const MatrixArguments& w, const LaneRows& rows, uint32_t slot,
                                                int32_t first_plane, int32_t staged_plane,
                                                float (&part)[TokenTiles][4]) const {
    uint32_t x_at[TokenTiles];
#pragma unroll
    for (int n = 0; n < TokenTiles; n++) x_at[n] = x_at_[n] + uint32_t(128 * staged_plane);
    const uint32_t sums = sums_at_ + uint32_t(32 * TokenTiles * (Groups == Scales::fine ? 4 : 1) * staged_plane);
    cuda::multiply_unit<Bits, Bf16, 1, TokenTiles, Groups>(w, reinterpret_cast<const LaneRows(&)[1]>(rows), slot, 0,
                                                           lane_, first_plane, x_at, sums,
                                                           reinterpret_cast<float (&)[1][TokenTiles][4]>(part));
  }

  __device__ __forceinline__ static float finish(const DecodeArguments&, int64_t, int32_t, float total) {
    return total;
  }

 private:
  int lane_;
  uint32_t x_at_[TokenTiles];  // of token 8n + g (absent: the last), at byte 32c of a plane
  uint32_t sums_at_;           // of token 2c
};

}  // namespace cuda
}  // namespace lowbit
#endif
