// Where codes land in the tensor cores' operands, exhaustively: every format, encoding, plane, word, slot and code.
#include <cstring>
#include <set>
#include <vector>

#include "check.h"
#include "control.h"
#include "cuda/float_product.cuh"
#include "cuda/integer_product.cuh"

using namespace lowbit;
using namespace lowbit::cuda;

namespace {

// The columns of a unit's slots are its columns, each once; and slot j of word w lies in byte 2(j & 1) + (j >> 1) of it.
template <int Bits>
void test_slots() {
  constexpr int kPlanes = Format<Bits>::kPlanes;
  std::set<int> columns;
  for (int p = 0; p < kPlanes; p++)
    for (int c = 0; c < 4; c++)
      for (int w = 0; w < 4; w++)
        for (int j = 0; j < 4; j++) {
          const int k = slot_column(p, c, w, j), byte = 2 * (j & 1) + (j >> 1);
          CHECK(k == 64 * p + 16 * c + 4 * w + byte, "slot %d %d %d %d: column %d", p, c, w, j, k);
          columns.insert(k);
        }
  CHECK(int(columns.size()) == 64 * kPlanes && *columns.begin() == 0 && *columns.rbegin() == 64 * kPlanes - 1,
        "%zu columns", columns.size());
}

// A row whose codes are given; every pair of every fragment is then what its columns' codes say.
template <int Bits, bool Bf16>
void test_pairs(int cols, int turn) {
  using T = Terms<Bits, Bf16>;
  constexpr int kLines = T::kLines;
  std::vector<uint8_t> codes(static_cast<size_t>(cols)), row(static_cast<size_t>(row_lines(Bits, cols)) * 64);
  for (int k = 0; k < cols; k++) {
    codes[size_t(k)] = uint8_t((k * 7 + k / 64 + turn) % code_count(Bits));
    put_code(Bits, cols, row.data(), k, codes[size_t(k)]);
  }
  for (int64_t unit = 0; unit * 64 * T::kPlanes < cols; unit++) {
    const bool is_short = Bits == 3 && (unit + 1) * kLines > row_lines(Bits, cols);
    for (int c = 0; c < 4; c++)
      for (int w = 0; w < 4; w++) {
        uint32_t line[kLines];
        for (int l = 0; l < kLines; l++)  // as UnitCopier copies them
          memcpy(&line[l], row.data() + (unit * kLines + (is_short && l ? l - 1 : l)) * 64 + 16 * c + 4 * w, 4);
        for (int p = 0; p < T::kPlanes; p++)
          for (int t = 0; t < T::kTerms; t++)
            for (int j = 0; j < 4; j++) {
              const int64_t k = unit * 64 * T::kPlanes + slot_column(p, c, w, j);
              if (k >= cols) continue;
              const uint32_t pair = T::pair(T::plane_word(line, p), p, t, j >> 1);
              const float number = from_16<Bf16>(uint16_t(pair >> 16 * (j & 1)));
              const int part = T::kTerms == 1 ? codes[size_t(k)] : t ? codes[size_t(k)] >> 4 : codes[size_t(k)] & 15;
              const float wanted = T::kBase + T::step(p, t) * float(part);
              CHECK(number == wanted, "int%d bf16 %d column %ld term %d: got %g, wanted %g", Bits, Bf16, long(k), t,
                    double(number), double(wanted));
              CHECK(T::worth(p, t) * T::step(p, t) == (t ? 16 : 1), "worth");
            }
      }
  }
}

template <int Bits>
void test_bytes(int cols, int turn) {
  constexpr int kLines = Format<Bits>::kLines, kPlanes = Format<Bits>::kPlanes;
  std::vector<uint8_t> row(static_cast<size_t>(row_lines(Bits, cols)) * 64);
  for (int k = 0; k < cols; k++) put_code(Bits, cols, row.data(), k, (k * 5 + k / 64 + turn) % code_count(Bits));
  for (int at = 0; at < 64; at += 4) {
    uint32_t line[kLines];
    for (int l = 0; l < kLines; l++) memcpy(&line[l], row.data() + l * 64 + at, 4);
    CodeBytes<Bits> bytes;
    bytes.start(line);
    for (int p = 0; p < kPlanes; p++) {
      const uint32_t four = bytes.plane(p);
      for (int i = 0; i < 4; i++) {
        const int k = 64 * p + at + i, got = int(four >> 8 * i & 255);
        if (k < cols) CHECK(got == get_code(Bits, cols, row.data(), k), "format %d column %d: got %d", Bits, k, got);
      }
    }
  }
}

template <int Bits>
void test_format() {
  test_slots<Bits>();
  for (int turn = 0; turn < code_count(Bits); turn++) {
    for (const int cols : {1024, 1024 - 256, 1024 - 320, 577}) {  // int3: whole units, and short last ones
      test_pairs<Bits, false>(cols, turn);
      test_pairs<Bits, true>(cols, turn);
    }
    test_bytes<Bits>(64 * Format<Bits>::kPlanes, turn);
  }
}

// Every byte that a trit line may hold, and the 13 that it never does: digits 0, 1, 2 whatever the byte.
void test_trit_bytes() {
  for (int byte = 0; byte < 256; byte++) {
    CodeBytes<kTrit> bytes;
    const uint32_t line[1] = {uint32_t(byte) | uint32_t(255 - byte) << 8 | uint32_t(byte) << 16 | 242u << 24};
    bytes.start(line);
    for (int p = 0; p < kTritPlanes; p++) {
      const uint32_t four = bytes.plane(p);
      const int wanted[4] = {trit_digit(byte, p), trit_digit(255 - byte, p), trit_digit(byte, p), trit_digit(242, p)};
      for (int i = 0; i < 4; i++) {
        const int got = int(four >> 8 * i & 255), source = int(line[0] >> 8 * i & 255);
        CHECK(got <= 2, "byte %d digit %d: got %d", source, p, got);
        if (is_trit_byte(source))
          CHECK(got == wanted[i], "byte %d digit %d: got %d, wanted %d", source, p, got, wanted[i]);
      }
    }
  }
}

}  // namespace

int main() {
  test_format<2>();
  test_format<3>();
  test_format<4>();
  test_format<8>();
  test_bytes<kTrit>(320, 0);
  test_bytes<kTrit>(320, 1);
  test_bytes<kTrit>(320, 2);
  test_trit_bytes();
  return check::finish("GPU fragments");
}
