// From a plan's numbers to the kernel that was compiled for them. Each format's .cu file instantiates these.
#ifndef LOWBIT_CUDA_LAUNCHERS_CUH
#define LOWBIT_CUDA_LAUNCHERS_CUH

#include "cuda/integer_product.cuh"
#include "cuda/plain.cuh"
#include "cuda/tile.cuh"

namespace lowbit {
namespace cuda {

template <class Product>
cudaError_t launch_product(const DecodePlan& p, const DecodeArguments& a, cudaStream_t stream) {
  return launch(decode<Product>, dim3(unsigned(p.blocks_x), unsigned(p.blocks_y)), kThreads, p.shared_bytes, stream, a);
}

template <int Bits, bool Bf16, int TokenTiles>
cudaError_t launch_decode_of(const MatmulPlan& plan, const DecodeArguments& a, cudaStream_t stream) {
  switch (plan.scales) {
    case Scales::unit:
      return launch_product<FloatProduct<Bits, Bf16, TokenTiles, Scales::unit>>(plan.decode, a, stream);
    case Scales::plane:
      if constexpr (Bits != 8)  // whose units are planes
        return launch_product<FloatProduct<Bits, Bf16, TokenTiles, Scales::plane>>(plan.decode, a, stream);
      [[fallthrough]];
    case Scales::pair:
      if constexpr (Bits == 2 || Bits == 3)
        return launch_product<FloatProduct<Bits, Bf16, TokenTiles, Scales::pair>>(plan.decode, a, stream);
      [[fallthrough]];
    default: return launch_product<FloatProduct<Bits, Bf16, TokenTiles, Scales::fine>>(plan.decode, a, stream);
  }
}

// One pass of up to 16 tokens, fp16 or bf16.
template <int Bits>
cudaError_t launch_decode(const MatmulPlan& plan, const DecodeArguments& a, cudaStream_t stream) {
  const bool two = plan.decode.pass_tokens > kTileTokens;
  if (a.o.dtype == LOWBIT_BF16)
    return two ? launch_decode_of<Bits, true, 2>(plan, a, stream) : launch_decode_of<Bits, true, 1>(plan, a, stream);
  return two ? launch_decode_of<Bits, false, 2>(plan, a, stream) : launch_decode_of<Bits, false, 1>(plan, a, stream);
}

template <int Bits, int Digits, int TokenTiles>
cudaError_t launch_integer_of(const MatmulPlan& plan, const DecodeArguments& a, cudaStream_t stream) {
  if constexpr (Bits == kTrit)
    if (plan.spans == Spans::whole)
      return launch_product<IntegerProduct<Bits, Digits, TokenTiles, Spans::whole>>(plan.decode, a, stream);
  if (plan.spans == Spans::plane)
    return launch_product<IntegerProduct<Bits, Digits, TokenTiles, Spans::plane>>(plan.decode, a, stream);
  return launch_product<IntegerProduct<Bits, Digits, TokenTiles, Spans::fine>>(plan.decode, a, stream);
}

// One pass of up to 16 tokens, as digits.
template <int Bits>
cudaError_t launch_integer(const MatmulPlan& plan, const DecodeArguments& a, cudaStream_t stream) {
  const bool two = plan.decode.pass_tokens > kTileTokens;
  if constexpr (Bits == kTrit)  // the float mode of the other formats stays floating point
    if (plan.digits == 2)
      return two ? launch_integer_of<Bits, 2, 2>(plan, a, stream) : launch_integer_of<Bits, 2, 1>(plan, a, stream);
  return two ? launch_integer_of<Bits, 1, 2>(plan, a, stream) : launch_integer_of<Bits, 1, 1>(plan, a, stream);
}

template <int Bits, bool Bf16>
cudaError_t launch_tile_of(const MatmulPlan& plan, const TileArguments& a, cudaStream_t stream) {
  const TilePlan& p = plan.tile;
  auto start = [&](void (*kernel)(TileArguments)) {
    const int64_t rows = kTileRows * kWarps * p.row_tiles, tokens = kTileTokens * p.token_tiles;
    const dim3 grid(unsigned(ceil_div(a.w.rows, rows)), unsigned(ceil_div(a.o.tokens, tokens)), unsigned(p.splits));
    return launch(kernel, grid, kThreads, p.shared_bytes, stream, a);
  };
  if constexpr (Bits == 2 || Bits == 4)
    if (p.row_tiles == 2) return start(tile<Bits, Bf16, 2, 8, Scales::plane>);
  if constexpr (Bits >= 4)
    if (p.scales == Scales::unit)
      return start(p.token_tiles == 8 ? tile<Bits, Bf16, 1, 8, Scales::unit> : tile<Bits, Bf16, 1, 4, Scales::unit>);
  if constexpr (Bits != 8)
    return start(p.token_tiles == 8 ? tile<Bits, Bf16, 1, 8, Scales::plane> : tile<Bits, Bf16, 1, 4, Scales::plane>);
  return cudaErrorInvalidValue;  // int8's units are planes: the plan never says so
}

template <int Bits>
cudaError_t launch_tile(const MatmulPlan& plan, const TileArguments& a, cudaStream_t stream) {
  return a.o.dtype == LOWBIT_BF16 ? launch_tile_of<Bits, true>(plan, a, stream)
                                  : launch_tile_of<Bits, false>(plan, a, stream);
}

template <int Bits>
cudaError_t launch_plain(const PlainArguments& a, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(a.w.rows, kWarps)), unsigned(ceil_div(a.o.tokens, kPlainTokens)));
  return launch(plain<Bits>, grid, kThreads, 0, stream, a);
}

}  // namespace cuda
}  // namespace lowbit
#endif
