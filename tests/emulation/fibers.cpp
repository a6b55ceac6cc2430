#include "fibers.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if LOWBIT_FIBERS_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace lowbit {
namespace emulation {
namespace {

// Only the pages that are touched take memory. Sanitizers' frames are several times as large.
constexpr size_t kStack = LOWBIT_FIBERS_ASAN ? 512 << 10 : 128 << 10, kGuard = 4096;

// Who switched last: whoever wakes up reads it to tell AddressSanitizer whose stack was left.
Fiber* left = nullptr;

char* new_stack() {
  void* base = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED || mprotect(base, kGuard, PROT_NONE)) {
    perror("emulation: a stack");
    abort();
  }
  return static_cast<char*>(base) + kGuard;
}

}  // namespace

#if defined(__x86_64__)
extern "C" void lowbit_emulation_switch(void** save_top, void* top);
// System V ABI: a call preserves rbx, rbp, r12-r15 and the stack. What it pops, the other side pushed (or prepare did).
asm(R"(
  .pushsection .text
  .p2align 4
  .globl lowbit_emulation_switch
  .hidden lowbit_emulation_switch
  .type lowbit_emulation_switch, @function
lowbit_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size lowbit_emulation_switch, .-lowbit_emulation_switch
  .popsection
)");
#endif

namespace {
Fiber* arriving = nullptr;  // who a first switch starts: start() takes no argument
}

void Fiber::prepare(void (*body)(void*), void* argument, unsigned colour) {
  body_ = body, argument_ = argument;
  char* stack = new_stack();
  stack_ = stack, bytes_ = kStack;
  const size_t used = kStack - colour * 320 % 4096;
#if defined(__x86_64__)
  // As if called: a return address of 0, which ends backtraces, 8 below a multiple of 16. Below it what the switch
  // takes: the address that it returns to, and six registers.
  uintptr_t* top = reinterpret_cast<uintptr_t*>(stack + used);
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(&Fiber::start);
  for (int i = 0; i < 6; i++) *--top = 0;
  top_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = used;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::start, 0);
#endif
}

void Fiber::enter([[maybe_unused]] Fiber* self) {
#if LOWBIT_FIBERS_ASAN
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(self->fake_stack_, &stack, &bytes);
  if (!left->stack_) left->stack_ = stack, left->bytes_ = bytes;
#endif
}

void Fiber::start() {
  Fiber* self = arriving;
  enter(self);
  self->body_(self->argument_);
  abort();
}

void Fiber::change(Fiber& from, Fiber& to) {
  left = &from, arriving = &to;
#if LOWBIT_FIBERS_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_, to.bytes_);
#endif
#if defined(__x86_64__)
  lowbit_emulation_switch(&from.top_, to.top_);
#else
  swapcontext(&from.context_, &to.context_);
#endif
  enter(&from);
}

}  // namespace emulation
}  // namespace lowbit
