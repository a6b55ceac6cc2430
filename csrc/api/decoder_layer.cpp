// Decoder layers for one new token of each sequence: the calls of lowbit.h one after the other over one scratch, so that a
// host pays for one call where it would for nine, or for a model's hundreds.
#include <cinttypes>
#include <cstdlib>

#include "api/validate.h"

namespace lowbit {
namespace {

// Sizes of a layer, read from the first matrix of each.
struct Widths {
  int64_t hidden, q, kv, inner;

  explicit Widths(const lowbit_decoder_layer& layer)
      : hidden(layer.q.w->cols), q(layer.q.w->rows), kv(layer.k.w->rows), inner(layer.gate.w->rows) {}
};

lowbit_status check_linear(const char* name, const lowbit_linear& linear, int64_t rows, int64_t cols) {
  lowbit_matrix w;
  LOWBIT_TRY(check_layout(linear.w, &w));
  if (w.rows != rows || w.cols != cols)
    return fail(LOWBIT_INVALID_ARGUMENT, "%s: expected [%" PRId64 ", %" PRId64 "], got [%" PRId64 ", %" PRId64 "]",
                name, rows, cols, w.rows, w.cols);
  return LOWBIT_OK;
}

// What no single verb checks: each part fits the next.
lowbit_status check_layer(const lowbit_decoder_layer* layer, const lowbit_decode_step* step) {
  if (!layer || !step) return fail(LOWBIT_INVALID_ARGUMENT, "layer and step: expected pointers, got NULL");
  if (!is_float(step->dtype))
    return fail(LOWBIT_INVALID_ARGUMENT, "dtype: expected f32, f16 or bf16, got %d", int(step->dtype));
  const lowbit_linear* const firsts[] = {&layer->q, &layer->k, &layer->gate};
  lowbit_matrix unused;
  for (const lowbit_linear* linear : firsts) LOWBIT_TRY(check_layout(linear->w, &unused));
  const Widths n(*layer);
  const int64_t size = step->head_size;
  if (size < 1 || n.q % size || n.kv % size)
    return fail(LOWBIT_INVALID_ARGUMENT,
                "head_size: expected a divisor of the rows of q (%" PRId64 ") and k (%" PRId64 "), got %" PRId64, n.q,
                n.kv, size);
  LOWBIT_TRY(check_linear("k", layer->k, n.kv, n.hidden));
  LOWBIT_TRY(check_linear("v", layer->v, n.kv, n.hidden));
  LOWBIT_TRY(check_linear("o", layer->o, n.hidden, n.q));
  LOWBIT_TRY(check_linear("gate", layer->gate, n.inner, n.hidden));
  LOWBIT_TRY(check_linear("up", layer->up, n.inner, n.hidden));
  LOWBIT_TRY(check_linear("down", layer->down, n.hidden, n.inner));
  const int64_t widest = n.inner > n.q ? n.inner : n.q;
  if (step->sequences < 0 || step->sequences > kMaxElements / (widest > n.hidden ? widest : n.hidden))
    return fail(LOWBIT_INVALID_ARGUMENT, "sequences: expected 0 or more, below 2^46 elements, got %" PRId64,
                step->sequences);
  return LOWBIT_OK;
}

lowbit_product product(const lowbit_linear& linear, void* y) {
  return {linear.w, linear.bias, linear.bias_dtype, y, linear.w->rows};
}

// One layer after its checks.
lowbit_status run_layer(const lowbit_decoder_layer* layer, const lowbit_decode_step* step, const void* x, void* y) {
  const Widths n(*layer);
  const int64_t tokens = step->sequences, element = dtype_bytes(step->dtype);

  // The scratch: each part a row a token, at multiples of 64 bytes.
  int64_t bytes = 0;
  auto place = [&](int64_t width) {
    const int64_t at = bytes;
    bytes += (tokens * width * element + 63) / 64 * 64;
    return at;
  };
  const int64_t normed_at = place(n.hidden), sum_at = place(n.hidden), product_at = place(n.hidden);
  const int64_t q_at = place(n.q), k_at = place(n.kv), v_at = place(n.kv), seen_at = place(n.q);
  const int64_t gate_at = place(n.inner), up_at = place(n.inner);
  char* scratch = static_cast<char*>(aligned_alloc(64, size_t(bytes)));
  if (!scratch) return fail(LOWBIT_OUT_OF_MEMORY, "layer: no memory for %" PRId64 " bytes", bytes);
  char *normed = scratch + normed_at, *sum = scratch + sum_at, *out = scratch + product_at;
  char *q = scratch + q_at, *k = scratch + k_at, *v = scratch + v_at, *seen = scratch + seen_at;
  char *gate = scratch + gate_at, *up = scratch + up_at;

  auto norm = [&](const lowbit_norm& norm, const void* from, const void* residual, int64_t rows, int64_t size,
                  void* to) {
    return lowbit_rms_norm(from, size, residual, size, norm.weight, norm.eps, step->dtype, rows, size, sum, size, to,
                           size);
  };
  auto multiply = [&](const lowbit_product* products, int count, const void* from, lowbit_activations activations) {
    return lowbit_matmul_group(products, count, from, step->dtype, tokens, products->w->cols, activations, nullptr, 0);
  };
  auto run = [&]() -> lowbit_status {
    LOWBIT_TRY(norm(layer->input, x, nullptr, tokens, n.hidden, normed));
    const lowbit_product qkv[] = {product(layer->q, q), product(layer->k, k), product(layer->v, v)};
    LOWBIT_TRY(multiply(qkv, 3, normed, layer->q.activations));
    const int64_t size = step->head_size;
    if (layer->q_norm.weight) LOWBIT_TRY(norm(layer->q_norm, q, nullptr, tokens * (n.q / size), size, q));
    if (layer->k_norm.weight) LOWBIT_TRY(norm(layer->k_norm, k, nullptr, tokens * (n.kv / size), size, k));
    lowbit_decode_step attention = *step;
    attention.heads = n.q / size;
    attention.kv_heads = n.kv / size;
    attention.q = q, attention.k = k, attention.v = v, attention.y = seen;
    attention.q_stride = attention.y_stride = n.q;
    attention.k_stride = attention.v_stride = n.kv;
    LOWBIT_TRY(lowbit_decode_attention(&attention));
    const lowbit_product o = product(layer->o, out), down = product(layer->down, out);
    LOWBIT_TRY(multiply(&o, 1, seen, layer->o.activations));
    LOWBIT_TRY(norm(layer->output, out, x, tokens, n.hidden, normed));
    const lowbit_product gate_up[] = {product(layer->gate, gate), product(layer->up, up)};
    LOWBIT_TRY(multiply(gate_up, 2, normed, layer->gate.activations));
    LOWBIT_TRY(lowbit_silu_mul(gate, n.inner, up, n.inner, step->dtype, tokens, n.inner, gate, n.inner));
    LOWBIT_TRY(multiply(&down, 1, gate, layer->down.activations));
    return lowbit_rms_norm(out, n.hidden, sum, n.hidden, nullptr, 0, step->dtype, tokens, n.hidden, y, n.hidden,
                           nullptr, n.hidden);
  };
  const lowbit_status status = run();
  free(scratch);
  return status;
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" {

lowbit_status lowbit_decode_layer(const lowbit_decoder_layer* layer, const lowbit_decode_step* step, const void* x,
                                  void* y) {
  return lowbit_decode_layers(&layer, step, 1, nullptr, x, y);
}

lowbit_status lowbit_decode_layers(const lowbit_decoder_layer* const* layers, const lowbit_decode_step* steps,
                                   int count, const lowbit_norm* last, const void* x, void* y) {
  if (!layers || !steps || count < 1)
    return fail(LOWBIT_INVALID_ARGUMENT, "layers and steps: expected at least one, got %d at %p and %p", count,
                static_cast<const void*>(layers), static_cast<const void*>(steps));
  for (int i = 0; i < count; i++) {
    LOWBIT_TRY(check_layer(layers[i], &steps[i]));
    if (layers[i]->q.w->cols != layers[0]->q.w->cols || steps[i].dtype != steps->dtype ||
        steps[i].sequences != steps->sequences)
      return fail(LOWBIT_INVALID_ARGUMENT,
                  "layers[%d]: expected %" PRId64 " columns, dtype %d and %" PRId64
                  " sequences as the first has, got %" PRId64 ", %d and %" PRId64,
                  i, layers[0]->q.w->cols, int(steps->dtype), steps->sequences, layers[i]->q.w->cols,
                  int(steps[i].dtype), steps[i].sequences);
  }
  if (steps->sequences == 0) return LOWBIT_OK;
  if (!x || !y) return fail(LOWBIT_INVALID_ARGUMENT, "x and y: expected pointers, got NULL");
  for (int i = 0; i < count; i++) LOWBIT_TRY(run_layer(layers[i], &steps[i], i ? y : x, y));
  if (!last || !last->weight) return LOWBIT_OK;
  const int64_t hidden = layers[0]->q.w->cols;
  return lowbit_rms_norm(y, hidden, nullptr, hidden, last->weight, last->eps, steps->dtype, steps->sequences, hidden,
                         nullptr, hidden, y, hidden);
}
}
