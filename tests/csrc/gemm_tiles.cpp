// gemm_tiles: reads lines "architecture M N K", prints the number of the tile of each.
// gemm_tiles rules: checks the table on itself.
#include "dist_int8/gemm_tiles.h"

#include <cstdio>
#include <cstring>

using namespace dist_int8;

namespace {

bool is_hopper(GemmTile tile) { return tile >= GemmTile::kSm90_128x128x128; }

int check_rules() {
  int bad = 0;
  const int num_rules = sizeof(kGemmRules) / sizeof(kGemmRules[0]);
  for (int i = 0; i < num_rules; ++i) {
    const GemmRule& rule = kGemmRules[i];
    // At its largest M and smallest N a rule is the one that is found, so none is dead.
    const int64_t N = rule.min_outputs == 0 ? 8 : rule.min_outputs;
    const GemmShape corner{rule.min_architecture, rule.max_rows, N, 4096};
    int first = 0;
    while (first < num_rules && !holds(kGemmRules[first], corner)) ++first;
    if (first != i) std::fprintf(stderr, "rule %d is hidden by rule %d\n", i, first), ++bad;
    // wgmma exists on compute capability 9.0 alone.
    const bool only_hopper = rule.min_architecture == 90 && rule.max_architecture == 90;
    if (is_hopper(rule.tile) && !only_hopper) std::fprintf(stderr, "rule %d: card\n", i), ++bad;
    if (rule.tile == GemmTile::kSmall) std::fprintf(stderr, "rule %d: kSmall\n", i), ++bad;
  }
  return bad;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "rules") == 0) return check_rules() == 0 ? 0 : 1;
  long architecture, M, N, K;
  while (std::scanf("%ld %ld %ld %ld", &architecture, &M, &N, &K) == 4) {
    const GemmShape shape{static_cast<int32_t>(architecture), M, N, K};
    std::printf("%d\n", static_cast<int>(gemm_tile(shape)));
  }
  return 0;
}
