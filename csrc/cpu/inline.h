// The one macro of the kernel files: their loops are small functions that must melt into one.
// Not under a sanitizer: its checks in a loop that was inlined whole take the compiler many minutes, and nobody times
// it.
#ifndef LOWBIT_CPU_INLINE_H
#define LOWBIT_CPU_INLINE_H

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define LOWBIT_INLINE inline
#else
#define LOWBIT_INLINE __attribute__((always_inline)) inline
#endif

#endif
