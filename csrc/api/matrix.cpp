// The noun: validation of packed matrices, and memory for them.
#include <sys/mman.h>

#include <atomic>
#include <cinttypes>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "api/validate.h"
#include "cpu/float_types.h"
#include "cpu/kernel.h"
#include "dispatch/parallel.h"

namespace lowbit {

lowbit_status check_format(int format) {
  if (is_format(format)) return LOWBIT_OK;
  return fail(LOWBIT_INVALID_ARGUMENT, "format: expected int2, int3, int4, int8 or trit, got %d", format);
}

lowbit_status check_shape(int format, int64_t rows, int64_t cols) {
  LOWBIT_TRY(check_format(format));
  if (rows < 1 || cols < 1)
    return fail(LOWBIT_INVALID_ARGUMENT, "shape: expected at least 1x1, got %" PRId64 "x%" PRId64, rows, cols);
  if (cols > INT32_MAX) return fail(LOWBIT_INVALID_ARGUMENT, "cols: expected at most 2^31 - 1, got %" PRId64, cols);
  if (rows > kMaxElements / padded_cols(format, cols))
    return fail(LOWBIT_INVALID_ARGUMENT, "shape: expected at most 2^46 elements, got %" PRId64 "x%" PRId64, rows, cols);
  return LOWBIT_OK;
}

lowbit_status check_group_size(int64_t cols, int64_t group_size) {
  if (group_size == cols) return LOWBIT_OK;
  if (group_size < 16 || group_size > cols || group_size % 16)
    return fail(LOWBIT_INVALID_ARGUMENT,
                "group_size: expected -1, a multiple of 16 up to cols (%" PRId64 "), or cols, got %" PRId64, cols,
                group_size);
  return LOWBIT_OK;
}

lowbit_status check_perm(const int32_t* perm, int64_t cols) {
  uint32_t largest = 0;  // a negative entry is a large unsigned one; a loop without exits becomes vector code
  for (int64_t j = 0; j < cols; j++) largest = uint32_t(perm[j]) > largest ? uint32_t(perm[j]) : largest;
  if (largest < uint64_t(cols)) return LOWBIT_OK;
  int64_t j = 0;
  while (uint32_t(perm[j]) < uint64_t(cols)) j++;
  return fail(LOWBIT_INVALID_ARGUMENT, "perm[%" PRId64 "]: expected a column in [0, %" PRId64 "), got %d", j, cols,
              perm[j]);
}

lowbit_status check_layout(const lowbit_matrix* w, lowbit_matrix* normalised) {
  if (!w) return fail(LOWBIT_INVALID_ARGUMENT, "matrix: expected a pointer, got NULL");
  *normalised = *w;
  LOWBIT_TRY(check_shape(w->format, w->rows, w->cols));
  if (w->group_size == -1) normalised->group_size = w->cols;
  LOWBIT_TRY(check_group_size(w->cols, normalised->group_size));
  if (!w->codes) return fail(LOWBIT_INVALID_ARGUMENT, "codes: expected a pointer, got NULL");
  if (!w->scales) return fail(LOWBIT_INVALID_ARGUMENT, "scales: expected a pointer, got NULL");
  if (!is_float(w->scale_dtype))
    return fail(LOWBIT_INVALID_ARGUMENT, "scale_dtype: expected f32, f16 or bf16, got %d", int(w->scale_dtype));
  const int64_t groups = ceil_div(w->cols, normalised->group_size);
  const bool grouped = w->scale_rows == w->rows && w->scale_cols == groups;
  const bool per_tensor = w->scale_rows == 1 && w->scale_cols == 1 && groups == 1;
  if (!grouped && !per_tensor)
    return fail(LOWBIT_INVALID_ARGUMENT,
                "scales: expected shape [%" PRId64 ", %" PRId64 "]%s, got [%" PRId64 ", %" PRId64 "]", w->rows, groups,
                groups == 1 ? " or [1, 1]" : "", w->scale_rows, w->scale_cols);
  if (w->zeros && w->format == LOWBIT_TRIT)
    return fail(LOWBIT_INVALID_ARGUMENT,
                "zeros: expected NULL for trit, whose codes 0, 1, 2 mean -1, 0, 1; got a pointer");
  return LOWBIT_OK;
}

lowbit_status check_matrix(const lowbit_matrix* w, lowbit_matrix* normalised) {
  LOWBIT_TRY(check_layout(w, normalised));
  return w->perm ? check_perm(w->perm, w->cols) : LOWBIT_OK;
}

// Every byte of a ternary matrix is one that packing writes. Thirteen values never are: they would decode like their
// neighbours, so a file that holds one is damaged or not ours.
static lowbit_status check_trit_bytes(const lowbit_matrix& m) {
  const int64_t row_bytes = row_lines(m.format, m.cols) * kLineBytes;
  std::atomic<int64_t> bad{-1};
  parallel_for(m.rows, 1, m.rows * row_bytes < 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const uint8_t* row = m.codes + n * row_bytes;
      bool valid = true;  // no exit from the loop: it becomes vector code
      for (int64_t i = 0; i < row_bytes; i++) valid &= is_trit_byte(row[i]);
      if (!valid) bad = n;
    }
  });
  if (bad >= 0) {
    int64_t at = bad * row_bytes;
    while (is_trit_byte(m.codes[at])) at++;
    return fail(LOWBIT_INVALID_ARGUMENT,
                "codes[%" PRId64 ", %" PRId64 ", %" PRId64
                "]: expected a byte of five trits, got %d, one of the 13 that "
                "none are stored as",
                at / row_bytes, at % row_bytes / kLineBytes, at % kLineBytes, m.codes[at]);
  }
  return LOWBIT_OK;
}

}  // namespace lowbit

using namespace lowbit;

extern "C" {

int64_t lowbit_row_lines(lowbit_format format, int64_t cols) {
  return is_format(format) && cols >= 1 && cols <= INT32_MAX ? row_lines(format, cols) : 0;
}

lowbit_status lowbit_matrix_check(const lowbit_matrix* w, int values) {
  lowbit_matrix m;
  LOWBIT_TRY(check_matrix(w, &m));
  if (!values) return LOWBIT_OK;
  const int64_t count = m.scale_rows * m.scale_cols;
  for (int64_t i = 0; i < count; i++)
    if (const float scale = load_float(m.scales, m.scale_dtype, i); !std::isfinite(scale))
      return fail(LOWBIT_INVALID_ARGUMENT, "scales[%" PRId64 ", %" PRId64 "]: expected a finite number, got %g",
                  i / m.scale_cols, i % m.scale_cols, double(scale));
    else if (scale == 0 && m.format == LOWBIT_TRIT)  // no packer stores one: zeros are codes
      return fail(LOWBIT_INVALID_ARGUMENT, "scales[%" PRId64 ", %" PRId64 "]: expected a number other than 0, got 0",
                  i / m.scale_cols, i % m.scale_cols);
  const int largest = code_count(m.format) - 1;
  for (int64_t i = 0; m.zeros && i < count; i++)
    if (m.zeros[i] > largest)
      return fail(LOWBIT_INVALID_ARGUMENT, "zeros[%" PRId64 ", %" PRId64 "]: expected at most %d, got %d",
                  i / m.scale_cols, i % m.scale_cols, largest, m.zeros[i]);
  if (m.format == LOWBIT_TRIT) LOWBIT_TRY(check_trit_bytes(m));
  if (m.perm) {  // in range already; now every column once
    std::unique_ptr<uint8_t[]> seen(new (std::nothrow) uint8_t[size_t(m.cols)]());
    if (!seen) return fail(LOWBIT_OUT_OF_MEMORY, "perm: no memory for %" PRId64 " marks", m.cols);
    for (int64_t j = 0; j < m.cols; j++)
      if (seen[size_t(m.perm[j])]++)
        return fail(LOWBIT_INVALID_ARGUMENT, "perm: expected every column once, got %d again at %" PRId64, m.perm[j],
                    j);
  }
  return LOWBIT_OK;
}

// Large blocks are mapped at a 2 MiB boundary and advised onto huge pages; small ones share the heap's.
static constexpr size_t kHugePage = size_t(2) << 20;

void* lowbit_alloc(size_t bytes) {
  if (bytes < kHugePage) {
    const size_t rounded = bytes == 0 ? 64 : (bytes + 63) / 64 * 64;
    void* memory = aligned_alloc(64, rounded);
    return memory ? memset(memory, 0, rounded) : nullptr;
  }
  if (bytes > size_t(PTRDIFF_MAX) - 2 * kHugePage) return nullptr;
  const size_t span = (bytes + 4095) / 4096 * 4096;
  char* map = static_cast<char*>(
      mmap(nullptr, span + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (map == MAP_FAILED) return nullptr;
  char* memory = reinterpret_cast<char*>((uintptr_t(map) + kHugePage - 1) / kHugePage * kHugePage);
  if (memory > map) munmap(map, size_t(memory - map));
  if (const size_t rest = size_t(map + span + kHugePage - (memory + span))) munmap(memory + span, rest);
  madvise(memory, span, MADV_HUGEPAGE);  // advice only: 4 KiB pages work too
  return memory;
}

void lowbit_free(void* memory, size_t bytes) {
  if (!memory) return;
  if (bytes < kHugePage)
    free(memory);
  else
    munmap(memory, (bytes + 4095) / 4096 * 4096);
}
}
