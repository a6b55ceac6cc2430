// The line layout: where every code of a packed matrix lies. Pure arithmetic, constexpr, for host and device.
//
// The atom is the line: 64 bytes holding the next codes of ONE row. A matrix is uint8 codes[N][row_lines][64],
// row-major; N is never padded, K is padded to whole lines with the zero point.
// Every format is a sequence of planes: plane p of a row holds the 64 consecutive codes k = 64p .. 64p+63, one
// code in each of the 64 byte columns, so a kernel peels one plane into one register of 64 codes.
//
//   int8   1 plane a line     byte i                     = code of k = i
//   int4   2 planes a line    byte i                     = code(64+i) << 4 | code(i)
//   int2   4 planes a line    byte i                     = code(192+i) << 6 | code(128+i) << 4 | code(64+i) << 2 | code(i)
//   int3   8 planes, 3 lines  lines 0,1 byte i           = the low two bits of planes 0-3 and 4-7, as int2
//                             line 2   byte i, bit       = the high bit of (line j, plane p) at 2(1-j) + 4(p>>1) + (p&1)
//                             bit:      7    6    5    4    3    2    1    0
//                             (j,p):   0,3  0,2  1,3  1,2  0,1  0,0  1,1  1,0
//   trit   5 planes a line    byte i                     = five base-3 digits, code(64p+i) the p-th, most significant first
// The last int3 group of a row stores only the low lines it needs (1 or 2), then its high line.
//
// A trit byte is a fraction: q = 81*d0 + 27*d1 + 9*d2 + 3*d3 + d4 is stored as ceil(256*q / 243), so that a digit falls
// out of the top of a product by 3: d0 = 3*b >> 8, and 3*b mod 256 is the byte of the digits that remain. 13 of the 256
// bytes are never written.
#ifndef LOWBIT_FORMATS_H
#define LOWBIT_FORMATS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define LOWBIT_HD __host__ __device__
#else
#define LOWBIT_HD
#endif

namespace lowbit {

constexpr int64_t kLineBytes = 64;   // one cache line, one AVX-512 register, two 32-byte GPU sectors
constexpr int64_t kPlaneCodes = 64;  // one code in each byte column of a line

// A format is an int, the value of lowbit_format in lowbit.h: an integer format's is its width ("bits" below), the
// ternary format's is kTrit.
constexpr int kTrit = 1;
constexpr int kTritPlanes = 5;  // digits of a byte

template <int Bits>
struct Format;

template <>
struct Format<8> {
  static constexpr int kBits = 8, kPlanes = 1, kLines = 1;  // planes and lines of one unit
};
template <>
struct Format<4> {
  static constexpr int kBits = 4, kPlanes = 2, kLines = 1;
};
template <>
struct Format<2> {
  static constexpr int kBits = 2, kPlanes = 4, kLines = 1;
};
template <>
struct Format<3> {
  static constexpr int kBits = 3, kPlanes = 8, kLines = 3;
};

template <>
struct Format<kTrit> {
  static constexpr int kBits = kTrit, kPlanes = kTritPlanes, kLines = 1;
};

static_assert(Format<8>::kPlanes * kPlaneCodes * 8 == Format<8>::kLines * kLineBytes * 8, "8 bits a weight");
static_assert(Format<4>::kPlanes * kPlaneCodes * 4 == Format<4>::kLines * kLineBytes * 8, "4 bits a weight");
static_assert(Format<2>::kPlanes * kPlaneCodes * 2 == Format<2>::kLines * kLineBytes * 8, "2 bits a weight");
static_assert(Format<3>::kPlanes * kPlaneCodes * 3 == Format<3>::kLines * kLineBytes * 8, "3 bits a weight");
static_assert(Format<kTrit>::kPlanes * kPlaneCodes * 16 == Format<kTrit>::kLines * kLineBytes * 8 * 10,
              "1.6 bits a weight");

// Codes of a format are 0 .. code_count - 1; without zeros the weight is scale * (code - middle_code).
LOWBIT_HD constexpr int code_count(int bits) { return bits == kTrit ? 3 : 1 << bits; }
LOWBIT_HD constexpr int middle_code(int bits) { return 1 << (bits - 1); }

LOWBIT_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The byte of five digits as one number q in [0, 243), and back. A byte that trit_byte never gives reads as the byte
// below it.
LOWBIT_HD constexpr int trit_byte(int q) { return (256 * q + 242) / 243; }
LOWBIT_HD constexpr int trit_number(int byte) { return byte * 243 >> 8; }
LOWBIT_HD constexpr bool is_trit_byte(int byte) {
  return (byte * 243 & 255) < 243;
}  // the fraction lost by trit_number

// The worth of digit p: 81, 27, 9, 3, 1.
LOWBIT_HD constexpr int trit_power(int p) { return p == 0 ? 81 : p == 1 ? 27 : p == 2 ? 9 : p == 3 ? 3 : 1; }
LOWBIT_HD constexpr int trit_digit(int byte, int p) { return trit_number(byte) / trit_power(p) % 3; }

// Planes that hold at least one code of a row of `cols` codes.
LOWBIT_HD constexpr int64_t row_planes(int64_t cols) { return ceil_div(cols, kPlaneCodes); }

// Lines that a row of `cols` codes takes.
LOWBIT_HD constexpr int64_t row_lines(int bits, int64_t cols) {
  const int64_t planes = row_planes(cols);
  return bits == 8       ? planes
         : bits == 4     ? ceil_div(planes, 2)
         : bits == 2     ? ceil_div(planes, 4)
         : bits == kTrit ? ceil_div(planes, kTritPlanes)
                         : (planes / 8) * 3 + (planes % 8 == 0 ? 0 : ceil_div(planes % 8, 4) + 1);
}

// Codes that those lines can hold: `cols` and its padding.
LOWBIT_HD constexpr int64_t padded_cols(int bits, int64_t cols) {
  const int64_t planes = row_planes(cols);
  return kPlaneCodes * (bits == 8       ? planes
                        : bits == 4     ? 2 * ceil_div(planes, 2)
                        : bits == kTrit ? kTritPlanes * ceil_div(planes, kTritPlanes)
                                        : 4 * ceil_div(planes, 4));  // int2 and the low lines of int3
}

// Where one code of a row lies: `bits` of it at byte `offset` from bit `shift`; int3 keeps its high bit apart.
struct CodePlace {
  int64_t offset;       // of the byte that holds the code, or its low two bits (int3)
  int shift;            // of its lowest bit in that byte (trit: which digit of the byte)
  int64_t high_offset;  // int3: of the byte that holds the high bit, else -1
  int high_shift;       // int3: of that bit
};

LOWBIT_HD constexpr CodePlace code_place(int bits, int64_t cols, int64_t k) {
  const int64_t plane = k / kPlaneCodes, column = k % kPlaneCodes;
  if (bits == 8) return {plane * kLineBytes + column, 0, -1, 0};
  if (bits == 4) return {plane / 2 * kLineBytes + column, 4 * int(plane % 2), -1, 0};
  if (bits == 2) return {plane / 4 * kLineBytes + column, 2 * int(plane % 4), -1, 0};
  if (bits == kTrit) return {plane / kTritPlanes * kLineBytes + column, int(plane % kTritPlanes), -1, 0};
  const int64_t group = plane / 8, planes_left = row_planes(cols) - 8 * group;
  const int64_t low_lines = planes_left >= 5 ? 2 : 1;  // only the last group of a row can have one
  const int j = int(plane % 8) / 4, p = int(plane % 4);
  return {(group * 3 + j) * kLineBytes + column, 2 * p, (group * 3 + low_lines) * kLineBytes + column,
          2 * (1 - j) + 4 * (p >> 1) + (p & 1)};
}

LOWBIT_HD constexpr int get_code(int bits, int64_t cols, const uint8_t* row, int64_t k) {
  const CodePlace at = code_place(bits, cols, k);
  if (bits == 3) return ((row[at.offset] >> at.shift) & 3) | (((row[at.high_offset] >> at.high_shift) & 1) << 2);
  if (bits == kTrit) return trit_digit(row[at.offset], at.shift);
  return (row[at.offset] >> at.shift) & ((1 << bits) - 1);
}

// Puts a code into a row that still holds zero there.
LOWBIT_HD constexpr void put_code(int bits, int64_t cols, uint8_t* row, int64_t k, int code) {
  const CodePlace at = code_place(bits, cols, k);
  if (bits == 3) {
    row[at.offset] = uint8_t(row[at.offset] | (code & 3) << at.shift);
    row[at.high_offset] = uint8_t(row[at.high_offset] | (code >> 2 & 1) << at.high_shift);
  } else if (bits == kTrit) {
    row[at.offset] = uint8_t(trit_byte(trit_number(row[at.offset]) + code * trit_power(at.shift)));
  } else {
    row[at.offset] = uint8_t(row[at.offset] | code << at.shift);
  }
}

static_assert(row_lines(4, 4096) == 32 && row_lines(3, 4096) == 24 && row_lines(3, 64) == 2 && row_lines(3, 320) == 3,
              "a narrow int3 row stores only the low lines it needs");

// Activations are integers per token and chunk: a group, or the largest part of one that is a power of two of at most
// 128 columns. A ternary row with one scale is a chunk as a whole, up to 40960 columns (128 lines). One chunk times one
// row is ONE integer, so every ISA, thread count and batch size agrees.
constexpr int64_t kTritChunk = 128 * kTritPlanes * kPlaneCodes;

LOWBIT_HD constexpr int64_t chunk_size(int bits, int64_t cols, int64_t group_size) {
  if (bits == kTrit && group_size == cols) return kTritChunk;
  return group_size == cols || group_size % 128 == 0 ? 128 : group_size % 64 == 0 ? 64 : group_size % 32 == 0 ? 32 : 16;
}

}  // namespace lowbit
#endif
