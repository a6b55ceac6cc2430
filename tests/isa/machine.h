// The machine that machine.cpp describes.
#pragma once

namespace lowbit {

extern bool tiles_are_refused;  // set before the library is asked anything

}
