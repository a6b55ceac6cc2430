// pack.cu on the emulator against lowbit_pack_codes and lowbit_unpack_codes, bit for bit, and the check of values.
#include "verbs_test.h"

using namespace lowbit;

namespace {

std::mt19937 generator(2);

void test_round_trip(const Case& c, size_t offset) {
  const TestMatrix m(c, generator);
  const lowbit_matrix w = normalised(m);
  Guarded codes(m.codes.size(), offset), lines(m.lines.size());
  memcpy(codes.get(), m.codes.data(), m.codes.size());
  int64_t first_bad = INT64_MAX;
  run(name_of(c), cuda::pack_codes, &w, codes.get(), lines.get(), &first_bad);
  CHECK(memcmp(lines.get(), m.lines.data(), m.lines.size()) == 0, "%s: lines differ", name_of(c).c_str());
  CHECK(lines.intact(), "%s: written outside the lines", name_of(c).c_str());
  CHECK(first_bad == INT64_MAX, "%s: first_bad %lld", name_of(c).c_str(), static_cast<long long>(first_bad));

  const int64_t begin = c.rows / 3, end = c.rows - (c.rows > 2);
  Guarded out(size_t((end - begin) * c.cols), offset);
  run(name_of(c), cuda::unpack_codes, &w, begin, end, out.get());
  CHECK(memcmp(out.get(), m.codes.data() + begin * c.cols, size_t((end - begin) * c.cols)) == 0, "%s: codes differ",
        name_of(c).c_str());
  CHECK(out.intact(), "%s: written outside the codes", name_of(c).c_str());
}

// Codes that the format lacks: the smallest place is reported, and the lines are those of the codes made good.
void test_bad_codes(int bits, int64_t cols) {
  const Case c = some_case(bits, 4, cols, false, generator);
  const TestMatrix m(c, generator);
  const lowbit_matrix w = normalised(m);
  std::vector<uint8_t> codes = m.codes, good = m.codes;
  int64_t smallest = INT64_MAX;
  for (int i = 0; i < 6; i++) {
    const size_t at = generator() % codes.size();
    codes[at] = uint8_t(code_count(bits) + int(generator() % unsigned(256 - code_count(bits))));
    good[at] = bits == kTrit ? 2 : uint8_t(codes[at] & (code_count(bits) - 1));
    smallest = std::min(smallest, int64_t(at));
  }
  std::vector<uint8_t> wanted(m.lines.size()), lines(m.lines.size());
  CHECK(lowbit_pack_codes(&m.view, good.data(), wanted.data()) == LOWBIT_OK, "%s", lowbit_last_error());
  int64_t first_bad = INT64_MAX;
  run(name_of(c), cuda::pack_codes, &w, codes.data(), lines.data(), &first_bad);
  CHECK(lines == wanted, "%s: lines of bad codes differ", name_of(c).c_str());
  CHECK(first_bad == smallest, "%s: first_bad %lld, not %lld", name_of(c).c_str(), static_cast<long long>(first_bad),
        static_cast<long long>(smallest));
  run(name_of(c), cuda::pack_codes, &w, codes.data(), lines.data(), static_cast<int64_t*>(nullptr));
}

struct Places {
  int64_t scale = INT64_MAX, zero = INT64_MAX, perm = INT64_MAX, byte = INT64_MAX;
};

void expect_check(const std::string& what, const TestMatrix& m, const Places& wanted) {
  const lowbit_matrix w = normalised(m);
  int64_t bad[4] = {INT64_MAX, INT64_MAX, INT64_MAX, INT64_MAX};
  std::vector<uint32_t> first(size_t(w.cols), 7);
  run(what, cuda::check, &w, bad, w.perm ? first.data() : nullptr);
  const int64_t places[4] = {wanted.scale, wanted.zero, wanted.perm, wanted.byte};
  for (int i = 0; i < 4; i++)
    CHECK(bad[i] == places[i], "%s: bad[%d] is %lld, not %lld", what.c_str(), i, static_cast<long long>(bad[i]),
          static_cast<long long>(places[i]));
}

// Two bad values of each kind: the earlier one is found.
void test_check(int bits, lowbit_dtype scale_dtype) {
  Case c = {bits, 9, 513, 48, bits != kTrit, true, 0, scale_dtype, false};
  const TestMatrix sound(c, generator);
  expect_check(name_of(c), sound, {});
  const int64_t scales = c.rows * 11;
  for (const float value : {INFINITY, -INFINITY, NAN, 0.0f, -0.0f}) {
    TestMatrix m = sound;
    m.view.scales = m.scales.data();
    const int64_t at = int64_t(generator() % unsigned(scales - 1));
    store_float(m.scales.data(), scale_dtype, at, value);
    store_float(m.scales.data(), scale_dtype, scales - 1, value);
    Places places;
    if (value != 0 || bits == kTrit) places.scale = at;
    expect_check(name_of(c) + " scale " + std::to_string(value), m, places);
  }
  if (c.zeros && bits != 8) {
    TestMatrix m = sound;
    m.view.zeros = m.zeros.data();
    m.zeros[17] = uint8_t(code_count(bits)), m.zeros[90] = 255;
    Places places;
    places.zero = 17;
    expect_check(name_of(c) + " zero", m, places);
  }
  for (const int32_t value : {-1, 513, INT32_MAX, INT32_MIN, sound.perm[3]}) {
    TestMatrix m = sound;
    m.view.perm = m.perm.data();
    m.perm[400] = value, m.perm[512] = value;
    Places places;
    places.perm = 400;
    expect_check(name_of(c) + " perm " + std::to_string(value), m, places);
  }
  if (bits == kTrit)
    for (const int byte : {1, 20, 40, 60, 79, 99, 119, 138, 158, 178, 197, 217, 237}) {
      TestMatrix m = sound;
      m.view.codes = m.lines.data();
      const size_t at = generator() % (m.lines.size() - 1);
      m.lines[at] = m.lines.back() = uint8_t(byte);
      Places places;
      places.byte = int64_t(at);
      expect_check(name_of(c) + " byte " + std::to_string(byte), m, places);
    }
}

}  // namespace

int main() {
  for (const int bits : kFormats) {
    for (const int64_t cols : kColumns)
      for (const int64_t rows : {1, 7}) {
        test_round_trip(some_case(bits, rows, cols, false, generator), 0);
        test_round_trip(some_case(bits, rows, cols, false, generator), 1 + generator() % 15);
      }
    for (const int64_t cols : {16, 192, 256, 512, 768, 1024, 1280, 2560})  // rows of 16-byte loads
      test_round_trip(some_case(bits, 3, cols, false, generator), 0);
    test_round_trip(some_case(bits, 1, 10944, false, generator), 0);
    if (bits != 8)
      for (const int64_t cols : {5, 320, 1000}) test_bad_codes(bits, cols);
    for (const lowbit_dtype dtype : {LOWBIT_F32, LOWBIT_F16, LOWBIT_BF16}) test_check(bits, dtype);
  }
  return check::finish("pack");
}
