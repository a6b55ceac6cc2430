// The line layout's arithmetic, exhaustively: every code at every position of rows of every length up to three int3 groups.
#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include "check.h"
#include "lowbit/formats.h"
#include "lowbit/lowbit.h"

using namespace lowbit;

int main() {
  for (int bits : {2, 3, 4, 8})
    for (int64_t cols = 1; cols <= 1537; cols++) {
      const int64_t bytes = row_lines(bits, cols) * kLineBytes;
      CHECK(padded_cols(bits, cols) >= cols, "int%d cols %ld", bits, long(cols));
      CHECK(lowbit_row_lines(lowbit_format(bits), cols) == row_lines(bits, cols), "int%d cols %ld", bits, long(cols));
      if (cols % 61 && cols % 64 > 1) continue;  // the maps below on the borders and a sample between
      // Every bit of every code has its own bit of the row, inside the row.
      std::set<std::pair<int64_t, int>> taken;
      for (int64_t k = 0; k < padded_cols(bits, cols); k++) {
        const CodePlace at = code_place(bits, cols, k);
        for (int bit = 0; bit < (bits == 3 ? 2 : bits); bit++) {
          CHECK(at.offset >= 0 && at.offset < bytes && at.shift + bit < 8, "int%d cols %ld k %ld", bits, long(cols),
                long(k));
          CHECK(taken.insert({at.offset, at.shift + bit}).second, "int%d cols %ld k %ld", bits, long(cols), long(k));
        }
        if (bits == 3) {
          CHECK(at.high_offset >= 0 && at.high_offset < bytes && at.high_shift < 8, "cols %ld k %ld", long(cols),
                long(k));
          CHECK(taken.insert({at.high_offset, at.high_shift}).second, "cols %ld k %ld", long(cols), long(k));
        }
      }
      // What is put is got, whatever the neighbours hold.
      std::vector<uint8_t> row(size_t(bytes), 0);
      for (int64_t k = 0; k < cols; k++) put_code(bits, cols, row.data(), k, int((k * 7 + k / 64) & ((1 << bits) - 1)));
      for (int64_t k = 0; k < cols; k++)
        CHECK(get_code(bits, cols, row.data(), k) == int((k * 7 + k / 64) & ((1 << bits) - 1)), "int%d cols %ld k %ld",
              bits, long(cols), long(k));
    }

  // The documented bytes, written out: docs/formats.md section 1.
  uint8_t line[192] = {};
  put_code(4, 128, line, 0, 0x5);
  put_code(4, 128, line, 64, 0xA);
  CHECK(line[0] == 0xA5, "got %02x", line[0]);
  memset(line, 0, sizeof line);
  for (int p = 0; p < 4; p++) put_code(2, 256, line, 64 * p + 3, p);
  CHECK(line[3] == 0xE4, "got %02x", line[3]);
  const int high_bits[8] = {2, 3, 6, 7, 0, 1, 4, 5};  // by plane of a full group: 2(1-j) + 4(p>>1) + (p&1)
  for (int plane = 0; plane < 8; plane++) {
    memset(line, 0, sizeof line);
    put_code(3, 512, line, 64 * plane + 9, 4);
    CHECK(line[128 + 9] == 1 << high_bits[plane], "plane %d: got %02x", plane, line[128 + 9]);
  }

  CHECK(chunk_size(4096, 128) == 128 && chunk_size(4096, 4096) == 128 && chunk_size(100, 100) == 128, "whole groups");
  CHECK(chunk_size(4096, 64) == 64 && chunk_size(4096, 192) == 64 && chunk_size(4096, 96) == 32 &&
            chunk_size(4096, 48) == 16,
        "parts of groups");
  return check::finish("formats");
}
