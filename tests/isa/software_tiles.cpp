#include "software_tiles.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace lowbit {
namespace software_tiles {
namespace {

constexpr int kTiles = 8, kRows = 16, kBytes = 64;

struct Tile {
  int rows, bytes;
  bool written;
  uint8_t data[kRows][kBytes];
};

struct File {
  bool configured;
  int64_t multiplied;
  Tile tiles[kTiles];
};
thread_local File file;

void print_and_abort(const char* fault) {
  std::fprintf(stderr, "software tiles: %s\n", fault);
  std::abort();
}

bool refuse(const char* fault) {
  report(fault);
  return false;
}

// The tile, if there is one of that number that can be used; a source must have been written.
Tile* usable(int tile, bool source) {
  if (!file.configured) return refuse("a tile without a configuration"), nullptr;
  Tile* t = &file.tiles[tile];
  if (!t->rows) return refuse("a tile that the configuration leaves out"), nullptr;
  if (source && !t->written) return refuse("a tile that was never written"), nullptr;
  return t;
}

bool lines_whole(const Tile& t, const void* at, int64_t stride) {
  for (int i = 0; i < t.rows; i++)
    if ((uintptr_t(at) + uintptr_t(i * stride)) % 64 + uintptr_t(t.bytes) > 64)
      return refuse("a row that crosses a cache line");
  return true;
}

}  // namespace

void (*report)(const char*) = print_and_abort;

void configure(const void* shapes) {
  uint8_t bytes[64];
  std::memcpy(bytes, shapes, sizeof bytes);
  if (file.configured) return void(refuse("a configuration over one that was not released"));
  if (bytes[0] != 1 || bytes[1] != 0) return void(refuse("a palette other than 1 or a start row"));
  for (int i = 2; i < 16; i++)
    if (bytes[i]) return void(refuse("a reserved byte of the configuration"));
  for (int i = 0; i < 16; i++) {
    const int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
    if (i >= kTiles ? row_bytes || rows : rows > kRows || row_bytes > kBytes || !rows != !row_bytes)
      return void(refuse("a tile of more than 16 rows of 64 bytes, or a ninth one"));
    if (i < kTiles) file.tiles[i] = Tile{rows, row_bytes, false, {}};
  }
  file.configured = true;
}

void release() { file.configured = false; }

void zero(int tile) {
  if (Tile* t = usable(tile, false)) {
    std::memset(t->data, 0, sizeof t->data);
    t->written = true;
  }
}

void load(int tile, const void* from, int64_t stride) {
  Tile* t = usable(tile, false);
  if (!t || !lines_whole(*t, from, stride)) return;
  std::memset(t->data, 0, sizeof t->data);
  for (int i = 0; i < t->rows; i++)
    std::memcpy(t->data[i], static_cast<const char*>(from) + i * stride, size_t(t->bytes));
  t->written = true;
}

void store(int tile, void* to, int64_t stride) {
  const Tile* t = usable(tile, true);
  if (!t || !lines_whole(*t, to, stride)) return;
  for (int i = 0; i < t->rows; i++) std::memcpy(static_cast<char*>(to) + i * stride, t->data[i], size_t(t->bytes));
}

void multiply(int c, int a, int b) {
  if (c == a || c == b || a == b) return void(refuse("one tile as two operands"));
  Tile* sums = usable(c, true);
  const Tile *codes = usable(a, true), *digits = usable(b, true);
  if (!sums || !codes || !digits) return;
  if (sums->rows != codes->rows || sums->bytes != digits->bytes || codes->bytes != 4 * digits->rows || sums->bytes % 4)
    return void(refuse("operands whose shapes do not fit"));
  file.multiplied++;
  for (int i = 0; i < sums->rows; i++) {
    uint32_t row[kBytes / 4];
    std::memcpy(row, sums->data[i], sizeof row);
    for (int k = 0; k < digits->rows; k++)
      for (int j = 0; j < sums->bytes / 4; j++)
        for (int p = 0; p < 4; p++)
          row[j] += uint32_t(int(codes->data[i][4 * k + p]) * int(int8_t(digits->data[k][4 * j + p])));
    std::memcpy(sums->data[i], row, size_t(sums->bytes));
  }
}

bool configured() { return file.configured; }

int64_t multiplied() { return file.multiplied; }

}  // namespace software_tiles
}  // namespace lowbit
