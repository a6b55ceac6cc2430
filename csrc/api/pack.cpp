// pack: codes or floats to lines. unpack_codes: lines to codes. Row by row, plane by plane, in parallel over rows.
// Floats go through the column solver's kernels, 16 rows at a time: the same grids and codes, with nothing to push on.
#include <atomic>
#include <cinttypes>
#include <cmath>
#include <cstring>

#include "api/validate.h"
#include "cpu/float_types.h"
#include "dispatch/parallel.h"
#include "dispatch/select.h"
#include "solver/panel.h"

namespace lowbit {
namespace {

constexpr int64_t kSerialCodes = 1 << 16;  // below this a thread's wake-up costs more than the work

// Five planes make a line of trits; the middle digit fills the padding.
void pack_trit_row(int64_t cols, const uint8_t* codes, uint8_t* row) {
  for (int64_t line = 0; line < row_lines(kTrit, cols); line++) {
    int number[kLineBytes] = {};
    for (int p = 0; p < kTritPlanes; p++)
      for (int i = 0; i < kPlaneCodes; i++) {
        const int64_t k = (line * kTritPlanes + p) * kPlaneCodes + i;
        number[i] = 3 * number[i] + (k < cols ? codes[k] : middle_code(kTrit));
      }
    for (int i = 0; i < kLineBytes; i++) row[line * kLineBytes + i] = uint8_t(trit_byte(number[i]));
  }
}

void unpack_trit_row(int64_t cols, const uint8_t* row, uint8_t* codes) {
  for (int64_t k = 0; k < cols; k += kPlaneCodes) {
    const CodePlace at = code_place(kTrit, cols, k);
    for (int64_t i = 0; i < kPlaneCodes && k + i < cols; i++)
      codes[k + i] = uint8_t(trit_digit(row[at.offset + i], at.shift));
  }
}

// Lines of one row from one code a byte; `zero_point` fills the padding.
void pack_row(int bits, int64_t cols, const uint8_t* codes, uint8_t zero_point, uint8_t* row) {
  if (bits == kTrit) return pack_trit_row(cols, codes, row);
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
  if (bits == kTrit) return unpack_trit_row(cols, row, codes);
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

struct FloatRows {
  const void* src;
  lowbit_dtype dtype;
  int64_t stride;
};

struct RoundedRows {
  uint8_t* codes;
  void* scales;
  uint8_t* zeros;
  lowbit_dtype scale_dtype;
};

// Rows [n, n + count), at most 16, to the nearest codes of their own grids: the column solver with no errors to push.
// Returns the first row that holds a number that is not finite, or -1.
int64_t round_rows(SolveKernel round, const GridRule& rule, const FloatRows& from, int64_t n, int64_t count,
                   int64_t cols, int64_t group_size, const PanelBuffers& panel, const RoundedRows& to) {
  const int64_t groups = ceil_div(cols, group_size), strips = ceil_div(cols, kStripCols);
  for (int64_t lane = 0; lane < kSolverLanes; lane++) {
    bool finite = true;
    for (int64_t k = 0; k < cols; k++) {
      const float w = lane < count ? load_float(from.src, from.dtype, (n + lane) * from.stride + k) : 0.0f;
      panel.weight[k * kSolverLanes + lane] = w;
      finite = finite && std::isfinite(w);
    }
    if (!finite) return n + lane;
    for (int64_t k = cols; k < strips * kStripCols; k++) panel.weight[k * kSolverLanes + lane] = 0;
  }
  const SolvePanel p = {rule,
                        false,
                        cols,
                        group_size,
                        groups,
                        kStripCols,
                        nullptr,
                        nullptr,
                        1,
                        panel.weight.get(),
                        panel.scales.get(),
                        panel.zeros.get(),
                        panel.codes.get(),
                        panel.loss.get(),
                        panel.pushed.get()};
  round(&p);
  // A row of codes is no longer than the floats that it came from: one lane of the panel's memory after another.
  for (int64_t lane = 0; lane < count; lane++) {
    uint8_t* row = reinterpret_cast<uint8_t*>(panel.weight.get());
    for (int64_t k = 0; k < cols; k++) row[k] = panel.codes[k * kSolverLanes + lane];
    for (int64_t g = 0; g < groups; g++) {
      const int64_t at = (n + lane) * groups + g;
      store_float(to.scales, to.scale_dtype, at, panel.scales[g * kSolverLanes + lane]);
      if (to.zeros) to.zeros[at] = uint8_t(panel.zeros[g * kSolverLanes + lane]);
    }
    const uint8_t zero = uint8_t(panel.zeros[(groups - 1) * kSolverLanes + lane]);
    pack_row(rule.bits, cols, row, zero, to.codes + (n + lane) * row_lines(rule.bits, cols) * kLineBytes);
  }
  return -1;
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
      uint8_t largest = 0;
      for (int64_t k = 0; k < cols; k++) largest = row[k] > largest ? row[k] : largest;
      if (largest >= code_count(bits)) {
        bad = n;
        return;
      }
      // Padding continues the last group: group min(k / group_size, G - 1).
      const uint8_t zero = m.zeros ? m.zeros[scale_index(&m, n, groups - 1)] : uint8_t(middle_code(bits));
      pack_row(bits, cols, row, zero, codes_out + n * row_bytes);
    }
  });
  if (const int64_t n = bad; n >= 0) {
    int64_t k = 0;
    while (codes[n * cols + k] < code_count(bits)) k++;
    return fail(LOWBIT_OUT_OF_RANGE, "codes[%" PRId64 ", %" PRId64 "]: expected at most %d, got %d", n, k,
                code_count(bits) - 1, codes[n * cols + k]);
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
  if (format == LOWBIT_TRIT && zeros_out)
    return fail(LOWBIT_INVALID_ARGUMENT, "zeros: expected NULL for trit, got a pointer");
  if (src_stride < cols)
    return fail(LOWBIT_INVALID_ARGUMENT, "stride: expected at least cols (%" PRId64 "), got %" PRId64, cols,
                src_stride);
  SolveKernel round;
  LOWBIT_TRY(select<Verb::solve>(0, &round));
  const FloatRows from{src, src_dtype, src_stride};
  const RoundedRows to{codes_out, scales_out, zeros_out, scale_dtype};
  const GridRule rule = {format, zeros_out == nullptr, clip != 0, scale_dtype};
  std::atomic<int64_t> bad{-1};
  std::atomic<bool> no_memory{false};
  parallel_for(rows, kSolverLanes, rows * cols < kSerialCodes, [&](int64_t begin, int64_t end) {
    const int64_t strips = ceil_div(cols, kStripCols);
    const PanelBuffers panel(strips, ceil_div(cols, group_size), 1);
    if (!panel) {
      no_memory = true;
      return;
    }
    for (int64_t n = begin; n < end; n += kSolverLanes) {
      const int64_t count = end - n < kSolverLanes ? end - n : kSolverLanes;
      if (const int64_t row = round_rows(round, rule, from, n, count, cols, group_size, panel, to); row >= 0) {
        bad = row;
        return;
      }
    }
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
