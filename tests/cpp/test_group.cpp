// Groups of products: lowbit_matmul_group gives every member the bits that lowbit_matmul gives it alone, for every ISA,
// number of threads and of tokens, whatever formats, groups, permutations and biases are mixed.
#include <cstring>

#include "matrices.h"

namespace {

struct Member {
  TestMatrix matrix;
  std::vector<float> bias;  // empty: none
};

std::vector<Member> members(int64_t cols, std::mt19937& random) {
  std::vector<Member> made;
  auto add = [&](const Case& c, bool bias) {
    made.push_back({TestMatrix(c, random), {}});
    for (int64_t n = 0; bias && n < c.rows; n++) made.back().bias.push_back(float(random() % 100) / 7);
  };
  add({4, 67, cols, 128, false, false, 0, LOWBIT_F16, false}, true);  // the three of a layer: read alike
  add({4, 16, cols, 128, true, false, 0, LOWBIT_BF16, false}, false);
  add({4, 1, cols, 128, false, false, 0, LOWBIT_F16, false}, true);
  add({8, 33, cols, 32, false, false, 0, LOWBIT_F32, false}, false);  // other chunks
  add({3, 40, cols, 128, true, true, 0, LOWBIT_F16, false}, true);    // a permutation
  add({2, 65, cols, 64, false, false, 0, LOWBIT_F16, false}, false);
  add({lowbit::kTrit, 70, cols, -1, false, false, 2, LOWBIT_F32, false}, true);
  return made;
}

void compare(const std::vector<Member>& group, int64_t cols, int64_t tokens, lowbit_activations mode,
             const std::vector<float>& x, const char* what) {
  std::vector<std::vector<float>> alone, together;
  std::vector<lowbit_product> products;
  for (const Member& member : group) {
    const int64_t rows = member.matrix.view.rows;
    alone.emplace_back(size_t(rows * (tokens + 1)), -1.0f);
    together.push_back(alone.back());
    const float* bias = member.bias.empty() ? nullptr : member.bias.data();
    CHECK(lowbit_matmul(&member.matrix.view, x.data(), LOWBIT_F32, tokens, cols, bias, LOWBIT_F32, alone.back().data(),
                        rows, mode, nullptr, 0) == LOWBIT_OK,
          "%s", lowbit_last_error());
  }
  for (size_t i = 0; i < group.size(); i++)
    products.push_back({&group[i].matrix.view, group[i].bias.empty() ? nullptr : group[i].bias.data(), LOWBIT_F32,
                        together[i].data(), group[i].matrix.view.rows});
  CHECK(lowbit_matmul_group(products.data(), int(products.size()), x.data(), LOWBIT_F32, tokens, cols, mode, nullptr,
                            0) == LOWBIT_OK,
        "%s", lowbit_last_error());
  for (size_t i = 0; i < group.size(); i++)  // what lies behind the last token included
    CHECK(alone[i] == together[i], "%s: member %zu of a group differs from itself alone, %d tokens", what, i,
          int(tokens));
}

void refusals(std::mt19937& random) {
  const TestMatrix w({4, 16, 64, 32, false, false, 0, LOWBIT_F16, false}, random);
  const TestMatrix other({4, 16, 96, 32, false, false, 0, LOWBIT_F16, false}, random);
  std::vector<float> x(96), y(32, -1.0f);
  lowbit_product products[2] = {{&w.view, nullptr, LOWBIT_F32, y.data(), 16},
                                {&other.view, nullptr, LOWBIT_F32, y.data() + 16, 16}};
  auto refused = [&](int count, const lowbit_product* p, const char* word) {
    const lowbit_status status =
        lowbit_matmul_group(p, count, x.data(), LOWBIT_F32, 1, 96, LOWBIT_ACT_FLOAT, nullptr, 0);
    CHECK(status == LOWBIT_INVALID_ARGUMENT && std::strstr(lowbit_last_error(), word), "expected \"%s\", got %d: %s",
          word, int(status), lowbit_last_error());
  };
  refused(2, products, "products[1]: expected 64 columns as the first has, got 96");
  refused(0, products, "products: expected 1 to 16, got 0");
  refused(17, products, "products: expected 1 to 16, got 17");
  refused(1, nullptr, "products: expected a pointer");
  products[1] = {&w.view, x.data(), LOWBIT_I64, y.data() + 16, 16};
  refused(2, products, "bias: expected dtype");
  products[1] = {&w.view, nullptr, LOWBIT_F32, nullptr, 16};
  refused(2, products, "expected pointers");
  for (const float v : y) CHECK(v == -1.0f, "a refused group wrote");
  alignas(64) static char small[64];
  products[1] = products[0];
  CHECK(lowbit_matmul_group(products, 2, x.data(), LOWBIT_F32, 1, 64, LOWBIT_ACT_FLOAT, small, sizeof small) ==
            LOWBIT_INVALID_ARGUMENT,
        "workspace");
  const size_t two = lowbit_matmul_group_workspace(products, 2, 5, LOWBIT_ACT_FLOAT);
  const size_t one = lowbit_matmul_workspace(&w.view, 5, LOWBIT_ACT_FLOAT);
  CHECK(one > 0 && two == one + 64, "one preparation for both, a bias more: %zu and %zu", one, two);
  CHECK(lowbit_matmul_group_workspace(products, 99, 5, LOWBIT_ACT_FLOAT) == 0, "no such group");
}

}  // namespace

int main() {
  std::mt19937 random(7);
  for (const int64_t cols : {160, 1000, 2048}) {
    const std::vector<Member> group = members(cols, random);
    std::normal_distribution<float> normal;
    std::vector<float> x(size_t(cols * 270));
    for (auto& v : x) v = normal(random);
    for (const char* isa : {"ref", "avx2", "avx512vnni"}) {
      if (lowbit_set_isa(isa) != LOWBIT_OK) continue;
      const bool slow = !std::strcmp(isa, "ref");
      for (const int threads : {1, 2, 3, 5}) {
        CHECK(lowbit_set_threads(threads) == LOWBIT_OK, "%s", lowbit_last_error());
        for (const auto mode : {LOWBIT_ACT_FLOAT, LOWBIT_ACT_INT8})
          for (const int64_t tokens : {0, 1, 2, 3, 12, 17, 270})
            if (tokens < 20 || (!slow && cols < 1000)) compare(group, cols, tokens, mode, x, isa);
      }
    }
  }
  lowbit_set_isa("auto");
  lowbit_set_threads(0);
  refusals(random);
  return check::finish("group");
}
