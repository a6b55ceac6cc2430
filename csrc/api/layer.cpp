// What a decoder layer does between its products: checks, then the kernel, on as many threads as the work is worth.
#include <cinttypes>

#include "api/validate.h"
#include "dispatch/parallel.h"
#include "dispatch/select.h"

namespace lowbit {
namespace {

constexpr int64_t kSerialElements = 1 << 15;  // of a norm or a gate
constexpr double kSerialWork = 1 << 16;       // multiply-adds of an attention, 10 us

lowbit_status check_rows(lowbit_dtype dtype, int64_t tokens, int64_t size) {
  if (!is_float(dtype)) return fail(LOWBIT_INVALID_ARGUMENT, "dtype: expected f32, f16 or bf16, got %d", int(dtype));
  if (size < 1 || size > kMaxElements)
    return fail(LOWBIT_INVALID_ARGUMENT, "size: expected 1 to 2^46, got %" PRId64, size);
  if (tokens < 0 || tokens > kMaxElements / size)
    return fail(LOWBIT_INVALID_ARGUMENT, "tokens: expected 0 or more, below 2^46 elements, got %" PRId64, tokens);
  return LOWBIT_OK;
}

// An operand [rows][size] that is read or written.
lowbit_status check_operand(const char* name, const void* data, int64_t rows, int64_t size, int64_t stride) {
  if (!data) return fail(LOWBIT_INVALID_ARGUMENT, "%s: expected a pointer, got NULL", name);
  if (rows > 1 && (stride < size || stride > kMaxElements / rows))
    return fail(LOWBIT_INVALID_ARGUMENT, "%s stride: expected at least %" PRId64 ", got %" PRId64, name, size, stride);
  return LOWBIT_OK;
}

lowbit_status check_step(const lowbit_decode_step* s) {
  if (!s) return fail(LOWBIT_INVALID_ARGUMENT, "step: expected a pointer, got NULL");
  const int64_t size = s->head_size, n = s->sequences;
  if (!is_float(s->dtype))
    return fail(LOWBIT_INVALID_ARGUMENT, "dtype: expected f32, f16 or bf16, got %d", int(s->dtype));
  if (size < 16 || size > kMaxHeadSize || size % 16)
    return fail(LOWBIT_INVALID_ARGUMENT, "head_size: expected a multiple of 16 up to %" PRId64 ", got %" PRId64,
                kMaxHeadSize, size);
  if (s->kv_heads < 1 || s->heads < s->kv_heads || s->heads > kMaxElements / kMaxHeadSize || s->heads % s->kv_heads)
    return fail(LOWBIT_INVALID_ARGUMENT,
                "heads: expected a multiple of kv_heads (%" PRId64 ", at least 1), got %" PRId64, s->kv_heads,
                s->heads);
  const int64_t width = s->heads * size, kv_width = s->kv_heads * size;
  if (n < 0 || n > kMaxElements / width)
    return fail(LOWBIT_INVALID_ARGUMENT, "sequences: expected 0 or more, below 2^46 elements, got %" PRId64, n);
  if (s->past < 0 || s->past >= kMaxElements / (kv_width * (n > 0 ? n : 1)))
    return fail(LOWBIT_INVALID_ARGUMENT, "past: expected 0 or more, below 2^46 elements of cache, got %" PRId64,
                s->past);
  if (n == 0) return LOWBIT_OK;
  LOWBIT_TRY(check_operand("q", s->q, n, width, s->q_stride));
  LOWBIT_TRY(check_operand("k", s->k, n, kv_width, s->k_stride));
  LOWBIT_TRY(check_operand("v", s->v, n, kv_width, s->v_stride));
  LOWBIT_TRY(check_operand("y", s->y, n, width, s->y_stride));
  if (!s->cos != !s->sin) return fail(LOWBIT_INVALID_ARGUMENT, "cos and sin: expected both or neither");
  if (s->cos && s->angle_stride != 0) LOWBIT_TRY(check_operand("cos and sin", s->cos, n, size, s->angle_stride));
  LOWBIT_TRY(check_operand("keys", s->keys, s->kv_heads, (s->past + 1) * size, s->cache_head_stride));
  LOWBIT_TRY(check_operand("values", s->values, s->kv_heads, (s->past + 1) * size, s->cache_head_stride));
  const int64_t heads_apart = s->kv_heads > 1 ? s->cache_head_stride : 0;
  LOWBIT_TRY(check_operand("cache sequence", s->keys, n, (s->kv_heads - 1) * heads_apart + (s->past + 1) * size,
                           s->cache_sequence_stride));
  return LOWBIT_OK;
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" {

lowbit_status lowbit_rms_norm(const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                              const void* weight, float eps, lowbit_dtype dtype, int64_t tokens, int64_t size,
                              void* sum, int64_t sum_stride, void* y, int64_t y_stride) {
  LOWBIT_TRY(check_rows(dtype, tokens, size));
  if (!(eps >= 0)) return fail(LOWBIT_INVALID_ARGUMENT, "eps: expected at least 0, got %g", double(eps));
  if (tokens == 0) return LOWBIT_OK;
  LOWBIT_TRY(check_operand("x", x, tokens, size, x_stride));
  if (y || !residual) {
    LOWBIT_TRY(check_operand("weight", weight, 1, size, size));
    LOWBIT_TRY(check_operand("y", y, tokens, size, y_stride));
  }
  if (residual) {
    LOWBIT_TRY(check_operand("residual", residual, tokens, size, residual_stride));
    LOWBIT_TRY(check_operand("sum", sum, tokens, size, sum_stride));
  }
  RmsNormKernel kernel;
  LOWBIT_TRY(select<Verb::rms_norm>(0, &kernel));
  const RmsNorm n = {dtype, size, x, x_stride, residual, residual_stride, sum, sum_stride, weight, eps, y, y_stride};
  parallel_for(tokens, 1, tokens * size < kSerialElements, [&](int64_t begin, int64_t end) { kernel(&n, begin, end); });
  return LOWBIT_OK;
}

lowbit_status lowbit_silu_mul(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride,
                              lowbit_dtype dtype, int64_t tokens, int64_t size, void* y, int64_t y_stride) {
  LOWBIT_TRY(check_rows(dtype, tokens, size));
  if (tokens == 0) return LOWBIT_OK;
  LOWBIT_TRY(check_operand("gate", gate, tokens, size, gate_stride));
  LOWBIT_TRY(check_operand("up", up, tokens, size, up_stride));
  LOWBIT_TRY(check_operand("y", y, tokens, size, y_stride));
  SiluMulKernel kernel;
  LOWBIT_TRY(select<Verb::silu_mul>(0, &kernel));
  const SiluMul s = {dtype, size, gate, gate_stride, up, up_stride, y, y_stride};
  parallel_for(tokens, 1, tokens * size < kSerialElements, [&](int64_t begin, int64_t end) { kernel(&s, begin, end); });
  return LOWBIT_OK;
}

lowbit_status lowbit_decode_attention(const lowbit_decode_step* step) {
  LOWBIT_TRY(check_step(step));
  DecodeAttentionKernel kernel;
  LOWBIT_TRY(select<Verb::decode_attention>(0, &kernel));
  const int64_t units = step->sequences * step->kv_heads;
  const double work = 2.0 * double(step->sequences * step->heads * step->head_size) * double(step->past + 1);
  parallel_for(units, 1, work < kSerialWork, [&](int64_t begin, int64_t end) { kernel(step, begin, end); });
  return LOWBIT_OK;
}
}
