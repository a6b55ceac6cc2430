// Software prefetch of the codes: how far ahead pays depends on whose core it is.
#ifndef LOWBIT_CPU_PREFETCH_H
#define LOWBIT_CPU_PREFETCH_H

#include <immintrin.h>

#include "cpu/inline.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace {

LOWBIT_INLINE void prefetch(const uint8_t* line) { _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0); }

// How a loop over consecutive lines runs ahead of itself: by how many bytes (0: it does not), and whether into L2 alone.
struct Ahead {
  int64_t bytes = 0;
  bool l2 = false;
};

LOWBIT_INLINE void prefetch(const uint8_t* line, Ahead ahead) {
  if (ahead.l2)
    _mm_prefetch(reinterpret_cast<const char*>(line + ahead.bytes), _MM_HINT_T1);
  else
    prefetch(line + ahead.bytes);
}

// The choice for a loop over one row after the other. kFast: it would keep up with the memory if that were nearer.
// Intel (Sapphire Rapids): 2-4 KB into L1 doubled the rate of a row loop from DRAM.
// AMD (Zen 4): 8 KB into L2 make loops of many operations a line .97 to 1.2 times as fast, presumably because they ask too
// late for the hardware to be in time, and up to 1.75 times where the digits take most of the L1. A faster loop (int8's)
// loses up to 20%. 1 or 2 KB cost most loops something, trits up to 40%. L1 is no place for lines where digits fill it:
// NTA, 2 KB ahead, takes int4 1.3 to 1.5 times the time at 11008 columns.
template <bool kFast>
LOWBIT_INLINE Ahead prefetch_ahead() {
  if (!__builtin_cpu_is("amd")) return {4096, false};
  return kFast ? Ahead{} : Ahead{8192, true};
}

// For rows that are read as several streams, one beside the other: at least so many bytes, and whole rows (row_streams.h).
constexpr int64_t kStreamAhead = 3072;

}  // namespace
}  // namespace lowbit
#endif
