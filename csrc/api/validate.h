// What every verb checks before a kernel runs. Kernels trust their arguments; this is where trust is earned.
#pragma once

#include "api/status.h"
#include "lowbit/formats.h"

namespace lowbit {

inline bool is_integer_format(int format) { return format == 2 || format == 3 || format == 4 || format == 8; }
inline bool is_format(int format) { return is_integer_format(format) || format == kTrit; }
inline bool is_float(lowbit_dtype dtype) { return dtype == LOWBIT_F32 || dtype == LOWBIT_F16 || dtype == LOWBIT_BF16; }
inline int64_t dtype_bytes(lowbit_dtype dtype) {
  return dtype == LOWBIT_I64 ? 8 : dtype == LOWBIT_F32 || dtype == LOWBIT_I32 ? 4 : 2;
}

// Sizes up to 2^46 elements: every product of them with a small constant stays far from int64's end.
constexpr int64_t kMaxElements = int64_t(1) << 46;

lowbit_status check_format(int format);
lowbit_status check_shape(int format, int64_t rows, int64_t cols);
lowbit_status check_group_size(int64_t cols, int64_t group_size);  // after normalising
lowbit_status check_perm(const int32_t* perm, int64_t cols);       // every entry in [0, cols)

// The matrix with its group size normalised, after the checks that read none of its values.
lowbit_status check_layout(const lowbit_matrix* w, lowbit_matrix* normalised);

// The same and perm's range, which CPU kernels index by.
lowbit_status check_matrix(const lowbit_matrix* w, lowbit_matrix* normalised);

#define LOWBIT_TRY(call)                                                            \
  do {                                                                              \
    if (const lowbit_status status_ = (call); status_ != LOWBIT_OK) return status_; \
  } while (0)

}  // namespace lowbit
