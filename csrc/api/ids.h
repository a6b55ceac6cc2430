// Ids as a caller gives them, int32 or int64, and what becomes of one outside the table: what gather and bags share.
#pragma once

#include <cinttypes>

#include "api/validate.h"

namespace lowbit {

constexpr int64_t kZeroRow = -1;  // what kernels take for a row of zeros

class Ids {
 public:
  // Checks everything but the ids themselves.
  static lowbit_status check(const lowbit_matrix& w, const void* ids, lowbit_dtype dtype, int64_t count,
                             lowbit_id_policy policy, Ids* made) {
    if (dtype != LOWBIT_I32 && dtype != LOWBIT_I64)
      return fail(LOWBIT_INVALID_ARGUMENT, "ids: expected dtype i32 or i64, got %d", int(dtype));
    if (policy != LOWBIT_IDS_ERROR && policy != LOWBIT_IDS_ZERO && policy != LOWBIT_IDS_CLAMP)
      return fail(LOWBIT_INVALID_ARGUMENT, "policy: expected error, zero or clamp, got %d", int(policy));
    if (count < 0 || count > kMaxElements / w.cols)
      return fail(LOWBIT_INVALID_ARGUMENT, "count: expected 0 or more below 2^46 elements, got %" PRId64, count);
    if (count > 0 && !ids) return fail(LOWBIT_INVALID_ARGUMENT, "ids: expected a pointer, got NULL");
    *made = {ids, dtype, policy, w.rows};
    return LOWBIT_OK;
  }

  int64_t operator[](int64_t i) const {
    return dtype_ == LOWBIT_I64 ? static_cast<const int64_t*>(ids_)[i] : static_cast<const int32_t*>(ids_)[i];
  }

  // Under policy ERROR: LOWBIT_OUT_OF_RANGE when one of ids [begin, end) is neither a row nor `padding`; the first of
  // them is named, and put to *first_bad if that is not NULL.
  lowbit_status find_bad(int64_t begin, int64_t end, int64_t padding, int64_t* first_bad) const {
    if (policy_ != LOWBIT_IDS_ERROR) return LOWBIT_OK;
    for (int64_t i = begin; i < end; i++) {
      const int64_t id = (*this)[i];
      if ((id >= 0 && id < rows_) || (padding >= 0 && id == padding)) continue;
      if (first_bad) *first_bad = i;
      return fail(LOWBIT_OUT_OF_RANGE, "ids[%" PRId64 "]: expected a row in [0, %" PRId64 "), got %" PRId64, i, rows_,
                  id);
    }
    return LOWBIT_OK;
  }

  // The row that id i asks for, after the policy.
  int64_t row(int64_t i) const {
    const int64_t id = (*this)[i];
    if (id >= 0 && id < rows_) return id;
    return policy_ == LOWBIT_IDS_CLAMP ? (id < 0 ? 0 : rows_ - 1) : kZeroRow;
  }

  Ids() = default;

 private:
  Ids(const void* ids, lowbit_dtype dtype, lowbit_id_policy policy, int64_t rows)
      : ids_(ids), dtype_(dtype), policy_(policy), rows_(rows) {}

  const void* ids_ = nullptr;
  lowbit_dtype dtype_ = LOWBIT_I64;
  lowbit_id_policy policy_ = LOWBIT_IDS_ZERO;
  int64_t rows_ = 0;
};

// What every output of rows has to be: `rows` of them, `cols` apart at least.
inline lowbit_status check_output(const void* out, lowbit_dtype dtype, int64_t rows, int64_t cols, int64_t stride) {
  if (!is_float(dtype))
    return fail(LOWBIT_INVALID_ARGUMENT, "out: expected dtype f32, f16 or bf16, got %d", int(dtype));
  if (rows > 0 && !out) return fail(LOWBIT_INVALID_ARGUMENT, "out: expected a pointer, got NULL");
  if (rows > 1 && stride < cols)
    return fail(LOWBIT_INVALID_ARGUMENT, "out: expected a stride of at least cols (%" PRId64 "), got %" PRId64, cols,
                stride);
  return LOWBIT_OK;
}

}  // namespace lowbit
