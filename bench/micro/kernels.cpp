// Every row of dispatch/kernels.inc under Google Benchmark, called directly, on one thread: what a change to a kernel
// changes, without preparation, threads or Python around it.
//
//   lowbit_micro --benchmark_filter=int4_matmul__avx512vnni        a kernel
//   lowbit_micro --benchmark_filter='matmul__.*/tokens:1/.*dram'   one token from DRAM, every format and level
//   lowbit_micro --count --benchmark_filter=int4_matmul            instructions instead of time, one by one (step.h)
//
//   <format>_matmul__<isa>/tokens:T/<mode>/<where>   4096 x 4096, T = 1 and 16, both activation modes
//   <format>_gather__<isa>/<dtype>/<where>           64 random rows of 4096
//   <format>_bags__<isa>/<where>                     the sum of 64 random rows
//   activations__<isa>/tokens:T/<mode>               quantizing T tokens of 4096 for groups of 128
//   store__<isa>/<dtype>                             16 tokens of a block of 64 rows
//   rms_norm__, silu_mul__, decode_attention__<isa>  one token of a decoder layer of Llama-3-8B's widths
//
// where: warm is one matrix again and again (a large cache holds it), dram 500 MB of them in turn. GB/s counts codes,
// scales and what gather writes; share is that of the read bandwidth probed right before and after (probe, GB/s).
// Solver rows are left to bench/solver.py: their time is that of a whole matrix.
//
// --count makes one call with a small matrix: names have no <where>, labels are the rows and columns of what the call
// takes, and the time is that of counting.
#include <algorithm>
#include <string>
#include <type_traits>

#include "dispatch/isa.h"
#include "meter.h"
#include "operands.h"
#include "step.h"

namespace lowbit {
#define KERNEL(symbol, verb, bits, isa) extern std::remove_pointer_t<KernelOf<Verb::verb>::Type> symbol;
#include "dispatch/kernels.inc"
#undef KERNEL
}  // namespace lowbit

namespace micro {
namespace {

using namespace lowbit;

bool counting = false;  // --count

constexpr Shape kTimed{4096, 4096, 64};
constexpr int kNotCounted = 77;  // the status by which test drivers know a test that was skipped

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
  const std::string name = std::string(kernel.name) + (variant.empty() ? "" : "/" + variant);
  auto* benchmark = benchmark::RegisterBenchmark(name.c_str(), run)->Unit(benchmark::kMicrosecond);
  if (counting) benchmark->Iterations(1);
}

// As body(state, dram): from DRAM and warm, which is one and the same to those who count.
template <class Body>
void add_places(const Kernel& kernel, const std::string& variant, Body body) {
  if (counting) return add(kernel, variant, [=](benchmark::State& state) { body(state, false); });
  const std::string prefix = variant.empty() ? "" : variant + "/";
  for (const bool dram : {false, true})
    add(kernel, prefix + (dram ? "dram" : "warm"), [=](benchmark::State& state) { body(state, dram); });
}

const char* mode(bool int8_mode) { return int8_mode ? "int8" : "float"; }
const char* dtype_name(lowbit_dtype dtype) { return dtype == LOWBIT_F32 ? "f32" : "bf16"; }
int64_t dtype_bytes(lowbit_dtype dtype) { return dtype == LOWBIT_F32 ? 4 : 2; }

// What is counted is one call that takes seconds at most. Its columns are whole lines, and for integers as many chunks
// of 128 as there are slots. ref does the same for every code and a hundred times as much, so it gets few of them; bits
// is 0 for activations, which are padded to 512.
Shape shape_for(int bits, Isa isa) {
  if (!counting) return kTimed;
  if (isa == Isa::ref) return {1, bits == 0 ? 512 : bits == kTrit ? 320 : 256, 1};
  return {16, bits == kTrit ? 2560 : 2048, 8};
}

std::vector<int64_t> random_ids(int64_t count, int64_t rows) {
  std::mt19937 random(1);
  std::vector<int64_t> ids(static_cast<size_t>(count));
  for (int64_t& id : ids) id = int64_t(random() % unsigned(rows));
  return ids;
}

// What one call of a benchmark's body does; 0 leaves out what depends on it.
struct Work {
  double bytes, operations = 0;
  double lines = 0, tokens = 0;  // lines of codes that it reads, and tokens that each of them meets
  double values = 0;             // that it quantizes or stores
};

template <class Call>
void count(benchmark::State& state, const Call& call, const Work& work) {
  Steps steps;
  for (auto _ : state) steps = count_instructions([&] { call(0); });
  if (!steps.failure.empty()) return state.SkipWithError(steps.failure.c_str());
  const double instructions = double(steps.instructions);
  state.counters["instructions"] = instructions;
  if (work.lines > 0) state.counters["instructions/line"] = instructions / work.lines;
  if (work.tokens > 0) state.counters["instructions/line/token"] = instructions / work.lines / work.tokens;
  if (work.values > 0) state.counters["instructions/64 values"] = instructions / work.values * 64;
}

// Times or counts call(turn), turn being 0, 1, ...
template <class Call>
void measure(benchmark::State& state, const Call& call, const Work& work) {
  if (counting) return count(state, call, work);
  Meter meter;
  int64_t turn = 0;
  for (auto _ : state) {
    call(turn++);
    benchmark::ClobberMemory();
  }
  meter.report(state, work.bytes, work.operations, work.lines);
}

void set_label(benchmark::State& state, int64_t rows, int64_t cols) {
  if (counting) state.SetLabel(std::to_string(rows) + " x " + std::to_string(cols));
}

void matmul(benchmark::State& state, Kernel row, MatmulKernel kernel, int64_t tokens, bool int8_mode, bool dram) {
  const Shape shape = shape_for(row.bits, row.isa);
  const Matrices& w = matrices(row.bits, shape, dram);
  const Activated x(row.bits, shape.cols, tokens, int8_mode, row.isa);
  x.quantize(activations__ref);
  const Pages out(size_t(tokens * kRowBlock * 4));
  auto call = [&](int64_t turn) {
    const lowbit_matrix& matrix = w[turn];
    for (int64_t n = 0; n < shape.rows; n += kRowBlock)
      kernel(&matrix, &x.view(), n, std::min(n + kRowBlock, shape.rows), out.as<float>(), kRowBlock);
  };
  Work work{double(w.bytes()), 2.0 * double(shape.rows * shape.cols * tokens)};
  work.lines = double(w.lines());
  work.tokens = double(tokens);
  measure(state, call, work);
  set_label(state, shape.rows, shape.cols);
}

void gather(benchmark::State& state, Kernel row, GatherKernel kernel, lowbit_dtype dtype, bool dram) {
  const Shape shape = shape_for(row.bits, row.isa);
  const Matrices& w = matrices(row.bits, shape, dram);
  const int64_t out_bytes = shape.ids * shape.cols * dtype_bytes(dtype);
  const Pages out(static_cast<size_t>(out_bytes));
  const std::vector<int64_t> ids = random_ids(shape.ids * 64, shape.rows);
  auto call = [&](int64_t turn) {
    kernel(&w[turn], ids.data() + turn % 64 * shape.ids, shape.ids, out.as<void>(), dtype, shape.cols);
  };
  const double part = double(shape.ids) / double(shape.rows);
  Work work{double(w.bytes()) * part + double(out_bytes)};
  work.lines = double(w.lines()) * part;
  measure(state, call, work);
  set_label(state, shape.ids, shape.cols);
}

void bags(benchmark::State& state, Kernel row, BagsKernel kernel, bool dram) {
  const Shape shape = shape_for(row.bits, row.isa);
  const Matrices& w = matrices(row.bits, shape, dram);
  const int64_t planes = row_planes(shape.cols);
  const Pages sum(size_t((planes + kPlaneGrain) * kPlaneCodes * 4));
  const std::vector<int64_t> ids = random_ids(shape.ids * 64, shape.rows);
  auto call = [&](int64_t turn) {
    kernel(&w[turn], ids.data() + turn % 64 * shape.ids, nullptr, shape.ids, 0, planes, sum.as<float>());
  };
  const double part = double(shape.ids) / double(shape.rows);
  Work work{double(w.bytes()) * part, 2.0 * double(shape.ids * shape.cols)};
  work.lines = double(w.lines()) * part;
  measure(state, call, work);
  set_label(state, shape.ids, shape.cols);
}

void activations(benchmark::State& state, Isa isa, ActivationsKernel kernel, int64_t tokens, bool int8_mode) {
  const Shape shape = shape_for(0, isa);
  const Activated x(4, shape.cols, tokens, int8_mode, isa);
  Work work{double(tokens * shape.cols * 4)};
  work.values = double(tokens * shape.cols);
  measure(state, [&](int64_t) { x.quantize(kernel); }, work);
  set_label(state, tokens, shape.cols);
}

void store(benchmark::State& state, StoreKernel kernel, lowbit_dtype dtype) {
  constexpr int64_t kTokens = 16;
  const std::vector<float> tile = random_floats(kTokens * kRowBlock);
  const Pages y(size_t(kTokens * kTimed.rows * dtype_bytes(dtype)));
  auto call = [&](int64_t) {
    kernel(tile.data(), kRowBlock, nullptr, kTokens, kRowBlock, y.as<void>(), dtype, kTimed.rows);
  };
  Work work{double(kTokens * kRowBlock * (4 + dtype_bytes(dtype)))};
  work.values = double(kTokens * kRowBlock);
  measure(state, call, work);
  set_label(state, kTokens, kRowBlock);
}
// A decoder layer of Llama-3-8B's widths, one token; a small one to count.
struct LayerShape {
  int64_t hidden = 4096, gate = 14336, heads = 32, kv_heads = 8, head_size = 128;
};

LayerShape layer_for(Isa isa) {
  if (!counting) return {};
  return isa == Isa::ref ? LayerShape{64, 64, 2, 1, 16} : LayerShape{1024, 1024, 8, 2, 64};
}

const void* layer_operand() {  // the same bytes, which are zeros, for every operand that is read
  static const Pages operand(size_t(LayerShape{}.gate * 4));
  return operand.as<void>();
}

void rms_norm(benchmark::State& state, Isa isa, RmsNormKernel kernel, lowbit_dtype dtype) {
  const int64_t size = layer_for(isa).hidden;
  const void* x = layer_operand();
  const Pages sum(size_t(size * 4)), y(size_t(size * 4));
  const RmsNorm n = {dtype, size, x, size, x, size, sum.as<void>(), size, x, 1e-5f, y.as<void>(), size};
  Work work{double(5 * size * dtype_bytes(dtype))};
  work.values = double(size);
  measure(state, [&](int64_t) { kernel(&n, 0, 1); }, work);
  set_label(state, 1, size);
}

void silu_mul(benchmark::State& state, Isa isa, SiluMulKernel kernel, lowbit_dtype dtype) {
  const int64_t size = layer_for(isa).gate;
  const void* x = layer_operand();
  const Pages y(size_t(size * 4));
  const SiluMul s = {dtype, size, x, size, x, size, y.as<void>(), size};
  Work work{double(3 * size * dtype_bytes(dtype))};
  work.values = double(size);
  measure(state, [&](int64_t) { kernel(&s, 0, 1); }, work);
  set_label(state, 1, size);
}

void decode_attention(benchmark::State& state, Isa isa, DecodeAttentionKernel kernel, lowbit_dtype dtype,
                      int64_t past) {
  const LayerShape shape = layer_for(isa);
  const int64_t places = past + 1, width = shape.heads * shape.head_size;
  const int64_t cache = shape.kv_heads * places * shape.head_size;
  const Pages keys(size_t(cache * 4)), values(size_t(cache * 4)), y(size_t(width * 4));
  lowbit_decode_step step{};
  step.dtype = dtype;
  step.sequences = 1, step.heads = shape.heads, step.kv_heads = shape.kv_heads, step.head_size = shape.head_size;
  step.past = past, step.scale = 0.1f;
  step.q = step.k = step.v = step.cos = step.sin = layer_operand();
  step.keys = keys.as<void>(), step.values = values.as<void>();
  step.cache_head_stride = places * shape.head_size, step.cache_sequence_stride = cache;
  step.y = y.as<void>();
  Work work{double(2 * cache * dtype_bytes(dtype)), 4.0 * double(width * places)};
  work.values = double(width * places);
  measure(state, [&](int64_t) { kernel(&step, 0, shape.kv_heads); }, work);
  set_label(state, shape.heads, shape.head_size);
}

// The variants of a verb: one overload each, chosen by the verb's column of the table.
template <Verb V>
using Is = std::integral_constant<Verb, V>;

void add_variants(Is<Verb::matmul>, const Kernel& row, MatmulKernel kernel) {
  for (const int64_t tokens : {1, 16})
    for (const bool int8_mode : {false, true})
      add_places(row, "tokens:" + std::to_string(tokens) + "/" + mode(int8_mode),
                 [=](benchmark::State& state, bool dram) { matmul(state, row, kernel, tokens, int8_mode, dram); });
}

void add_variants(Is<Verb::gather>, const Kernel& row, GatherKernel kernel) {
  for (const lowbit_dtype dtype : {LOWBIT_F32, LOWBIT_BF16})
    add_places(row, dtype_name(dtype),
               [=](benchmark::State& state, bool dram) { gather(state, row, kernel, dtype, dram); });
}

void add_variants(Is<Verb::bags>, const Kernel& row, BagsKernel kernel) {
  add_places(row, "", [=](benchmark::State& state, bool dram) { bags(state, row, kernel, dram); });
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

void add_variants(Is<Verb::rms_norm>, const Kernel& row, RmsNormKernel kernel) {
  for (const lowbit_dtype dtype : {LOWBIT_F32, LOWBIT_BF16})
    add(row, dtype_name(dtype), [=](benchmark::State& state) { rms_norm(state, row.isa, kernel, dtype); });
}

void add_variants(Is<Verb::silu_mul>, const Kernel& row, SiluMulKernel kernel) {
  for (const lowbit_dtype dtype : {LOWBIT_F32, LOWBIT_BF16})
    add(row, dtype_name(dtype), [=](benchmark::State& state) { silu_mul(state, row.isa, kernel, dtype); });
}

void add_variants(Is<Verb::decode_attention>, const Kernel& row, DecodeAttentionKernel kernel) {
  for (const int64_t past : {63, 1023})
    for (const lowbit_dtype dtype : {LOWBIT_F32, LOWBIT_BF16}) {
      if (counting && past > 63) continue;  // the same again, 16 times
      add(row, "past:" + std::to_string(past) + "/" + dtype_name(dtype),
          [=](benchmark::State& state) { decode_attention(state, row.isa, kernel, dtype, past); });
    }
}

void add_variants(Is<Verb::solve>, const Kernel&, SolveKernel) {}

}  // namespace
}  // namespace micro

int main(int argc, char** argv) {
  using namespace lowbit;
  // Google Benchmark reports flags that it does not know, so this one is taken out first.
  char** const end = std::remove(argv + 1, argv + argc, std::string("--count"));
  micro::counting = end != argv + argc;
  argc = int(end - argv);
#define KERNEL(symbol, verb, bits, isa) micro::add_variants(micro::Is<Verb::verb>{}, {#symbol, bits, Isa::isa}, symbol);
#include "dispatch/kernels.inc"
#undef KERNEL
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  if (micro::counting) {
    micro::stay_on_this_cpu();
    const std::string failure = micro::count_instructions([] {}).failure;
    if (!failure.empty()) {
      fprintf(stderr, "--count: this system does not let a process step through another: %s\n", failure.c_str());
      return micro::kNotCounted;
    }
  }
  benchmark::AddCustomContext("lowbit", lowbit_version());
  benchmark::AddCustomContext("compiler", __VERSION__);
  benchmark::AddCustomContext("cpu_features", lowbit_cpu_features());
  const micro::Counters& counters = micro::counters();
  benchmark::AddCustomContext("perf_counters", counters.available() ? "cycles, instructions" : counters.reason());
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
