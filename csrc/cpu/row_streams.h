// Rows of a block that are multiplied together, so that each digit is read once for all of them: each is a stream of its
// own, an equal part of the block away from the next. Consecutive rows would share pages, and such streams defeat the
// hardware's prefetchers.
#ifndef LOWBIT_CPU_ROW_STREAMS_H
#define LOWBIT_CPU_ROW_STREAMS_H

#include "cpu/prefetch.h"

namespace lowbit {
namespace {

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// Calls rows(Count<kRows>, n, apart, ahead) for rows n, n + apart, ... of [n0, n1), and for each of those that remain
// rows(Count<1>, n, 0, ahead). Lines are asked for a few whole rows ahead, which where a stream ends are those of the
// stream that takes its place in the next block: what is not asked for waits for the memory, presumably because the
// hardware stops looking ahead where everything is in L2.
template <int kBits, int kRows, class Rows>
LOWBIT_INLINE void each_stream_row(const lowbit_matrix* w, int64_t n0, int64_t n1, Rows&& rows) {
  const int64_t row_bytes = row_lines(kBits, w->cols) * kLineBytes, rows_ahead = ceil_div(kStreamAhead, row_bytes);
  const int64_t apart = (n1 - n0) / kRows;
  int64_t n = n0;
  for (; n < n0 + apart; n++) {
    const int64_t jump = n + rows_ahead < n0 + apart ? 0 : n1 - n0 - apart;
    rows(Count<kRows>(), n, apart, Ahead{(rows_ahead + jump) * row_bytes, true});
  }
  for (n = n0 + kRows * apart; n < n1; n++) rows(Count<1>(), n, int64_t(0), Ahead{rows_ahead * row_bytes, true});
}

}  // namespace
}  // namespace lowbit
#endif
