// Gathers, swaps and sums activations (stage.cuh says how) once for all blocks of a product. One block a token; bound by
// latency and by the bytes of x, read once and written once.
#include "cuda/prepare.cuh"

#include "cuda/stage.cuh"

namespace lowbit {
namespace cuda {
namespace {

template <bool Bf16>
__global__ void __launch_bounds__(kThreads) prepare(const PrepareArguments a) {
  for (int64_t token = blockIdx.x; token < a.tokens_padded; token += gridDim.x) {
    const bool present = token < a.o.tokens;
    for (int32_t base = 0; base < a.x_cols / 8; base += kThreads) {
      const int32_t at = base + int32_t(threadIdx.x);
      uint4 v = make_uint4(0, 0, 0, 0);
      if (present && at < a.x_cols / 8) {
        v = load_8_columns(a.w, a.o, token, 8 * at);
        reinterpret_cast<uint4*>(a.x + token * a.x_cols)[at] = swap_middles(v);
      }
      float sum = sum_8<Bf16>(v);
      for (int mask = 1; mask < 8; mask <<= 1) sum += shuffle_xor(sum, mask);
      if (at < a.x_cols / 8 && !(at & 7)) a.sums[(at >> 3) * a.tokens_padded + token] = sum;
    }
  }
}

}  // namespace

cudaError_t prepare_activations(const PrepareArguments& a, cudaStream_t stream) {
  const int64_t blocks = a.tokens_padded < 65535 ? a.tokens_padded : 65535;
  return launch(a.o.dtype == LOWBIT_BF16 ? prepare<true> : prepare<false>, dim3(unsigned(blocks)), kThreads, 0, stream,
                a);
}

}  // namespace cuda
}  // namespace lowbit
