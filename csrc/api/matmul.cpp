// matmul: activations become integers once, then every thread multiplies its rows of W, 64 at a time.
// Work is split over N only, and tokens are taken in batches that depend on nothing but their number, so the bits of an
// output never depend on the threads or on the batch it sits in.
#include <cinttypes>
#include <cstdlib>

#include "api/validate.h"
#include "cpu/float_types.h"
#include "dispatch/parallel.h"
#include "dispatch/select.h"

namespace lowbit {
namespace {

constexpr int64_t kTokenBatch = 256;               // bounds the scratch, whatever the number of tokens
constexpr int64_t kSerialWork = int64_t(1) << 18;  // multiply-adds below which waking a thread costs more
// Columns that kernels walk at a time: a whole int3 group; two lines of trits.
constexpr int64_t padding(int format) { return format == LOWBIT_TRIT ? 640 : 512; }
constexpr int64_t kRowGrain = 16;  // rows: a cache line of fp32 outputs has one writer

int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Where the parts of the scratch lie. The same arithmetic sizes it and fills it.
struct Scratch {
  Activations x;
  float* bias;
  int64_t bytes;

  Scratch(const lowbit_matrix& w, int64_t tokens, lowbit_activations mode, char* base) {
    const int64_t batch = tokens < kTokenBatch ? tokens : kTokenBatch;
    x.cols = w.cols;
    x.cols_padded = ceil_div(w.cols, padding(w.format)) * padding(w.format);
    x.chunk = chunk_size(w.format, w.cols, w.group_size);
    x.token_step = w.format == LOWBIT_TRIT && mode == LOWBIT_ACT_INT8;
    x.chunks = ceil_div(w.cols, x.chunk);
    x.chunks_padded = ceil_div(x.chunks, kSlots) * kSlots;
    // Whole tiles wherever a level of instructions takes them: the size is the same for all.
    const int64_t places = batch >= kLeastTileTokens ? ceil_div(batch, kLanes) * kLanes : batch;
    bytes = 0;
    auto take = [&](int64_t size) {
      char* at = base ? base + bytes : nullptr;
      bytes += align64(size);
      return at;
    };
    x.low = reinterpret_cast<int8_t*>(take(places * x.cols_padded));
    x.high = mode == LOWBIT_ACT_FLOAT ? reinterpret_cast<int8_t*>(take(places * x.cols_padded)) : nullptr;
    x.step = reinterpret_cast<float*>(take(places * x.chunks_padded * 4));
    x.sum = reinterpret_cast<int32_t*>(take(places * x.chunks_padded * 4));
    bias = reinterpret_cast<float*>(take(w.rows * 4));
  }
};

struct Output {
  char* y;
  lowbit_dtype dtype;
  int64_t stride;
};

void multiply_rows(const lowbit_matrix& w, const Activations& x, const float* bias, int64_t begin, int64_t end,
                   MatmulKernel kernel, StoreKernel store, const Output& out) {
  alignas(64) float tile[kTokenBatch * kRowBlock];
  for (int64_t n = begin; n < end; n += kRowBlock) {
    const int64_t rows = end - n < kRowBlock ? end - n : kRowBlock;
    kernel(&w, &x, n, n + rows, tile, kRowBlock);
    store(tile, kRowBlock, bias ? bias + n : nullptr, x.tokens, rows, out.y + n * dtype_bytes(out.dtype), out.dtype,
          out.stride);
  }
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" {

size_t lowbit_matmul_workspace(const lowbit_matrix* w, int64_t tokens, lowbit_activations activations) {
  lowbit_matrix m;
  if (check_matrix(w, &m) != LOWBIT_OK || tokens < 1) return 0;
  return size_t(Scratch(m, tokens, activations, nullptr).bytes);
}

lowbit_status lowbit_matmul_batching(int64_t* batch, int64_t* tiles_from) {
  if (!batch || !tiles_from) return fail(LOWBIT_INVALID_ARGUMENT, "batch and tiles_from: expected pointers, got NULL");
  Isa isa;
  LOWBIT_TRY(allowed_isa(&isa));
  *batch = kTokenBatch;
  *tiles_from = tile_tokens(isa);
  return LOWBIT_OK;
}

lowbit_status lowbit_matmul(const lowbit_matrix* w, const void* x, lowbit_dtype dtype, int64_t tokens, int64_t x_stride,
                            const void* bias, lowbit_dtype bias_dtype, void* y, int64_t y_stride,
                            lowbit_activations activations, void* workspace, size_t workspace_bytes) {
  lowbit_matrix m;
  LOWBIT_TRY(check_matrix(w, &m));
  if (!is_float(dtype)) return fail(LOWBIT_INVALID_ARGUMENT, "x: expected dtype f32, f16 or bf16, got %d", int(dtype));
  if (bias && !is_float(bias_dtype))
    return fail(LOWBIT_INVALID_ARGUMENT, "bias: expected dtype f32, f16 or bf16, got %d", int(bias_dtype));
  if (activations != LOWBIT_ACT_FLOAT && activations != LOWBIT_ACT_INT8)
    return fail(LOWBIT_INVALID_ARGUMENT, "activations: expected float or int8, got %d", int(activations));
  if (tokens < 0) return fail(LOWBIT_INVALID_ARGUMENT, "tokens: expected at least 0, got %" PRId64, tokens);
  if (tokens == 0) return LOWBIT_OK;
  if (!x || !y) return fail(LOWBIT_INVALID_ARGUMENT, "x and y: expected pointers, got NULL");
  if (tokens > 1 && (x_stride < m.cols || y_stride < m.rows))
    return fail(LOWBIT_INVALID_ARGUMENT,
                "strides: expected at least cols (%" PRId64 ") and rows (%" PRId64 "), got %" PRId64 " and %" PRId64,
                m.cols, m.rows, x_stride, y_stride);
  if (tokens > kMaxElements / (m.rows > m.cols ? m.rows : m.cols))
    return fail(LOWBIT_INVALID_ARGUMENT, "tokens: expected below 2^46 elements, got %" PRId64, tokens);
  Isa isa;
  ActivationsKernel quantize;
  MatmulKernel kernel;
  StoreKernel store;
  LOWBIT_TRY(allowed_isa(&isa));
  LOWBIT_TRY(select<Verb::activations>(0, &quantize));
  LOWBIT_TRY(select<Verb::matmul>(m.format, &kernel));
  LOWBIT_TRY(select<Verb::store>(0, &store));

  const size_t needed = size_t(Scratch(m, tokens, activations, nullptr).bytes);
  if (workspace && (workspace_bytes < needed || uintptr_t(workspace) % 64))
    return fail(LOWBIT_INVALID_ARGUMENT, "workspace: expected %zu bytes at a multiple of 64, got %zu at %p", needed,
                workspace_bytes, workspace);
  void* owned = workspace ? nullptr : aligned_alloc(64, needed);  // the heap keeps it for the next call
  if (!workspace && !owned) return fail(LOWBIT_OUT_OF_MEMORY, "workspace: no memory for %zu bytes", needed);
  Scratch scratch(m, tokens, activations, static_cast<char*>(workspace ? workspace : owned));
  if (bias)
    for (int64_t n = 0; n < m.rows; n++) scratch.bias[n] = load_float(bias, bias_dtype, n);

  for (int64_t first = 0; first < tokens; first += kTokenBatch) {
    Activations& batch = scratch.x;
    batch.tokens = tokens - first < kTokenBatch ? tokens - first : kTokenBatch;
    batch.layout = select_layout(batch.tokens, isa);
    const char* from = static_cast<const char*>(x) + first * x_stride * dtype_bytes(dtype);
    const Output to{static_cast<char*>(y) + first * y_stride * dtype_bytes(dtype), dtype, y_stride};
    const int64_t grain = batch.layout == Activations::kTiles ? kLanes : 1;
    parallel_for(batch.tokens, grain, batch.tokens * m.cols < (1 << 15),
                 [&](int64_t begin, int64_t end) { quantize(from, dtype, x_stride, m.perm, begin, end, &batch); });
    parallel_for(m.rows, kRowGrain, m.rows * m.cols * batch.tokens < kSerialWork, [&](int64_t begin, int64_t end) {
      multiply_rows(m, batch, bias ? scratch.bias : nullptr, begin, end, kernel, store, to);
    });
  }
  free(owned);
  return LOWBIT_OK;
}
}
