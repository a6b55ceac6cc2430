// Every row of dispatch/kernels.inc under Google Benchmark, called directly, on one thread: what a change to a kernel
// changes, without preparation, threads or Python around it.
//
//   lowbit_micro --benchmark_filter=int4_matmul__avx512vnni        a kernel
//   lowbit_micro --benchmark_filter='matmul__.*/tokens:1/.*dram'   one token from DRAM, every format and level
//
//   <format>_matmul__<isa>/tokens:T/<mode>/<where>   4096 x 4096, T = 1 and 16, both activation modes
//   <format>_gather__<isa>/<dtype>/<where>           64 random rows of 4096
//   <format>_bags__<isa>/<where>                     the sum of 64 random rows
//   activations__<isa>/tokens:T/<mode>               quantizing T tokens of 4096 for groups of 128
//   store__<isa>/<dtype>                             16 tokens of a block of 64 rows
//
// where: warm is one matrix again and again (a large cache holds it), dram 500 MB of them in turn. GB/s counts codes,
// scales and what gather writes; share is that of the read bandwidth probed right before and after (probe, GB/s). Solver
// rows are left to bench/solver.py: their time is that of a whole matrix.
#include <string>
#include <type_traits>

#include "dispatch/isa.h"
#include "meter.h"
#include "operands.h"

namespace lowbit {
#define KERNEL(symbol, verb, bits, isa) extern std::remove_pointer_t<KernelOf<Verb::verb>::Type> symbol;
#include "dispatch/kernels.inc"
#undef KERNEL
}  // namespace lowbit

namespace micro {
namespace {

using namespace lowbit;

constexpr int64_t kIds = 64;

struct Kernel {
  const char* name;
  int bits;
  Isa isa;
};

template <class Body>
void add(const Kernel& kernel, const std::string& variant, Body body) {
  auto run = [kernel, body](benchmark::State& state) {
    const char* missing = lowbit_isa_missing(isa_name(kernel.isa));
    if (*missing) return state.SkipWithError(missing);
    body(state);
  };
  benchmark::RegisterBenchmark((std::string(kernel.name) + "/" + variant).c_str(), run)->Unit(benchmark::kMicrosecond);
}

const char* where(bool dram) { return dram ? "dram" : "warm"; }
const char* mode(bool int8_mode) { return int8_mode ? "int8" : "float"; }
const char* dtype_name(lowbit_dtype dtype) { return dtype == LOWBIT_F32 ? "f32" : "bf16"; }
int64_t dtype_bytes(lowbit_dtype dtype) { return dtype == LOWBIT_F32 ? 4 : 2; }

std::vector<int64_t> random_ids(int64_t count) {
  std::mt19937 random(1);
  std::vector<int64_t> ids(static_cast<size_t>(count));
  for (int64_t& id : ids) id = int64_t(random() % unsigned(kRows));
  return ids;
}

void matmul(benchmark::State& state, Kernel row, MatmulKernel kernel, int64_t tokens, bool int8_mode, bool dram) {
  const Matrices& w = matrices(row.bits, dram);
  const Activated x(row.bits, tokens, int8_mode, row.isa);
  x.quantize(activations__ref);
  const Pages out(size_t(tokens * kRowBlock * 4));
  Meter meter;
  int64_t turn = 0;
  for (auto _ : state) {
    const lowbit_matrix& matrix = w[turn++];
    for (int64_t n = 0; n < kRows; n += kRowBlock)
      kernel(&matrix, &x.view(), n, n + kRowBlock, out.as<float>(), kRowBlock);
    benchmark::ClobberMemory();
  }
  meter.report(state, double(w.bytes()), 2.0 * kRows * kCols * double(tokens), double(w.lines()));
}

void gather(benchmark::State& state, int bits, GatherKernel kernel, lowbit_dtype dtype, bool dram) {
  const Matrices& w = matrices(bits, dram);
  const Pages out(size_t(kIds * kCols * dtype_bytes(dtype)));
  const std::vector<int64_t> ids = random_ids(kIds * 64);
  Meter meter;
  int64_t turn = 0;
  for (auto _ : state) {
    kernel(&w[turn], ids.data() + turn % 64 * kIds, kIds, out.as<void>(), dtype, kCols);
    turn++;
    benchmark::ClobberMemory();
  }
  const double rows = double(kIds) / kRows;
  meter.report(state, double(w.bytes()) * rows + double(kIds * kCols * dtype_bytes(dtype)), 0,
               double(w.lines()) * rows);
}

void bags(benchmark::State& state, int bits, BagsKernel kernel, bool dram) {
  const Matrices& w = matrices(bits, dram);
  const int64_t planes = row_planes(kCols);
  const Pages sum(size_t((planes + kPlaneGrain) * kPlaneCodes * 4));
  const std::vector<int64_t> ids = random_ids(kIds * 64);
  Meter meter;
  int64_t turn = 0;
  for (auto _ : state) {
    kernel(&w[turn], ids.data() + turn % 64 * kIds, nullptr, kIds, 0, planes, sum.as<float>());
    turn++;
    benchmark::ClobberMemory();
  }
  const double rows = double(kIds) / kRows;
  meter.report(state, double(w.bytes()) * rows, 2.0 * kIds * kCols, double(w.lines()) * rows);
}

void activations(benchmark::State& state, Isa isa, ActivationsKernel kernel, int64_t tokens, bool int8_mode) {
  const Activated x(4, tokens, int8_mode, isa);
  Meter meter;
  for (auto _ : state) {
    x.quantize(kernel);
    benchmark::ClobberMemory();
  }
  meter.report(state, double(tokens * kCols * 4), 0, 0);
}

void store(benchmark::State& state, StoreKernel kernel, lowbit_dtype dtype) {
  constexpr int64_t kTokens = 16;
  const std::vector<float> tile = random_floats(kTokens * kRowBlock);
  const Pages y(size_t(kTokens * kRows * dtype_bytes(dtype)));
  Meter meter;
  for (auto _ : state) {
    kernel(tile.data(), kRowBlock, nullptr, kTokens, kRowBlock, y.as<void>(), dtype, kRows);
    benchmark::ClobberMemory();
  }
  meter.report(state, double(kTokens * kRowBlock * (4 + dtype_bytes(dtype))), 0, 0);
}

// The variants of a verb: one overload each, chosen by the verb's column of the table.
template <Verb V>
using Is = std::integral_constant<Verb, V>;

void add_variants(Is<Verb::matmul>, const Kernel& row, MatmulKernel kernel) {
  for (const bool dram : {false, true})
    for (const int64_t tokens : {1, 16})
      for (const bool int8_mode : {false, true})
        add(row, "tokens:" + std::to_string(tokens) + "/" + mode(int8_mode) + "/" + where(dram),
            [=](benchmark::State& state) { matmul(state, row, kernel, tokens, int8_mode, dram); });
}

void add_variants(Is<Verb::gather>, const Kernel& row, GatherKernel kernel) {
  for (const bool dram : {false, true})
    for (const lowbit_dtype dtype : {LOWBIT_F32, LOWBIT_BF16})
      add(row, std::string(dtype_name(dtype)) + "/" + where(dram),
          [=](benchmark::State& state) { gather(state, row.bits, kernel, dtype, dram); });
}

void add_variants(Is<Verb::bags>, const Kernel& row, BagsKernel kernel) {
  for (const bool dram : {false, true})
    add(row, where(dram), [=](benchmark::State& state) { bags(state, row.bits, kernel, dram); });
}

void add_variants(Is<Verb::activations>, const Kernel& row, ActivationsKernel kernel) {
  for (const int64_t tokens : {1, 16})
    for (const bool int8_mode : {false, true})
      add(row, "tokens:" + std::to_string(tokens) + "/" + mode(int8_mode),
          [=](benchmark::State& state) { activations(state, row.isa, kernel, tokens, int8_mode); });
}

void add_variants(Is<Verb::store>, const Kernel& row, StoreKernel kernel) {
  for (const lowbit_dtype dtype : {LOWBIT_F32, LOWBIT_BF16})
    add(row, dtype_name(dtype), [=](benchmark::State& state) { store(state, kernel, dtype); });
}

void add_variants(Is<Verb::solve>, const Kernel&, SolveKernel) {}

}  // namespace
}  // namespace micro

int main(int argc, char** argv) {
  using namespace lowbit;
#define KERNEL(symbol, verb, bits, isa) micro::add_variants(micro::Is<Verb::verb>{}, {#symbol, bits, Isa::isa}, symbol);
#include "dispatch/kernels.inc"
#undef KERNEL
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("lowbit", lowbit_version());
  benchmark::AddCustomContext("cpu_features", lowbit_cpu_features());
  const micro::Counters& counters = micro::counters();
  benchmark::AddCustomContext("perf_counters", counters.available() ? "cycles, instructions" : counters.reason());
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
