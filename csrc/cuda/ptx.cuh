// Every instruction that C++ has no word for, as a small function: shared memory, asynchronous copies, tensor cores,
// warp collectives, conversions. The emulator gives the same functions (tests/emulation/emulation.h).
//
// Fragments of mma.sync (PTX ISA, "Matrix Fragments for mma.m16n8k16 / m16n8k32"), lane = 4g + c:
//   A 16 x k   a0: row g, first half of k    a1: row g+8, first half    a2: row g, second half    a3: row g+8, second half
//              16-bit: a0 holds k = 2c, 2c+1 (a2: 8 + ...)     8-bit: a0 holds k = 4c .. 4c+3 (a2: 16 + ...)
//   B k x 8    b0, b1: the same k of column g
//   D 16 x 8   d0, d1: row g, columns 2c, 2c+1    d2, d3: row g+8
#ifndef LOWBIT_CUDA_PTX_CUH
#define LOWBIT_CUDA_PTX_CUH

#include "cuda/platform.cuh"

#if !defined(LOWBIT_EMULATED)

namespace lowbit {
namespace cuda {

extern __shared__ __align__(128) uint8_t shared_arena[];

// ---- shared memory: byte offsets into the block's arena ----

template <class T>
__device__ __forceinline__ T lds(uint32_t at) {
  return *reinterpret_cast<const T*>(shared_arena + at);
}
template <class T>
__device__ __forceinline__ void sts(uint32_t at, T value) {
  *reinterpret_cast<T*>(shared_arena + at) = value;
}

// ---- global memory ----

// Read-only for the whole launch.
template <class T>
__device__ __forceinline__ T ldg(const T* from) {
  return __ldg(from);
}
// Written by other blocks of this launch: not through the incoherent cache.
template <class T>
__device__ __forceinline__ T ld_shared_result(const T* from) {
  return __ldcg(from);
}

// ---- asynchronous copies: global to shared, behind the back of the registers ----
// cp_async16 copies `bytes` (16, or 0: zeros are written) and passes by L1; cp_async4 copies `bytes` of 4, the rest
// zeros. Before sm_80 they are plain copies, done at once.

__device__ __forceinline__ void cp_async16(uint32_t at, const void* from, uint32_t bytes = 16) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared_arena + at));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#else
  uint4 value = make_uint4(0, 0, 0, 0);
  if (bytes) value = *static_cast<const uint4*>(from);
  sts<uint4>(at, value);
#endif
}
__device__ __forceinline__ void cp_async4(uint32_t at, const void* from, uint32_t bytes = 4) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared_arena + at));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#else
  uint32_t value = 0;
  for (uint32_t i = 0; i < bytes; i++) value |= uint32_t(static_cast<const uint8_t*>(from)[i]) << 8 * i;
  sts<uint32_t>(at, value);
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `Pending` of this thread's newest groups are under way.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// ---- tensor cores ----

// d += A B, fp16 x fp16 -> fp32. sm_75 takes it in two halves of k.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#else
  __trap();  // the plan never sends such a device here
#endif
}

// d += A B, bf16 x bf16 -> fp32, from sm_80 on.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

// d += A B, uint8 x int8 -> int32, exact. sm_75 takes it in four quarters.
__device__ __forceinline__ void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750
#define LOWBIT_QUARTER(d0, d1, a, b) \
  asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0,%1},{%2},{%3},{%0,%1};" : "+r"(d0), "+r"(d1) : "r"(a), "r"(b))
  LOWBIT_QUARTER(d[0], d[1], a[0], b0);
  LOWBIT_QUARTER(d[2], d[3], a[1], b0);
  LOWBIT_QUARTER(d[0], d[1], a[2], b1);
  LOWBIT_QUARTER(d[2], d[3], a[3], b1);
#undef LOWBIT_QUARTER
#else
  __trap();
#endif
}

// ---- warps and blocks ----

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// Makes this thread's writes to global memory visible to the device before what it writes next.
__device__ __forceinline__ void fence() { __threadfence(); }
// *at + 1, or 0 once *at is `last`; returns the old value. Tickets: they are back at 0 when everyone has drawn.
__device__ __forceinline__ uint32_t draw_ticket(uint32_t* at, uint32_t last) { return atomicInc(at, last); }
__device__ __forceinline__ void atomic_min(unsigned long long* at, unsigned long long value) { atomicMin(at, value); }
__device__ __forceinline__ void atomic_min(uint32_t* at, uint32_t value) { atomicMin(at, value); }

// ---- bits ----

// Bytes selected out of {a: 0-3, b: 4-7} by the nibbles of `selector`.
__device__ __forceinline__ uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float value) { return __float_as_uint(value); }

// The same value, about which the compiler knows nothing: what is computed from it in a loop stays there, where registers
// are worth more than instructions.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// ---- conversions, rounded to nearest even ----

__device__ __forceinline__ float from_f16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ __forceinline__ uint16_t to_f16(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ float from_bf16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
__device__ __forceinline__ uint16_t to_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return uint16_t(bits >> 16 | 0x40);  // a NaN stays one
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace cuda
}  // namespace lowbit
#endif  // !LOWBIT_EMULATED
#endif
