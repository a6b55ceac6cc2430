#include "dispatch/blocking.h"

#include <atomic>
#include <cerrno>
#include <cinttypes>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "api/validate.h"

namespace lowbit {
namespace {

struct Format {
  const char* name;
  int number;
};
constexpr Format kFormats[] = {
    {"int2", LOWBIT_INT2}, {"int3", LOWBIT_INT3}, {"int4", LOWBIT_INT4}, {"int8", LOWBIT_INT8}, {"trit", LOWBIT_TRIT}};
constexpr int kFormatCount = sizeof kFormats / sizeof kFormats[0];

// Below so many tokens the idle lanes of a tile cost more than row kernels do. Measured by bench/blocking.py on Zen 4, 4096
// columns, but for AVX-VNNI and AMX. AMX's 6 is an estimate from the instructions: a tile's products, sums and decoding
// take the time of about 3 tokens of the row kernel out of the caches, and as long as rows come from memory it is bound
// by that up to about 6.
struct TileTokens {
  int of_float[kFormatCount], of_int8[kFormatCount];  // by kFormats
};
constexpr TileTokens kTileTokens[] = {
    {{12, 12, 12, 12, 12}, {12, 12, 12, 12, 12}},  // ref: any
    {{13, 13, 14, 13, 11}, {12, 11, 13, 9, 9}},    // avx2
    {{12, 12, 12, 12, 12}, {12, 12, 12, 12, 12}},  // avxvnni
    {{12, 11, 12, 10, 12}, {11, 9, 9, 8, 12}},     // avx512vnni
    {{6, 6, 6, 6, 6}, {6, 6, 6, 6, 6}},            // amx
};
constexpr int64_t kLeastTileTokens = 6;
static_assert(sizeof kTileTokens / sizeof kTileTokens[0] == int(Isa::amx) + 1, "one line for each Isa");

// One of the two figures, for every format.
struct Setting {
  const char* variable;  // of the environment
  int64_t least;
  std::atomic<int64_t> value[kFormatCount];
};
Setting tiles_from{"LOWBIT_TILES_FROM", 1, {-1, -1, -1, -1, -1}};
Setting own_digits{"LOWBIT_OWN_DIGIT_BYTES", 0, {-1, -1, -1, -1, -1}};
std::once_flag environment_read;
std::string environment_error;  // written while it is read

int index_of(int format) {
  for (int i = 0; i < kFormatCount; i++)
    if (kFormats[i].number == format) return i;
  return -1;
}

// "9", or "int4=9,trit=12": to[i] of the formats that are named, all of them for a number alone.
lowbit_status parse(const Setting& setting, const char* text, int64_t (&to)[kFormatCount]) {
  for (const char* at = text; *at;) {
    int first = 0, last = kFormatCount - 1;
    if (const char* equals = strchr(at, '='); equals && !memchr(at, ',', size_t(equals - at))) {
      const size_t length = size_t(equals - at);
      while (first < kFormatCount &&
             (strlen(kFormats[first].name) != length || memcmp(kFormats[first].name, at, length)))
        first++;
      last = first;
      at = equals + 1;
    }
    char* end = nullptr;
    errno = 0;
    const long long value = *at >= '0' && *at <= '9' ? strtoll(at, &end, 10) : -1;
    if (first == kFormatCount || !end || errno || value < setting.least || (*end && (*end != ',' || !end[1])))
      return fail(LOWBIT_INVALID_ARGUMENT,
                  "%s: expected a number of at least %d, or such numbers as in int4=9,trit=12, got \"%.60s\"",
                  setting.variable, int(setting.least), text);
    for (int i = first; i <= last; i++) to[i] = value;
    at = *end ? end + 1 : end;
  }
  return LOWBIT_OK;
}

lowbit_status read_variable(Setting& setting) {
  int64_t values[kFormatCount];
  for (int64_t& value : values) value = -1;
  if (const char* text = getenv(setting.variable)) LOWBIT_TRY(parse(setting, text, values));
  for (int i = 0; i < kFormatCount; i++) setting.value[i] = values[i];
  return LOWBIT_OK;
}

}  // namespace

lowbit_status chosen_blocking(int format, BlockingChoice* choice) {
  std::call_once(environment_read, [] {
    if (read_variable(tiles_from) != LOWBIT_OK || read_variable(own_digits) != LOWBIT_OK)
      environment_error = lowbit_last_error();
  });
  if (!environment_error.empty()) return fail(LOWBIT_INVALID_ARGUMENT, "%s", environment_error.c_str());
  const int i = index_of(format);
  choice->tiles_from = tiles_from.value[i].load(std::memory_order_relaxed);
  choice->own_digit_bytes = own_digits.value[i].load(std::memory_order_relaxed);
  return LOWBIT_OK;
}

int64_t tile_tokens(int format, lowbit_activations mode, Isa isa, const BlockingChoice& choice) {
  if (choice.tiles_from >= 0) return choice.tiles_from;
  const TileTokens& row = kTileTokens[int(isa)];
  return (mode == LOWBIT_ACT_INT8 ? row.of_int8 : row.of_float)[index_of(format)];
}

int64_t tokens_in_tiles(int format, lowbit_activations mode, int64_t tokens, Isa isa, const BlockingChoice& choice) {
  const int64_t from = tile_tokens(format, mode, isa, choice), tail = tokens % kLanes;
  return tokens < from ? 0 : tail < from ? tokens - tail : tokens;
}

bool may_be_tiles(int64_t tokens, const BlockingChoice& choice) {
  return tokens >= (choice.tiles_from >= 0 ? choice.tiles_from : kLeastTileTokens);
}

// Measured on Zen 4 (32 KB), codes from DRAM at 33 and at 50 GB/s, by bench/blocking.py.
// AVX-512, where rows share: of float mode's two digits the loops of int2, int3 and int4 are .98 to 1.2 times as fast
// (1.1 to 1.4 from 16 KB of digits on, 2 where they are more than the cache); int8's, which are bound by the memory, from
// 16 KB on. In int8 mode int2 and int3 gain .97 to 1.15 times with one token and lose up to 9% with more while digits are
// few. int4 then gains 1.2 times from a cache, and from DRAM .92 to 1.3 times, by how its pages lie: where the hardware's
// prefetchers get along alone it is the former, where they do not, the latter. Trits are level where not said.
// AVX2: with lines asked for in time (prefetch.h) a row for itself is 1.0 to 1.5 times as fast as two that share, but for
// int4, one token and digits that fill the cache. AVX-VNNI: as AVX2, not measured.
int64_t own_digit_bytes(int format, lowbit_activations mode, int64_t tokens, Isa isa, int64_t l1_bytes,
                        const BlockingChoice& choice) {
  if (choice.own_digit_bytes >= 0) return choice.own_digit_bytes;
  const bool one = tokens == 1, two_digits = mode == LOWBIT_ACT_FLOAT;
  if (isa < Isa::avx512vnni) return format == LOWBIT_INT4 && one && two_digits ? l1_bytes * 7 / 8 : kNoSharing;
  int64_t eighths = 0;
  switch (format) {
    case LOWBIT_INT2:
    case LOWBIT_INT3: eighths = one || two_digits ? 0 : 4; break;
    case LOWBIT_INT4: eighths = 0; break;
    case LOWBIT_INT8: eighths = 3; break;
    case LOWBIT_TRIT: eighths = two_digits ? 3 : one ? 5 : 6; break;
  }
  return l1_bytes * eighths / 8;
}

}  // namespace lowbit

extern "C" lowbit_status lowbit_set_matmul_blocking(lowbit_format format, int64_t tokens, int64_t digit_bytes) {
  using namespace lowbit;
  LOWBIT_TRY(check_format(format));
  if (tokens != -1 && tokens < 1)
    return fail(LOWBIT_INVALID_ARGUMENT, "tiles_from: expected -1 or at least 1 token, got %" PRId64, tokens);
  if (digit_bytes < -1)
    return fail(LOWBIT_INVALID_ARGUMENT, "own_digit_bytes: expected -1 or at least 0, got %" PRId64, digit_bytes);
  BlockingChoice before;
  LOWBIT_TRY(chosen_blocking(format, &before));  // the environment's first, which must not overwrite this later
  const int i = index_of(format);
  tiles_from.value[i] = tokens;
  own_digits.value[i] = digit_bytes;
  return LOWBIT_OK;
}
