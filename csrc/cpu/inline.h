// The one macro of the kernel files: their loops are small functions that must melt into one.
#ifndef LOWBIT_CPU_INLINE_H
#define LOWBIT_CPU_INLINE_H

#define LOWBIT_INLINE __attribute__((always_inline)) inline

#endif
