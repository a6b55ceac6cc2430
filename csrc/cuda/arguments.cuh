// What every product kernel takes: a packed matrix, activations and results, as plain numbers.
#ifndef LOWBIT_CUDA_ARGUMENTS_CUH
#define LOWBIT_CUDA_ARGUMENTS_CUH

#include "cuda/backend.h"
#include "cuda/fragments.cuh"
#include "cuda/matmul_plan.h"

namespace lowbit {
namespace cuda {

// W[n][k] = scale(n, k / group) * (code - zero(n, k / group)).
struct MatrixArguments {
  const uint8_t* codes;
  const void* scales;
  const uint8_t* zeros;            // or NULL
  const int32_t* perm;             // or NULL
  int64_t rows, scale_row_stride;  // scales between two rows: the groups, 1, or 0 (one scale for all)
  int64_t scale_count;
  int32_t cols, row_lines, group_size, groups;  // groups: 1 where a row has one scale
  int32_t group_planes;  // planes of a group where it has whole ones; a row with one scale is one group
  int32_t group_shift;   // log2 of group_planes where that is a whole number, else -1
  int32_t scale_dtype, scale_bytes;
};

struct Operands {
  const void* x;
  const void* bias;  // or NULL
  void* y;
  int64_t x_stride, y_stride;  // elements
  int32_t dtype, bias_dtype;
  int32_t tokens;
  bool x_vectors;  // x may be read 16 bytes at a time
};

inline MatrixArguments matrix_arguments(const lowbit_matrix& w) {
  MatrixArguments a{};
  a.codes = w.codes;
  a.scales = w.scales;
  a.zeros = w.zeros;
  a.perm = w.perm;
  a.rows = w.rows;
  a.cols = int32_t(w.cols);
  a.row_lines = int32_t(row_lines(w.format, w.cols));
  const bool one = w.scale_cols == 1;
  a.group_size = int32_t(w.group_size);
  a.groups = one ? 1 : int32_t(ceil_div(w.cols, w.group_size));
  a.scale_row_stride = w.scale_rows == 1 ? 0 : w.scale_cols;
  a.scale_count = w.scale_rows * w.scale_cols;
  a.scale_dtype = w.scale_dtype;
  a.scale_bytes = w.scale_dtype == LOWBIT_F32 ? 4 : 2;
  a.group_planes = one ? 1 << 30 : a.group_size / 64;
  a.group_shift = -1;
  for (int shift = 0; shift <= 30; shift++)
    if (a.group_planes == 1 << shift) a.group_shift = shift;
  return a;
}

// The group of a plane, where groups are whole planes. One beyond the last for planes beyond the last column.
__device__ __forceinline__ int32_t plane_group(const MatrixArguments& w, int32_t plane) {
  return w.group_shift >= 0 ? plane >> w.group_shift : plane / w.group_planes;
}

// The group of 16 columns from `col` on.
__device__ __forceinline__ int32_t column_group(const MatrixArguments& w, int32_t col) {
  return w.groups == 1 ? 0 : min(col / w.group_size, w.groups - 1);
}

__device__ __forceinline__ float load_scale(const MatrixArguments& w, int64_t row, int32_t group) {
  return load_float(w.scales, w.scale_dtype, row * w.scale_row_stride + group);
}

}  // namespace cuda
}  // namespace lowbit
#endif
