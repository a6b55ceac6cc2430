// A host meaning for lowbit's .cu sources: what cuda/platform.cuh and cuda/ptx.cuh give on a GPU, for tests on a
// machine with none, and with checks that a GPU does not make.
//
// Modelled: a launch runs its blocks in turn. A block's threads are fibers (fibers.h) that run until they wait: a warp
// collective (mma, shuffle, sync_warp) waits for the 32 lanes of the warp and is computed by the last to come, a
// barrier waits for the block. Shared memory is one arena of exactly the bytes asked for; every access is checked:
//   - bounds and natural alignment;
//   - that what is read was written (each block finds the arena poisoned);
//   - races: two threads, one of them writing, that no barrier separates; or, for lanes of one warp, no collective;
//   - cp_async: the bytes land at the thread's own cp_async_wait, no sooner; until then nobody may touch the place.
// Collectives that part of a warp reaches, and barriers that part of a block reaches, are reported and let go.
// Global memory is the host's: AddressSanitizer sees where kernels read and write (its fiber calls are made).
//
// Not modelled: time, caches, registers; the memory model between blocks (draw_ticket and fence work, since blocks run
// in turn; a block that spins for another never ends); the order of a tensor core's sum (here: double, rounded once);
// wgmma, TMA.
//
// Control, findings and counters: control.h.
#ifndef LOWBIT_EMULATION_H
#define LOWBIT_EMULATION_H

#include <string.h>

#include <tuple>

#include "control.h"
#include "cuda_words.h"

namespace lowbit {
namespace emulation {

// The place in a kernel that a report names: as a default argument, the caller's line.
struct Place {
  const char* file;
  int line;
  constexpr Place(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
};

struct Grid {
  dim3 blocks;
  int threads;
  size_t shared_bytes;
};
cudaError_t run(const Grid& grid, void (*thread)(const void*), const void* call);

void read_shared(uint32_t at, uint32_t bytes, void* value, Place place);
void write_shared(uint32_t at, uint32_t bytes, const void* value, Place place);
void check_global(const void* at, uint32_t bytes, Place place);
void copy_async(uint32_t at, const void* from, uint32_t bytes, uint32_t size, Place place);
void commit_async();
void wait_async(uint32_t pending);

void wait_for_block(Place place);
void wait_for_warp(Place place);
uint64_t exchange(uint64_t value, int lane, Place place);
enum class Mma { F16, BF16, U8S8 };
void multiply(Mma kind, void* d, const uint32_t* a, uint32_t b0, uint32_t b1, Place place);

}  // namespace emulation

namespace cuda {

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t, A... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::remove_cv_t<P>...> arguments;
  } call{kernel, {P(arguments)...}};
  return emulation::run(
      {grid, threads, shared_bytes},
      [](const void* data) {
        const Call& call = *static_cast<const Call*>(data);
        std::apply(call.kernel, call.arguments);
      },
      &call);
}

// ---- shared memory ----

template <class T>
T lds(uint32_t at, emulation::Place place = {}) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 16 && !(sizeof(T) & (sizeof(T) - 1)),
                "one load instruction reads 1, 2, 4, 8 or 16 bytes");
  T value;
  emulation::read_shared(at, sizeof(T), &value, place);
  return value;
}
template <class T>
void sts(uint32_t at, T value, emulation::Place place = {}) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 16 && !(sizeof(T) & (sizeof(T) - 1)),
                "one store instruction writes 1, 2, 4, 8 or 16 bytes");
  emulation::write_shared(at, sizeof(T), &value, place);
}

// ---- global memory ----

template <class T>
T ldg(const T* from, emulation::Place place = {}) {
  emulation::check_global(from, sizeof(T), place);
  T value;
  memcpy(&value, static_cast<const void*>(from), sizeof value);
  return value;
}
inline float ld_shared_result(const float* from, emulation::Place place = {}) { return ldg(from, place); }

// ---- asynchronous copies ----

inline void cp_async16(uint32_t at, const void* from, uint32_t bytes = 16, emulation::Place place = {}) {
  emulation::copy_async(at, from, bytes, 16, place);
}
inline void cp_async4(uint32_t at, const void* from, uint32_t bytes = 4, emulation::Place place = {}) {
  emulation::copy_async(at, from, bytes, 4, place);
}
inline void cp_async_commit() { emulation::commit_async(); }
template <int Pending>
void cp_async_wait() {
  emulation::wait_async(Pending);
}

// ---- tensor cores ----

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulation::Place place = {}) {
  emulation::multiply(emulation::Mma::F16, d, a, b0, b1, place);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulation::Place place = {}) {
  emulation::multiply(emulation::Mma::BF16, d, a, b0, b1, place);
}
inline void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulation::Place place = {}) {
  emulation::multiply(emulation::Mma::U8S8, d, a, b0, b1, place);
}

// ---- warps and blocks ----

inline void sync_block(emulation::Place place = {}) { emulation::wait_for_block(place); }
inline void sync_warp(emulation::Place place = {}) { emulation::wait_for_warp(place); }
template <class T>
T shuffle(T value, int lane, emulation::Place place = {}) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "what __shfl_sync takes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = emulation::exchange(bits, lane, place);
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T shuffle_xor(T value, int mask, emulation::Place place = {}) {
  return shuffle(value, int(threadIdx.x & 31) ^ mask, place);
}
inline void fence() {}
inline uint32_t draw_ticket(uint32_t* at, uint32_t last) {
  const uint32_t old = *at;
  *at = old >= last ? 0 : old + 1;
  return old;
}
inline void atomic_min(unsigned long long* at, unsigned long long value) { *at = min(*at, value); }
inline void atomic_min(uint32_t* at, uint32_t value) { *at = min(*at, value); }

// ---- bits ----

inline uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ---- conversions, rounded to nearest even ----

inline float from_f16(uint16_t bits) {
  const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13;
  // The exponent's bias goes from 15 to 127 by one exact multiplication, which normalises subnormals as well. Only
  // infinity and (quieted) NaN need more: every bit of the exponent.
  uint32_t value = as_bits(as_float(magnitude) * 0x1p112f);
  value |= magnitude >= 0x7c00u << 13 ? 0x7f800000 : 0;
  value |= magnitude > 0x7c00u << 13 ? 0x400000 : 0;
  return as_float(value | uint32_t(bits & 0x8000) << 16);
}
inline uint16_t to_f16(float value) {
  const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;                    // cvt gives its one NaN
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more round to infinity
  if (magnitude < 0x38800000)  // below 2^-14: + 0.5 puts the units of 2^-24 last, and rounds to even
    return uint16_t(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13));
}
inline float from_bf16(uint16_t bits) { return as_float(uint32_t(bits) << 16); }
inline uint16_t to_bf16(float value) {
  const uint32_t bits = as_bits(value);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace cuda
}  // namespace lowbit
#endif
