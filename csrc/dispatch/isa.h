// What this CPU can run, and what the user allows. Levels are ordered: a kernel of a level runs wherever that level or
// a higher one is available and allowed.
#pragma once

#include "lowbit/lowbit.h"

namespace lowbit {

enum class Isa : int { ref = 0, avx2 = 1, avx512vnni = 2 };

Isa machine_isa();                    // the best level that this CPU and operating system offer
lowbit_status allowed_isa(Isa* isa);  // that, or the forced level; fails while LOWBIT_ISA is invalid
const char* isa_name(Isa isa);

}  // namespace lowbit
