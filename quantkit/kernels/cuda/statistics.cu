// All statistics of a tensor in one pass: what quantkit/statistics/_native.c does on a processor, bit for bit.
//
//   x[before, channels, behind] ──▶ counts by key, zeros, NaN, infinities, limits      (the whole tensor)
//                               ──▶ least, largest, Σ x, Σ |x|                         (each channel)
//
// A value is counted by the key that counting.py defines: fine in the four octaves below 2^(E+1), coarse in the twenty
// below those. A block counts in shared memory, both signs, and adds its table to the one in `out` when it ends. E is
// the greater of `exponent` and what a sample of the tensor has: never more than the tensor's own, so nothing is counted
// coarser than it must be. What few values lie above it, or far below, are counted by their own top bits in `out` and
// `above`; the host takes all three apart again (statistics_launch.py).
//
// Sums are float64 and added in an order that shape and grid alone decide: a thread's elements, its warp, its block, and
// in fold_channels the parts of a channel.
#include "instructions.h"

using namespace qk;
using portable::bits_float;
using portable::float_bits;

#define INPUT_F32 0
#define INPUT_F16 1
#define INPUT_BF16 2
// How threads share the tensor. RUNS: a warp takes pieces of the runs of a channel, 16 bytes a lane (one run, without
// channels, is a flat tensor). SHORT_RUNS: the same, an element a lane. COLUMNS: `behind` is 1; a thread takes 4
// neighbouring channels, or one, down the rows.
#define RUNS 0
#define SHORT_RUNS 1
#define COLUMNS 2

constexpr int WARPS = THREADS / 32;
static_assert(MODE != COLUMNS || WARPS >= 3, "a column has three threads or more");
constexpr int BYTES = INPUT == INPUT_F32 ? 4 : 2;
constexpr int PER = 16 / BYTES;                         // elements of 16 bytes
// Loads of a thread that are on their way together: 32 bytes, as far as there are.
constexpr int STEP = MODE == RUNS || (MODE == COLUMNS && VECTOR && BYTES == 4) ? 2 : 4;
constexpr int NEIGHBOURS = MODE == COLUMNS && VECTOR ? 4 : 1;

// The widest mantissa that a type has decides how far apart keys are: 11, 10 or 7 of its bits.
constexpr int FINE_SHIFT = INPUT == INPUT_F32 ? 12 : INPUT == INPUT_F16 ? 13 : 16;
constexpr int COARSE = 20 * 128, FINE = 4 << (23 - FINE_SHIFT), KEYS = COARSE + FINE;
constexpr int ROW = KEYS + 4;  // of one sign in the table: 16 bytes more

constexpr uint32_t INFINITY_BITS = 0x7f800000u;
constexpr int32_t LEAST = -0x7fffffff - 1, LARGEST = 0x7fffffff;

// `out`: these words (TAKEN: by COLUMNS, items beyond the first round), then counts by sign and key, then counts of what lies below the keys by its top 16 bits.
enum Word { NANS, INFINITIES, BELOW, ABOVE, HIGHEST, LOWEST, EXPONENT, TAKEN, WORDS };
constexpr int COUNTERS = ABOVE + 1;
// Shared memory: the table, space to add up channels, a number a warp, the counters, the next item.
constexpr uint32_t TABLE_BYTES = 2 * ROW * 4, SCRATCH_BYTES = MODE == COLUMNS ? THREADS * 24 : 0;
constexpr uint32_t PER_WARP = TABLE_BYTES + SCRATCH_BYTES, SHARED_COUNTERS = PER_WARP + WARPS * 8;
constexpr uint32_t SHARED_NEXT = SHARED_COUNTERS + COUNTERS * 4;

// Integers that are ordered as the floats with these bits; NaN lie beyond the infinities. The same leads back.
QK_FUNCTION int32_t ordered(uint32_t bits) {
  const int32_t value = static_cast<int32_t>(bits);
  return value ^ ((value >> 31) & 0x7fffffff);
}
QK_FUNCTION int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
QK_FUNCTION int32_t largest(int32_t a, int32_t b) { return a > b ? a : b; }

// What is known of some elements of a channel. lo and hi are of the finite ones: +inf and −inf of none.
struct Channel {
  double sum = 0, absolute = 0;
  float lo = bits_float(INFINITY_BITS), hi = bits_float(INFINITY_BITS | 0x80000000u);
};
// The same of all elements, ready to be added up: places of floats in their order.
struct Part {
  double sum = 0, absolute = 0;
  int32_t lo = LARGEST, hi = LEAST;
};
constexpr uint32_t ODD_NAN = 1, ODD_POSITIVE = 2, ODD_NEGATIVE = 4;

// NaN in one of the limits is NaN in both.
QK_FUNCTION Part part_of(const Channel& c, uint32_t odd) {
  const int32_t infinite = ordered(INFINITY_BITS), negative = ordered(INFINITY_BITS | 0x80000000u);
  Part p;
  p.sum = c.sum, p.absolute = c.absolute;
  if (c.lo <= c.hi) p.lo = ordered(float_bits(c.lo)), p.hi = ordered(float_bits(c.hi));
  if (odd & ODD_POSITIVE) p.lo = least(p.lo, infinite), p.hi = infinite;
  if (odd & ODD_NEGATIVE) p.lo = negative, p.hi = largest(p.hi, negative);
  if (odd & ODD_NAN) p.lo = LEAST, p.hi = LARGEST;
  return p;
}
QK_FUNCTION void add(Part& p, const Part& other) {
  p.sum += other.sum, p.absolute += other.absolute;
  p.lo = least(p.lo, other.lo), p.hi = largest(p.hi, other.hi);
}

// ---- counting ------------------------------------------------------------------------------------------------

struct Counting {
  uint32_t table, counters;  // shared addresses
  int32_t fine, coarse;      // what is subtracted of the top bits
  uint32_t first, end;       // the first magnitude that has a key, less 1, and the first beyond them
  int32_t* below;
  int32_t* above;
  uint32_t odd = 0;          // which odd values this thread met since it was last emptied, three bits a neighbour
};

// The key of |x|; what lies below the table is negative, and what lies above it too large.
QK_FUNCTION int32_t key_of(const Counting& c, uint32_t magnitude) {
  const int32_t key = static_cast<int32_t>(magnitude >> 16) - c.coarse;
  return FINE_SHIFT == 16 ? key : largest(key, static_cast<int32_t>(magnitude >> FINE_SHIFT) - c.fine);
}

// Count a value. A row's last slot counts what the table has no key for, zeros too: so nothing is decided for each value,
// and additions of a warp to one word cost one.
QK_FUNCTION void count(const Counting& c, uint32_t bits) {
  const uint32_t key = static_cast<uint32_t>(key_of(c, bits & 0x7fffffffu)), slot = key < KEYS ? key : KEYS;
  red_add_shared(c.table + ((bits >> 31) * ROW + slot) * 4, 1);
}

// Which magnitudes some values have: `lowest` less 1, so that 0 is the largest of all.
struct Span {
  uint32_t lowest = 0xffffffffu, highest = 0;
};
QK_FUNCTION void widen(Span& span, uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  span.lowest = span.lowest < magnitude - 1 ? span.lowest : magnitude - 1;
  span.highest = span.highest > magnitude ? span.highest : magnitude;
}
// Whether the table has no key for one of them, zeros apart.
QK_FUNCTION bool is_odd(const Counting& c, const Span& span) {
  return span.lowest < c.first || span.highest >= c.end;
}

QK_FUNCTION void sum_up(Channel& channel, uint32_t bits) {
  if (!CHANNELS) return;
  const double value = static_cast<double>(bits_float(bits));
  channel.sum += value;
  channel.absolute += magnitude(value);
}
QK_FUNCTION void limit(Channel& channel, uint32_t bits) {
  channel.lo = lesser(channel.lo, bits_float(bits)), channel.hi = greater(channel.hi, bits_float(bits));
}

// The limits of a value among which the table lacks a key, and what is counted apart from the table. Half of a tensor
// may be −inf, so that is counted in shared memory.
QK_FUNCTION void visit_odd(Counting& c, uint32_t bits, Channel& channel, int neighbour) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude < INFINITY_BITS) limit(channel, bits);
  const int32_t key = key_of(c, magnitude);
  if (magnitude == 0 || static_cast<uint32_t>(key) < KEYS) return;
  uint32_t counter = key < 0 ? BELOW : ABOVE, odd = 0;
  if (magnitude > INFINITY_BITS) {
    counter = NANS, odd = ODD_NAN;
  } else if (magnitude == INFINITY_BITS) {
    counter = INFINITIES, odd = bits >> 31 ? ODD_NEGATIVE : ODD_POSITIVE;
  } else {
    red_add(key < 0 ? c.below + (bits >> 16) : c.above + (bits >> 12), 1);
  }
  red_add_shared(c.counters + counter * 4, 1);
  c.odd |= odd << (3 * neighbour);
}

// ---- reading -------------------------------------------------------------------------------------------------

// Element i of some that were loaded, as the bits of a float32.
QK_FUNCTION uint32_t element_of(const uint32_t* words, int i) {
  if (INPUT == INPUT_F32) return words[i];
  const uint32_t pair = words[i / 2];
  if (INPUT == INPUT_BF16) return i % 2 ? pair & 0xffff0000u : pair << 16;
  return float_bits(i % 2 ? f16_high(pair) : f16_low(pair));
}
QK_FUNCTION uint32_t load_element(const void* x, int64_t at) {
  const uint32_t word = INPUT == INPUT_F32 ? ld_global_once(static_cast<const uint32_t*>(x) + at)
                                           : ld_global(static_cast<const uint16_t*>(x) + at);
  return element_of(&word, 0);
}
QK_FUNCTION const uint8_t* address_of(const void* x, int64_t at) { return static_cast<const uint8_t*>(x) + at * BYTES; }

QK_FUNCTION void visit_one(Counting& c, uint32_t bits, Channel& channel) {
  Span span;
  count(c, bits), sum_up(channel, bits), widen(span, bits);
  if (is_odd(c, span)) visit_odd(c, bits, channel, 0);
  else limit(channel, bits);
}

// Visit elements at … at + length - 1, by a warp: 16 bytes a lane, and what lies before and behind whole 16 bytes.
QK_FUNCTION void visit_run(Counting& c, const void* x, int64_t at, int length, Channel& channel) {
  const int lane = threadIdx.x % 32;
  const uint8_t* run = address_of(x, at);
  const int beyond = static_cast<int>(reinterpret_cast<uint64_t>(run) % 16) / BYTES;
  const int before = beyond ? PER - beyond : 0, head = before < length ? before : length;
  const int vectors = (length - head) / PER, tail = head + vectors * PER;
  if (lane < head) visit_one(c, load_element(run, lane), channel);
  const U32x4* from = reinterpret_cast<const U32x4*>(run + head * BYTES);
  uint32_t words[STEP][4], next[STEP][4];  // those of the next round are on their way while one is counted
  auto load = [&](uint32_t (&to)[STEP][4], int vector) {
    QK_UNROLL for (int s = 0; s < STEP; s++)
      if (vector + s * 32 < vectors) {
        const U32x4 four = ld_global_once(from + vector + s * 32);
        memcpy(to[s], &four, 16);
      }
  };
  load(next, lane);
  QK_ROLLED for (int vector = lane; vector < vectors; vector += 32 * STEP) {
    QK_UNROLL for (int s = 0; s < STEP; s++) {
      QK_UNROLL for (int i = 0; i < 4; i++) words[s][i] = next[s][i];
    }
    load(next, vector + 32 * STEP);
    QK_UNROLL for (int s = 0; s < STEP; s++)
      if (vector + s * 32 < vectors) {
        Span span;
        QK_UNROLL for (int i = 0; i < PER; i++) {
          const uint32_t bits = element_of(words[s], i);
          count(c, bits), sum_up(channel, bits), widen(span, bits);
        }
        if (!is_odd(c, span)) {
          QK_UNROLL for (int i = 0; i < PER; i++) limit(channel, element_of(words[s], i));
        } else {
          // Read again: registers kept for a rare thing are missing for the usual one.
          QK_ROLLED for (int i = 0; i < PER; i++)
            visit_odd(c, load_element(from + vector + s * 32, i), channel, 0);
        }
      }
  }
  if (lane < length - tail) visit_one(c, load_element(run, tail + lane), channel);
}

// Visit `length` elements at `at` and every `step` from there, `rows` times, by a warp: an element a lane.
QK_FUNCTION void visit_short_runs(Counting& c, const void* x, int64_t at, int64_t step, int rows, int length,
                                  Channel& channel) {
  const int lane = threadIdx.x % 32, down = 32 / length, along = 32 % length;
  int row = lane / length, column = lane % length;
  while (row < rows) {
    uint32_t found[STEP];
    int taken = 0;
    QK_UNROLL for (int s = 0; s < STEP; s++) {
      if (row < rows) {
        found[s] = load_element(x, at + row * step + column);
        taken++;
      }
      row += down, column += along;
      if (column >= length) column -= length, row++;
    }
    QK_UNROLL for (int s = 0; s < STEP; s++)
      if (s < taken) visit_one(c, found[s], channel);
  }
}

// ---- between threads -----------------------------------------------------------------------------------------

QK_FUNCTION double shuffle_xor_double(double value, int mask) {
  uint32_t words[2];
  memcpy(words, &value, 8);
  words[0] = shuffle_xor(words[0], mask), words[1] = shuffle_xor(words[1], mask);
  memcpy(&value, words, 8);
  return value;
}
QK_FUNCTION void add_over_warp(Part& c) {
  QK_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    Part other;
    other.sum = shuffle_xor_double(c.sum, mask), other.absolute = shuffle_xor_double(c.absolute, mask);
    other.lo = shuffle_xor(c.lo, mask), other.hi = shuffle_xor(c.hi, mask);
    add(c, other);
  }
}

// A part of a channel's statistics, in memory.
QK_FUNCTION void store_part(double* sums, int32_t* limits, int64_t at, const Part& c) {
  st_global(sums + 2 * at, c.sum), st_global(sums + 2 * at + 1, c.absolute);
  st_global(limits + 2 * at, c.lo), st_global(limits + 2 * at + 1, c.hi);
}

// |x| of a sample, one element a thread, as bits: the same in every block. Then the largest of a block's.
QK_FUNCTION uint32_t sampled(const void* x, int64_t size) {
  const int64_t step = size / THREADS + (size < THREADS);
  const int64_t at = threadIdx.x * step;
  return at < size ? load_element(x, at) & 0x7fffffffu : 0;
}
QK_FUNCTION uint32_t largest_of(uint32_t amax, uint32_t scratch) {
  amax = amax < INFINITY_BITS ? amax : 0;
  QK_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(amax, mask);
    amax = amax > other ? amax : other;
  }
  if (threadIdx.x % 32 == 0) st_shared(scratch + threadIdx.x / 32 * 4, amax);
  block_sync();
  QK_ROLLED for (int warp = 0; warp < WARPS; warp++) {
    const uint32_t other = ld_shared<uint32_t>(scratch + warp * 4);
    amax = amax > other ? amax : other;
  }
  block_sync();
  return amax;
}

// ---- the pass ------------------------------------------------------------------------------------------------

// x starts `offset` elements into the buffer, which starts at 16 bytes. out, above: zeros at first. sums, limits: the parts of channels, of items in their order (RUNS), or of an item's
// channels (COLUMNS).
// RUNS: an item is `rows` runs of a channel, or `piece` elements of one; items are ordered by rows, channel, piece.
// COLUMNS: an item is `rows` rows of `width` neighbouring threads' columns, by a block; ordered by rows, column.
QK_KERNEL(THREADS, 2)
statistics(const void* buffer, int64_t offset, uint32_t* out, int32_t* above, double* sums, int32_t* limits, int exponent, int64_t before,
           int channels, int64_t behind, int items, int pieces, int64_t piece, int64_t rows, int width) {
  const void* x = address_of(buffer, offset);
  const uint32_t shared = shared_base();
  const int thread = threadIdx.x;
  const uint32_t sample = sampled(x, before * channels * behind);  // on its way while the table is cleared
  for (int i = thread; i < static_cast<int>(TABLE_BYTES / 16); i += THREADS) st_shared(shared + i * 16, U32x4{0, 0, 0, 0});
  if (thread < COUNTERS) st_shared<uint32_t>(shared + SHARED_COUNTERS + thread * 4, 0);
  // Its barriers publish the zeros.
  const uint32_t amax = largest_of(sample, shared + PER_WARP);
  exponent = largest(exponent, static_cast<int>(amax >> 23) - 127);

  Counting c;
  c.table = shared, c.counters = shared + SHARED_COUNTERS;
  const int32_t base = (exponent - 3 + 127) << 23;  // the bits of 2^(E−3)
  c.fine = (base >> FINE_SHIFT) - COARSE, c.coarse = (base >> 16) - COARSE;
  c.below = reinterpret_cast<int32_t*>(out + WORDS + 2 * ROW), c.above = above;
  const uint32_t lowest = static_cast<uint32_t>(c.coarse) << 16;
  c.first = lowest - 1, c.end = static_cast<uint32_t>(base) + (4u << 23);
  Channel all;  // its limits are this thread's
  auto close = [&](const Channel& channel) {
    all.lo = lesser(all.lo, channel.lo), all.hi = greater(all.hi, channel.hi);
    const Part part = part_of(channel, c.odd & 7);
    c.odd >>= 3;
    return part;
  };

  if (MODE == COLUMNS) {
    const int slot = thread / width, slots = THREADS / width, across = (channels + NEIGHBOURS - 1) / NEIGHBOURS;
    const int groups = (across + width - 1) / width;
    int item = blockIdx.x;
    while (item < items) {
      const uint32_t taken = thread == 0 ? atomic_add(out + TAKEN, 1) : 0;  // long before it is asked for
      const int column = item % groups * width + thread % width;
      const int64_t first = item / groups * rows;
      const bool mine = slot < slots && column < across;
      const int down = static_cast<int>(first + rows < before ? rows : before - first);
      const int64_t pitch = static_cast<int64_t>(channels) * BYTES, stride = pitch * slots;
      const uint8_t* from = address_of(x, first * channels + column * NEIGHBOURS) + slot * pitch;
      constexpr int WORDS_OF = NEIGHBOURS == 1 ? 1 : NEIGHBOURS * BYTES / 4;
      // Those of the next rows are on their way while one step is counted; the two change places.
      uint32_t words[2][STEP][WORDS_OF];
      auto load = [&](uint32_t (&to)[STEP][WORDS_OF], int row) {
        QK_UNROLL for (int s = 0; s < STEP; s++) {
          if (row + s * slots < down) {
            if constexpr (NEIGHBOURS == 1) {
              to[s][0] = load_element(from, 0);
            } else if constexpr (BYTES == 4) {
              const U32x4 four = ld_global_once(reinterpret_cast<const U32x4*>(from));
              memcpy(to[s], &four, 16);
            } else {
              const U32x2 four = ld_global_once(reinterpret_cast<const U32x2*>(from));
              memcpy(to[s], &four, 8);
            }
          }
          from += stride;
        }
      };
      Channel of[NEIGHBOURS];
      auto visit = [&](const uint32_t (&loaded)[STEP][WORDS_OF], int row) {
        QK_UNROLL for (int s = 0; s < STEP; s++)
          if (row + s * slots < down) {
            Span span;
            auto element = [&](int i) { return NEIGHBOURS == 1 ? loaded[s][0] : element_of(loaded[s], i); };
            QK_UNROLL for (int i = 0; i < NEIGHBOURS; i++)
              count(c, element(i)), sum_up(of[i], element(i)), widen(span, element(i));
            if (!is_odd(c, span)) {
              QK_UNROLL for (int i = 0; i < NEIGHBOURS; i++) limit(of[i], element(i));
            } else {
              QK_UNROLL for (int i = 0; i < NEIGHBOURS; i++) visit_odd(c, element(i), of[i], i);
            }
          }
      };
      const int step = slots * STEP;
      if (mine) load(words[0], slot);
      QK_ROLLED for (int row = slot; mine && row < down; row += 2 * step) {
        load(words[1], row + step);
        visit(words[0], row);
        load(words[0], row + 2 * step);
        visit(words[1], row + step);
      }
      QK_UNROLL for (int i = 0; i < NEIGHBOURS; i++) {
        Part part = close(of[i]);
        if (CHANNELS) {
          // Halves of the slots are added to each other until one is left. With three slots or more there is a barrier
          // between reading a place and writing it for the next neighbour.
          const uint32_t place = shared + TABLE_BYTES + thread * 24;
          for (int left = slots; left > 1; left = (left + 1) / 2) {
            const int half = (left + 1) / 2;
            if (slot >= half && slot < left) {
              st_shared(place, part.sum), st_shared(place + 8, part.absolute);
              st_shared(place + 16, part.lo), st_shared(place + 20, part.hi);
            }
            block_sync();
            if (slot + half < left) {
              const uint32_t from = place + half * width * 24;
              Part other;
              other.sum = ld_shared<double>(from), other.absolute = ld_shared<double>(from + 8);
              other.lo = ld_shared<int32_t>(from + 16), other.hi = ld_shared<int32_t>(from + 20);
              add(part, other);
            }
          }
          if (slot == 0 && mine)
            store_part(sums, limits, static_cast<int64_t>(item / groups) * channels + column * NEIGHBOURS + i, part);
        }
      }
      // Read long before it is written again: the next item has barriers of its own.
      if (thread == 0) st_shared<uint32_t>(shared + SHARED_NEXT, gridDim.x + taken);
      block_sync();
      item = ld_shared<int32_t>(shared + SHARED_NEXT);
    }
  } else {
    const int step = gridDim.x * WARPS;
    for (int item = blockIdx.x * WARPS + thread / 32; item < items; item += step) {
      const int channel = item / pieces % channels;
      const int64_t first = static_cast<int64_t>(item / pieces / channels) * rows, start = item % pieces * piece;
      const int64_t end = first + rows < before ? first + rows : before;
      const int length = static_cast<int>(behind - start < piece ? behind - start : piece);
      const int64_t at = (first * channels + channel) * behind + start;
      Channel of;
      if (MODE == SHORT_RUNS) {
        visit_short_runs(c, x, at, channels * behind, static_cast<int>(end - first), length, of);
      } else {
        for (int64_t row = 0; row < end - first; row++) visit_run(c, x, at + row * channels * behind, length, of);
      }
      Part part = close(of);
      if (CHANNELS) {
        add_over_warp(part);
        if (thread % 32 == 0) store_part(sums, limits, item, part);
      }
    }
  }

  // Limits of the block.
  const Part mine = part_of(all, 0);
  int32_t lo = mine.lo, hi = mine.hi;
  QK_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    lo = least(lo, shuffle_xor(lo, mask)), hi = largest(hi, shuffle_xor(hi, mask));
  }
  if (thread % 32 == 0) {
    st_shared(shared + PER_WARP + thread / 32 * 8, lo), st_shared(shared + PER_WARP + thread / 32 * 8 + 4, hi);
  }
  block_sync();
  // Each block begins elsewhere, lest all of them add to the same words at a time.
  const int begin = static_cast<int>(2 * ROW / 32 * static_cast<int64_t>(blockIdx.x) / gridDim.x) * 32;
  for (int i = thread; i < 2 * ROW; i += THREADS) {
    const int at = begin + i < 2 * ROW ? begin + i : begin + i - 2 * ROW;
    const int32_t found = ld_shared<int32_t>(shared + at * 4);
    if (found) red_add(reinterpret_cast<int32_t*>(out + WORDS + at), found);
  }
  if (thread < COUNTERS) {
    const int32_t found = ld_shared<int32_t>(shared + SHARED_COUNTERS + thread * 4);
    if (found) red_add(reinterpret_cast<int32_t*>(out + thread), found);
  }
  if (thread == 0) {
    QK_ROLLED for (int warp = 0; warp < WARPS; warp++) {
      lo = least(lo, ld_shared<int32_t>(shared + PER_WARP + warp * 8));
      hi = largest(hi, ld_shared<int32_t>(shared + PER_WARP + warp * 8 + 4));
    }
    // Ordered as unsigned numbers above 0, which stands for no finite value; the lowest upside down.
    if (lo <= hi) {
      atomic_max(out + HIGHEST, static_cast<uint32_t>(hi) ^ 0x80000000u);
      atomic_max(out + LOWEST, ~(static_cast<uint32_t>(lo) ^ 0x80000000u));
    }
    if (blockIdx.x == 0) st_global(out + EXPONENT, static_cast<uint32_t>(exponent));
  }
}
QK_EXPORT(statistics)

// Add up the parts of every channel, a warp each: part p of group g of channel c at (g · channels + c) · pieces + p.
// found: Σ x, Σ |x| of every channel, then their limits as the bits of two floats, all in eight bytes.
QK_KERNEL(256, 1)
fold_channels(const double* sums, const int32_t* limits, double* found, int channels, int groups, int pieces) {
  const int lane = threadIdx.x % 32, channel = blockIdx.x * 8 + threadIdx.x / 32;
  if (channel >= channels) return;
  Part c;
  for (int i = lane; i < groups * pieces; i += 32) {
    const int64_t at = (static_cast<int64_t>(i / pieces) * channels + channel) * pieces + i % pieces;
    Part part;
    part.sum = ld_global(sums + 2 * at), part.absolute = ld_global(sums + 2 * at + 1);
    part.lo = ld_global(limits + 2 * at), part.hi = ld_global(limits + 2 * at + 1);
    add(c, part);
  }
  add_over_warp(c);
  if (lane == 0) {
    const bool is_nan = c.lo < ordered(INFINITY_BITS | 0x80000000u) || c.hi > ordered(INFINITY_BITS);
    // −0 becomes 0: which of the two comes first says nothing. −1 is the place of −0.
    uint32_t bits[2] = {c.lo == -1 ? 0u : static_cast<uint32_t>(ordered(static_cast<uint32_t>(c.lo))),
                        c.hi == -1 ? 0u : static_cast<uint32_t>(ordered(static_cast<uint32_t>(c.hi)))};
    if (is_nan) bits[0] = bits[1] = 0x7fc00000u;
    st_global(found + channel, c.sum);
    st_global(found + channels + channel, c.absolute);
    uint32_t* words = reinterpret_cast<uint32_t*>(found + 2 * static_cast<int64_t>(channels) + channel);
    st_global(words, bits[0]), st_global(words + 1, bits[1]);
  }
}
QK_EXPORT(fold_channels)
