// Chooses a kernel: a pure function of verb, format and the allowed ISA, over the one table.
#pragma once

#include "cpu/kernel.h"
#include "dispatch/isa.h"
#include "layer/kernel.h"
#include "solver/kernel.h"

namespace lowbit {

enum class Verb { activations, matmul, gather, store, solve, bags, rms_norm, silu_mul, decode_attention };

template <Verb V>
struct KernelOf;
template <>
struct KernelOf<Verb::activations> {
  using Type = ActivationsKernel;
};
template <>
struct KernelOf<Verb::matmul> {
  using Type = MatmulKernel;
};
template <>
struct KernelOf<Verb::gather> {
  using Type = GatherKernel;
};
template <>
struct KernelOf<Verb::store> {
  using Type = StoreKernel;
};
template <>
struct KernelOf<Verb::solve> {
  using Type = SolveKernel;
};
template <>
struct KernelOf<Verb::bags> {
  using Type = BagsKernel;
};
template <>
struct KernelOf<Verb::rms_norm> {
  using Type = RmsNormKernel;
};
template <>
struct KernelOf<Verb::silu_mul> {
  using Type = SiluMulKernel;
};
template <>
struct KernelOf<Verb::decode_attention> {
  using Type = DecodeAttentionKernel;
};

// Writes the best allowed kernel of a verb for a width (0: the verb has none) and records it as the thread's last one.
template <Verb V>
lowbit_status select(int bits, typename KernelOf<V>::Type* kernel);

}  // namespace lowbit
