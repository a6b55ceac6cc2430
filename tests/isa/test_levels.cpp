// Levels that this machine lacks: that they are offered, forced and refused as they should be, that AMX's kernels keep the
// tiles in order, and the numbers of tokens about the sizes of its tiles. test_kernels_of_levels has all the shapes.
#include <cstring>
#include <string>
#include <vector>

#include "machine.h"
#include "matrices.h"
#include "software_tiles.h"

#include "cpu/amx_tiles.h"
#include "dispatch/blocking.h"

namespace {

namespace tiles = lowbit::software_tiles;

std::mt19937 random_bits(5);

std::vector<float> product(const TestMatrix& w, const std::vector<float>& x, int64_t tokens, lowbit_activations mode,
                           const char* isa) {
  CHECK(lowbit_set_isa(isa) == LOWBIT_OK, "%s", lowbit_last_error());
  std::vector<float> y(size_t(tokens * w.view.rows));
  CHECK(lowbit_matmul(&w.view, x.data(), LOWBIT_F32, tokens, w.view.cols, nullptr, LOWBIT_F32, y.data(), w.view.rows,
                      mode, nullptr, 0) == LOWBIT_OK,
        "%s", lowbit_last_error());
  return y;
}

void test_choice() {
  CHECK(!strcmp(lowbit_isa_missing("amx"), ""), "%s", lowbit_isa_missing("amx"));
  CHECK(!lowbit_isa_missing("sse9"), "%s", lowbit_isa_missing("sse9"));
  constexpr int kBits[] = {2, 3, 4, 8, lowbit::kTrit};
  struct {
    const char *isa, *matmul, *gather;
    int64_t of_float[5], of_int8[5];  // tokens of a tile at least, as kBits
  } const wanted[] = {{"auto", "amx", "avx512vnni", {6, 6, 6, 6, 6}, {6, 6, 6, 6, 6}},
                      {"amx", "amx", "avx512vnni", {6, 6, 6, 6, 6}, {6, 6, 6, 6, 6}},
                      {"avx512vnni", "avx512vnni", "avx512vnni", {12, 11, 12, 10, 12}, {11, 9, 9, 8, 12}},
                      {"avxvnni", "avxvnni", "avx2", {12, 12, 12, 12, 12}, {12, 12, 12, 12, 12}},
                      {"avx2", "avx2", "avx2", {13, 13, 14, 13, 11}, {12, 11, 13, 9, 9}}};
  for (const auto& level : wanted) {
    CHECK(lowbit_set_isa(level.isa) == LOWBIT_OK, "%s", lowbit_last_error());
    for (int i = 0; i < 5; i++) {
      const int bits = kBits[i];
      const std::string matmul = lowbit_selected_kernel("matmul", lowbit_format(bits));
      const std::string gather = lowbit_selected_kernel("gather", lowbit_format(bits));
      CHECK(matmul == format_name(bits) + "_matmul__" + level.matmul, "%s at %s", matmul.c_str(), level.isa);
      CHECK(gather == format_name(bits) + "_gather__" + level.gather, "%s at %s", gather.c_str(), level.isa);
      for (const auto mode : {LOWBIT_ACT_FLOAT, LOWBIT_ACT_INT8}) {
        int64_t batch = 0, tiles_from = 0;
        CHECK(lowbit_matmul_batching(lowbit_format(bits), mode, &batch, &tiles_from) == LOWBIT_OK, "%s",
              lowbit_last_error());
        CHECK(batch == 256 && tiles_from == (mode == LOWBIT_ACT_FLOAT ? level.of_float : level.of_int8)[i],
              "%s of %d bits, mode %d: tiles from %ld", level.isa, bits, int(mode), long(tiles_from));
      }
    }
  }
}

// A batch is cut into whole tiles and a tail: 16 * (tiles) + tail of fewer tokens than make a tile.
void test_tails() {
  using lowbit::tokens_in_tiles;
  struct {
    int64_t tokens, in_tiles, if_chosen_1, if_chosen_40;
  } const cases[] = {{1, 0, 1, 0},     {8, 0, 8, 0},     {9, 9, 9, 0},         {16, 16, 16, 0},     {17, 16, 17, 0},
                     {24, 16, 24, 0},  {25, 25, 25, 0},  {32, 32, 32, 0},      {40, 32, 40, 32},    {41, 41, 41, 32},
                     {48, 48, 48, 48}, {63, 63, 63, 48}, {250, 250, 250, 240}, {256, 256, 256, 256}};
  for (const auto& c : cases) {
    const auto in_tiles = [&](const lowbit::BlockingChoice& choice) {
      return tokens_in_tiles(LOWBIT_INT4, LOWBIT_ACT_INT8, c.tokens, lowbit::Isa::avx512vnni, choice);
    };
    CHECK(in_tiles({}) == c.in_tiles && in_tiles({1, -1}) == c.if_chosen_1 && in_tiles({40, -1}) == c.if_chosen_40,
          "%ld tokens: %ld, %ld and %ld in tiles", long(c.tokens), long(in_tiles({})), long(in_tiles({1, -1})),
          long(in_tiles({40, -1})));
  }
}

void choose(int bits, const lowbit::BlockingChoice& choice) {
  CHECK(lowbit_set_matmul_blocking(lowbit_format(bits), choice.tiles_from, choice.own_digit_bytes) == LOWBIT_OK, "%s",
        lowbit_last_error());
}

// Lowbit's own; tiles whatever the tokens; rows, each with digits of its own; rows that share them.
constexpr lowbit::BlockingChoice kBlockings[] = {{}, {1, -1}, {1000, int64_t(1) << 40}, {1000, 0}};

// The user's choice is of one format, at every level, until it is taken back.
void test_chosen_blocking() {
  for (const char* isa : {"amx", "avx512vnni", "avx2", "ref"}) {
    CHECK(lowbit_set_isa(isa) == LOWBIT_OK, "%s", lowbit_last_error());
    choose(LOWBIT_INT3, {17, 8192});
    int64_t batch = 0, tiles_from = 0, others = 0, columns = 0;
    CHECK(lowbit_matmul_batching(LOWBIT_INT3, LOWBIT_ACT_FLOAT, &batch, &tiles_from) == LOWBIT_OK, "%s",
          lowbit_last_error());
    CHECK(lowbit_matmul_batching(LOWBIT_INT4, LOWBIT_ACT_FLOAT, &batch, &others) == LOWBIT_OK, "%s",
          lowbit_last_error());
    CHECK(lowbit_matmul_sharing(LOWBIT_INT3, 2, LOWBIT_ACT_FLOAT, &columns) == LOWBIT_OK, "%s", lowbit_last_error());
    CHECK(tiles_from == 17 && others < 17 && columns == 2048, "%s: tiles from %ld and %ld, %ld columns", isa,
          long(tiles_from), long(others), long(columns));
    choose(LOWBIT_INT3, {});
    CHECK(lowbit_matmul_batching(LOWBIT_INT3, LOWBIT_ACT_FLOAT, &batch, &tiles_from) == LOWBIT_OK && tiles_from < 17,
          "%s: tiles from %ld", isa, long(tiles_from));
  }
}

// From how many columns on rows share digits, by format, number of tokens and the size of the first-level cache.
void test_sharing() {
  struct {
    int64_t l1;
    int format;
    int64_t tokens, of_float, of_int8;
    const char* isa = "avx512vnni";
  } const cases[] = {{32 << 10, 4, 1, 0, 0},
                     {32 << 10, 4, 1, 0, 0, "amx"},
                     {32 << 10, 4, 1, 14336, INT64_MAX, "avx2"},
                     {32 << 10, 4, 2, INT64_MAX, INT64_MAX, "avx2"},
                     {32 << 10, 3, 1, INT64_MAX, INT64_MAX, "avxvnni"},
                     {32 << 10, 8, 4, INT64_MAX, INT64_MAX, "avx2"},
                     {32 << 10, 3, 1, 0, 0},
                     {32 << 10, 8, 1, 6144, 12288},
                     {48 << 10, 8, 1, 9216, 18432},
                     {32 << 10, 3, 2, 0, 8192},
                     {32 << 10, 2, 8, 0, 2048},
                     {32 << 10, lowbit::kTrit, 1, 5760, 20480},
                     {32 << 10, lowbit::kTrit, 4, 1280, 5760},
                     {1024, 8, 3, 0, 0}};
  for (const auto& c : cases) {
    lowbit::l1_size = c.l1;
    CHECK(lowbit_set_isa(c.isa) == LOWBIT_OK, "%s", lowbit_last_error());
    int64_t columns[2] = {-1, -1};
    for (const auto mode : {LOWBIT_ACT_FLOAT, LOWBIT_ACT_INT8})
      CHECK(lowbit_matmul_sharing(lowbit_format(c.format), c.tokens, mode, &columns[mode == LOWBIT_ACT_INT8]) ==
                LOWBIT_OK,
            "%s", lowbit_last_error());
    CHECK(columns[0] == c.of_float && columns[1] == c.of_int8, "%s at %s, %ld tokens, %ld bytes: %ld and %ld columns",
          format_name(c.format).c_str(), c.isa, long(c.tokens), long(c.l1), long(columns[0]), long(columns[1]));
  }
  lowbit::l1_size = 32 << 10;
}

// The probe of the tiles: shapes and registers that the stand-ins accept, and a rate.
void test_tile_rate() {
  CHECK(lowbit_multiply_rate("tiles", 1) > 0 && lowbit_multiply_rate("tiles", 2) > 0, "no rate of the tiles");
}

// The system keeps the tiles to itself: the level below is taken, and AMX is an error with the reason.
void test_refused() {
  const std::string reason = lowbit_isa_missing("amx");
  CHECK(reason == "the CPU has AMX, but the system refuses its tiles: a test said so", "%s", reason.c_str());
  CHECK(lowbit_set_isa("amx") == LOWBIT_UNSUPPORTED && strstr(lowbit_last_error(), reason.c_str()), "%s",
        lowbit_last_error());
  CHECK(!strcmp(lowbit_isa(), "avx512vnni"), "%s", lowbit_isa());
  CHECK(!strcmp(lowbit_selected_kernel("matmul", LOWBIT_INT4), "int4_matmul__avx512vnni"), "%s",
        lowbit_selected_kernel("matmul", LOWBIT_INT4));
}

// Tiles are used from 6 tokens on, by AMX alone, and given back after every product.
void test_use_of_tiles() {
  CHECK(lowbit_set_threads(1) == LOWBIT_OK, "%s", lowbit_last_error());
  const TestMatrix w({4, 40, 1024, 128, true, false, 0, LOWBIT_F16, false}, random_bits);
  const std::vector<float> x(64 * 1024, 1.0f);
  auto products = [&](int64_t tokens, lowbit_activations mode, const char* isa) {
    const int64_t before = tiles::multiplied();
    product(w, x, tokens, mode, isa);
    CHECK(!tiles::configured(), "%ld tokens: tiles were not released", long(tokens));
    return tiles::multiplied() - before;
  };
  CHECK(products(5, LOWBIT_ACT_FLOAT, "amx") == 0, "rows use no tiles");
  CHECK(products(16, LOWBIT_ACT_FLOAT, "avx512vnni") == 0, "only AMX uses tiles");
  // 1024 columns are 16 products; 40 rows are 3 A tiles; one B tile a digit and 16 tokens.
  CHECK(products(6, LOWBIT_ACT_FLOAT, "amx") == 16 * 3 * 2, "two digits");
  CHECK(products(16, LOWBIT_ACT_INT8, "amx") == 16 * 3, "one digit");
  CHECK(products(17, LOWBIT_ACT_INT8, "amx") == 16 * 3, "one digit, a tile of tokens and a tail");
  CHECK(products(22, LOWBIT_ACT_INT8, "amx") == 16 * 3 * 2, "one digit, two tiles of tokens");
  CHECK(products(37, LOWBIT_ACT_FLOAT, "amx") == 16 * 3 * 4, "two digits, two tiles of tokens and a tail");
  CHECK(products(38, LOWBIT_ACT_FLOAT, "amx") == 16 * 3 * 6, "two digits, three tiles of tokens");
  choose(LOWBIT_INT4, {1, -1});
  CHECK(products(1, LOWBIT_ACT_INT8, "amx") == 16 * 3, "one token, as was chosen");
  choose(LOWBIT_INT4, {20, -1});
  CHECK(products(19, LOWBIT_ACT_INT8, "amx") == 0 && products(20, LOWBIT_ACT_INT8, "amx") == 16 * 3, "from 20 on");
  choose(LOWBIT_INT4, {});
  CHECK(lowbit_set_threads(0) == LOWBIT_OK, "%s", lowbit_last_error());
}

void test_numbers_of_tokens() {
  std::vector<int64_t> counts;
  for (int64_t tokens = 1; tokens <= 18; tokens++) counts.push_back(tokens);
  for (const int64_t tokens : {23, 24, 25, 26, 27, 28, 29, 31, 32, 33, 48, 49, 64, 65, 70}) counts.push_back(tokens);
  for (const int bits : {lowbit::kTrit, 2, 3, 4, 8})
    for (const int64_t group : {-1, 128, 64, 32, 16}) {
      const bool zeros = bits != lowbit::kTrit && group % 32 == 0;
      // Rows: a block and a half of one, or one more than that. Columns: more stages than phases, the last one short.
      const int64_t rows = group == 128 ? 49 : 37, cols = 2100;
      const TestMatrix w({bits, rows, cols, group, zeros, group == 32, 0, LOWBIT_F16, false}, random_bits);
      std::vector<float> x(size_t(70 * cols));
      std::normal_distribution<float> normal;
      for (auto& v : x) v = normal(random_bits);
      for (const auto mode : {LOWBIT_ACT_FLOAT, LOWBIT_ACT_INT8}) {
        const auto wanted = product(w, x, 70, mode, "ref");
        for (const int64_t tokens : counts)
          for (const char* isa : {"amx", "avxvnni", "avx512vnni", "avx2"})
            for (const auto& blocking : kBlockings) {
              choose(bits, blocking);
              const auto got = product(w, x, tokens, mode, isa);
              CHECK(!memcmp(got.data(), wanted.data(), got.size() * 4),
                    "%s group %ld mode %d tokens %ld tiles from %ld own digits %ld: %s differs from ref",
                    format_name(bits).c_str(), long(group), int(mode), long(tokens), long(blocking.tiles_from),
                    long(blocking.own_digit_bytes), isa);
            }
        choose(bits, {});
      }
    }
}

std::string last_fault;

// That the software tiles see what they are there for.
void test_faults() {
  tiles::report = [](const char* fault) { last_fault = fault; };
  auto expect = [](const char* words) {
    CHECK(last_fault.find(words) != std::string::npos, "expected a fault about \"%s\", got \"%s\"", words,
          last_fault.c_str());
    last_fault.clear();
  };
  alignas(64) uint8_t memory[17 * 64] = {};
  tiles::zero(0);
  expect("without a configuration");
  lowbit::TileShapes shapes;
  auto set = [&](int tile, int rows, int bytes) {
    shapes.rows[tile] = uint8_t(rows), shapes.row_bytes[tile] = uint16_t(bytes);
  };
  set(0, 17, 64);
  tiles::configure(&shapes);
  expect("more than 16 rows");
  set(0, 16, 64), set(8, 1, 4);
  tiles::configure(&shapes);
  expect("ninth");
  set(8, 0, 0), shapes.palette = 2;
  tiles::configure(&shapes);
  expect("palette");
  shapes.palette = 1, shapes.reserved[3] = 1;
  tiles::configure(&shapes);
  expect("reserved");
  shapes.reserved[3] = 0;
  set(1, 16, 32), set(2, 16, 64), set(3, 8, 64);
  tiles::configure(&shapes);
  CHECK(last_fault.empty() && tiles::configured(), "%s", last_fault.c_str());
  tiles::configure(&shapes);
  expect("not released");
  tiles::zero(7);
  expect("leaves out");
  tiles::load(1, memory, 64), tiles::load(2, memory, 64), tiles::load(3, memory, 64);
  tiles::multiply(0, 1, 3);
  expect("never written");
  tiles::store(0, memory, 64);
  expect("never written");
  tiles::zero(0);
  tiles::multiply(0, 1, 2);
  expect("do not fit");
  tiles::multiply(0, 1, 1);
  expect("two operands");
  tiles::load(2, memory + 32, 64);
  expect("crosses");
  // 255 * -128, 32 times: unsigned by signed.
  memset(memory, 255, sizeof memory);
  tiles::load(1, memory, 64);
  memset(memory, 0x80, sizeof memory);
  tiles::load(3, memory, 64);
  tiles::multiply(0, 1, 3);
  int32_t sums[16 * 16];
  alignas(64) int32_t aligned[16 * 16];
  tiles::store(0, aligned, 64);
  memcpy(sums, aligned, sizeof sums);
  for (const int32_t sum : sums) CHECK(sum == 255 * -128 * 32, "got %d", sum);
  CHECK(last_fault.empty(), "%s", last_fault.c_str());
  tiles::release();
  tiles::store(0, memory, 64);
  expect("without a configuration");
}

}  // namespace

int main(int count, char** arguments) {
  lowbit::tiles_are_refused = count > 1 && !strcmp(arguments[1], "refused");
  if (strcmp(lowbit_isa_missing("avx512vnni"), "")) {  // nothing here can stand in for the levels above it
    CHECK(strstr(lowbit_isa_missing("amx"), "the CPU lacks"), "%s", lowbit_isa_missing("amx"));
    return check::finish("levels");
  }
  if (lowbit::tiles_are_refused) {
    test_refused();
    return check::finish("levels, tiles refused");
  }
  test_choice();
  test_tails();
  test_sharing();
  test_chosen_blocking();
  test_use_of_tiles();
  test_numbers_of_tokens();
  test_tile_rate();
  test_faults();
  return check::finish("levels");
}
