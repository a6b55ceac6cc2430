// How a product is cut: pure functions of format, tokens, level and first-level cache, unless the user chose otherwise.
// Whatever is chosen, results are the same bits.
#pragma once

#include "cpu/kernel.h"
#include "dispatch/isa.h"

namespace lowbit {

// What the user chose for a format; -1: nothing.
struct BlockingChoice {
  int64_t tiles_from = -1;       // as tile_tokens
  int64_t own_digit_bytes = -1;  // as own_digit_bytes
};

// By lowbit_set_matmul_blocking or the environment; fails while the latter is invalid. One call reads it once: its
// scratch, its layout and its kernels must agree.
lowbit_status chosen_blocking(int format, BlockingChoice* choice);

// The number of tokens from which activations lie as a tile of 16 tokens. More than 16 are whole tiles and a tail, which
// lies as rows while it has fewer. How many of a batch are in tiles follows: 0, all, or all but the tail.
int64_t tile_tokens(int format, lowbit_activations mode, Isa isa, const BlockingChoice& choice = {});
int64_t tokens_in_tiles(int format, lowbit_activations mode, int64_t tokens, Isa isa,
                        const BlockingChoice& choice = {});
// Whether any level would have some in tiles: scratch is sized for all levels alike.
bool may_be_tiles(int64_t tokens, const BlockingChoice& choice);

// Digits of all tokens, in the rows layout, up to which each row of the matrix should read them for itself beside a
// first-level cache of so many bytes; beyond, several rows read them together. kNoSharing: they never should.
constexpr int64_t kNoSharing = INT64_MAX;
int64_t own_digit_bytes(int format, lowbit_activations mode, int64_t tokens, Isa isa, int64_t l1_bytes,
                        const BlockingChoice& choice = {});

}  // namespace lowbit
