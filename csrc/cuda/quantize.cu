// Activations to integers, as docs/numerics.md defines them, for the integer kernels: x ~ step * v, v = 256*high + low.
// The same steps and digits as on the CPU, bit for bit.
//
// One block a token. Chunks of at most 128 columns find their largest magnitude among lanes; wider ones (a ternary row
// with one scale, BitNet's step a token) among the whole block first. Bound by latency: a few KB.
#include "cuda/quantize.cuh"

namespace lowbit {
namespace cuda {
namespace {

// The step of activations whose largest magnitude has these bits, and the factor before rounding.
__device__ __forceinline__ void find_step(uint32_t magnitude, bool two_digits, bool token_step, float* step,
                                          float* inverse) {
  float a = as_float(magnitude);
  if (token_step && a < 1e-5f) a = 1e-5f;
  if (magnitude >= 0x7f800000u) {  // infinite or NaN
    *step = as_float(0x7fc00000u);
    *inverse = 0;
  } else if (a < as_float(27u << 23)) {  // 2^-100
    *step = *inverse = 0;
  } else if (two_digits) {
    int exponent = int(as_bits(a) >> 23) - 127 - 14;
    if (a > 32639.0f * as_float(uint32_t(exponent + 127) << 23)) exponent++;
    *step = as_float(uint32_t(127 + exponent) << 23);
    *inverse = as_float(uint32_t(127 - exponent) << 23);
  } else {
    *step = a / 127.0f;
    *inverse = 127.0f / a;
  }
}

// The largest of a value over the block; every thread gets it. Takes kWarps words of shared memory.
__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  for (int mask = 16; mask; mask >>= 1) value = max(value, shuffle_xor(value, mask));
  sync_block();
  if (!(threadIdx.x & 31)) sts<uint32_t>(4 * (threadIdx.x >> 5), value);
  sync_block();
  for (uint32_t warp = 0; warp < uint32_t(kWarps); warp++) value = max(value, lds<uint32_t>(4 * warp));
  return value;
}

__global__ void __launch_bounds__(kThreads) quantize(const QuantizeArguments a) {
  for (int64_t token = blockIdx.x; token < a.tokens; token += gridDim.x) {
    auto value = [&](int32_t k) {
      const int32_t from = a.perm ? int32_t(min(uint32_t(ldg(a.perm + k)), uint32_t(a.cols - 1))) : k;
      return load_float(a.x, a.dtype, token * a.x_stride + from);
    };
    const bool wide = a.token_step || a.chunk > 128;
    int32_t row_sum = 0;
    for (int32_t first = 0; first < a.x_cols; first += wide ? a.chunk : a.x_cols) {  // a wide chunk at a time
      const int32_t end = wide ? min(first + a.chunk, a.x_cols) : a.x_cols;
      uint32_t largest = 0;  // bits of a magnitude: they order as magnitudes do, NaN above all
      if (wide) {
        const int32_t from = a.token_step ? 0 : first, to = min(a.token_step ? a.cols : end, a.cols);
        for (int32_t k = from + int32_t(threadIdx.x); k < to; k += kThreads)
          largest = max(largest, as_bits(value(k)) & 0x7fffffffu);
        largest = block_max(largest);
      }
      for (int32_t base = first; base < end; base += 4 * kThreads) {  // four columns a lane
        const int32_t k = base + 4 * int32_t(threadIdx.x);
        float x[4];
        uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          x[i] = k + i < min(end, a.cols) ? value(k + i) : 0.0f;
          most = max(most, as_bits(x[i]) & 0x7fffffffu);
        }
        for (int mask = 1; mask < 32; mask <<= 1) {
          const uint32_t other = shuffle_xor(most, mask);
          if (8 * mask <= a.chunk) most = max(most, other);
        }
        float step, inverse;
        find_step(wide ? largest : most, a.two_digits, a.token_step, &step, &inverse);
        uint32_t low = 0, high = 0;
        int32_t sum = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int32_t v = inverse == 0 ? 0 : int32_t(rintf(x[i] * inverse));
          const int32_t digit = a.two_digits ? ((v + 128) & 255) - 128 : v;
          low |= uint32_t(digit & 255) << 8 * i;
          high |= uint32_t(((v - digit) >> 8) & 255) << 8 * i;
          sum += v;
        }
        if (k < end) {
          *reinterpret_cast<uint32_t*>(a.digits + token * a.x_cols + k) = low;
          if (a.two_digits) *reinterpret_cast<uint32_t*>(a.digits + (a.tokens + token) * a.x_cols + k) = high;
        }
        row_sum += sum;
        if (a.span <= 64) {
          for (int mask = 1; mask < a.span / 4; mask <<= 1) sum += shuffle_xor(sum, mask);
          if (k < end && k % a.span == 0) {
            a.steps[token * a.spans + k / a.span] = step;
            a.sums[token * a.spans + k / a.span] = sum;
          }
        } else if (k == 0) {
          a.steps[token] = step;  // one span: the token
        }
      }
    }
    if (a.span > 64) {
      for (int mask = 16; mask; mask >>= 1) row_sum += shuffle_xor(row_sum, mask);
      sync_block();
      if (!(threadIdx.x & 31)) sts<int32_t>(4 * (threadIdx.x >> 5), row_sum);
      sync_block();
      if (threadIdx.x == 0) {
        int32_t sum = 0;
        for (int warp = 0; warp < kWarps; warp++) sum += lds<int32_t>(4 * uint32_t(warp));
        a.sums[token] = sum;
      }
      sync_block();
    }
  }
}

}  // namespace

cudaError_t quantize_activations(const QuantizeArguments& arguments, cudaStream_t stream) {
  const int64_t blocks = arguments.tokens < 65535 ? arguments.tokens : 65535;
  return launch(quantize, dim3(unsigned(blocks)), kThreads, 4 * kWarps, stream, arguments);
}

}  // namespace cuda
}  // namespace lowbit
