// The line layout's arithmetic, exhaustively: every code at every position of rows of every length up to three int3
// groups.
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

  CHECK(chunk_size(4, 4096, 128) == 128 && chunk_size(4, 4096, 4096) == 128 && chunk_size(4, 100, 100) == 128,
        "whole groups");
  CHECK(chunk_size(4, 4096, 64) == 64 && chunk_size(4, 4096, 192) == 64 && chunk_size(4, 4096, 96) == 32 &&
            chunk_size(4, 4096, 48) == 16,
        "parts of groups");
  CHECK(chunk_size(kTrit, 4096, 4096) == 40960 && chunk_size(kTrit, 4096, 128) == 128, "ternary rows are one chunk");

  // Trits: all 243 numbers, every digit of each, and the 13 bytes that none of them gives.
  std::set<int> written;
  for (int q = 0; q < 243; q++) {
    const int byte = trit_byte(q);
    CHECK(byte >= 0 && byte < 256 && trit_number(byte) == q && is_trit_byte(byte), "q %d byte %d", q, byte);
    written.insert(byte);
    int rest = byte, number = 0;
    for (int p = 0; p < kTritPlanes; p++) {
      CHECK(trit_digit(byte, p) == 3 * rest >> 8, "q %d digit %d", q, p);  // the decoding of docs/formats.md
      number = 3 * number + (3 * rest >> 8);
      rest = 3 * rest & 255;
    }
    CHECK(number == q, "q %d", q);
  }
  CHECK(written.size() == 243, "%zu bytes", written.size());
  const std::set<int> unused = {1, 20, 40, 60, 79, 99, 119, 138, 158, 178, 197, 217, 237};
  for (int byte = 0; byte < 256; byte++) {
    CHECK(is_trit_byte(byte) == !unused.count(byte) && is_trit_byte(byte) == bool(written.count(byte)), "byte %d",
          byte);
    if (unused.count(byte)) CHECK(trit_number(byte) == trit_number(byte - 1), "byte %d", byte);
  }
  CHECK(trit_byte(121) == 128, "padding is 128");
  for (int64_t cols = 1; cols <= 1000; cols++) {
    std::vector<uint8_t> row(size_t(row_lines(kTrit, cols) * kLineBytes), 0);
    CHECK(int64_t(row.size()) == (cols + 319) / 320 * 64 && padded_cols(kTrit, cols) == (cols + 319) / 320 * 320,
          "cols %ld", long(cols));
    for (int64_t k = 0; k < cols; k++) put_code(kTrit, cols, row.data(), k, int((k * 7 + k / 64) % 3));
    for (int64_t k = 0; k < cols; k++)
      CHECK(get_code(kTrit, cols, row.data(), k) == int((k * 7 + k / 64) % 3), "cols %ld k %ld", long(cols), long(k));
  }
  return check::finish("formats");
}
