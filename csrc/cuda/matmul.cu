// matmul: plans, prepares activations where the plan says so, and launches pass after pass on the caller's stream.
#include "cuda/decode.cuh"
#include "cuda/matmul_plan.h"
#include "cuda/plain.cuh"
#include "cuda/prepare.cuh"
#include "cuda/quantize.cuh"
#include "cuda/status.cuh"
#include "cuda/tile.cuh"
#include "cuda/verbs.cuh"

namespace lowbit {
namespace cuda {

// Instantiated in <format>_matmul.cu.
template <int Bits>
cudaError_t launch_decode(const MatmulPlan& plan, const DecodeArguments& a, cudaStream_t stream);
template <int Bits>
cudaError_t launch_integer(const MatmulPlan& plan, const DecodeArguments& a, cudaStream_t stream);
template <int Bits>
cudaError_t launch_tile(const MatmulPlan& plan, const TileArguments& a, cudaStream_t stream);
template <int Bits>
cudaError_t launch_plain(const PlainArguments& a, cudaStream_t stream);

namespace {

#define LOWBIT_OF_FORMAT(call, bits, ...) \
  (bits) == 2   ? call<2>(__VA_ARGS__)    \
  : (bits) == 3 ? call<3>(__VA_ARGS__)    \
  : (bits) == 4 ? call<4>(__VA_ARGS__)    \
                : call<8>(__VA_ARGS__)

// Tokens of one launch's grid: the y dimension ends at 65535 blocks.
constexpr int64_t kMostTokens = 65535 * 4;

cudaError_t multiply(const MatmulPlan& plan, const CudaMatmul& c, const MatrixArguments& w, const Operands& o,
                     cudaStream_t stream) {
  const int bits = c.w.format;
  char* workspace = static_cast<char*>(c.workspace);
  auto at = [&](int64_t offset) { return static_cast<void*>(workspace + offset); };

  if (plan.kernel == Kernel::tile) {
    const int64_t block_tokens = kTileTokens * plan.tile.token_tiles;
    TileArguments a{};
    a.w = w;
    a.o = o;
    a.plan = plan.tile;
    a.units = int32_t(plan.x_cols / unit_cols(bits));
    a.x = static_cast<const uint16_t*>(at(plan.x_at));
    a.sums = static_cast<const float*>(at(plan.sums_at));
    a.x_cols = plan.x_cols;
    a.tokens_padded = ceil_div(c.tokens, block_tokens) * block_tokens;
    a.parts = static_cast<float*>(at(plan.parts_at));
    a.tickets = static_cast<uint32_t*>(c.workspace);
    const PrepareArguments prepare{w,
                                   o,
                                   static_cast<uint16_t*>(at(plan.x_at)),
                                   static_cast<float*>(at(plan.sums_at)),
                                   int32_t(plan.x_cols),
                                   a.tokens_padded};
    const cudaError_t error = prepare_activations(prepare, stream);
    return error != cudaSuccess ? error : LOWBIT_OF_FORMAT(launch_tile, bits, plan, a, stream);
  }

  int8_t* digits = plan.digits ? static_cast<int8_t*>(at(plan.x_at)) : nullptr;
  float* steps = plan.digits ? static_cast<float*>(at(plan.steps_at)) : nullptr;
  int32_t* sums = plan.digits ? static_cast<int32_t*>(at(plan.sums_at)) : nullptr;
  const int32_t spans = plan.digits ? int32_t(ceil_div(plan.x_cols, plan.span)) : 0;
  if (plan.digits) {
    const bool token_step = bits == kTrit && c.activations == LOWBIT_ACT_INT8;
    const QuantizeArguments q{c.x,
                              c.w.perm,
                              c.x_stride,
                              c.tokens,
                              int32_t(c.dtype),
                              w.cols,
                              int32_t(plan.x_cols),
                              plan.chunk,
                              plan.digits == 2,
                              token_step,
                              plan.span,
                              spans,
                              digits,
                              steps,
                              sums};
    const cudaError_t error = quantize_activations(q, stream);
    if (error != cudaSuccess) return error;
  }
  if (plan.kernel == Kernel::plain) {
    const PlainArguments a{w, o, digits, steps, int32_t(plan.x_cols), plan.span, spans};
    return bits == kTrit ? launch_plain<kTrit>(a, stream) : LOWBIT_OF_FORMAT(launch_plain, bits, a, stream);
  }
  DecodeArguments a{
      w,      o,     plan.decode, Slices(bits, c.w.cols), 0,    at(plan.parts_at), static_cast<uint32_t*>(c.workspace),
      digits, steps, sums,        int32_t(plan.x_cols),   spans};
  for (; a.first_token < c.tokens; a.first_token += plan.decode.pass_tokens) {
    const cudaError_t error = plan.kernel == Kernel::decode ? LOWBIT_OF_FORMAT(launch_decode, bits, plan, a, stream)
                              : bits == kTrit               ? launch_integer<kTrit>(plan, a, stream)
                                                            : LOWBIT_OF_FORMAT(launch_integer, bits, plan, a, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

lowbit_status matmul(const lowbit_cuda_queue* queue, const lowbit_cuda_device* device, const CudaMatmul* call,
                     CudaMessage* message) {
  const CurrentDevice current(queue->device);
  if (current.error() != cudaSuccess) return succeed_or(current.error(), "matmul", message);
  const int64_t width = call->dtype == LOWBIT_F32 ? 4 : 2;
  const MatrixArguments w = matrix_arguments(call->w);
  // One plan for all parts: a smaller last part must not take another kernel, whose tickets would lie elsewhere.
  const int64_t most = call->tokens < kMostTokens ? call->tokens : kMostTokens;
  const MatmulPlan plan = plan_matmul(call->w, most, call->dtype, call->activations, *device);
  for (int64_t first = 0; first < call->tokens; first += kMostTokens) {
    CudaMatmul part = *call;
    part.tokens = call->tokens - first < most ? call->tokens - first : most;
    part.x = static_cast<const char*>(call->x) + first * call->x_stride * width;
    part.y = static_cast<char*>(call->y) + first * call->y_stride * width;
    Operands o{};
    o.x = part.x;
    o.bias = part.bias;
    o.y = part.y;
    o.x_stride = part.x_stride;
    o.y_stride = part.y_stride;
    o.dtype = part.dtype;
    o.bias_dtype = part.bias_dtype;
    o.tokens = int32_t(part.tokens);
    o.x_vectors = !part.w.perm && width == 2 && reinterpret_cast<uintptr_t>(part.x) % 16 == 0 &&
                  (part.tokens == 1 || part.x_stride % 8 == 0);
    const lowbit_status status =
        succeed_or(multiply(plan, part, w, o, static_cast<cudaStream_t>(queue->stream)), "matmul", message);
    if (status != LOWBIT_OK) return status;
  }
  return LOWBIT_OK;
}

}  // namespace cuda
}  // namespace lowbit
