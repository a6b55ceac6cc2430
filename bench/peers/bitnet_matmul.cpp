// Products of bitnet.cpp's I2_S kernels for bitnet.py: rows split over OpenMP threads, its own vector dot products inside.
// Built by bitnet.py together with the peer's src/ggml-bitnet-mad.cpp. Activations are quantized once a call, per token,
// as BitNet defines it. For one token its "weight parallel" kernel (four rows at a time, the faster one by its own
// figures), for more its "activation parallel" kernel (four tokens at a time).
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <vector>

void ggml_vec_dot_i2_i8_s_1xN(int n, float* s, size_t bs, const void* vx, size_t bx, const void* vy, size_t by,
                              int nrc);
void ggml_vec_dot_i2_i8_s_Nx1(int n, float* s, size_t bs, const void* vx, size_t bx, const void* vy, size_t by,
                              int nrc);
void ggml_vec_dot_i2_i8_s_1x1(int n, float* s, size_t bs, const void* vx, size_t bx, const void* vy, size_t by,
                              int nrc);

extern "C" {

// codes: [rows][cols / 4], byte j of a block of 128 holds elements j, 32 + j, 64 + j, 96 + j, high bits first, t + 1 each.
// x [tokens][cols] fp32, y [tokens][rows]. rows, and tokens above 1, are multiples of 4; cols one of 128.
void peer_matmul(const uint8_t* codes, float scale, int64_t cols, int64_t rows, const float* x, int64_t tokens,
                 float* y, int threads) {
  static thread_local std::vector<int8_t> digits;
  static thread_local std::vector<float> steps, sums;
  digits.resize(size_t(tokens * cols)), steps.resize(size_t(tokens)), sums.resize(size_t(tokens));
  int8_t* q = digits.data();
  float *step = steps.data(), *sum = sums.data();
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t m = 0; m < tokens; m++) {
      float largest = 1e-5f;
      for (int64_t k = 0; k < cols; k++) largest = std::fmax(largest, std::fabs(x[m * cols + k]));
      const float inverse = 127 / largest;
      int32_t total = 0;
      for (int64_t k = 0; k < cols; k++) {
        const int v = int(std::nearbyintf(x[m * cols + k] * inverse));
        q[m * cols + k] = int8_t(v);
        total += v;
      }
      step[m] = largest / 127;
      sum[m] = float(total);
    }
    const int64_t grains = rows / 4;
    const int64_t begin = grains * omp_get_thread_num() / omp_get_num_threads() * 4;
    const int64_t end = grains * (omp_get_thread_num() + 1) / omp_get_num_threads() * 4;
    if (tokens == 1) {
      ggml_vec_dot_i2_i8_s_1xN(int(cols), y + begin, 1, codes + begin * cols / 4, size_t(cols), q, 0, int(end - begin));
      for (int64_t n = begin; n < end; n++) y[n] = (y[n] - sum[0]) * (step[0] * scale);
    } else {
      for (int64_t n = begin; n < end; n++) {
        ggml_vec_dot_i2_i8_s_Nx1(int(cols), y + n, size_t(rows), codes + n * cols / 4, 0, q, size_t(cols), int(tokens));
        for (int64_t m = 0; m < tokens; m++) y[m * rows + n] = (y[m * rows + n] - sum[m]) * (step[m] * scale);
      }
    }
  }
}
}
