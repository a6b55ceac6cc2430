// The functions of amx_tiles.h in software, one tile file a thread. What a CPU would refuse with a fault or the kernels
// must not do is reported, and the instruction not executed: shapes that do not fit, a tile that was never written, rows
// that cross a cache line, a configuration over one that was not released.
#ifndef LOWBIT_TESTS_SOFTWARE_TILES_H
#define LOWBIT_TESTS_SOFTWARE_TILES_H

#include <cstdint>

namespace lowbit {
namespace software_tiles {

void configure(const void* shapes);
void release();
void zero(int tile);
void load(int tile, const void* from, int64_t stride);
void store(int tile, void* to, int64_t stride);
void multiply(int c, int a, int b);

bool configured();                         // on this thread
int64_t multiplied();                      // products of this thread so far
extern void (*report)(const char* fault);  // prints and aborts, unless a test wants to know

}  // namespace software_tiles

namespace {

template <class Shapes>
void configure_tiles(const Shapes& shapes) {
  software_tiles::configure(&shapes);
}
inline void release_tiles() { software_tiles::release(); }
template <int kTile>
void zero_tile() {
  software_tiles::zero(kTile);
}
template <int kTile>
void load_tile(const void* from, int64_t stride) {
  software_tiles::load(kTile, from, stride);
}
template <int kTile>
void store_tile(void* to, int64_t stride) {
  software_tiles::store(kTile, to, stride);
}
template <int kC, int kA, int kB>
void multiply_tiles() {
  software_tiles::multiply(kC, kA, kB);
}

}  // namespace
}  // namespace lowbit
#endif
