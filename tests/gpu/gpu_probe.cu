// What the kernels take for granted about a GPU, asked of it in one run of seconds:
//
//   exact     fp16 subnormals through mma.sync (the fp16 kernels feed codes as such numbers), 128 + code in bf16, and
//             u8 x s8: sums of small integers, where every bit is known. A difference fails the run.
//   error     the same with activations that are no integers, against float64: what the tensor core's own sums cost
//   read      bytes a second out of memory, of a plain kernel; copy: read and written
//   mma       fp16, bf16 and u8s8 mma.sync a second, from registers
//   node      microseconds of an empty kernel in a CUDA graph: what no kernel gets below
//
//   gpu_probe [FILE.json]     a table, and the same as JSON
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/ptx.cuh"

using namespace lowbit::cuda;

namespace {

void need(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s: CUDA error %d, %s\n", what, int(error), cudaGetErrorString(error));
  exit(1);
}

struct Figure {
  std::string name, unit;
  double value;
};
std::vector<Figure> figures;
int failures = 0;

void report(const std::string& name, double value, const char* unit, const char* note = "") {
  figures.push_back({name, unit, value});
  printf("%-44s %12.5g %-8s %s\n", name.c_str(), value, unit, note);
}

template <class T>
class OnDevice {
 public:
  explicit OnDevice(size_t count) : count_(count) { need(cudaMalloc(&at_, count * sizeof(T)), "cudaMalloc"); }
  explicit OnDevice(const std::vector<T>& values) : OnDevice(values.size()) {
    need(cudaMemcpy(at_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(at_); }
  T* get() const { return at_; }
  std::vector<T> back() const {
    std::vector<T> values(count_);
    need(cudaMemcpy(values.data(), at_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "a kernel");
    return values;
  }

 private:
  size_t count_;
  T* at_ = nullptr;
};

// ---- one m16n8 product, by one warp: fragments as ptx.cuh describes them ----

enum class Kind { f16, bf16, u8s8 };

template <Kind K>
__global__ void multiply(const uint32_t* a, const uint32_t* b, uint32_t* d) {
  const uint32_t lane = threadIdx.x;
  const uint32_t fragment[4] = {a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3]};
  if constexpr (K == Kind::u8s8) {
    int32_t sum[4] = {};
    mma_u8s8(sum, fragment, b[2 * lane], b[2 * lane + 1]);
    for (int i = 0; i < 4; i++) d[4 * lane + i] = uint32_t(sum[i]);
  } else {
    float sum[4] = {};
    if constexpr (K == Kind::f16) mma_f16(sum, fragment, b[2 * lane], b[2 * lane + 1]);
    if constexpr (K == Kind::bf16) mma_bf16(sum, fragment, b[2 * lane], b[2 * lane + 1]);
    for (int i = 0; i < 4; i++) d[4 * lane + i] = as_bits(sum[i]);
  }
}

double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
  return bits >> 15 ? -size : size;
}
double bf16_value(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
// The number of that kind nearest to `value`, by search: exact for what is a number of it.
uint16_t nearest(Kind kind, double value) {
  uint16_t best = 0;
  double distance = INFINITY;
  for (uint32_t bits = 0; bits < 0x10000; bits++) {
    const double number = kind == Kind::f16 ? half_value(uint16_t(bits)) : bf16_value(uint16_t(bits));
    if (fabs(number - value) < distance) distance = fabs(number - value), best = uint16_t(bits);
  }
  return best;
}

// |found - expected| / |expected| of A B, A 16 x k and B k x 8 as numbers' bits (u8s8: one byte each).
template <Kind K>
double relative_error(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b) {
  constexpr int kCols = K == Kind::u8s8 ? 32 : 16, kPer = kCols / 8;  // numbers of a register
  auto value = [](uint16_t bits, bool left) {
    return K == Kind::f16    ? half_value(bits)
           : K == Kind::bf16 ? bf16_value(bits)
           : left            ? double(bits)
                             : double(int8_t(bits));
  };
  std::vector<uint32_t> fragment_a(128), fragment_b(64);
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++)
      for (int e = 0; e < kPer; e++) {
        const int row = (lane >> 2) + 8 * (i & 1), k = kPer * (lane & 3) + kCols / 2 * (i >> 1) + e;
        fragment_a[size_t(4 * lane + i)] |= uint32_t(a[size_t(row * kCols + k)]) << (32 / kPer * e);
        if (i % 2 == 0)
          fragment_b[size_t(2 * lane + i / 2)] |=
              (uint32_t(b[size_t(k * 8 + (lane >> 2))]) & (kPer == 4 ? 0xffu : 0xffffu)) << (32 / kPer * e);
      }
  const OnDevice<uint32_t> on_a(fragment_a), on_b(fragment_b), on_d(128);
  need(launch(multiply<K>, dim3(1), 32, 0, nullptr, on_a.get(), on_b.get(), on_d.get()), "multiply");
  const std::vector<uint32_t> d = on_d.back();
  double difference = 0, norm = 0;
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const int row = (lane >> 2) + 8 * (i >> 1), col = 2 * (lane & 3) + (i & 1);
      double expected = 0, found;
      for (int k = 0; k < kCols; k++)
        expected += value(a[size_t(row * kCols + k)], true) * value(b[size_t(k * 8 + col)], false);
      if (K == Kind::u8s8) {
        found = int32_t(d[size_t(4 * lane + i)]);
      } else {
        float bits;
        memcpy(&bits, &d[size_t(4 * lane + i)], 4);
        found = bits;
      }
      difference += (found - expected) * (found - expected);
      norm += expected * expected;
    }
  return sqrt(difference / norm);
}

void ask_products(int arch) {
  std::mt19937 random(1);
  std::vector<uint16_t> integers_f16, integers_bf16;  // -8 .. 8
  for (int i = -8; i <= 8; i++)
    integers_f16.push_back(nearest(Kind::f16, i)), integers_bf16.push_back(nearest(Kind::bf16, i));
  auto draw = [&](const std::vector<uint16_t>& from, size_t count) {
    std::vector<uint16_t> values(count);
    for (auto& v : values) v = from[random() % from.size()];
    return values;
  };
  auto exact = [&](const std::string& name, double error) {
    report(name, error, "error", error == 0 ? "exact" : "EXPECTED 0");
    failures += error != 0;
  };
  // Every place that a kernel leaves a code at: int4 0 and 4, int2 0, 2, 4, 6, int8 0 (eight bits).
  for (const int width : {2, 4, 8})
    for (int position = 0; position + width <= 8; position += width) {
      std::vector<uint16_t> codes;
      for (int code = 0; code < 1 << width; code++) codes.push_back(uint16_t(code << position));
      exact("fp16 subnormals, " + std::to_string(width) + " bits at " + std::to_string(position),
            relative_error<Kind::f16>(draw(codes, 256), draw(integers_f16, 128)));
    }
  std::vector<uint16_t> small;  // fp16 subnormals as activations
  for (uint16_t bits = 1; bits < 1024; bits = uint16_t(bits + 37)) small.push_back(bits);
  exact("fp16 subnormal activations", relative_error<Kind::f16>(draw(integers_f16, 256), draw(small, 128)));
  if (arch >= 80) {
    std::vector<uint16_t> codes;
    for (int code = 0; code < 16; code++) codes.push_back(uint16_t(0x4300 | code << 3));
    exact("bf16, 128 + 8 code", relative_error<Kind::bf16>(draw(codes, 256), draw(integers_bf16, 128)));
  }
  std::vector<uint16_t> bytes;
  for (int byte = 0; byte < 256; byte++) bytes.push_back(uint16_t(byte));
  exact("u8 x s8", relative_error<Kind::u8s8>(draw(bytes, 512), draw(bytes, 256)));

  for (const double mean : {0.0, 1.0}) {
    std::normal_distribution<double> normal(mean, 1);
    std::vector<uint16_t> codes, x(128);
    for (int code = 0; code < 16; code++) codes.push_back(uint16_t(code << 4));
    double worst = 0;
    for (int turn = 0; turn < 8; turn++) {
      for (auto& v : x) v = nearest(Kind::f16, normal(random));
      worst = std::max(worst, relative_error<Kind::f16>(draw(codes, 256), x));
    }
    report("fp16 subnormals, Gaussian x of mean " + std::to_string(int(mean)), worst, "error", "of float64");
  }
}

// ---- rates ----

__global__ void read_all(const uint4* from, size_t count, uint32_t* sink) {
  constexpr int kAtOnce = 8;
  const size_t step = size_t(gridDim.x) * blockDim.x;
  size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  uint32_t sum = 0;
  for (; i + (kAtOnce - 1) * step < count; i += kAtOnce * step) {
    uint4 v[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) v[j] = __ldcs(from + i + size_t(j) * step);
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (sum == 0x12345678) *sink = sum;  // keeps the loads
}

__global__ void copy_all(const uint4* from, uint4* to, size_t count) {
  const size_t step = size_t(gridDim.x) * blockDim.x;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) __stcs(to + i, __ldcs(from + i));
}

template <Kind K>
__global__ void mma_many(int loops, uint32_t* sink) {
  constexpr int kChains = 8;  // independent sums, so that none waits for itself
  float f[kChains][4] = {};
  int32_t d[kChains][4] = {};
  const uint32_t a[4] = {threadIdx.x, blockIdx.x, threadIdx.x * 3, 7}, b[2] = {threadIdx.x * 5, 11};
  for (int loop = 0; loop < loops; loop++)
#pragma unroll
    for (int i = 0; i < kChains; i++) {
      if constexpr (K == Kind::f16) mma_f16(f[i], a, b[0], b[1]);
      if constexpr (K == Kind::bf16) mma_bf16(f[i], a, b[0], b[1]);
      if constexpr (K == Kind::u8s8) mma_u8s8(d[i], a, b[0], b[1]);
    }
  uint32_t sum = 0;
  for (int i = 0; i < kChains; i++)
    for (int j = 0; j < 4; j++) sum ^= K == Kind::u8s8 ? uint32_t(d[i][j]) : as_bits(f[i][j]);
  if (sum == 0x12345678) *sink = sum;
}

__global__ void fill(uint4* to, size_t count) {
  const size_t step = size_t(gridDim.x) * blockDim.x;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    uint32_t x = uint32_t(i) * 2654435761u;  // not zeros: those would be faster than data is
    to[i] = make_uint4(x, x ^ 0x9e3779b9u, x * 7, ~x);
  }
}

__global__ void nothing() {}

// Median of `runs` after a warm-up, in seconds.
template <class F>
double seconds(int runs, F call) {
  cudaEvent_t begin, end;
  need(cudaEventCreate(&begin), "cudaEventCreate");
  need(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<double> taken;
  for (int run = -2; run < runs; run++) {
    need(cudaEventRecord(begin), "cudaEventRecord");
    call();
    need(cudaEventRecord(end), "cudaEventRecord");
    need(cudaEventSynchronize(end), "a kernel");
    float ms = 0;
    need(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (run >= 0) taken.push_back(ms * 1e-3);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(taken.begin(), taken.end());
  return taken[taken.size() / 2];
}

void ask_memory(const cudaDeviceProp& card) {
  size_t bytes = size_t(4) << 30;
  while (bytes > card.totalGlobalMem / 4) bytes /= 2;
  const OnDevice<uint4> from(bytes / 16), to(bytes / 16);
  const OnDevice<uint32_t> sink(1);
  const int blocks = 8 * card.multiProcessorCount;
  for (const OnDevice<uint4>* memory : {&from, &to})
    need(launch(fill, dim3(unsigned(blocks)), 512, 0, nullptr, memory->get(), bytes / 16), "fill");
  double best = INFINITY;
  for (const int per_sm : {2, 4, 8})
    best = std::min(best, seconds(11, [&] {
                      need(launch(read_all, dim3(unsigned(per_sm * card.multiProcessorCount)), 512, 0, nullptr,
                                  static_cast<const uint4*>(from.get()), bytes / 16, sink.get()),
                           "read_all");
                    }));
  report("read", double(bytes) / best * 1e-12, "TB/s", "plain loads, 4 GB");
  const double copied = seconds(11, [&] {
    need(launch(copy_all, dim3(unsigned(blocks)), 512, 0, nullptr, static_cast<const uint4*>(from.get()), to.get(),
                bytes / 16),
         "copy_all");
  });
  report("copy", 2.0 * double(bytes) / copied * 1e-12, "TB/s", "read and written");
}

template <Kind K>
void ask_rate(const cudaDeviceProp& card, const char* name, double operations) {
  const OnDevice<uint32_t> sink(1);
  const int loops = 4096, blocks = 4 * card.multiProcessorCount;
  const double taken =
      seconds(5, [&] { need(launch(mma_many<K>, dim3(unsigned(blocks)), 256, 0, nullptr, loops, sink.get()), name); });
  report(name, double(blocks) * 8 * 8 * loops * operations / taken * 1e-12, "T/s", "operations, 2 a multiply-add");
}

void ask_graph() {
  constexpr int kNodes = 512;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  need(cudaStreamCreate(&stream), "cudaStreamCreate");
  need(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < kNodes; i++) need(launch(nothing, dim3(1), 32, 0, stream), "nothing");
  need(cudaStreamEndCapture(stream, &graph), "capture");
  need(cudaGraphInstantiate(&ready, graph, 0), "cudaGraphInstantiate");
  report("empty kernel of a graph", seconds(21, [&] { need(cudaGraphLaunch(ready, nullptr), "graph"); }) / kNodes * 1e6,
         "us", "512 in a row");
  cudaGraphExecDestroy(ready);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace

int main(int count, char** arguments) {
  cudaDeviceProp card;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    printf("skipped: no GPU was found\n");
    return 77;
  }
  need(cudaGetDeviceProperties(&card, 0), "cudaGetDeviceProperties");
  const int arch = 10 * card.major + card.minor;
  printf("%s, sm_%d, %d multiprocessors, %d KB of L2, %zu KB of shared memory each\n", card.name, arch,
         card.multiProcessorCount, card.l2CacheSize >> 10, card.sharedMemPerMultiprocessor >> 10);
  ask_products(arch);
  ask_memory(card);
  ask_rate<Kind::f16>(card, "mma.sync fp16", 2 * 16 * 8 * 16);
  if (arch >= 80) ask_rate<Kind::bf16>(card, "mma.sync bf16", 2 * 16 * 8 * 16);
  ask_rate<Kind::u8s8>(card, "mma.sync u8s8", 2 * 16 * 8 * 32);
  ask_graph();
  if (count > 1) {
    FILE* file = fopen(arguments[1], "w");
    if (!file) return fprintf(stderr, "%s: cannot be written\n", arguments[1]), 1;
    fprintf(file, "{\"gpu\": \"%s\", \"arch\": %d, \"multiprocessors\": %d, \"l2_bytes\": %d, \"figures\": [\n",
            card.name, arch, card.multiProcessorCount, card.l2CacheSize);
    for (size_t i = 0; i < figures.size(); i++)
      fprintf(file, " {\"name\": \"%s\", \"value\": %.6g, \"unit\": \"%s\"}%s\n", figures[i].name.c_str(),
              figures[i].value, figures[i].unit.c_str(), i + 1 < figures.size() ? "," : "");
    fprintf(file, "]}\n");
    fclose(file);
  }
  if (failures) printf("%d products that had to be exact were not\n", failures);
  return failures ? 1 : 0;
}
