// What this machine can run, and what the user allows. A level is a set of instructions that kernels are written for.
// Levels are ordered, best last; a machine need not offer all that lie below its best (avxvnni is missing from many that
// have avx512vnni). A kernel runs where its level is offered and at most the allowed one.
#pragma once

#include "lowbit/lowbit.h"

namespace lowbit {

enum class Isa : int { ref = 0, avx2 = 1, avxvnni = 2, avx512vnni = 3, amx = 4 };

bool offered(Isa isa);                // by this CPU and operating system; asks the latter for AMX's tiles
Isa machine_isa();                    // the best level that is
lowbit_status allowed_isa(Isa* isa);  // that, or the forced level; fails while LOWBIT_ISA is invalid
const char* isa_name(Isa isa);

}  // namespace lowbit
