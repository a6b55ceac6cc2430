// The emulator itself: small kernels in the words of cuda/ptx.cuh give the right numbers, and each thing that a kernel
// may not do is reported.
#include <string.h>

#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "control.h"
#include "cpu/float_types.h"
#include "cuda/ptx.cuh"

namespace emulation = lowbit::emulation;
using namespace lowbit::cuda;

namespace {

std::mt19937 random_bits(7);

// ---- right results ----

__global__ void add(const float* a, const float* b, float* sum, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) sum[i] = ldg(a + i) + ldg(b + i);
}

// One sum a block, by halves through shared memory; the last block to finish adds the blocks' sums in order.
__global__ void reduce(const float* values, float* partial, float* sum, uint32_t* ticket) {
  const uint32_t t = threadIdx.x;
  sts<float>(4 * t, values[blockIdx.x * blockDim.x + t]);
  for (uint32_t half = blockDim.x / 2; half; half /= 2) {
    sync_block();
    if (t < half) sts<float>(4 * t, lds<float>(4 * t) + lds<float>(4 * (t + half)));
  }
  if (t) return;
  partial[blockIdx.x] = lds<float>(0);
  fence();
  if (draw_ticket(ticket, gridDim.x - 1) != gridDim.x - 1) return;
  float total = 0;
  for (uint32_t i = 0; i < gridDim.x; i++) total += ld_shared_result(partial + i);
  *sum = total;
}

__global__ void warp_sums(const int* values, int* sums, double* firsts) {
  int sum = values[threadIdx.x];
#pragma unroll
  for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  sums[threadIdx.x] = sum;
  firsts[threadIdx.x] = shuffle(double(values[threadIdx.x]), 5);
}

// Every second lane holds its neighbour's half: the words are exchanged through shared memory within a warp.
__global__ void swap_neighbours(uint32_t* values) {
  const uint32_t t = threadIdx.x;
  for (int round = 0; round < 3; round++) {
    sts<uint16_t>(4 * t, uint16_t(values[t]));
    sts<uint8_t>(4 * t + 2, uint8_t(values[t] >> 16));
    sts<uint8_t>(4 * t + 3, uint8_t(values[t] >> 24));
    sync_warp();
    values[t] = lds<uint32_t>(4 * (t ^ 1));
    sync_warp();
  }
}

void test_results() {
  const int count = 1000;
  std::vector<float> a(count), b(count), sum(count, -1.f);
  for (int i = 0; i < count; i++) a[size_t(i)] = float(i), b[size_t(i)] = float(3 * i);
  CHECK(launch(add, dim3(4), 256, 0, nullptr, a.data(), b.data(), sum.data(), count) == cudaSuccess, "launch");
  for (int i = 0; i < count; i++) CHECK(sum[size_t(i)] == float(4 * i), "%d: %g", i, double(sum[size_t(i)]));

  std::vector<float> values(5 * 128, 0.5f), partial(5);
  uint32_t ticket = 0;
  for (int again = 0; again < 2; again++) {
    float total = 0;
    launch(reduce, dim3(5), 128, 512, nullptr, values.data(), partial.data(), &total, &ticket);
    CHECK(total == 320 && ticket == 0, "%g, ticket %u", double(total), ticket);
  }

  std::vector<int> numbers(64), sums(64);
  std::vector<double> firsts(64);
  for (int i = 0; i < 64; i++) numbers[size_t(i)] = i;
  launch(warp_sums, dim3(1), 64, 0, nullptr, numbers.data(), sums.data(), firsts.data());
  for (size_t i = 0; i < 64; i++) {
    CHECK(sums[i] == (i < 32 ? 496 : 1520), "lane %zu: %d", i, sums[i]);
    CHECK(firsts[i] == (i < 32 ? 5 : 37), "lane %zu: %g", i, firsts[i]);
  }

  std::vector<uint32_t> words(64);
  for (uint32_t i = 0; i < 64; i++) words[i] = 0x01020304 * i;
  launch(swap_neighbours, dim3(1), 64, 256, nullptr, words.data());
  for (uint32_t i = 0; i < 64; i++) CHECK(words[i] == 0x01020304 * (i ^ 1), "%u: %08x", i, words[i]);
}

// ---- tensor cores ----

template <class T>
uint32_t pick(const T* from) {
  uint32_t word;
  memcpy(&word, from, sizeof word);
  return word;
}

// d [16][8] += a [16][k] b^T, b [8][k]; T is the storage of a and b, k = 32 bytes of them.
template <class A, class B, class D,
          void (*Multiply)(D (&)[4], const uint32_t (&)[4], uint32_t, uint32_t, emulation::Place)>
__global__ void multiply(const A* a, const B* b, D* d) {
  const int lane = int(threadIdx.x) & 31, g = lane / 4, c = lane % 4;
  constexpr int word = 4 / sizeof(A), k = 8 * word;
  const uint32_t fragment[4] = {pick(a + g * k + word * c), pick(a + (g + 8) * k + word * c),
                                pick(a + g * k + word * (c + 4)), pick(a + (g + 8) * k + word * (c + 4))};
  D out[4] = {d[8 * g + 2 * c], d[8 * g + 2 * c + 1], d[8 * (g + 8) + 2 * c], d[8 * (g + 8) + 2 * c + 1]};
  Multiply(out, fragment, pick(b + g * k + word * c), pick(b + g * k + word * (c + 4)), emulation::Place());
  for (int i = 0; i < 4; i++) d[8 * (g + 8 * (i / 2)) + 2 * c + i % 2] = out[i];
}

template <void (*Multiply)(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t, emulation::Place)>
void test_mma_16bit(bool bf16, uint16_t mask, uint16_t set, const char* name) {
  for (int round = 0; round < 50; round++) {
    uint16_t a[16 * 16], b[8 * 16];
    float d[16 * 8], before[16 * 8];
    for (uint16_t& value : a) value = uint16_t((random_bits() & mask) | set);
    for (uint16_t& value : b) value = uint16_t((random_bits() & mask) | set);
    for (float& value : d) value = float(int(random_bits() % 2001) - 1000) / 64;
    memcpy(before, d, sizeof d);
    launch(multiply<uint16_t, uint16_t, float, Multiply>, dim3(1), 32, 0, nullptr, a, b, d);
    for (int row = 0; row < 16; row++) {
      for (int column = 0; column < 8; column++) {
        double expected = double(before[8 * row + column]);
        for (int k = 0; k < 16; k++) {
          const uint16_t left = a[16 * row + k], right = b[16 * column + k];
          expected += bf16 ? double(lowbit::float_from_bf16(left)) * double(lowbit::float_from_bf16(right))
                           : double(lowbit::float_from_f16(left)) * double(lowbit::float_from_f16(right));
        }
        const float got = d[8 * row + column];
        CHECK(got == float(expected) || (got != got && expected != expected), "%s (%d, %d): %.9g, expected %.9g", name,
              row, column, double(got), expected);
      }
    }
  }
}

void test_mma() {
  test_mma_16bit<mma_f16>(false, 0xbfff, 0, "fp16 below 2");
  test_mma_16bit<mma_f16>(false, 0x83ff, 0, "fp16 subnormal");
  test_mma_16bit<mma_f16>(false, 0xffff, 0, "fp16 anything");
  test_mma_16bit<mma_bf16>(true, 0x83ff, 0x3c00, "bf16 near 1");
  test_mma_16bit<mma_bf16>(true, 0xffff, 0, "bf16 anything");
  for (int round = 0; round < 50; round++) {
    uint8_t a[16 * 32];
    int8_t b[8 * 32];
    int32_t d[16 * 8], before[16 * 8];
    for (uint8_t& value : a) value = round ? uint8_t(random_bits()) : 255;
    for (int8_t& value : b) value = round ? int8_t(random_bits()) : -128;
    for (int32_t& value : d) value = int32_t(random_bits()) / 2;
    memcpy(before, d, sizeof d);
    launch(multiply<uint8_t, int8_t, int32_t, mma_u8s8>, dim3(1), 32, 0, nullptr, a, b, d);
    for (int i = 0; i < 16 * 8; i++) {
      int32_t expected = before[i];
      for (int k = 0; k < 32; k++) expected += a[32 * (i / 8) + k] * b[32 * (i % 8) + k];
      CHECK(d[i] == expected, "u8s8 (%d, %d): %d, expected %d", i / 8, i % 8, d[i], expected);
    }
  }
  const emulation::Counters counts = emulation::counters();
  CHECK(counts.mma_f16 == 150 && counts.mma_bf16 == 100 && counts.mma_u8s8 == 50, "%lld %lld %lld",
        (long long)counts.mma_f16, (long long)counts.mma_bf16, (long long)counts.mma_u8s8);
}

void test_conversions() {
  for (uint32_t bits = 0; bits < 65536; bits++) {
    const float f16 = from_f16(uint16_t(bits)), expected = lowbit::float_from_f16(uint16_t(bits));
    CHECK(as_bits(f16) == as_bits(expected), "from_f16(%04x): %08x", bits, as_bits(f16));
    if (f16 == f16) CHECK(to_f16(f16) == bits, "to_f16(%g): %04x", double(f16), to_f16(f16));
    const float bf16 = from_bf16(uint16_t(bits));
    if (bf16 == bf16) CHECK(to_bf16(bf16) == bits, "to_bf16(%g)", double(bf16));
  }
  for (int i = 0; i < 200000; i++) {
    const float value = as_float(uint32_t(random_bits()));
    if (value != value) continue;
    CHECK(to_f16(value) == lowbit::f16_from_float(value), "to_f16(%g)", double(value));
    CHECK(to_bf16(value) == lowbit::bf16_from_float(value), "to_bf16(%g)", double(value));
  }
  CHECK(from_f16(to_f16(NAN)) != from_f16(to_f16(NAN)) && from_bf16(to_bf16(NAN)) != from_bf16(to_bf16(NAN)), "NaN");
  CHECK(byte_perm(0x33221100, 0x77665544, 0x7340) == 0x77334400, "%08x", byte_perm(0x33221100, 0x77665544, 0x7340));
}

// ---- asynchronous copies ----

// Three stages in flight; each thread adds what another thread's copy brought.
__global__ void pipeline(const uint32_t* from, uint32_t* sums, int stages) {
  constexpr int kDepth = 3;
  const uint32_t t = threadIdx.x, stage_bytes = 4 * blockDim.x;
  const auto fetch = [&](int stage) {
    if (stage < stages) {
      const uint32_t* source = from + uint32_t(stage) * blockDim.x;
      if (t < blockDim.x / 4) cp_async16(uint32_t(stage % kDepth) * stage_bytes + 16 * t, source + 4 * t);
    }
    cp_async_commit();
  };
  for (int stage = 0; stage < kDepth - 1; stage++) fetch(stage);
  uint32_t sum = 0;
  for (int stage = 0; stage < stages; stage++) {
    cp_async_wait<kDepth - 2>();
    sync_block();
    sum += lds<uint32_t>(uint32_t(stage % kDepth) * stage_bytes + 4 * (blockDim.x - 1 - t));
    fetch(stage + kDepth - 1);
  }
  sums[t] = sum;
}

__global__ void partial_copies(const uint32_t* from, uint32_t* out) {
  const uint32_t t = threadIdx.x;
  cp_async4(4 * t, from + t, t % 5);
  cp_async16(128 + 16 * t, nullptr, 0);
  cp_async_commit();
  cp_async_wait<0>();
  out[t] = lds<uint32_t>(4 * t) + lds<uint4>(128 + 16 * t).w;
}

void test_async() {
  for (const int architecture : {75, 80, 90}) {
    emulation::set_device(emulation::device_of(architecture));
    const int stages = 7;
    std::vector<uint32_t> from(128 * stages), sums(128);
    for (uint32_t& value : from) value = uint32_t(random_bits());
    launch(pipeline, dim3(1), 128, 3 * 512, nullptr, from.data(), sums.data(), stages);
    for (size_t t = 0; t < 128; t++) {
      uint32_t expected = 0;
      for (size_t stage = 0; stage < stages; stage++) expected += from[128 * stage + 127 - t];
      CHECK(sums[t] == expected, "sm_%d, thread %zu: %u, expected %u", architecture, t, sums[t], expected);
    }
    launch(partial_copies, dim3(1), 32, 640, nullptr, from.data(), sums.data());
    for (size_t t = 0; t < 32; t++) {
      const uint32_t expected = uint32_t(from[t] & ((uint64_t(1) << 8 * (t % 5)) - 1));
      CHECK(sums[t] == expected, "sm_%d, %zu bytes: %08x, expected %08x", architecture, t % 5, sums[t], expected);
    }
  }
  emulation::set_device(emulation::device_of(90));
}

// ---- what is reported ----

enum Wrong {
  kNoBarrier,
  kNoBarrierReadFirst,
  kNoWarpSync,
  kSameWord,
  kNeighbourBytes,
  kOutOfBounds,
  kMisaligned,
  kMisalignedGlobal,
  kUnwritten,
  kBeforeWait,
  kNewestGroup,
  kUncommitted,
  kOthersCopy,
  kCopyOverRead,
  kCopyMisaligned,
  kCopyTooLong,
  kDivergentKinds,
  kDivergentLines,
  kExitedLanes,
  kExitedThreads,
  kTwoBarriers,
};

__global__ void wrong(int what, uint32_t* global) {
  const uint32_t t = threadIdx.x, other_warp = t ^ 32, other_lane = t ^ 1;
  if (what != kUnwritten) sts<uint32_t>(4 * t, t);
  sync_block();
  if (what != kUnwritten) sts<uint32_t>(4 * t, t + 1);
  if (what != kNoBarrier && what != kNoWarpSync) sync_block();
  switch (what) {
    case kNoBarrier: lds<uint32_t>(4 * other_warp); break;
    case kNoBarrierReadFirst:
      lds<uint32_t>(4 * t);
      if (t == 40) sts<uint32_t>(0, 1);
      break;
    case kNoWarpSync: lds<uint32_t>(4 * other_lane); break;
    case kSameWord: sts<uint32_t>(0, t); break;
    case kNeighbourBytes:  // four threads in a word: no race, until one reads a neighbour's byte
      sts<uint8_t>(t, uint8_t(t));
      if (t == 9) lds<uint8_t>(8);
      break;
    case kOutOfBounds:
      if (t == 3) sts<uint32_t>(256, 1), lds<uint4>(252), lds<uint32_t>(0xfffffffc);
      break;
    case kMisaligned:
      if (t == 3) lds<uint2>(4);
      break;
    case kMisalignedGlobal:
      if (t == 3) ldg(reinterpret_cast<const uint2*>(global + 1));
      break;
    case kUnwritten: lds<uint32_t>(4 * t); break;
    case kBeforeWait:
      cp_async4(4 * t, global + t);
      cp_async_commit();
      if (t == 7) lds<uint8_t>(4 * t);
      cp_async_wait<0>();
      break;
    case kNewestGroup:
      cp_async_commit();
      cp_async4(4 * t, global + t);
      cp_async_commit();
      cp_async_wait<1>();
      if (t == 7) lds<uint32_t>(4 * t);
      break;
    case kUncommitted:
      cp_async4(4 * t, global + t);
      cp_async_wait<0>();
      if (t == 7) lds<uint32_t>(4 * t);
      break;
    case kOthersCopy:  // waited for, but by its own thread alone
      cp_async4(4 * t, global + t);
      cp_async_commit();
      cp_async_wait<0>();
      if (t == 7) lds<uint32_t>(4 * 8);
      break;
    case kCopyOverRead:
      lds<uint32_t>(4 * t);
      if (t == 7) cp_async4(4 * 40, global);
      break;
    case kCopyMisaligned:
      if (t == 7) cp_async16(8, global), cp_async16(0, global + 1);
      break;
    case kCopyTooLong:
      if (t == 7) cp_async4(0, global, 5), cp_async16(0, global, 8);
      break;
    case kDivergentKinds:
      if (t < 16)
        shuffle(t, 0);
      else
        sync_warp();
      break;
    case kDivergentLines:
      if (t & 1)
        sync_warp();
      else
        sync_warp();
      break;
    case kExitedLanes:
      if (t == 40) return;
      shuffle_xor(t, 1);
      break;
    case kExitedThreads:
      if (t >= 32) return;
      sync_block();
      break;
    case kTwoBarriers:
      if (t < 32)
        sync_block();
      else
        sync_block();
      break;
  }
}

// Runs it and demands a report that says `expected`; `at_most` reports at all, if that is given.
void expect(Wrong what, const char* expected, int at_most = 1 << 30) {
  alignas(16) uint32_t global[68] = {};
  for (const uint64_t seed : {0, 1, 2, 3}) {
    emulation::clear();
    emulation::set_seed(seed);
    CHECK(launch(wrong, dim3(1), 64, 256, nullptr, int(what), global) == cudaSuccess, "launch");
    bool found = false;
    for (int i = 0; i < emulation::kMessages; i++) found |= strstr(emulation::message(i), expected) != nullptr;
    CHECK(found && emulation::violations() <= at_most, "%d, seed %d: %lld reports, the first: %s; expected: %s",
          int(what), int(seed), (long long)emulation::violations(), emulation::message(0), expected);
  }
  emulation::set_seed(0);
  emulation::clear();
}

void test_reports() {
  CHECK(emulation::violations() == 0, "%lld, the first: %s", (long long)emulation::violations(), emulation::message(0));
  expect(kNoBarrier, "reads what no barrier separates from the write", 64);
  expect(kNoBarrierReadFirst, "race on 4 bytes at 0 of shared memory", 1);
  expect(kNoWarpSync, "reads what no barrier separates from the write");
  expect(kSameWord, "writes what no barrier separates from the write", 63);
  expect(kNeighbourBytes, "race on 1 bytes at 8", 1);
  expect(kOutOfBounds, "sts of 4 bytes at 256 is out of bounds: shared memory has 256", 3);
  expect(kOutOfBounds, "lds of 16 bytes at 252 is out of bounds", 3);
  expect(kOutOfBounds, "lds of 4 bytes at 4294967292 is out of bounds", 3);
  expect(kMisaligned, "thread 3: lds of 8 bytes at 4 is misaligned", 1);
  expect(kMisalignedGlobal, "is misaligned", 1);
  expect(kUnwritten, "reads what was never written", 64);
  expect(kBeforeWait, "reads what a cp_async under way is to write by thread 7", 1);
  expect(kNewestGroup, "thread 7: race on 4 bytes at 28", 1);
  expect(kUncommitted, "thread 7: race on 4 bytes at 28", 1);
  expect(kOthersCopy, "race on 4 bytes at 32", 1);
  expect(kCopyOverRead, "race on 4 bytes at 160", 1);
  expect(kCopyMisaligned, "cp_async16 of 16 bytes at 8 is misaligned", 2);
  expect(kCopyMisaligned, "cp_async16 from", 2);
  expect(kCopyTooLong, "cp_async4 of 5 bytes: expected 0 to 4", 2);
  expect(kCopyTooLong, "cp_async16 of 8 bytes: expected 16 or 0", 2);
  expect(kDivergentKinds, "0000ffff at shuffle", 1);
  expect(kDivergentLines, "warp 1 is divergent at sync_warp: lanes", 2);
  expect(kExitedLanes, "00000100 exited", 1);
  expect(kExitedThreads, "sync_block: 32 of 64 threads wait", 1);
  expect(kTwoBarriers, "the block is divergent", 1);
}

// ---- the race check against its definition ----

// Sparse random programs: a thread does at most one access a step; every step ends in nothing, a collective or a
// barrier, the same for all.
struct Step {
  enum { kNothing, kWarp, kBlock } end;
  struct {
    int8_t at, size, write;  // size 0: no access
  } access[64];
};

__global__ void random_program(const Step* steps, int count) {
  const uint32_t t = threadIdx.x;
  if (t < 8) sts<uint32_t>(4 * t, 0);
  sync_block();
  for (int i = 0; i < count; i++) {
    const auto& access = steps[i].access[t];
    const uint32_t at = uint32_t(access.at);
    if (access.size == 1 && access.write) sts<uint8_t>(at, 0);
    if (access.size == 1 && !access.write) lds<uint8_t>(at);
    if (access.size == 4 && access.write) sts<uint32_t>(at, 0);
    if (access.size == 4 && !access.write) lds<uint32_t>(at);
    if (access.size == 8 && access.write) sts<uint2>(at, {0, 0});
    if (access.size == 8 && !access.write) lds<uint2>(at);
    if (steps[i].end == Step::kWarp) sync_warp();
    if (steps[i].end == Step::kBlock) sync_block();
  }
}

bool has_race(const std::vector<Step>& steps) {
  for (size_t i = 0; i < steps.size(); i++) {
    bool warp = false, block = false;  // what lies between steps i and j
    for (size_t j = i; j < steps.size() && !block; j++) {
      for (int t = 0; t < 64; t++) {
        for (int u = 0; u < 64; u++) {
          const auto &a = steps[i].access[t], &b = steps[j].access[u];
          if (t == u || (warp && t / 32 == u / 32) || !a.size || !b.size) continue;
          if ((a.write || b.write) && a.at < b.at + b.size && b.at < a.at + a.size) return true;
        }
      }
      warp |= steps[j].end == Step::kWarp;
      block |= steps[j].end == Step::kBlock;
    }
  }
  return false;
}

void test_race_check() {
  emulation::clear();
  int races = 0;
  const int programs = 4000;
  for (int program = 0; program < programs; program++) {
    std::vector<Step> steps(8);
    for (Step& step : steps) {
      memset(&step, 0, sizeof step);
      const uint32_t end = random_bits() % 8;
      step.end = end < 3 ? Step::kNothing : end < 6 ? Step::kWarp : Step::kBlock;
      for (uint32_t accesses = random_bits() % 3; accesses; accesses--) {
        // Half the accesses are of four threads, so that threads meet again.
        auto& access = step.access[random_bits() % 2 ? random_bits() % 4 * 21 : random_bits() % 64];
        const int8_t sizes[] = {1, 4, 4, 8};
        access.size = sizes[random_bits() % 4];
        access.at = int8_t(random_bits() % 16 / uint32_t(access.size) * uint32_t(access.size));
        access.write = random_bits() % 3 == 0;
      }
    }
    emulation::set_seed(uint64_t(program));
    launch(random_program, dim3(1), 64, 32, nullptr, steps.data(), int(steps.size()));
    const bool expected = has_race(steps), reported = emulation::violations() != 0;
    races += expected;
    CHECK(reported == expected, "program %d: a race %s: %s", program, expected ? "went unnoticed" : "was invented",
          emulation::message(0));
    emulation::clear();
  }
  CHECK(races > programs / 5 && races < programs * 4 / 5, "%d of %d programs have races", races, programs);
  emulation::set_seed(0);
}

void test_refusals() {
  float* none = nullptr;
  const auto refused = [&](int threads, size_t shared, dim3 grid) {
    return launch(add, grid, threads, shared, nullptr, none, none, none, 0);
  };
  CHECK(refused(1056, 0, dim3(1)) == cudaErrorInvalidConfiguration, "1056 threads");
  CHECK(refused(48, 0, dim3(1)) == cudaErrorInvalidConfiguration, "48 threads");
  CHECK(refused(32, 0, dim3(1, 0)) == cudaErrorInvalidConfiguration, "no blocks");
  CHECK(refused(32, (227 << 10) + 1, dim3(1)) == cudaErrorInvalidValue, "shared memory");
  CHECK(refused(1024, 227 << 10, dim3(2, 3, 4)) == cudaSuccess, "all of it");
  emulation::set_device(emulation::device_of(75));
  CHECK(refused(32, 65537, dim3(1)) == cudaErrorInvalidValue, "shared memory of sm_75");
  cudaDeviceProp properties;
  cudaGetDeviceProperties(&properties, 0);
  CHECK(properties.major == 7 && properties.minor == 5 && std::string(properties.name) == "emulated sm_75", "%s",
        properties.name);
  uint16_t half[256] = {};
  float d[128] = {};
  launch(multiply<uint16_t, uint16_t, float, mma_bf16>, dim3(1), 32, 0, nullptr, half, half, d);
  CHECK(strstr(emulation::message(0), "this mma needs sm_80"), "%s", emulation::message(0));
  emulation::clear();
  emulation::set_device(emulation::device_of(90));
}

// An order that differs by seed, of blocks and of warps.
__global__ void log_order(int* log, int* length) {
  if (threadIdx.x % 32 == 0) log[(*length)++] = int(blockIdx.x * blockDim.x + threadIdx.x) / 32;
}

void test_seeds() {
  std::vector<int> logs[3];
  for (int seed = 0; seed < 3; seed++) {
    emulation::set_seed(uint64_t(seed));
    logs[seed].resize(32);
    int length = 0;
    launch(log_order, dim3(8), 128, 0, nullptr, logs[seed].data(), &length);
    CHECK(length == 32, "%d", length);
  }
  emulation::set_seed(0);
  for (int i = 0; i < 32; i++) CHECK(logs[0][size_t(i)] == i, "%d: %d", i, logs[0][size_t(i)]);
  CHECK(logs[1] != logs[0] && logs[2] != logs[0] && logs[1] != logs[2], "seeds change nothing");
}

}  // namespace

int main() {
  for (const uint64_t seed : {0, 1, 2, 3}) {
    emulation::set_seed(seed);
    emulation::clear();
    test_results();
    test_mma();
    test_async();
    CHECK(emulation::violations() == 0, "seed %d: %s", int(seed), emulation::message(0));
  }
  emulation::set_seed(0);
  test_conversions();
  test_reports();
  test_race_check();
  test_refusals();
  test_seeds();
  return check::finish("test_emulator");
}
