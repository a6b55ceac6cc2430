// gather_bags: sums and means of rows by id, as an embedding bag makes them. Kernels decode rows and add them to a bag's
// sum, which lies in the cache, in the order that columns are packed in; every id is checked before any row is read. Each
// column of a bag is summed in the order of ids by whoever has it, so threads change no bit: they take bags, or where one
// bag is most of the work, its columns.
#include <cstdlib>
#include <cstring>

#include "api/ids.h"
#include "cpu/kernel.h"
#include "dispatch/parallel.h"
#include "dispatch/select.h"

namespace lowbit {
namespace {

constexpr int64_t kSerialCodes = 1 << 15;
constexpr int64_t kBatch = 16;           // rows a call of a kernel; their ids lie on the stack
constexpr int64_t kAhead = 8;            // ids from one that is added to the one whose row is fetched
constexpr int64_t kPrefetchBytes = 256;  // of each row

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Kernels {
  BagsKernel bags;
  StoreKernel store;
};

struct Bags {
  lowbit_matrix w;
  int64_t row_bytes;
  Ids ids;
  const int64_t* offsets;
  int64_t count, last;  // last: end of the last bag's ids
  const float* weights;
  bool mean;
  int64_t padding_id;
  Kernels kernels;

  int64_t begin(int64_t bag) const { return offsets[bag] < 0 ? 0 : smaller(offsets[bag], count); }
  int64_t end(int64_t bag) const { return begin(bag + 1); }

  bool is_padding(int64_t i) const { return padding_id >= 0 && ids[i] == padding_id; }

  // Asks for the first lines of id i's row and its first scales; of a narrow row that is all of it. Rows lie anywhere, so
  // each is a wait for memory, unless those of the ids to come are under way: of the bags to come too.
  void prefetch(int64_t i) const {
    if (i >= last) return;
    const int64_t row = ids.row(i);
    if (row < 0) return;
    const char* codes = reinterpret_cast<const char*>(w.codes) + row * row_bytes;
    const int64_t bytes = smaller(row_bytes, kPrefetchBytes);
    for (int64_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(codes + at);
    const int64_t scale = scale_index(&w, row, 0);
    __builtin_prefetch(static_cast<const char*>(w.scales) + scale * dtype_bytes(w.scale_dtype));
    if (w.zeros) __builtin_prefetch(w.zeros + scale);
  }
};

// The next rows of a bag that count, and their weights; `next` moves on behind them.
struct Batch {
  int64_t row[kBatch];
  float weight[kBatch];
  int64_t size = 0;

  Batch(const Bags& call, int64_t end, int64_t* next) {
    for (; *next < end && size < kBatch; ++*next) {
      call.prefetch(*next + kAhead);
      if (call.is_padding(*next)) continue;
      row[size] = call.ids.row(*next);
      if (call.weights) weight[size] = call.weights[*next];
      size++;
    }
  }
};

// sum: [planes][64], and as much again to bring the columns of a matrix with a perm into their order. Threads share the
// columns of a bag unless it is one of many that they have.
void sum_bag(const Bags& call, int64_t bag, float* sum, void* out, lowbit_dtype dtype) {
  const int64_t cols = call.w.cols, planes = row_planes(cols), begin = call.begin(bag), end = call.end(bag);
  memset(sum, 0, size_t(planes) * 64 * sizeof(float));
  parallel_for(planes, kPlaneGrain, (end - begin) * cols < kSerialCodes, [&](int64_t first, int64_t last) {
    for (int64_t i = begin; i < end;) {
      const Batch batch(call, end, &i);
      call.kernels.bags(&call.w, batch.row, call.weights ? batch.weight : nullptr, batch.size, first, last, sum);
    }
  });
  if (call.mean) {
    int64_t counted = 0;
    for (int64_t i = begin; i < end; i++) counted += !call.is_padding(i);
    for (int64_t k = 0; k < cols && counted > 0; k++) sum[k] /= float(counted);
  }
  const float* ordered = sum;
  if (call.w.perm) {
    float* original = sum + planes * 64;
    for (int64_t k = 0; k < cols; k++) original[call.w.perm[k]] = sum[k];
    ordered = original;
  }
  call.kernels.store(ordered, cols, nullptr, 1, cols, out, dtype, cols);
}

int64_t largest_bag(const Bags& call, int64_t bags) {
  int64_t largest = 0;
  for (int64_t bag = 0; bag < bags; bag++)
    if (const int64_t size = call.end(bag) - call.begin(bag); size > largest) largest = size;
  return largest;
}

lowbit_status check_offsets(const int64_t* offsets, int64_t bags) {
  if (bags > 0 && !offsets) return fail(LOWBIT_INVALID_ARGUMENT, "offsets: expected a pointer, got NULL");
  for (int64_t bag = 0; bag < bags; bag++)
    if (offsets[bag + 1] < offsets[bag])
      return fail(LOWBIT_INVALID_ARGUMENT,
                  "offsets[%" PRId64 "]: expected at least %" PRId64 ", as before it, got %" PRId64, bag + 1,
                  offsets[bag], offsets[bag + 1]);
  return LOWBIT_OK;
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" {

lowbit_status lowbit_gather_bags(const lowbit_matrix* w, const void* ids, lowbit_dtype id_dtype, int64_t count,
                                 const int64_t* offsets, int64_t bags, const float* weights, int mean,
                                 lowbit_id_policy policy, int64_t padding_id, int64_t* first_bad, void* out,
                                 lowbit_dtype out_dtype, int64_t out_stride) {
  Bags call{};
  LOWBIT_TRY(check_matrix(w, &call.w));
  LOWBIT_TRY(Ids::check(call.w, ids, id_dtype, count, policy, &call.ids));
  const int64_t cols = call.w.cols;
  call.row_bytes = row_lines(call.w.format, cols) * kLineBytes;
  if (bags < 0 || bags > kMaxElements / cols)
    return fail(LOWBIT_INVALID_ARGUMENT, "bags: expected 0 or more below 2^46 elements, got %" PRId64, bags);
  if (mean && weights) return fail(LOWBIT_INVALID_ARGUMENT, "weights: expected NULL with mean, got a pointer");
  LOWBIT_TRY(check_output(out, out_dtype, bags, cols, out_stride));
  LOWBIT_TRY(check_offsets(offsets, bags));
  if (bags == 0) return LOWBIT_OK;
  call.offsets = offsets;
  call.count = count;
  call.weights = weights;
  call.mean = mean != 0;
  call.padding_id = padding_id;
  call.last = call.end(bags - 1);
  const int64_t looked_up = call.last - call.begin(0);
  LOWBIT_TRY(call.ids.find_bad(call.begin(0), call.last, padding_id, first_bad));
  LOWBIT_TRY(select<Verb::bags>(call.w.format, &call.kernels.bags));
  LOWBIT_TRY(select<Verb::store>(0, &call.kernels.store));

  const int64_t threads = (looked_up + bags) * cols < kSerialCodes ? 1 : executor_threads();
  // A bag of more than twice a thread's share would be waited for: then bags come one by one, with all threads in each.
  const int64_t parts = largest_bag(call, bags) * threads > 2 * looked_up ? 1 : smaller(bags, threads);
  const size_t floats = size_t(row_planes(cols)) * 64 * (call.w.perm ? 2 : 1);  // of a part
  float* scratch = static_cast<float*>(aligned_alloc(64, size_t(parts) * floats * 4));
  if (!scratch) return fail(LOWBIT_OUT_OF_MEMORY, "scratch: no memory for %zu bytes", size_t(parts) * floats * 4);
  parallel_for(parts, 1, parts == 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; part++)
      for (int64_t bag = bags * part / parts; bag < bags * (part + 1) / parts; bag++)
        sum_bag(call, bag, scratch + size_t(part) * floats,
                static_cast<char*>(out) + bag * out_stride * dtype_bytes(out_dtype), out_dtype);
  });
  free(scratch);
  return LOWBIT_OK;
}
}
