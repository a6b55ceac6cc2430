// pack: codes or floats to lines. unpack_codes: lines to codes. Row by row, plane by plane, in parallel over rows.
#include <atomic>
#include <cinttypes>
#include <cmath>
#include <cstring>

#include "api/validate.h"
#include "cpu/float_types.h"
#include "cpu/kernel.h"
#include "dispatch/parallel.h"
#include "solver/grid.h"

namespace lowbit {
namespace {

constexpr int64_t kSerialCodes = 1 << 16;  // below this a thread's wake-up costs more than the work

// Lines of one row from one code a byte; `zero_point` fills the padding.
void pack_row(int bits, int64_t cols, const uint8_t* codes, uint8_t zero_point, uint8_t* row) {
  memset(row, 0, size_t(row_lines(bits, cols) * kLineBytes));
  uint8_t plane[kPlaneCodes];
  for (int64_t k = 0; k < padded_cols(bits, cols); k += kPlaneCodes) {
    const int64_t real = k >= cols ? 0 : cols - k < kPlaneCodes ? cols - k : kPlaneCodes;
    memcpy(plane, codes + k, size_t(real));
    memset(plane + real, zero_point, size_t(kPlaneCodes - real));
    const CodePlace at = code_place(bits, cols, k);
    const int low_mask = bits == 3 ? 3 : 255;
    for (int i = 0; i < kPlaneCodes; i++)
      row[at.offset + i] = uint8_t(row[at.offset + i] | (plane[i] & low_mask) << at.shift);
    if (bits == 3)
      for (int i = 0; i < kPlaneCodes; i++)
        row[at.high_offset + i] = uint8_t(row[at.high_offset + i] | plane[i] >> 2 << at.high_shift);
  }
}

void unpack_row(int bits, int64_t cols, const uint8_t* row, uint8_t* codes) {
  const int mask = bits == 3 ? 3 : (1 << bits) - 1;
  for (int64_t k = 0; k < cols; k += kPlaneCodes) {
    const int64_t real = cols - k < kPlaneCodes ? cols - k : kPlaneCodes;
    const CodePlace at = code_place(bits, cols, k);
    for (int64_t i = 0; i < real; i++) codes[k + i] = uint8_t(row[at.offset + i] >> at.shift & mask);
    if (bits == 3)
      for (int64_t i = 0; i < real; i++)
        codes[k + i] = uint8_t(codes[k + i] | (row[at.high_offset + i] >> at.high_shift & 1) << 2);
  }
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" {

lowbit_status lowbit_pack_codes(const lowbit_matrix* w, const uint8_t* codes, uint8_t* codes_out) {
  if (!codes || !codes_out) return fail(LOWBIT_INVALID_ARGUMENT, "codes: expected pointers, got NULL");
  if (!w) return fail(LOWBIT_INVALID_ARGUMENT, "matrix: expected a pointer, got NULL");
  // The scales play no part in packing; any pointer stands for them in the checks.
  lowbit_matrix view = *w, m;
  view.codes = codes_out;
  view.scales = codes;
  view.scale_dtype = LOWBIT_F32;
  view.perm = nullptr;
  LOWBIT_TRY(check_matrix(&view, &m));
  const int bits = m.format;
  const int64_t cols = m.cols, row_bytes = row_lines(bits, cols) * kLineBytes, groups = ceil_div(cols, m.group_size);
  std::atomic<int64_t> bad{-1};
  parallel_for(m.rows, 1, m.rows * cols < kSerialCodes, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const uint8_t* row = codes + n * cols;
      uint8_t bits_used = 0;
      for (int64_t k = 0; k < cols; k++) bits_used = uint8_t(bits_used | row[k]);
      if (bits_used >> bits) {
        bad = n;
        return;
      }
      // Padding continues the last group: group min(k / group_size, G - 1).
      const uint8_t zero = m.zeros ? m.zeros[scale_index(&m, n, groups - 1)] : uint8_t(1 << (bits - 1));
      pack_row(bits, cols, row, zero, codes_out + n * row_bytes);
    }
  });
  if (const int64_t n = bad; n >= 0) {
    int64_t k = 0;
    while (codes[n * cols + k] >> bits == 0) k++;
    return fail(LOWBIT_OUT_OF_RANGE, "codes[%" PRId64 ", %" PRId64 "]: expected at most %d, got %d", n, k,
                (1 << bits) - 1, codes[n * cols + k]);
  }
  return LOWBIT_OK;
}

lowbit_status lowbit_unpack_codes(const lowbit_matrix* w, int64_t row_begin, int64_t row_end, uint8_t* out) {
  lowbit_matrix m;
  LOWBIT_TRY(check_matrix(w, &m));
  if (row_begin < 0 || row_end < row_begin || row_end > m.rows)
    return fail(LOWBIT_OUT_OF_RANGE, "rows: expected a range inside [0, %" PRId64 "), got [%" PRId64 ", %" PRId64 ")",
                m.rows, row_begin, row_end);
  if (!out && row_end > row_begin) return fail(LOWBIT_INVALID_ARGUMENT, "out: expected a pointer, got NULL");
  const int64_t row_bytes = row_lines(m.format, m.cols) * kLineBytes;
  parallel_for(row_end - row_begin, 1, (row_end - row_begin) * m.cols < kSerialCodes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      unpack_row(m.format, m.cols, m.codes + (row_begin + i) * row_bytes, out + i * m.cols);
  });
  return LOWBIT_OK;
}

lowbit_status lowbit_pack_float(lowbit_format format, int64_t rows, int64_t cols, int64_t group_size, const void* src,
                                lowbit_dtype src_dtype, int64_t src_stride, lowbit_dtype scale_dtype, int clip,
                                uint8_t* codes_out, void* scales_out, uint8_t* zeros_out) {
  LOWBIT_TRY(check_shape(format, rows, cols));
  if (group_size == -1) group_size = cols;
  LOWBIT_TRY(check_group_size(cols, group_size));
  if (!src || !codes_out || !scales_out) return fail(LOWBIT_INVALID_ARGUMENT, "pack: expected pointers, got NULL");
  if (!is_float(src_dtype) || !is_float(scale_dtype))
    return fail(LOWBIT_INVALID_ARGUMENT, "dtype: expected f32, f16 or bf16, got source %d, scales %d", int(src_dtype),
                int(scale_dtype));
  if (src_stride < cols)
    return fail(LOWBIT_INVALID_ARGUMENT, "stride: expected at least cols (%" PRId64 "), got %" PRId64, cols,
                src_stride);
  const int bits = format;
  const int64_t groups = ceil_div(cols, group_size), row_bytes = row_lines(bits, cols) * kLineBytes;
  std::atomic<int64_t> bad{-1};
  std::atomic<bool> no_memory{false};
  parallel_for(rows, 1, rows * cols < kSerialCodes, [&](int64_t begin, int64_t end) {
    const size_t float_bytes = size_t(cols) * sizeof(float);
    float* row = static_cast<float*>(lowbit_alloc(float_bytes));
    uint8_t* codes = static_cast<uint8_t*>(lowbit_alloc(size_t(cols)));
    no_memory = no_memory || !row || !codes;
    for (int64_t n = begin; n < end && row && codes; n++) {
      bool finite = true;
      for (int64_t k = 0; k < cols; k++) {
        row[k] = load_float(src, src_dtype, n * src_stride + k);
        finite = finite && std::isfinite(row[k]);
      }
      if (!finite) {
        bad = n;
        break;
      }
      int zero = 1 << (bits - 1);
      for (int64_t g = 0; g < groups; g++) {
        const int64_t k0 = g * group_size, k1 = k0 + group_size < cols ? k0 + group_size : cols;
        const Grid grid = find_grid(row + k0, k1 - k0, 1, bits, zeros_out == nullptr, clip, scale_dtype);
        for (int64_t k = k0; k < k1; k++) codes[k] = uint8_t(quantize_code(row[k], grid, bits));
        store_float(scales_out, scale_dtype, n * groups + g, grid.scale);
        zero = grid.zero;
        if (zeros_out) zeros_out[n * groups + g] = uint8_t(zero);
      }
      pack_row(bits, cols, codes, uint8_t(zero), codes_out + n * row_bytes);
    }
    lowbit_free(row, float_bytes);
    lowbit_free(codes, size_t(cols));
  });
  if (no_memory) return fail(LOWBIT_OUT_OF_MEMORY, "pack: no memory for a row of %" PRId64 " columns", cols);
  if (const int64_t n = bad; n >= 0) {
    int64_t k = 0;
    while (std::isfinite(load_float(src, src_dtype, n * src_stride + k))) k++;
    return fail(LOWBIT_INVALID_ARGUMENT, "weight[%" PRId64 ", %" PRId64 "]: expected a finite number, got %g", n, k,
                double(load_float(src, src_dtype, n * src_stride + k)));
  }
  return LOWBIT_OK;
}
}
