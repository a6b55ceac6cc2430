// What the C API refuses, and how it says so: status, the thing, expected and actual. Nothing here may crash (run under
// the sanitizers too). Also threads: one and many give the same bits.
#include <cmath>
#include <cstring>
#include <string>

#include "matrices.h"

namespace {

std::mt19937 random_bits(7);

void refused(lowbit_status status, lowbit_status expected, const char* word, int line) {
  CHECK(status == expected, "line %d: got %s: %s", line, lowbit_status_name(status), lowbit_last_error());
  CHECK(std::strstr(lowbit_last_error(), word), "line %d: message \"%s\" does not name \"%s\"", line,
        lowbit_last_error(), word);
}
#define REFUSED(call, status, word) refused(call, status, word, __LINE__)

}  // namespace

int main() {
  const Case c{4, 6, 64, 32, true, true, 0, LOWBIT_F32, false};
  TestMatrix w(c, random_bits);
  std::vector<float> x(64 * 4, 1.0f), y(6 * 4);
  auto check = [&](auto change, int values) {
    lowbit_matrix m = w.view;
    change(m);
    return lowbit_matrix_check(&m, values);
  };
  const lowbit_status bad = LOWBIT_INVALID_ARGUMENT;
  REFUSED(lowbit_matrix_check(nullptr, 0), bad, "matrix");
  REFUSED(check([](auto& m) { m.format = lowbit_format(5); }, 0), bad, "format");
  REFUSED(check([](auto& m) { m.rows = 0; }, 0), bad, "shape");
  REFUSED(check([](auto& m) { m.cols = -3; }, 0), bad, "shape");
  REFUSED(check([](auto& m) { m.rows = int64_t(1) << 60; }, 0), bad, "shape");
  REFUSED(check([](auto& m) { m.cols = int64_t(1) << 40; }, 0), bad, "cols");
  REFUSED(check([](auto& m) { m.group_size = 40; }, 0), bad, "group_size");
  REFUSED(check([](auto& m) { m.group_size = 0; }, 0), bad, "group_size");
  REFUSED(check([](auto& m) { m.group_size = 128; }, 0), bad, "group_size");
  REFUSED(check([](auto& m) { m.codes = nullptr; }, 0), bad, "codes");
  REFUSED(check([](auto& m) { m.scales = nullptr; }, 0), bad, "scales");
  REFUSED(check([](auto& m) { m.scale_dtype = LOWBIT_I32; }, 0), bad, "scale_dtype");
  REFUSED(check([](auto& m) { m.scale_cols = 1; }, 0), bad, "scales");
  REFUSED(check([](auto& m) { m.scale_rows = 1, m.scale_cols = 1; }, 0), bad, "scales");  // two groups a row
  for (const float scale : {INFINITY, -INFINITY, NAN}) {
    TestMatrix broken(c, random_bits);
    std::memcpy(broken.scales.data() + 20, &scale, 4);
    REFUSED(lowbit_matrix_check(&broken.view, 1), bad, "scales[2, 1]");
  }
  TestMatrix broken(c, random_bits);
  broken.zeros[3] = 16;
  REFUSED(lowbit_matrix_check(&broken.view, 1), bad, "zeros[1, 1]");
  broken.zeros[3] = 0;
  broken.perm[5] = broken.perm[6];
  REFUSED(lowbit_matrix_check(&broken.view, 1), bad, "perm");
  for (const int32_t entry :
       {-1, 64, INT32_MAX, INT32_MIN}) {  // out of range is caught by every verb, not only by check
    broken.perm[5] = entry;
    REFUSED(lowbit_matmul(&broken.view, x.data(), LOWBIT_F32, 1, 64, nullptr, LOWBIT_F32, y.data(), 6, LOWBIT_ACT_FLOAT,
                          nullptr, 0),
            bad, "perm[5]");
    REFUSED(lowbit_unpack(&broken.view, 0, 1, x.data(), LOWBIT_F32, 64), bad, "perm[5]");
  }

  auto matmul = [&](lowbit_dtype dtype, int64_t tokens, int64_t x_stride, int64_t y_stride, int mode, void* workspace,
                    size_t bytes) {
    return lowbit_matmul(&w.view, x.data(), dtype, tokens, x_stride, nullptr, LOWBIT_F32, y.data(), y_stride,
                         lowbit_activations(mode), workspace, bytes);
  };
  REFUSED(matmul(LOWBIT_I64, 1, 64, 6, 0, nullptr, 0), bad, "dtype");
  REFUSED(matmul(LOWBIT_F32, -1, 64, 6, 0, nullptr, 0), bad, "tokens");
  REFUSED(matmul(LOWBIT_F32, 2, 63, 6, 0, nullptr, 0), bad, "strides");
  REFUSED(matmul(LOWBIT_F32, 2, 64, 5, 0, nullptr, 0), bad, "strides");
  REFUSED(matmul(LOWBIT_F32, 1, 64, 6, 2, nullptr, 0), bad, "activations");
  alignas(64) char small[64];
  REFUSED(matmul(LOWBIT_F32, 1, 64, 6, 0, small, sizeof small), bad, "workspace");
  CHECK(matmul(LOWBIT_F32, 0, 64, 6, 0, nullptr, 0) == LOWBIT_OK, "no tokens is no work");
  const size_t bytes = lowbit_matmul_workspace(&w.view, 4, LOWBIT_ACT_FLOAT);
  void* workspace = lowbit_alloc(bytes);
  CHECK(bytes > 0 && workspace, "workspace of %zu bytes", bytes);
  CHECK(matmul(LOWBIT_F32, 4, 64, 6, 0, workspace, bytes) == LOWBIT_OK, "%s", lowbit_last_error());
  lowbit_free(workspace, bytes);

  // NaN and infinity in an activation reach that token's outputs and no other token's.
  for (const float value : {NAN, INFINITY}) {
    std::vector<float> poisoned(x);
    poisoned[64 + 7] = value;
    CHECK(lowbit_matmul(&w.view, poisoned.data(), LOWBIT_F32, 4, 64, nullptr, LOWBIT_F32, y.data(), 6, LOWBIT_ACT_FLOAT,
                        nullptr, 0) == LOWBIT_OK,
          "%s", lowbit_last_error());
    for (int m = 0; m < 4; m++)
      for (int n = 0; n < 6; n++) CHECK(std::isnan(y[size_t(m * 6 + n)]) == (m == 1), "token %d output %d", m, n);
  }

  std::vector<float> rows(64 * 3);
  auto gather = [&](std::vector<int32_t> ids, lowbit_id_policy policy) {
    return lowbit_gather(&w.view, ids.data(), LOWBIT_I32, int64_t(ids.size()), policy, rows.data(), LOWBIT_F32, 64);
  };
  REFUSED(gather({0, 6}, LOWBIT_IDS_ERROR), LOWBIT_OUT_OF_RANGE, "ids[1]");
  REFUSED(gather({-1}, LOWBIT_IDS_ERROR), LOWBIT_OUT_OF_RANGE, "ids[0]");
  REFUSED(gather({0}, lowbit_id_policy(9)), bad, "policy");
  CHECK(gather({-5, 99, 2}, LOWBIT_IDS_CLAMP) == LOWBIT_OK, "%s", lowbit_last_error());
  for (int k = 0; k < 64; k++) {
    CHECK(rows[size_t(k)] == float(w.dense[size_t(k)]), "below clamps to the first row");
    CHECK(rows[size_t(64 + k)] == float(w.dense[size_t(5 * 64 + k)]), "above clamps to the last row");
  }

  std::vector<int64_t> ids = {3, 0, 7, -2, 1}, offsets = {0, 2, 2, 5};
  const std::vector<float> weights(5, 2.0f);
  int64_t first_bad = -1;
  struct {
    const lowbit_matrix* w;
    lowbit_dtype id_dtype, out_dtype;
    int64_t count, bags, padding, stride;
    const float* weights;
    int mean, policy;
    bool has_ids, has_offsets, has_out;
  } const good = {&w.view, LOWBIT_I64, LOWBIT_F32, 5, 3, -1, 64, nullptr, 0, LOWBIT_IDS_ZERO, true, true, true};
  auto bags = [&](auto change) {
    auto a = good;
    change(a);
    return lowbit_gather_bags(a.w, a.has_ids ? ids.data() : nullptr, a.id_dtype, a.count,
                              a.has_offsets ? offsets.data() : nullptr, a.bags, a.weights, a.mean,
                              lowbit_id_policy(a.policy), a.padding, &first_bad, a.has_out ? rows.data() : nullptr,
                              a.out_dtype, a.stride);
  };
  const auto nothing = [](auto&) {};
  CHECK(bags(nothing) == LOWBIT_OK && first_bad == -1, "%s", lowbit_last_error());
  for (int k = 0; k < 64; k++) {
    CHECK(rows[size_t(k)] == float(w.dense[size_t(3 * 64 + k)]) + float(w.dense[size_t(k)]), "column %d of bag 0", k);
    CHECK(rows[size_t(64 + k)] == 0, "an empty bag is zeros");
    CHECK(rows[size_t(128 + k)] == float(w.dense[size_t(64 + k)]), "ids outside are zeros");
  }
  REFUSED(bags([](auto& a) { a.w = nullptr; }), bad, "matrix");
  REFUSED(bags([](auto& a) { a.id_dtype = LOWBIT_F32; }), bad, "ids");
  REFUSED(bags([](auto& a) { a.has_ids = false; }), bad, "ids");
  REFUSED(bags([](auto& a) { a.count = -1; }), bad, "count");
  REFUSED(bags([](auto& a) { a.bags = -1; }), bad, "bags");
  REFUSED(bags([](auto& a) { a.bags = INT64_MAX; }), bad, "bags");
  REFUSED(bags([](auto& a) { a.has_offsets = false; }), bad, "offsets");
  REFUSED(bags([](auto& a) { a.policy = 7; }), bad, "policy");
  REFUSED(bags([](auto& a) { a.out_dtype = LOWBIT_I32; }), bad, "out");
  REFUSED(bags([](auto& a) { a.stride = 63; }), bad, "stride");
  REFUSED(bags([](auto& a) { a.has_out = false; }), bad, "out");
  REFUSED(bags([&](auto& a) { a.weights = weights.data(), a.mean = 1; }), bad, "weights");
  const auto refuses_ids = [](auto& a) { a.policy = LOWBIT_IDS_ERROR; };
  REFUSED(bags(refuses_ids), LOWBIT_OUT_OF_RANGE, "ids[2]: expected a row in [0, 6), got 7");
  CHECK(first_bad == 2, "the first bad id is at 2, got %ld", long(first_bad));
  offsets = {0, 1, 2, 2};  // what is in no bag is not looked at
  CHECK(bags(refuses_ids) == LOWBIT_OK, "%s", lowbit_last_error());
  offsets = {INT64_MIN, 3, 4, INT64_MAX};
  REFUSED(bags([](auto& a) { a.policy = LOWBIT_IDS_ERROR, a.padding = 7; }), LOWBIT_OUT_OF_RANGE, "ids[3]");
  CHECK(bags(nothing) == LOWBIT_OK, "%s", lowbit_last_error());
  offsets = {0, 4, 3, 5};
  REFUSED(bags(nothing), bad, "offsets[2]: expected at least 4");
  CHECK(bags([](auto& a) { a.bags = 0, a.has_offsets = a.has_out = false; }) == LOWBIT_OK, "no bags are no work");

  REFUSED(lowbit_unpack(&w.view, 0, 7, x.data(), LOWBIT_F32, 64), LOWBIT_OUT_OF_RANGE, "rows");
  REFUSED(lowbit_unpack(&w.view, 0, 2, x.data(), LOWBIT_F32, 63), bad, "stride");
  REFUSED(lowbit_unpack_codes(&w.view, 3, 2, w.codes.data()), LOWBIT_OUT_OF_RANGE, "rows");

  std::vector<uint8_t> codes(6 * 64, 3), lines(6 * 64);
  codes[2 * 64 + 5] = 16;
  REFUSED(lowbit_pack_codes(&w.view, codes.data(), lines.data()), LOWBIT_OUT_OF_RANGE, "codes[2, 5]");
  std::vector<float> weight(6 * 64, 0.5f), scales(6 * 2);
  weight[64 + 3] = NAN;
  REFUSED(lowbit_pack_float(LOWBIT_INT4, 6, 64, 32, weight.data(), LOWBIT_F32, 64, LOWBIT_F32, 0, lines.data(),
                            scales.data(), nullptr),
          bad, "weight[1, 3]");

  // GPTQ words.
  std::vector<int32_t> words(32 * 4, 0);
  std::vector<uint8_t> zeros(32);
  REFUSED(lowbit_gptq_read_weight(5, 32, 32, words.data(), codes.data()), bad, "bits");
  REFUSED(lowbit_gptq_read_weight(4, 32, 33, words.data(), codes.data()), bad, "in_features");
  REFUSED(lowbit_gptq_read_zeros(4, 1, 33, 1, words.data(), zeros.data()), bad, "out_features");
  REFUSED(lowbit_gptq_read_zeros(4, 3, 32, 1, words.data(), zeros.data()), bad, "version");
  words[0] = -1;
  REFUSED(lowbit_gptq_read_zeros(4, 1, 32, 1, words.data(), zeros.data()), bad, "ambiguous");
  CHECK(lowbit_gptq_read_zeros(4, 2, 32, 1, words.data(), zeros.data()) == LOWBIT_OK && zeros[0] == 15,
        "v2 stores zeros as they are");
  std::fill(zeros.begin(), zeros.end(), uint8_t(0));
  REFUSED(lowbit_gptq_write_zeros(4, 1, 32, 1, zeros.data(), words.data()), bad, "zeros[0, 0]");
  // Symmetric words, docs/formats.md section 2, and the 3-bit words of writers that borrowed across fields.
  const uint32_t symmetric[4][2] = {
      {0x55555555, 0xAAAAAAAA}, {0xDB6DB6DB, 0x24924924}, {0x77777777, 0x88888888}, {0x7F7F7F7F, 0x80808080}};
  const int widths[4] = {2, 3, 4, 8};
  for (int i = 0; i < 4; i++)
    for (int version = 1; version <= 2; version++) {
      std::vector<uint8_t> middle(32, uint8_t(1 << (widths[i] - 1))), back(32);
      CHECK(lowbit_gptq_write_zeros(widths[i], version, 32, 1, middle.data(), words.data()) == LOWBIT_OK, "%s",
            lowbit_last_error());
      CHECK(uint32_t(words[0]) == symmetric[i][version - 1], "int%d v%d: %08x", widths[i], version, unsigned(words[0]));
      CHECK(lowbit_gptq_read_zeros(widths[i], version, 32, 1, words.data(), back.data()) == LOWBIT_OK && back == middle,
            "round trip");
    }
  const uint32_t borrowed[3] = {0x00000000u, 0xB6DB6DB7u, 0x49249249u};
  std::memcpy(words.data(), borrowed, sizeof borrowed);
  CHECK(lowbit_gptq_read_zeros(3, 1, 32, 1, words.data(), zeros.data()) == LOWBIT_OK, "%s", lowbit_last_error());
  for (const uint8_t zero : zeros) CHECK(zero == 4, "got %d", zero);
  for (const int bits : widths) {  // codes through the words and back
    std::vector<uint8_t> all(size_t(32 * 96)), back(all.size());
    for (auto& code : all) code = uint8_t(random_bits() % (1u << bits));
    std::vector<int32_t> stream(size_t(96 * bits / 32 * 32));
    CHECK(lowbit_gptq_write_weight(bits, 32, 96, all.data(), stream.data()) == LOWBIT_OK, "%s", lowbit_last_error());
    CHECK(lowbit_gptq_read_weight(bits, 32, 96, stream.data(), back.data()) == LOWBIT_OK && back == all,
          "int%d round trip", bits);
  }

  REFUSED(lowbit_set_isa("sse9"), bad, "isa");
  CHECK(!lowbit_isa_missing("sse9") && !lowbit_isa_missing(nullptr), "levels that there are not");
  CHECK(!strcmp(lowbit_isa_missing("ref"), ""), "%s", lowbit_isa_missing("ref"));
  int64_t batch = 0, tiles_from = 0;
  REFUSED(lowbit_matmul_batching(LOWBIT_INT4, LOWBIT_ACT_FLOAT, nullptr, &tiles_from), bad, "batch");
  REFUSED(lowbit_matmul_batching(lowbit_format(5), LOWBIT_ACT_FLOAT, &batch, &tiles_from), bad, "format");
  REFUSED(lowbit_matmul_batching(LOWBIT_INT4, lowbit_activations(7), &batch, &tiles_from), bad, "activations");
  int64_t columns = 0;
  REFUSED(lowbit_matmul_sharing(lowbit_format(5), 1, LOWBIT_ACT_FLOAT, &columns), bad, "format");
  REFUSED(lowbit_matmul_sharing(LOWBIT_INT4, 0, LOWBIT_ACT_FLOAT, &columns), bad, "tokens");
  REFUSED(lowbit_matmul_sharing(LOWBIT_INT4, 1, lowbit_activations(7), &columns), bad, "activations");
  REFUSED(lowbit_matmul_sharing(LOWBIT_INT4, 1, LOWBIT_ACT_FLOAT, nullptr), bad, "columns");
  CHECK(lowbit_matmul_batching(LOWBIT_INT4, LOWBIT_ACT_INT8, &batch, &tiles_from) == LOWBIT_OK && 1 < tiles_from &&
            tiles_from < batch,
        "batches of %ld, tiles from %ld", long(batch), long(tiles_from));
  REFUSED(lowbit_set_matmul_blocking(lowbit_format(5), 4, 4), bad, "format");
  REFUSED(lowbit_set_matmul_blocking(LOWBIT_INT4, 0, 4), bad, "tiles_from");
  REFUSED(lowbit_set_matmul_blocking(LOWBIT_INT4, 4, -2), bad, "own_digit_bytes");
  REFUSED(lowbit_set_threads(-1), bad, "threads");

  // One thread and several: the same bits, for a matrix large enough to be split.
  const TestMatrix large({4, 301, 1024, 128, true, false, 0, LOWBIT_F16, false}, random_bits);
  std::vector<float> input(1024 * 20), one(301 * 20), many(301 * 20);
  std::normal_distribution<float> normal;
  for (auto& v : input) v = normal(random_bits);
  auto product = [&](int threads, std::vector<float>& out) {
    CHECK(lowbit_set_threads(threads) == LOWBIT_OK, "%s", lowbit_last_error());
    CHECK(lowbit_matmul(&large.view, input.data(), LOWBIT_F32, 20, 1024, nullptr, LOWBIT_F32, out.data(), 301,
                        LOWBIT_ACT_FLOAT, nullptr, 0) == LOWBIT_OK,
          "%s", lowbit_last_error());
  };
  product(1, one);
  for (const int threads : {2, 3, 7}) {
    product(threads, many);
    CHECK(!std::memcmp(one.data(), many.data(), one.size() * 4), "%d threads differ from one", threads);
  }
  lowbit_set_threads(0);
  return check::finish("api");
}
