// Every tile instruction that a kernel needs, as a small function. Under LOWBIT_SOFTWARE_TILES, which only tests define,
// the same functions are software that checks what a CPU would refuse (tests/isa), so that the very same kernels run on
// any machine with AVX-512.
//
// A tile is up to 16 rows of up to 64 bytes. multiply<C, A, B>: C[i][j] += sum over k of A[i][k] * B[k / 4][4j + k % 4],
// A unsigned and B signed bytes, C int32 modulo 2^32: 16 rows of W (64 codes, one a byte), by 64 digits of 16 tokens
// ([k/4][16][4], 1 KB as it lies in memory), is 16 x 16 sums in one instruction.
//
// In asm, with all memory named: gcc 12's intrinsics tell the compiler neither that a load reads what the kernel has just
// stored nor that LDTILECFG reads more than its operand's first eight bytes, and it drops such stores.
#ifndef LOWBIT_CPU_AMX_TILES_H
#define LOWBIT_CPU_AMX_TILES_H

#include <stdint.h>

#include "cpu/inline.h"

namespace lowbit {
namespace {

constexpr int kTileRegisters = 8;
constexpr int kMostTileRows = 16, kMostTileBytes = 64;

// The operand of LDTILECFG, palette 1.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64, "what LDTILECFG reads");

}  // namespace
}  // namespace lowbit

#if defined(LOWBIT_SOFTWARE_TILES)
#include "software_tiles.h"
#else
namespace lowbit {
namespace {

LOWBIT_INLINE void configure_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }

LOWBIT_INLINE void release_tiles() { asm volatile("tilerelease"); }

template <int kTile>
LOWBIT_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// Row i is at from + i * stride bytes.
template <int kTile>
LOWBIT_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
LOWBIT_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}

template <int kC, int kA, int kB>
LOWBIT_INLINE void multiply_tiles() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

}  // namespace
}  // namespace lowbit
#endif
#endif
