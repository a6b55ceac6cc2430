// GPTQ's int32 word streams to and from one code a byte (docs/formats.md section 2).
// Code j of a run occupies bits [b*j, b*j + b) of a little-endian bit stream over consecutive words, so 32 codes are
// exactly b words for every width, 3 bits included. qweight runs along the input columns, qzeros along the rows.
#include <atomic>
#include <cinttypes>

#include "api/validate.h"
#include "dispatch/parallel.h"

namespace lowbit {
namespace {

constexpr int kRun = 32;  // codes that fill whole words

void split_run(int bits, const uint32_t* words, uint8_t* codes) {
  uint64_t buffer = 0;
  for (int j = 0, have = 0; j < kRun; j++) {
    if (have < bits) {
      buffer |= uint64_t(*words++) << have;
      have += 32;
    }
    codes[j] = uint8_t(buffer & ((1u << bits) - 1));
    buffer >>= bits;
    have -= bits;
  }
}

void join_run(int bits, const uint8_t* codes, uint32_t* words) {
  uint64_t buffer = 0;
  for (int j = 0, have = 0; j < kRun; j++) {
    buffer |= uint64_t(codes[j]) << have;
    have += bits;
    if (have >= 32) {
      *words++ = uint32_t(buffer);
      buffer >>= 32;
      have -= 32;
    }
  }
}

lowbit_status check_stream(int bits, int64_t rows, int64_t other, const char* name, const void* words,
                           const void* bytes) {
  if (!is_integer_format(bits)) return fail(LOWBIT_INVALID_ARGUMENT, "bits: expected 2, 3, 4 or 8, got %d", bits);
  if (rows < 1 || other < 1 || rows > kMaxElements / other)
    return fail(LOWBIT_INVALID_ARGUMENT, "%s: expected a positive shape below 2^46, got %" PRId64 "x%" PRId64, name,
                rows, other);
  if (!words || !bytes) return fail(LOWBIT_INVALID_ARGUMENT, "%s: expected pointers, got NULL", name);
  return LOWBIT_OK;
}

lowbit_status check_multiple(const char* name, int64_t value) {
  if (value % kRun == 0) return LOWBIT_OK;
  return fail(LOWBIT_INVALID_ARGUMENT, "%s: expected a multiple of 32 in a GPTQ file, got %" PRId64, name, value);
}

// What some writers stored for symmetric 3-bit zeros: 4 - 1 borrowed across the fields. Every field means zero = 4.
bool is_borrowed_symmetric3(const uint32_t* words) {
  return words[0] == 0x00000000u && words[1] == 0xB6DB6DB7u && words[2] == 0x49249249u;
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" {

lowbit_status lowbit_gptq_read_weight(int bits, int64_t rows, int64_t cols, const int32_t* qweight, uint8_t* codes) {
  LOWBIT_TRY(check_stream(bits, rows, cols, "qweight", qweight, codes));
  LOWBIT_TRY(check_multiple("in_features", cols));
  parallel_for(rows, 16, rows * cols < (1 << 16), [&](int64_t begin, int64_t end) {
    uint32_t words[8];
    for (int64_t run = 0; run < cols / kRun; run++)  // 16 rows of one run share the cache lines of its words
      for (int64_t n = begin; n < end; n++) {
        for (int i = 0; i < bits; i++) words[i] = uint32_t(qweight[(run * bits + i) * rows + n]);
        split_run(bits, words, codes + n * cols + run * kRun);
      }
  });
  return LOWBIT_OK;
}

lowbit_status lowbit_gptq_write_weight(int bits, int64_t rows, int64_t cols, const uint8_t* codes, int32_t* qweight) {
  LOWBIT_TRY(check_stream(bits, rows, cols, "qweight", qweight, codes));
  LOWBIT_TRY(check_multiple("in_features", cols));
  parallel_for(rows, 16, rows * cols < (1 << 16), [&](int64_t begin, int64_t end) {
    uint32_t words[8];
    for (int64_t run = 0; run < cols / kRun; run++)
      for (int64_t n = begin; n < end; n++) {
        join_run(bits, codes + n * cols + run * kRun, words);
        for (int i = 0; i < bits; i++) qweight[(run * bits + i) * rows + n] = int32_t(words[i]);
      }
  });
  return LOWBIT_OK;
}

lowbit_status lowbit_gptq_read_zeros(int bits, int version, int64_t rows, int64_t groups, const int32_t* qzeros,
                                     uint8_t* zeros) {
  LOWBIT_TRY(check_stream(bits, rows, groups, "qzeros", qzeros, zeros));
  LOWBIT_TRY(check_multiple("out_features", rows));
  if (version != 1 && version != 2) return fail(LOWBIT_INVALID_ARGUMENT, "version: expected 1 or 2, got %d", version);
  const int largest = (1 << bits) - 1;
  const int64_t row_words = rows / kRun * bits;
  for (int64_t g = 0; g < groups; g++)
    for (int64_t run = 0; run < rows / kRun; run++) {
      uint32_t words[8];
      uint8_t fields[kRun];
      for (int i = 0; i < bits; i++) words[i] = uint32_t(qzeros[g * row_words + run * bits + i]);
      split_run(bits, words, fields);
      const bool borrowed = version == 1 && bits == 3 && is_borrowed_symmetric3(words);
      for (int j = 0; j < kRun; j++) {
        if (version == 1 && bits != 3 && fields[j] == largest)
          return fail(LOWBIT_INVALID_ARGUMENT,
                      "qzeros[%" PRId64 "], row %" PRId64
                      ": a v1 field of %d is ambiguous (writers disagree on a zero point of 0); "
                      "convert the checkpoint to gptq_v2 with the tool that wrote it",
                      g, run * kRun + j, largest);
        const int zero = borrowed ? 4 : version == 1 ? (fields[j] + 1) & largest : fields[j];
        zeros[(run * kRun + j) * groups + g] = uint8_t(zero);
      }
    }
  return LOWBIT_OK;
}

lowbit_status lowbit_gptq_write_zeros(int bits, int version, int64_t rows, int64_t groups, const uint8_t* zeros,
                                      int32_t* qzeros) {
  LOWBIT_TRY(check_stream(bits, rows, groups, "qzeros", qzeros, zeros));
  LOWBIT_TRY(check_multiple("out_features", rows));
  if (version != 1 && version != 2) return fail(LOWBIT_INVALID_ARGUMENT, "version: expected 1 or 2, got %d", version);
  const int largest = (1 << bits) - 1;
  const int64_t row_words = rows / kRun * bits;
  for (int64_t g = 0; g < groups; g++)
    for (int64_t run = 0; run < rows / kRun; run++) {
      uint32_t words[8];
      uint8_t fields[kRun];
      for (int j = 0; j < kRun; j++) {
        const int64_t n = run * kRun + j;
        const int zero = zeros[n * groups + g];
        if (zero > largest)
          return fail(LOWBIT_OUT_OF_RANGE, "zeros[%" PRId64 ", %" PRId64 "]: expected at most %d, got %d", n, g,
                      largest, zero);
        if (version == 1 && zero == 0)
          return fail(LOWBIT_INVALID_ARGUMENT,
                      "zeros[%" PRId64 ", %" PRId64 "]: a zero point of 0 has no agreed form in gptq v1; write gptq_v2",
                      n, g);
        fields[j] = uint8_t(version == 1 ? zero - 1 : zero);
      }
      join_run(bits, fields, words);
      for (int i = 0; i < bits; i++) qzeros[g * row_words + run * bits + i] = int32_t(words[i]);
    }
  return LOWBIT_OK;
}
}
