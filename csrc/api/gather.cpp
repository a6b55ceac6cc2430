// gather: rows by id. unpack: consecutive rows. Both decode rows with the same kernel; every id is checked before any
// row is read or written.
#include "api/ids.h"
#include "cpu/kernel.h"
#include "dispatch/parallel.h"
#include "dispatch/select.h"

namespace lowbit {
namespace {

constexpr int64_t kSerialCodes = 1 << 15;
constexpr int64_t kIdBlock = 256;  // ids translated at a time, on the stack

// Decodes rows row(0) .. row(count - 1) of a checked matrix.
template <class Row>
lowbit_status decode_rows(const lowbit_matrix& w, int64_t count, void* out, lowbit_dtype dtype, int64_t stride,
                          Row row) {
  LOWBIT_TRY(check_output(out, dtype, count, w.cols, stride));
  if (count == 0) return LOWBIT_OK;
  GatherKernel kernel;
  LOWBIT_TRY(select<Verb::gather>(w.format, &kernel));
  parallel_for(count, 1, count * w.cols < kSerialCodes, [&](int64_t begin, int64_t end) {
    int64_t block[kIdBlock];
    for (int64_t first = begin; first < end; first += kIdBlock) {
      const int64_t n = end - first < kIdBlock ? end - first : kIdBlock;
      for (int64_t i = 0; i < n; i++) block[i] = row(first + i);
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
  Ids checked;
  LOWBIT_TRY(check_matrix(w, &m));
  LOWBIT_TRY(Ids::check(m, ids, id_dtype, count, policy, &checked));
  LOWBIT_TRY(checked.find_bad(0, count, -1, nullptr));
  return decode_rows(m, count, out, out_dtype, out_stride, [&](int64_t i) { return checked.row(i); });
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
