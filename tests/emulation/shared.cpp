// Shared memory and its checks. Beside the arena stands a record for each word: who wrote it last, who read it last.
// Order is told by stamps. A warp's stamp grows at each of its collectives; at a barrier all warps' stamps are set to
// one that was never used. An access of thread p is ordered before one of thread q when p = q, or when its stamp is
// less than q's warp's (p in the same warp) or than that of the last barrier (another warp).
#include "block.h"

namespace lowbit {
namespace emulation {
namespace {

// Readers: the last; the last that was of another warp than it; and the last that was another lane of its warp, of
// those since that other warp. If any reader since the last write is not ordered before a writer, one of the three is
// not: order depends on the warp and the stamp alone, and stamps only grow.
struct Cell {
  uint32_t block;  // the block that wrote all this; another's record means that nothing happened yet
  uint32_t write_stamp, read_stamp, far_stamp, near_stamp;
  uint16_t writer, reader, far, near;
  uint16_t write_line, read_line;
  bool written, split;  // split: the word's four bytes have records of their own
  bool landing;         // the destination of a cp_async under way
};

std::vector<uint8_t> arena;
std::vector<Cell> words, bytes;

struct Finding {
  const char* what = nullptr;
  int thread = 0, line = 0;  // the other one's
};

Cell& record(Cell& cell) {
  if (cell.block != block.id) cell = Cell(), cell.block = block.id;
  return cell;
}

// The running thread, for the length of one access.
struct Access {
  int me;
  uint32_t now;  // its warp's stamp
  int line;
  Finding found;

  explicit Access(const Place& place)
      : me(block.running->index), now(block.warp[block.running->warp].stamp), line(place.line) {}

  bool unordered(int other, uint32_t stamp) const {
    return other != me && stamp >= (other >> 5 == me >> 5 ? now : block.barrier_stamp);
  }
  void find(const char* what, int thread, int other_line) {
    if (!found.what) found = {what, thread, other_line};
  }

  void read(Cell& cell) {
    if (cell.landing)
      find("reads what a cp_async under way is to write", cell.writer, cell.write_line);
    else if (!cell.written)
      find("reads what was never written", -1, 0);
    else if (unordered(cell.writer, cell.write_stamp))
      find("reads what no barrier separates from the write", cell.writer, cell.write_line);
    if (cell.reader != me || !cell.read_stamp) {
      if (cell.reader >> 5 == me >> 5) {
        cell.near = cell.reader, cell.near_stamp = cell.read_stamp;
      } else {
        cell.far = cell.reader, cell.far_stamp = cell.read_stamp;
        cell.near_stamp = 0;
      }
      cell.reader = uint16_t(me);
    }
    cell.read_stamp = now;
    cell.read_line = uint16_t(line);
  }

  void write(Cell& cell) {
    if (cell.landing)
      find("writes what a cp_async under way is to write", cell.writer, cell.write_line);
    else if (unordered(cell.writer, cell.write_stamp))
      find("writes what no barrier separates from the write", cell.writer, cell.write_line);
    else if (unordered(cell.reader, cell.read_stamp))
      find("writes what no barrier separates from the read", cell.reader, cell.read_line);
    else if (unordered(cell.far, cell.far_stamp))
      find("writes what no barrier separates from the read", cell.far, cell.read_line);
    else if (unordered(cell.near, cell.near_stamp))
      find("writes what no barrier separates from the read", cell.near, cell.read_line);
    wrote(cell);
  }

  void wrote(Cell& cell) {
    cell.writer = uint16_t(me), cell.write_stamp = now, cell.write_line = uint16_t(line);
    cell.read_stamp = cell.far_stamp = cell.near_stamp = 0;
    cell.written = true;
  }
};

// Does it to the record of every word, or of every byte where words are shared out.
template <class F>
void for_cells(uint32_t at, uint32_t size, F act) {
  if (size >= 4) {
    for (uint32_t word = at / 4; word < (at + size) / 4; word++) {
      Cell& cell = record(words[word]);
      if (!cell.split) {
        act(cell);
      } else {
        for (uint32_t i = 0; i < 4; i++) act(bytes[4 * word + i]);
      }
    }
  } else {
    Cell& cell = record(words[at / 4]);
    if (!cell.split) {
      cell.split = true;
      for (uint32_t i = 0; i < 4; i++) bytes[at / 4 * 4 + i] = cell;
    }
    for (uint32_t i = 0; i < size; i++) act(bytes[at + i]);
  }
}

bool in_order(uint32_t at, uint32_t size, const char* what, const Place& place) {
  const int me = block.running->index;
  if (uint64_t(at) + size > arena.size()) {
    report(place, "thread %d: %s of %u bytes at %u is out of bounds: shared memory has %zu", me, what, size, at,
           arena.size());
    return false;
  }
  if (at % size) {
    report(place, "thread %d: %s of %u bytes at %u is misaligned", me, what, size, at);
    return false;
  }
  return true;
}

void tell(const Finding& found, uint32_t at, uint32_t size, const Place& place) {
  const int me = block.running->index;
  if (found.thread < 0)
    report(place, "thread %d: %u bytes at %u of shared memory: %s", me, size, at, found.what);
  else
    report(place, "thread %d: race on %u bytes at %u of shared memory: %s by thread %d (line %d)", me, size, at,
           found.what, found.thread, found.line);
}

// Lands the copies of all but the newest `pending` committed groups.
void land(Thread& thread, uint32_t pending) {
  const uint32_t done = thread.groups > pending ? thread.groups - pending : 0;
  while (thread.landed < thread.copies.size() && thread.copies[thread.landed].group < done) {
    const Copy& copy = thread.copies[thread.landed++];
    memcpy(arena.data() + copy.at, copy.bytes, copy.size);
    Access access{Place("", 0)};
    for_cells(copy.at, copy.size, [&](Cell& cell) {
      access.line = cell.write_line;  // a later race names the line of the cp_async
      access.wrote(cell);
      cell.landing = false;
    });
  }
  if (thread.landed == thread.copies.size()) thread.copies.clear(), thread.landed = 0;
}

}  // namespace

void start_shared(size_t size) {
  if (block.last_stamp >> 31) {  // four thousand million collectives later: begin anew
    words.clear(), bytes.clear();
    block.last_stamp = 0;
  }
  arena.resize(size);
  arena.shrink_to_fit();
  if (words.size() < (size + 3) / 4) words.resize((size + 3) / 4), bytes.resize(4 * words.size());
}

void clear_shared() {
  // NaN in every float type, and no valid index: what is read here shows.
  if (!arena.empty()) memset(arena.data(), 0xff, arena.size());
}

void read_shared(uint32_t at, uint32_t size, void* value, Place place) {
  counts.shared_reads++;
  memset(value, 0xff, size);
  if (!in_order(at, size, "lds", place)) return;
  Access access(place);
  for_cells(at, size, [&](Cell& cell) { access.read(cell); });
  if (access.found.what) tell(access.found, at, size, place);
  memcpy(value, arena.data() + at, size);
}

void write_shared(uint32_t at, uint32_t size, const void* value, Place place) {
  counts.shared_writes++;
  if (!in_order(at, size, "sts", place)) return;
  Access access(place);
  for_cells(at, size, [&](Cell& cell) { access.write(cell); });
  if (access.found.what) tell(access.found, at, size, place);
  memcpy(arena.data() + at, value, size);
}

void check_global(const void* at, uint32_t size, Place place) {
  if (uintptr_t(at) % size)
    report(place, "thread %d: ldg of %u bytes at %p is misaligned", block.running->index, size, at);
}

void copy_async(uint32_t at, const void* from, uint32_t count, uint32_t size, Place place) {
  Thread& me = *block.running;
  if (count > size || (size == 16 && count && count != 16))
    return report(place, "thread %d: cp_async%u of %u bytes: expected %s", me.index, size, count,
                  size == 16 ? "16 or 0" : "0 to 4");
  if (uintptr_t(from) % size) return report(place, "thread %d: cp_async%u from %p is misaligned", me.index, size, from);
  if (!in_order(at, size, size == 16 ? "cp_async16" : "cp_async4", place)) return;
  counts.async_bytes += count;

  Copy copy{at, size, me.groups, {}};
  if (count) memcpy(copy.bytes, from, count);
  Access access(place);
  const bool at_once = device().architecture < 80;
  for_cells(at, size, [&](Cell& cell) {
    access.write(cell);
    cell.landing = !at_once;
  });
  if (access.found.what) tell(access.found, at, size, place);
  if (at_once) {
    memcpy(arena.data() + at, copy.bytes, size);
  } else {
    memset(arena.data() + at, 0xff, size);
    me.copies.push_back(copy);
  }
}

void commit_async() { block.running->groups++; }
void wait_async(uint32_t pending) { land(*block.running, pending); }

}  // namespace emulation
}  // namespace lowbit
