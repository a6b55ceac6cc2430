// gather: rows by id. unpack: consecutive rows. Both decode rows with the same kernel; every id is checked before any
// row is read or written.
#include <cinttypes>

#include "api/validate.h"
#include "cpu/kernel.h"
#include "dispatch/parallel.h"
#include "dispatch/select.h"

namespace lowbit {
namespace {

constexpr int64_t kSerialCodes = 1 << 15;
constexpr int64_t kIdBlock = 256;  // ids translated at a time, on the stack

int64_t read_id(const void* ids, lowbit_dtype dtype, int64_t i) {
  return dtype == LOWBIT_I64 ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
}

// Decodes rows id(0) .. id(count - 1) of a checked matrix.
template <class Id>
lowbit_status decode_rows(const lowbit_matrix& w, int64_t count, void* out, lowbit_dtype dtype, int64_t stride, Id id) {
  if (!is_float(dtype))
    return fail(LOWBIT_INVALID_ARGUMENT, "out: expected dtype f32, f16 or bf16, got %d", int(dtype));
  if (count == 0) return LOWBIT_OK;
  if (!out) return fail(LOWBIT_INVALID_ARGUMENT, "out: expected a pointer, got NULL");
  if (count > 1 && stride < w.cols)
    return fail(LOWBIT_INVALID_ARGUMENT, "out: expected a stride of at least cols (%" PRId64 "), got %" PRId64, w.cols,
                stride);
  GatherKernel kernel;
  LOWBIT_TRY(select<Verb::gather>(w.format, &kernel));
  parallel_for(count, 1, count * w.cols < kSerialCodes, [&](int64_t begin, int64_t end) {
    int64_t block[kIdBlock];
    for (int64_t first = begin; first < end; first += kIdBlock) {
      const int64_t n = end - first < kIdBlock ? end - first : kIdBlock;
      for (int64_t i = 0; i < n; i++) block[i] = id(first + i);
      kernel(&w, block, n, static_cast<char*>(out) + first * stride * dtype_bytes(dtype), dtype, stride);
    }
  });
  return LOWBIT_OK;
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" {

lowbit_status lowbit_gather(const lowbit_matrix* w, const void* ids, lowbit_dtype id_dtype, int64_t count,
                            lowbit_id_policy policy, void* out, lowbit_dtype out_dtype, int64_t out_stride) {
  lowbit_matrix m;
  LOWBIT_TRY(check_matrix(w, &m));
  if (id_dtype != LOWBIT_I32 && id_dtype != LOWBIT_I64)
    return fail(LOWBIT_INVALID_ARGUMENT, "ids: expected dtype i32 or i64, got %d", int(id_dtype));
  if (policy != LOWBIT_IDS_ERROR && policy != LOWBIT_IDS_ZERO && policy != LOWBIT_IDS_CLAMP)
    return fail(LOWBIT_INVALID_ARGUMENT, "policy: expected error, zero or clamp, got %d", int(policy));
  if (count < 0 || count > kMaxElements / m.cols)
    return fail(LOWBIT_INVALID_ARGUMENT, "count: expected 0 or more below 2^46 elements, got %" PRId64, count);
  if (count > 0 && !ids) return fail(LOWBIT_INVALID_ARGUMENT, "ids: expected a pointer, got NULL");
  if (policy == LOWBIT_IDS_ERROR)
    for (int64_t i = 0; i < count; i++)
      if (const int64_t id = read_id(ids, id_dtype, i); id < 0 || id >= m.rows)
        return fail(LOWBIT_OUT_OF_RANGE, "ids[%" PRId64 "]: expected a row in [0, %" PRId64 "), got %" PRId64, i,
                    m.rows, id);
  // Kernels take a negative id as a row of zeros.
  return decode_rows(m, count, out, out_dtype, out_stride, [&](int64_t i) {
    const int64_t id = read_id(ids, id_dtype, i);
    if (id >= 0 && id < m.rows) return id;
    return policy == LOWBIT_IDS_CLAMP ? (id < 0 ? int64_t(0) : m.rows - 1) : int64_t(-1);
  });
}

lowbit_status lowbit_unpack(const lowbit_matrix* w, int64_t row_begin, int64_t row_end, void* out,
                            lowbit_dtype out_dtype, int64_t out_stride) {
  lowbit_matrix m;
  LOWBIT_TRY(check_matrix(w, &m));
  if (row_begin < 0 || row_end < row_begin || row_end > m.rows)
    return fail(LOWBIT_OUT_OF_RANGE, "rows: expected a range inside [0, %" PRId64 "), got [%" PRId64 ", %" PRId64 ")",
                m.rows, row_begin, row_end);
  return decode_rows(m, row_end - row_begin, out, out_dtype, out_stride, [&](int64_t i) { return row_begin + i; });
}
}
