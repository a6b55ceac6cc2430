// What the processor and the operating system say that they can do. isa.cpp makes levels of it; tests replace it by a
// machine with more instructions than theirs has.
#pragma once

#include <cstdint>

namespace lowbit {

bool cpu_has(const char* feature);
const char* cpu_features();  // those that lowbit knows and the processor has, separated by spaces

int64_t l1_bytes();  // of the first-level data cache; 32 KB where the system does not say

// AMX's tiles are 8 KB of registers, which Linux saves for a process that has asked for it. Asks at the first call, once
// a process; why it was refused, or "".
const char* tiles_refused();

}  // namespace lowbit
