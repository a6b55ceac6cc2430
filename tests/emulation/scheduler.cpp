// Runs blocks: who goes next, what a warp or a block waits for, and what it means when nobody can go on.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <mutex>
#include <numeric>

#include "block.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace lowbit {
namespace emulation {

Block block;
Counters counts;

namespace {

std::mutex one_launch;
Fiber* host;  // who called run()
struct {
  void (*thread)(const void*);
  const void* data;
} call;

int order[32], turn;  // the warps in the order in which they run, and the place of the one that does

uint64_t seed = getenv("LOWBIT_EMULATED_SEED") ? strtoull(getenv("LOWBIT_EMULATED_SEED"), nullptr, 0) : 0;
uint64_t state;  // of the random numbers of a launch

uint32_t draw() {  // splitmix64 (Steele, Lea, Flood 2014)
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return uint32_t((z ^ z >> 31) >> 32);
}
template <class T>
void shuffle(T* begin, size_t count) {
  for (size_t i = count; i > 1; i--) std::swap(begin[i - 1], begin[draw() % i]);
}

// ---- findings ----

struct Findings {
  int64_t count = 0;
  char message[kMessages][512] = {};
  ~Findings() {
    if (!count) return;
    fprintf(stderr, "emulation: %lld violations, the first of them:\n", static_cast<long long>(count));
    for (int i = 0; i < kMessages && *message[i]; i++) fprintf(stderr, "  %s\n", message[i]);
  }
} findings;

const char* file_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::None: return "nothing";
    case Wait::Block: return "sync_block";
    case Wait::Warp: return "sync_warp";
    case Wait::Exchange: return "shuffle";
    case Wait::MmaF16: return "mma_f16";
    case Wait::MmaBf16: return "mma_bf16";
    case Wait::MmaU8s8: return "mma_u8s8";
  }
  return "";
}

Thread& thread_at(int warp, int slot) { return *block.thread[size_t(32 * warp + slot)]; }

// "lanes 0000ffff at shuffle (line 12), ffff0000 exited": who of a warp is where.
void describe(int index, char* text, size_t size) {
  Warp& warp = block.warp[index];
  size_t length = 0;
  for (uint32_t left = ~0u; left;) {
    const Thread& first = thread_at(index, __builtin_ctz(left));
    const bool exited = warp.exited >> first.slot & 1;
    uint32_t slots = 0, lanes = 0;
    for (int slot = 0; slot < 32; slot++) {
      const Thread& other = thread_at(index, slot);
      const bool same =
          exited ? warp.exited >> slot & 1
                 : !(warp.exited >> slot & 1) && other.wait == first.wait && other.place.line == first.place.line;
      if (same && left >> slot & 1) slots |= 1u << slot, lanes |= 1u << other.lane;
    }
    left &= ~slots;
    if (length < size)
      length += size_t(exited ? snprintf(text + length, size - length, "%s%08x exited", length ? ", " : "lanes ", lanes)
                              : snprintf(text + length, size - length, "%s%08x at %s (line %d)",
                                         length ? ", " : "lanes ", lanes, name_of(first.wait), first.place.line));
  }
}

// ---- who goes next ----

void release(Warp& warp, uint32_t slots) {
  warp.ready |= slots;
  warp.at_collective &= ~slots;
  warp.at_barrier &= ~slots;
}

// Nobody can go on, and some wait at collectives: their warps have parted.
bool let_parted_warps_go() {
  bool any = false;
  for (int i = 0; i < block.warps; i++) {
    Warp& warp = block.warp[i];
    if (!warp.at_collective) continue;
    any = true;
    char text[300];
    describe(i, text, sizeof text);
    const Thread& first = thread_at(i, __builtin_ctz(warp.at_collective));
    report(first.place, "warp %d is divergent at %s: %s", i, name_of(first.wait), text);
    release(warp, warp.at_collective);
  }
  return any;
}

// Nobody can go on, and nobody waits at a collective: those at the barrier pass it. False if there are none.
bool pass_barrier() {
  const Thread *first = nullptr, *elsewhere = nullptr;
  int waiting = 0, exited = -1;
  for (int i = 0; i < block.warps; i++) {
    const Warp& warp = block.warp[i];
    waiting += __builtin_popcount(warp.at_barrier);
    if (warp.exited && exited < 0) exited = thread_at(i, __builtin_ctz(warp.exited)).index;
    for (uint32_t left = warp.at_barrier; left; left &= left - 1) {
      const Thread& thread = thread_at(i, __builtin_ctz(left));
      if (!first) first = &thread;
      if (thread.place.line != first->place.line) elsewhere = &thread;
    }
  }
  if (!waiting) return false;
  if (exited >= 0)
    report(first->place, "sync_block: %d of %d threads wait (thread %d among them), thread %d has exited", waiting,
           block.threads, first->index, exited);
  if (elsewhere)
    report(first->place, "sync_block: the block is divergent: thread %d waits here, thread %d at line %d", first->index,
           elsewhere->index, elsewhere->place.line);
  counts.barriers++;
  block.barrier_stamp = ++block.last_stamp;
  for (int i = 0; i < block.warps; i++) {
    release(block.warp[i], block.warp[i].at_barrier);
    block.warp[i].stamp = block.barrier_stamp;
  }
  turn = -1;
  if (seed) shuffle(order, size_t(block.warps));
  return true;
}

Thread* next_of_warp(int warp, int after) {
  const uint32_t ready = block.warp[warp].ready, higher = ready & ~((2u << after) - 1);
  return &thread_at(warp, __builtin_ctz(higher ? higher : ready));
}

// A ready thread, of another warp than the last if there is one; nullptr once all have exited.
Thread* next_of_block() {
  for (;;) {
    for (int i = 0; i < block.warps; i++) {
      turn = turn + 1 < block.warps ? turn + 1 : 0;
      if (block.warp[order[turn]].ready) return next_of_warp(order[turn], 31);
    }
    if (!let_parted_warps_go() && !pass_barrier()) return nullptr;
  }
}

void go_on_with(Fiber& from, Thread* next) {
  block.running = next;
  if (next) threadIdx.x = unsigned(next->index);
  Fiber& to = next ? next->fiber : *host;
  if (&from != &to) Fiber::change(from, to);
}

void run_someone_else(Thread& me) {
  const bool same_warp = block.warp[me.warp].ready;
  go_on_with(me.fiber, same_warp ? next_of_warp(me.warp, me.slot) : next_of_block());
}

void thread_body(void* self) {
  Thread& me = *static_cast<Thread*>(self);
  for (;;) {  // once a block
    call.thread(call.data);
    Warp& warp = block.warp[me.warp];
    warp.ready &= ~(1u << me.slot);
    warp.exited |= 1u << me.slot;
    run_someone_else(me);
  }
}

// ---- what threads wait for ----

// The running thread waits until all of its warp are here; the last to come computes.
template <class F>
void meet(Wait wait, const Place& place, F compute) {
  Thread& me = *block.running;
  Warp& warp = block.warp[me.warp];
  me.wait = wait, me.place = place;
  if (!warp.at_collective) warp.uniform = true, warp.kind = wait, warp.line = place.line;
  warp.uniform &= warp.kind == wait && warp.line == place.line;
  warp.at_collective |= 1u << me.slot;
  warp.ready &= ~(1u << me.slot);
  if (warp.at_collective != ~0u || !warp.uniform) return run_someone_else(me);
  compute(warp);
  release(warp, ~0u);
  warp.stamp = ++block.last_stamp;
  if (seed && draw() % 8 == 0) go_on_with(me.fiber, next_of_block());
}

void start_block() {
  block.id++;
  counts.blocks++;
  block.barrier_stamp = ++block.last_stamp;
  const int flip = seed ? int(draw() & 31) : 0;
  for (int i = 0; i < block.warps; i++) {
    Warp& warp = block.warp[i];
    warp.ready = ~0u, warp.at_collective = warp.at_barrier = warp.exited = 0;
    warp.stamp = block.barrier_stamp;
    order[i] = i;
    for (int slot = 0; slot < 32; slot++) {
      Thread& thread = thread_at(i, slot);
      thread.lane = slot ^ flip;
      thread.index = 32 * i + thread.lane;
      thread.wait = Wait::None;
      thread.copies.clear();
      thread.landed = 0, thread.groups = 0;
    }
  }
  turn = -1;
  if (seed) shuffle(order, size_t(block.warps));
  clear_shared();
}

void hire(int threads) {
  while (block.thread.size() < size_t(threads)) {
    const int number = int(block.thread.size());
    block.thread.push_back(std::make_unique<Thread>());
    Thread& thread = *block.thread.back();
    thread.warp = number / 32, thread.slot = number % 32;
    thread.fiber.prepare(thread_body, &thread, unsigned(number));
  }
}

}  // namespace

bool room_for_message() { return findings.count < kMessages; }

void report(const Place& place, const char* format, ...) {
  if (room_for_message()) {
    char* text = findings.message[findings.count];
    const size_t size = sizeof findings.message[0];
    int length = snprintf(text, size, "%s:%d: block (%u, %u, %u) ", file_name(place.file), place.line, blockIdx.x,
                          blockIdx.y, blockIdx.z);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text + length, size - size_t(length), format, arguments);
    va_end(arguments);
  }
  findings.count++;
}

int64_t violations() { return findings.count; }
const char* message(int index) { return index >= 0 && index < kMessages ? findings.message[index] : ""; }
void clear() {
  findings.count = 0;
  memset(findings.message, 0, sizeof findings.message);
  counts = {};
}
Counters counters() { return counts; }
void set_seed(uint64_t value) { seed = value; }

cudaError_t run(const Grid& grid, void (*thread)(const void*), const void* data) {
  std::lock_guard<std::mutex> lock(one_launch);
  const dim3 blocks = grid.blocks;
  if (grid.threads < 32 || grid.threads > 1024 || grid.threads % 32 || !blocks.x || !blocks.y || !blocks.z ||
      blocks.x > 0x7fffffff || blocks.y > 65535 || blocks.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (grid.shared_bytes > device().shared_per_block) return cudaErrorInvalidValue;

  counts.launches++;
  hire(grid.threads);
  Fiber here;
  host = &here;
  call = {thread, data};
  block.threads = grid.threads, block.warps = grid.threads / 32;
  gridDim = blocks;
  blockDim = dim3(unsigned(grid.threads));
  threadIdx = {0, 0, 0};
  state = seed;
  start_shared(grid.shared_bytes);

  std::vector<uint64_t> place(uint64_t(blocks.x) * blocks.y * blocks.z);
  std::iota(place.begin(), place.end(), 0);
  if (seed) shuffle(place.data(), place.size());
  for (const uint64_t i : place) {
    blockIdx = {unsigned(i % blocks.x), unsigned(i / blocks.x % blocks.y), unsigned(i / blocks.x / blocks.y)};
    start_block();
    go_on_with(here, next_of_block());
  }
  return cudaSuccess;
}

void wait_for_block(Place place) {
  Thread& me = *block.running;
  Warp& warp = block.warp[me.warp];
  me.wait = Wait::Block, me.place = place;
  warp.at_barrier |= 1u << me.slot;
  warp.ready &= ~(1u << me.slot);
  run_someone_else(me);
}

void wait_for_warp(Place place) {
  meet(Wait::Warp, place, [](Warp&) {});
}

uint64_t exchange(uint64_t value, int lane, Place place) {
  Thread& me = *block.running;
  Warp& warp = block.warp[me.warp];
  warp.value[me.lane] = value;
  warp.source[me.lane] = uint8_t(lane & 31);
  meet(Wait::Exchange, place, [](Warp& all) {
    uint64_t given[32];
    memcpy(given, all.value, sizeof given);
    for (int i = 0; i < 32; i++) all.value[i] = given[all.source[i]];
  });
  return warp.value[me.lane];
}

void multiply(Mma kind, void* d, const uint32_t* a, uint32_t b0, uint32_t b1, Place place) {
  Thread& me = *block.running;
  Warp& warp = block.warp[me.warp];
  uint32_t words[4];
  memcpy(words, d, sizeof words);
  for (int i = 0; i < 4; i++) warp.a[i][me.lane] = a[i], warp.d[i][me.lane] = words[i];
  warp.b[0][me.lane] = b0, warp.b[1][me.lane] = b1;
  const int needs = kind == Mma::BF16 ? 80 : 75;
  const auto check = [&] {
    if (device().architecture < needs) report(place, "thread %d: this mma needs sm_%d", me.index, needs);
  };
  if (kind == Mma::F16)
    meet(Wait::MmaF16, place, [&](Warp& all) { check(), counts.mma_f16++, multiply_f16(all); });
  else if (kind == Mma::BF16)
    meet(Wait::MmaBf16, place, [&](Warp& all) { check(), counts.mma_bf16++, multiply_bf16(all); });
  else
    meet(Wait::MmaU8s8, place, [&](Warp& all) { check(), counts.mma_u8s8++, multiply_u8s8(all); });
  for (int i = 0; i < 4; i++) words[i] = warp.d[i][me.lane];
  memcpy(d, words, sizeof words);
}

}  // namespace emulation
}  // namespace lowbit
