// The other probe of a roofline: how fast this machine's vector units multiply at all, with everything in registers.
// Chains of one instruction that do not wait for each other, enough of them to cover its latency on every port:
//   int8  vpdpbusd on 512 bits with AVX-512 VNNI; vpmaddubsw, vpmaddwd and vpaddd, which stand for it, with AVX2
//   bf16  vdpbf16ps on 512 bits with AVX-512 BF16; nothing stands for it elsewhere
//   tiles TDPBUSD, 16 x 64 by 64 x 16 bytes, with AMX: two A by two B tiles into four C, as the kernels hold them
// The instructions are those of the kernels here.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "api/status.h"
#include "cpu/amx_tiles.h"
#include "dispatch/isa.h"
#include "dispatch/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

constexpr int kChains = 12;  // latency (4 to 6 cycles) times instructions a cycle (up to 2), on every CPU so far
constexpr int64_t kRounds = 1'500'000;  // of all chains: 5 to 10 ms
constexpr int kPasses = 3;              // the best counts: a clock that is still rising says nothing about the unit

// One way of multiplying: operations (a multiplication and an addition are two) that run(kRounds) does on a thread.
struct Unit {
  void (*run)(int64_t rounds);
  double operations_per_round;
};

#if defined(__x86_64__)
// Through an empty asm goes the operand every round, so that no compiler may take a product out of the loop, and every
// chain at its start and end: chains that a compiler knows to be equal would become one.
#define LOWBIT_OPAQUE(value) asm volatile("" : "+x"(value))
#define LOWBIT_OPAQUE_ZMM(value) asm volatile("" : "+v"(value))

// Target attributes instead of a file for each ISA: three loops, of which only the one that the CPU has is entered.
__attribute__((target("avx2"))) void multiply_int8_avx2(int64_t rounds) {
  __m256i codes = _mm256_set1_epi8(3), digits = _mm256_set1_epi8(5);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sums[kChains];
#pragma GCC unroll 12
  for (int j = 0; j < kChains; j++) LOWBIT_OPAQUE(sums[j] = _mm256_setzero_si256());
  for (int64_t i = 0; i < rounds; i++) {
    LOWBIT_OPAQUE(digits);
#pragma GCC unroll 12
    for (int j = 0; j < kChains; j++) {
      LOWBIT_OPAQUE(codes);  // otherwise one product would serve all chains
      sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(_mm256_maddubs_epi16(codes, digits), ones));
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < kChains; j++) LOWBIT_OPAQUE(sums[j]);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void multiply_int8_avx512vnni(int64_t rounds) {
  __m512i codes = _mm512_set1_epi8(3), digits = _mm512_set1_epi8(5);
  __m512i sums[kChains];
#pragma GCC unroll 12
  for (int j = 0; j < kChains; j++) LOWBIT_OPAQUE_ZMM(sums[j] = _mm512_setzero_si512());
  for (int64_t i = 0; i < rounds; i++) {
    LOWBIT_OPAQUE_ZMM(digits);
#pragma GCC unroll 12
    for (int j = 0; j < kChains; j++) sums[j] = _mm512_dpbusd_epi32(sums[j], codes, digits);
  }
#pragma GCC unroll 12
  for (int j = 0; j < kChains; j++) LOWBIT_OPAQUE_ZMM(sums[j]);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) void multiply_bf16_avx512(int64_t rounds) {
  const __m512i half = _mm512_set1_epi16(0x3F00);  // 0.5, twice a lane: sums stay finite whatever the rounds
  __m512bh x = reinterpret_cast<const __m512bh&>(half), w = x;
  __m512 sums[kChains];
#pragma GCC unroll 12
  for (int j = 0; j < kChains; j++) LOWBIT_OPAQUE_ZMM(sums[j] = _mm512_setzero_ps());
  for (int64_t i = 0; i < rounds; i++) {
    LOWBIT_OPAQUE_ZMM(x);
#pragma GCC unroll 12
    for (int j = 0; j < kChains; j++) sums[j] = _mm512_dpbf16_ps(sums[j], w, x);
  }
#pragma GCC unroll 12
  for (int j = 0; j < kChains; j++) LOWBIT_OPAQUE_ZMM(sums[j]);
}

// A round of tile instructions takes 64 cycles where one of the others takes 6 to 12: fewer will do.
#if defined(LOWBIT_SOFTWARE_TILES)
constexpr int64_t kTileShare = kRounds;  // one round, of stand-ins
#else
constexpr int64_t kTileShare = 8;
#endif

void multiply_tiles_amx(int64_t rounds) {
  TileShapes shapes;
  for (int tile = 0; tile < kTileRegisters; tile++)
    shapes.rows[tile] = kMostTileRows, shapes.row_bytes[tile] = kMostTileBytes;
  alignas(64) static const uint8_t bytes[kMostTileRows * kMostTileBytes] = {1, 2, 3};
  configure_tiles(shapes);
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  load_tile<4>(bytes, kMostTileBytes), load_tile<5>(bytes, kMostTileBytes);
  load_tile<6>(bytes, kMostTileBytes), load_tile<7>(bytes, kMostTileBytes);
  for (int64_t i = 0; i < rounds / kTileShare; i++) {
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }
  release_tiles();
}

Unit unit(const char* kind) {
  const bool avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (!strcmp(kind, "int8")) {
    if (avx512 && __builtin_cpu_supports("avx512vnni")) return {multiply_int8_avx512vnni, kChains * 64 * 2.0};
    if (__builtin_cpu_supports("avx2")) return {multiply_int8_avx2, kChains * 32 * 2.0};
  }
  if (!strcmp(kind, "tiles") && offered(Isa::amx))
    return {multiply_tiles_amx, 4.0 * kMostTileRows * kMostTileRows * kMostTileBytes * 2.0 / kTileShare};
  if (!strcmp(kind, "bf16") && avx512 && __builtin_cpu_supports("avx512bf16"))
    return {multiply_bf16_avx512, kChains * 32 * 2.0};
  return {nullptr, 0};
}
#else
Unit unit(const char*) { return {nullptr, 0}; }
#endif

}  // namespace
}  // namespace lowbit

extern "C" double lowbit_multiply_rate(const char* kind, int threads) {
  using namespace lowbit;
  if (!kind || threads < 1 || threads > 1024) return 0;
  Unit found = unit(kind);
  if (!found.run) return 0;
  auto body = [](void* argument, int, int) { static_cast<Unit*>(argument)->run(kRounds); };
  auto idle = [](void*, int, int) {};
  double best = 0;
  for (int pass = 0; pass < kPasses; pass++) {
    run_parts(threads, idle, nullptr);  // the threads are awake before the clock starts
    const auto start = std::chrono::steady_clock::now();
    run_parts(threads, body, &found);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(kRounds) * found.operations_per_round * threads / seconds.count() * 1e-9);
  }
  return best;
}
