/* The C API from C: matrices of known codes, checked against plain loops over the same codes.
 * Exits with 0 when every value is right; names the first wrong one otherwise. */
#include <lowbit/lowbit.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t state = 1;
static uint32_t draw(void) { return (state = state * 1664525u + 1013904223u) >> 8; }

static void* array(size_t count, size_t size) {
  void* memory = calloc(count, size);
  if (!memory) {
    fprintf(stderr, "no memory for %zu bytes\n", count * size);
    exit(1);
  }
  return memory;
}

static void expect(lowbit_status status, lowbit_status expected, const char* call) {
  if (status == expected) return;
  fprintf(stderr, "%s: expected %s, got %s: %s\n", call, lowbit_status_name(expected), lowbit_status_name(status),
          lowbit_last_error());
  exit(1);
}

static void expect_close(float got, double expected, double tolerance, const char* what, int64_t row, int64_t col) {
  if (fabs(got - expected) <= tolerance) return;
  fprintf(stderr, "%s[%lld, %lld]: expected %.9g within %.3g, got %.9g\n", what, (long long)row, (long long)col,
          expected, tolerance, got);
  exit(1);
}

/* One matrix: codes, scales, zeros and a permutation drawn at random; pack, unpack, multiply, gather. */
static void check_matrix(lowbit_format format, int64_t rows, int64_t cols, int64_t group_size) {
  const int64_t groups = (cols + group_size - 1) / group_size, tokens = 3;
  const uint32_t levels = 1u << (int)format;
  uint8_t *codes = array((size_t)(rows * cols), 1), *seen = array((size_t)(rows * cols), 1);
  float *scales = array((size_t)(rows * groups), sizeof *scales),
        *weight = array((size_t)(rows * cols), sizeof *weight);
  uint8_t* zeros = array((size_t)(rows * groups), 1);
  int32_t* perm = array((size_t)cols, sizeof *perm);
  float *x = array((size_t)(tokens * cols), sizeof *x), *y = array((size_t)(tokens * rows), sizeof *y);
  float *bias = array((size_t)rows, sizeof *bias), *row = array((size_t)cols, sizeof *row);

  for (int64_t i = 0; i < rows * cols; i++) codes[i] = (uint8_t)(draw() % levels);
  for (int64_t i = 0; i < rows * groups; i++) {
    scales[i] = (float)(1 + draw() % 15) / 64;
    zeros[i] = (uint8_t)(draw() % levels);
  }
  for (int64_t i = 0; i < tokens * cols; i++) x[i] = (float)((int)(draw() % 2001) - 1000) / 1000;
  for (int64_t n = 0; n < rows; n++) bias[n] = (float)n / 4;
  for (int64_t j = 0; j < cols; j++) perm[j] = (int32_t)j;
  for (int64_t j = cols - 1; j > 0; j--) {
    const int64_t other = (int64_t)(draw() % (uint32_t)(j + 1));
    const int32_t held = perm[j];
    perm[j] = perm[other];
    perm[other] = held;
  }
  for (int64_t n = 0; n < rows; n++)
    for (int64_t j = 0; j < cols; j++) {
      const int64_t g = n * groups + j / group_size;
      weight[n * cols + perm[j]] = scales[g] * (float)((int)codes[n * cols + j] - (int)zeros[g]);
    }

  lowbit_matrix w = {0};
  w.format = format;
  w.rows = rows;
  w.cols = cols;
  w.group_size = group_size;
  w.scales = scales;
  w.scale_dtype = LOWBIT_F32;
  w.scale_rows = rows;
  w.scale_cols = groups;
  w.zeros = zeros;
  w.perm = perm;
  const size_t bytes = (size_t)(rows * lowbit_row_lines(format, cols)) * 64;
  uint8_t* packed = lowbit_alloc(bytes);
  if (!packed) expect(LOWBIT_OUT_OF_MEMORY, LOWBIT_OK, "lowbit_alloc");
  expect(lowbit_pack_codes(&w, codes, packed), LOWBIT_OK, "lowbit_pack_codes");
  w.codes = packed;
  expect(lowbit_matrix_check(&w, 1), LOWBIT_OK, "lowbit_matrix_check");

  expect(lowbit_unpack_codes(&w, 0, rows, seen), LOWBIT_OK, "lowbit_unpack_codes");
  if (memcmp(seen, codes, (size_t)(rows * cols)) != 0) {
    fprintf(stderr, "lowbit_unpack_codes: the codes differ from those packed\n");
    exit(1);
  }

  expect(lowbit_matmul(&w, x, LOWBIT_F32, tokens, cols, bias, LOWBIT_F32, y, rows, LOWBIT_ACT_FLOAT, NULL, 0),
         LOWBIT_OK, "lowbit_matmul");
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t n = 0; n < rows; n++) {
      double sum = bias[n], size = fabs(sum);
      for (int64_t k = 0; k < cols; k++) {
        sum += (double)x[m * cols + k] * weight[n * cols + k];
        size += fabs((double)x[m * cols + k] * weight[n * cols + k]);
      }
      expect_close(y[m * rows + n], sum, 3e-4 * size, "y", m, n);
    }

  const int32_t id = (int32_t)(rows - 1);
  expect(lowbit_gather(&w, &id, LOWBIT_I32, 1, LOWBIT_IDS_ERROR, row, LOWBIT_F32, cols), LOWBIT_OK, "lowbit_gather");
  for (int64_t k = 0; k < cols; k++) expect_close(row[k], weight[id * cols + k], 0, "gather", id, k);

  const int32_t beyond = (int32_t)rows;
  expect(lowbit_gather(&w, &beyond, LOWBIT_I32, 1, LOWBIT_IDS_ERROR, row, LOWBIT_F32, cols), LOWBIT_OUT_OF_RANGE,
         "lowbit_gather of an id past the end");

  lowbit_free(packed, bytes);
  void* arrays[] = {codes, seen, scales, weight, zeros, perm, x, y, bias, row};
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
}

int main(void) {
  const lowbit_format formats[] = {LOWBIT_INT2, LOWBIT_INT3, LOWBIT_INT4, LOWBIT_INT8};
  if (lowbit_abi_version() != LOWBIT_ABI_VERSION) {
    fprintf(stderr, "lowbit_abi_version: expected %d, got %d\n", LOWBIT_ABI_VERSION, (int)lowbit_abi_version());
    return 1;
  }
  for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
    check_matrix(formats[i], 1, 1, 1);
    check_matrix(formats[i], 5, 200, 32);
    check_matrix(formats[i], 67, 512, 128);
  }
  printf("C %s: every value as expected\n", lowbit_version());
  return 0;
}
