// The machine that machine.cpp describes.
#pragma once

#include <cstdint>

namespace lowbit {

extern bool tiles_are_refused;  // set before the library is asked anything
extern int64_t l1_size;         // of the first-level cache

}  // namespace lowbit
