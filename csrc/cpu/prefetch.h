// Software prefetch of the codes: how far ahead pays depends on whose core it is.
#ifndef LOWBIT_CPU_PREFETCH_H
#define LOWBIT_CPU_PREFETCH_H

#include <immintrin.h>

#include "cpu/inline.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace {

LOWBIT_INLINE void prefetch(const uint8_t* line) { _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0); }

// How a loop over consecutive lines runs ahead of itself, in bytes; `stream`: with the hint that keeps the lines from
// driving others out of L1 (NTA).
struct Ahead {
  int64_t bytes = 0;
  bool stream = false;
};

LOWBIT_INLINE void prefetch(const uint8_t* line, Ahead ahead) {
  if (ahead.stream)
    _mm_prefetch(reinterpret_cast<const char*>(line + ahead.bytes), _MM_HINT_NTA);
  else
    prefetch(line + ahead.bytes);
}

// The choice for codes of kBits that meet `digit_bytes` of activations in every row.
// Intel (Sapphire Rapids): 2-4 KB into L1 doubled the rate of a row loop from DRAM.
// AMD (Zen 4): prefetching into L1 or L2 costs, presumably because lines asked for by software no longer train the
// prefetchers of the hardware (int4 / int8, two digits, share of a plain read: .86 / .86 without, .67 / .73 with 4 KB
// into L2). With NTA it pays where the loop is not bound by the memory: int3 and int2 gain 5-10%, and 20-25% once the
// digits take most of the L1 (K = 11008); int4 gains 13% then and loses 5% before; int8 never gains.
template <int kBits>
LOWBIT_INLINE Ahead prefetch_ahead(int64_t digit_bytes) {
  if (!__builtin_cpu_is("amd")) return {4096, false};
  const bool pays = kBits < 4 || (kBits == 4 && digit_bytes > 16384);
  return pays ? Ahead{2048, true} : Ahead{};
}

}  // namespace
}  // namespace lowbit
#endif
