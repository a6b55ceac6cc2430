// matmul: activations become integers once, then every thread multiplies its rows of W, 64 at a time. A group of
// matrices over one input is one call: what its members read alike is prepared once, and their rows are split as if they
// were one matrix. A single product is a group of one.
// Work is split over N only, and tokens are taken in batches that depend on nothing but their number, so the bits of an
// output never depend on the threads, on the batch it sits in or on the group.
#include <cinttypes>
#include <cstdlib>

#include "api/validate.h"
#include "cpu/float_types.h"
#include "dispatch/blocking.h"
#include "dispatch/features.h"
#include "dispatch/parallel.h"
#include "dispatch/select.h"

namespace lowbit {
namespace {

constexpr int kMaxProducts = LOWBIT_MAX_GROUP;
constexpr int64_t kTokenBatch = 256;               // bounds the scratch, whatever the number of tokens
constexpr int64_t kSerialWork = int64_t(1) << 18;  // multiply-adds below which waking a thread costs more
// Columns that kernels walk at a time: a whole int3 group; two lines of trits.
constexpr int64_t padding(int format) { return format == LOWBIT_TRIT ? 640 : 512; }
constexpr int64_t kRowGrain = 16;  // rows: a cache line of fp32 outputs has one writer

int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// One product after the checks.
struct Product {
  lowbit_matrix w;
  const void* bias;
  lowbit_dtype bias_dtype;
  char* y;
  int64_t y_stride;
  MatmulKernel kernel;
  BlockingChoice blocking;
  int prepared;  // the activations that it reads
};

struct Group {
  Product products[kMaxProducts];
  int count = 0;
};

// The activations of a batch, as some of the products read them.
struct Prepared {
  Activations x;  // of all tokens; parts[] are of some, in one layout each
  const int32_t* perm;
  int format;  // decides on padding, steps and layout
  BlockingChoice blocking;
  Activations parts[2];  // tiles, then rows
  int count;

  bool serves(const Prepared& other) const {
    return perm == other.perm && format == other.format && x.chunk == other.x.chunk;
  }

  // Cuts a batch into tiles and rows.
  void cut(int64_t tokens, Isa isa) {
    const lowbit_activations mode = x.high ? LOWBIT_ACT_FLOAT : LOWBIT_ACT_INT8;
    const int64_t in_tiles = tokens_in_tiles(format, mode, tokens, isa, blocking);
    count = 0;
    if (in_tiles) {
      parts[count] = x;
      parts[count].layout = Activations::kTiles;
      parts[count++].tokens = in_tiles;
    }
    if (in_tiles == tokens) return;
    Activations& rows = parts[count++] = x;
    rows.layout = Activations::kRows;
    rows.tokens = tokens - in_tiles;
    rows.low += in_tiles * x.cols_padded;
    if (x.high) rows.high += in_tiles * x.cols_padded;
    rows.step += in_tiles * x.chunks_padded;
    rows.sum += in_tiles * x.chunks_padded;
    const int64_t digit_bytes = (x.high ? 2 : 1) * rows.tokens * x.cols_padded;
    rows.rows_share = digit_bytes > own_digit_bytes(format, mode, rows.tokens, isa, l1_bytes(), blocking);
  }
};

// Where the parts of the scratch lie, and who reads which. The same arithmetic sizes it and fills it.
struct Scratch {
  Prepared prepared[kMaxProducts];
  int count = 0;
  float* bias[kMaxProducts];
  int64_t bytes = 0;

  Scratch(Group* group, int64_t tokens, lowbit_activations mode, char* base) {
    const int64_t batch = tokens < kTokenBatch ? tokens : kTokenBatch;
    auto take = [&](int64_t size) {
      char* at = base ? base + bytes : nullptr;
      bytes += align64(size);
      return at;
    };
    for (int i = 0; i < group->count; i++) {
      Product& product = group->products[i];
      const lowbit_matrix& w = product.w;
      Prepared wanted{};
      Activations& x = wanted.x;
      wanted.perm = w.perm;
      wanted.format = w.format;
      wanted.blocking = product.blocking;
      x.cols = w.cols;
      x.cols_padded = ceil_div(w.cols, padding(w.format)) * padding(w.format);
      x.chunk = chunk_size(w.format, w.cols, w.group_size);
      x.token_step = w.format == LOWBIT_TRIT && mode == LOWBIT_ACT_INT8;
      x.chunks = ceil_div(w.cols, x.chunk);
      x.chunks_padded = ceil_div(x.chunks, kSlots) * kSlots;
      bias[i] = reinterpret_cast<float*>(take(w.rows * 4));
      product.prepared = 0;
      while (product.prepared < count && !prepared[product.prepared].serves(wanted)) product.prepared++;
      if (product.prepared < count) continue;
      // Whole tiles wherever a level of instructions takes them: the size is the same for all.
      const int64_t places = may_be_tiles(batch, wanted.blocking) ? ceil_div(batch, kLanes) * kLanes : batch;
      x.low = reinterpret_cast<int8_t*>(take(places * x.cols_padded));
      x.high = mode == LOWBIT_ACT_FLOAT ? reinterpret_cast<int8_t*>(take(places * x.cols_padded)) : nullptr;
      x.step = reinterpret_cast<float*>(take(places * x.chunks_padded * 4));
      x.sum = reinterpret_cast<int32_t*>(take(places * x.chunks_padded * 4));
      prepared[count++] = wanted;
    }
  }
};

struct Output {
  char* y;
  lowbit_dtype dtype;
  int64_t stride;
};

// A block of rows of the matrix for all tokens, so that the second part finds its codes in a cache.
void multiply_rows(const lowbit_matrix& w, const Prepared& x, const float* bias, int64_t begin, int64_t end,
                   MatmulKernel kernel, StoreKernel store, const Output& out) {
  alignas(64) float tile[kTokenBatch * kRowBlock];
  for (int64_t n = begin; n < end; n += kRowBlock) {
    const int64_t rows = end - n < kRowBlock ? end - n : kRowBlock;
    int64_t tokens = 0;
    for (int i = 0; i < x.count; tokens += x.parts[i++].tokens)
      kernel(&w, &x.parts[i], n, n + rows, tile + tokens * kRowBlock, kRowBlock);
    store(tile, kRowBlock, bias ? bias + n : nullptr, tokens, rows, out.y + n * dtype_bytes(out.dtype), out.dtype,
          out.stride);
  }
}

lowbit_status check_product(const lowbit_product& given, int64_t tokens, int64_t x_stride, Product* product) {
  LOWBIT_TRY(check_matrix(given.w, &product->w));
  const lowbit_matrix& w = product->w;
  if (given.bias && !is_float(given.bias_dtype))
    return fail(LOWBIT_INVALID_ARGUMENT, "bias: expected dtype f32, f16 or bf16, got %d", int(given.bias_dtype));
  if (tokens > 0 && !given.y) return fail(LOWBIT_INVALID_ARGUMENT, "x and y: expected pointers, got NULL");
  if (tokens > 1 && (x_stride < w.cols || given.y_stride < w.rows))
    return fail(LOWBIT_INVALID_ARGUMENT,
                "strides: expected at least cols (%" PRId64 ") and rows (%" PRId64 "), got %" PRId64 " and %" PRId64,
                w.cols, w.rows, x_stride, given.y_stride);
  if (tokens > kMaxElements / (w.rows > w.cols ? w.rows : w.cols))
    return fail(LOWBIT_INVALID_ARGUMENT, "tokens: expected below 2^46 elements, got %" PRId64, tokens);
  product->bias = given.bias;
  product->bias_dtype = given.bias_dtype;
  product->y = static_cast<char*>(given.y);
  product->y_stride = given.y_stride;
  LOWBIT_TRY(chosen_blocking(w.format, &product->blocking));
  return select<Verb::matmul>(w.format, &product->kernel);
}

lowbit_status check_activations(lowbit_activations activations) {
  if (activations != LOWBIT_ACT_FLOAT && activations != LOWBIT_ACT_INT8)
    return fail(LOWBIT_INVALID_ARGUMENT, "activations: expected float or int8, got %d", int(activations));
  return LOWBIT_OK;
}

lowbit_status check_group(const lowbit_product* products, int count, int64_t tokens, int64_t x_stride, Group* group) {
  if (count < 1 || count > kMaxProducts)
    return fail(LOWBIT_INVALID_ARGUMENT, "products: expected 1 to %d, got %d", kMaxProducts, count);
  if (!products) return fail(LOWBIT_INVALID_ARGUMENT, "products: expected a pointer, got NULL");
  if (tokens < 0) return fail(LOWBIT_INVALID_ARGUMENT, "tokens: expected at least 0, got %" PRId64, tokens);
  for (group->count = 0; group->count < count; group->count++) {
    Product* product = &group->products[group->count];
    LOWBIT_TRY(check_product(products[group->count], tokens, x_stride, product));
    if (product->w.cols != group->products[0].w.cols)
      return fail(LOWBIT_INVALID_ARGUMENT, "products[%d]: expected %" PRId64 " columns as the first has, got %" PRId64,
                  group->count, group->products[0].w.cols, product->w.cols);
  }
  return LOWBIT_OK;
}

// The rows of all products, each rounded up to whole grains, as one range: body(product, begin, end) for the parts of
// it in [begin, end).
template <class Body>
void each_part(const Group& group, int64_t begin, int64_t end, Body&& body) {
  int64_t first = 0;
  for (int i = 0; i < group.count; i++) {
    const int64_t rows = group.products[i].w.rows, next = first + ceil_div(rows, kRowGrain) * kRowGrain;
    const int64_t from = begin > first ? begin - first : 0, to = end < next ? end - first : rows;
    if (from < (to < rows ? to : rows)) body(i, from, to < rows ? to : rows);
    first = next;
  }
}

void multiply(Group& group, Scratch& scratch, const void* x, lowbit_dtype dtype, int64_t tokens, int64_t x_stride,
              Isa isa, ActivationsKernel quantize, StoreKernel store) {
  int64_t weights = 0, range = 0;
  for (int i = 0; i < group.count; i++) {
    const Product& product = group.products[i];
    for (int64_t n = 0; product.bias && n < product.w.rows; n++)
      scratch.bias[i][n] = load_float(product.bias, product.bias_dtype, n);
    weights += product.w.rows * product.w.cols;
    range += ceil_div(product.w.rows, kRowGrain) * kRowGrain;
  }
  for (int64_t first = 0; first < tokens; first += kTokenBatch) {
    const int64_t batch = tokens - first < kTokenBatch ? tokens - first : kTokenBatch;
    const char* from = static_cast<const char*>(x) + first * x_stride * dtype_bytes(dtype);
    for (int p = 0; p < scratch.count; p++) {
      Prepared& prepared = scratch.prepared[p];
      prepared.cut(batch, isa);
      const int64_t grain = prepared.parts[0].layout == Activations::kTiles ? kLanes : 1;
      parallel_for(batch, grain, batch * prepared.x.cols < (1 << 15), [&](int64_t begin, int64_t end) {
        int64_t first = 0;  // of the part
        for (int i = 0; i < prepared.count; first += prepared.parts[i++].tokens) {
          const Activations& part = prepared.parts[i];
          const int64_t m0 = begin > first ? begin - first : 0;
          const int64_t m1 = end - first < part.tokens ? end - first : part.tokens;
          const char* of_part = from + first * x_stride * dtype_bytes(dtype);
          if (m0 < m1) quantize(of_part, dtype, x_stride, prepared.perm, m0, m1, &part);
        }
      });
    }
    parallel_for_helping(range, kRowGrain, kRowBlock, weights * batch < kSerialWork, [&](int64_t begin, int64_t end) {
      each_part(group, begin, end, [&](int i, int64_t n0, int64_t n1) {
        const Product& product = group.products[i];
        const Output to{product.y + first * product.y_stride * dtype_bytes(dtype), dtype, product.y_stride};
        multiply_rows(product.w, scratch.prepared[product.prepared], product.bias ? scratch.bias[i] : nullptr, n0, n1,
                      product.kernel, store, to);
      });
    });
  }
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" {

size_t lowbit_matmul_group_workspace(const lowbit_product* products, int count, int64_t tokens,
                                     lowbit_activations activations) {
  Group group;
  if (count < 1 || count > kMaxProducts || !products || tokens < 1) return 0;
  for (; group.count < count; group.count++) {
    Product& product = group.products[group.count];
    if (check_matrix(products[group.count].w, &product.w) != LOWBIT_OK ||
        chosen_blocking(product.w.format, &product.blocking) != LOWBIT_OK)
      return 0;
  }
  return size_t(Scratch(&group, tokens, activations, nullptr).bytes);
}

size_t lowbit_matmul_workspace(const lowbit_matrix* w, int64_t tokens, lowbit_activations activations) {
  const lowbit_product product = {w, nullptr, LOWBIT_F32, nullptr, 0};
  return lowbit_matmul_group_workspace(&product, 1, tokens, activations);
}

lowbit_status lowbit_matmul_batching(lowbit_format format, lowbit_activations activations, int64_t* batch,
                                     int64_t* tiles_from) {
  LOWBIT_TRY(check_format(format));
  LOWBIT_TRY(check_activations(activations));
  if (!batch || !tiles_from) return fail(LOWBIT_INVALID_ARGUMENT, "batch and tiles_from: expected pointers, got NULL");
  Isa isa;
  BlockingChoice choice;
  LOWBIT_TRY(allowed_isa(&isa));
  LOWBIT_TRY(chosen_blocking(format, &choice));
  *batch = kTokenBatch;
  *tiles_from = tile_tokens(format, activations, isa, choice);
  return LOWBIT_OK;
}

lowbit_status lowbit_matmul_sharing(lowbit_format format, int64_t tokens, lowbit_activations activations,
                                    int64_t* columns) {
  LOWBIT_TRY(check_format(format));
  if (tokens < 1) return fail(LOWBIT_INVALID_ARGUMENT, "tokens: expected at least 1, got %" PRId64, tokens);
  if (!columns) return fail(LOWBIT_INVALID_ARGUMENT, "columns: expected a pointer, got NULL");
  LOWBIT_TRY(check_activations(activations));
  Isa isa;
  BlockingChoice choice;
  LOWBIT_TRY(allowed_isa(&isa));
  LOWBIT_TRY(chosen_blocking(format, &choice));
  const int64_t digits = activations == LOWBIT_ACT_FLOAT ? 2 : 1;
  const int64_t own = own_digit_bytes(format, activations, tokens, isa, l1_bytes(), choice);
  *columns = own == kNoSharing ? own : own / digits / tokens / padding(format) * padding(format);
  return LOWBIT_OK;
}

lowbit_status lowbit_matmul_group(const lowbit_product* products, int count, const void* x, lowbit_dtype dtype,
                                  int64_t tokens, int64_t x_stride, lowbit_activations activations, void* workspace,
                                  size_t workspace_bytes) {
  Group group;
  LOWBIT_TRY(check_group(products, count, tokens, x_stride, &group));
  if (!is_float(dtype)) return fail(LOWBIT_INVALID_ARGUMENT, "x: expected dtype f32, f16 or bf16, got %d", int(dtype));
  LOWBIT_TRY(check_activations(activations));
  if (tokens == 0) return LOWBIT_OK;
  if (!x) return fail(LOWBIT_INVALID_ARGUMENT, "x and y: expected pointers, got NULL");
  Isa isa;
  ActivationsKernel quantize;
  StoreKernel store;
  LOWBIT_TRY(allowed_isa(&isa));
  LOWBIT_TRY(select<Verb::activations>(0, &quantize));
  LOWBIT_TRY(select<Verb::store>(0, &store));

  const size_t needed = size_t(Scratch(&group, tokens, activations, nullptr).bytes);
  if (workspace && (workspace_bytes < needed || uintptr_t(workspace) % 64))
    return fail(LOWBIT_INVALID_ARGUMENT, "workspace: expected %zu bytes at a multiple of 64, got %zu at %p", needed,
                workspace_bytes, workspace);
  void* owned = workspace ? nullptr : aligned_alloc(64, needed);  // the heap keeps it for the next call
  if (!workspace && !owned) return fail(LOWBIT_OUT_OF_MEMORY, "workspace: no memory for %zu bytes", needed);
  Scratch scratch(&group, tokens, activations, static_cast<char*>(workspace ? workspace : owned));
  multiply(group, scratch, x, dtype, tokens, x_stride, isa, quantize, store);
  free(owned);
  return LOWBIT_OK;
}

lowbit_status lowbit_matmul(const lowbit_matrix* w, const void* x, lowbit_dtype dtype, int64_t tokens, int64_t x_stride,
                            const void* bias, lowbit_dtype bias_dtype, void* y, int64_t y_stride,
                            lowbit_activations activations, void* workspace, size_t workspace_bytes) {
  const lowbit_product product = {w, bias, bias_dtype, y, y_stride};
  return lowbit_matmul_group(&product, 1, x, dtype, tokens, x_stride, activations, workspace, workspace_bytes);
}
}
