#include "dispatch/select.h"

#include <cstring>
#include <type_traits>

#include "api/status.h"

namespace lowbit {

#define KERNEL(symbol, verb, bits, isa) extern std::remove_pointer_t<KernelOf<Verb::verb>::Type> symbol;
#include "dispatch/kernels.inc"
#undef KERNEL

namespace {

using AnyKernel = void (*)();

struct Row {
  const char* name;
  Verb verb;
  int bits;
  Isa isa;
  AnyKernel kernel;
};

const Row kTable[] = {
#define KERNEL(symbol, verb, bits, isa) {#symbol, Verb::verb, bits, Isa::isa, reinterpret_cast<AnyKernel>(symbol)},
#include "dispatch/kernels.inc"
#undef KERNEL
};
constexpr int kRows = sizeof kTable / sizeof kTable[0];

constexpr const char* kVerbs[] = {"activations", "matmul",   "gather",   "store",           "solve",
                                  "bags",        "rms_norm", "silu_mul", "decode_attention"};
constexpr int kVerbCount = sizeof kVerbs / sizeof kVerbs[0];
thread_local const char* last_kernel[kVerbCount] = {"", "", "", "", "", "", "", "", ""};

const Row* find(Verb verb, int bits, Isa isa) {
  for (const Row& row : kTable)
    if (row.verb == verb && row.bits == bits && row.isa <= isa && offered(row.isa)) return &row;
  return nullptr;  // unreachable for valid formats: `ref` closes every list
}

bool has_formats(Verb verb) { return verb == Verb::matmul || verb == Verb::gather || verb == Verb::bags; }

int verb_index(const char* verb) {
  for (int i = 0; verb && i < kVerbCount; i++)
    if (!strcmp(verb, kVerbs[i])) return i;
  return -1;
}

}  // namespace

template <Verb V>
lowbit_status select(int bits, typename KernelOf<V>::Type* kernel) {
  Isa isa;
  if (const lowbit_status status = allowed_isa(&isa)) return status;
  const Row* row = find(V, bits, isa);
  if (!row) return fail(LOWBIT_UNSUPPORTED, "%s of %d bits: no such kernel", kVerbs[int(V)], bits);
  last_kernel[int(V)] = row->name;
  *kernel = reinterpret_cast<typename KernelOf<V>::Type>(row->kernel);
  return LOWBIT_OK;
}

template lowbit_status select<Verb::activations>(int, ActivationsKernel*);
template lowbit_status select<Verb::matmul>(int, MatmulKernel*);
template lowbit_status select<Verb::gather>(int, GatherKernel*);
template lowbit_status select<Verb::store>(int, StoreKernel*);
template lowbit_status select<Verb::solve>(int, SolveKernel*);
template lowbit_status select<Verb::bags>(int, BagsKernel*);
template lowbit_status select<Verb::rms_norm>(int, RmsNormKernel*);
template lowbit_status select<Verb::silu_mul>(int, SiluMulKernel*);
template lowbit_status select<Verb::decode_attention>(int, DecodeAttentionKernel*);

}  // namespace lowbit

extern "C" {

const char* lowbit_kernel_name(int index, int* runnable) {
  if (index < 0 || index >= lowbit::kRows) return nullptr;
  if (runnable) *runnable = lowbit::offered(lowbit::kTable[index].isa);
  return lowbit::kTable[index].name;
}

const char* lowbit_selected_kernel(const char* verb, lowbit_format format) {
  using namespace lowbit;
  const int index = verb_index(verb);
  Isa isa;
  if (index < 0 || allowed_isa(&isa) != LOWBIT_OK) return "";
  const Row* row = find(Verb(index), has_formats(Verb(index)) ? int(format) : 0, isa);
  return row ? row->name : "";
}

const char* lowbit_last_kernel(const char* verb) {
  const int index = lowbit::verb_index(verb);
  return index < 0 ? "" : lowbit::last_kernel[index];
}
}
