// D[m, n] = A[m, k] @ W[n, k].T for sm_90a: W of four bits, decoded in registers, A bf16 or fp16.
//
//   producer warpgroup            consumer warpgroups
//   one thread:                   16 bytes of codes a thread -> registers -> decode -> wgmma's A operand
//     A by TMA, codes and    ->   ring of STAGES in shared memory  ------------------> wgmma's B operand
//     scales by bulk copies       sums in registers -> epilogue.h -> D
//
// Operands are swapped: 64 rows of W fill wgmma's M, from registers; TILE_N rows of A are its N, from shared memory.
// A consumer has MI blocks of 64 rows of W. While the tensor core multiplies one granule (GRAIN instructions deep), the
// consumer decodes the next into the other set of registers.
//
// Codes lie as w4.py packs them: for every 64 of K ("slab") and every 64 rows, 16 bytes a thread, of which word j holds
// the thread's eight codes of the j-th 16 of K: those of registers 0 … 3 of wgmma's A fragment, two each (register r
// is row g + 8 (r % 2), columns 2 t + 8 (r / 2) and the next, with g = lane / 4, t = lane % 4).
//
// Integers: the two codes of register r are nibble r of either half-word, q + 8 for signed ones.
//   bf16: q as a subnormal is q 2^-133. Symmetric: q S - 8 S by one fused multiply-add with S = scale 2^126, so that
//         w = (q - 8) scale rounds once. With zero points: (q - zero) exactly, then times S, which rounds once.
//   fp16: 1024 + q and 64 + q are numbers whose low bits are q; (q - zero) exactly, then times the scale, rounds once.
//   Scales of another type than A's are split into two parts of A's type; the product is off by 2^-16 of itself at most
//   before it rounds.
// e2m1: its sign, exponent and mantissa are moved to bf16's sign and lowest exponent and highest mantissa bit (fp16's):
//   that is the value times 2^-126 (2^-14). Times the scale as a power of two times e4m3's value or e8m0's: exact.
// Sums are float32; REBASE takes the powers of two back.
//
// Work: the first `whole` tiles are dealt out one by one; the rest of the tiles, laid end to end along K, is cut into
// one equal piece a block (stream-K). Pieces of one tile leave their sums in `partials`; the consumer that arrives last
// adds them in the order of K, so the result does not depend on who that is.
#include "epilogue.h"

using namespace qk;
using Type = TYPE;
constexpr bool BF = Type::code == BF16::code;

#define CODES_INT4 0
#define CODES_E2M1 1
// How scales of groups are stored; NONE: one a row, left to the epilogue.
#define SCALES_NONE 0
#define SCALES_BF16 1
#define SCALES_F16 2
#define SCALES_F32 3
#define SCALES_E4M3 4  // as exponent + 3 (five bits) and mantissa: no subnormals
#define SCALES_E8M0 5  // less the row's largest, + 254

constexpr int CONSUMER_THREADS = 128 * CONSUMERS, THREADS = CONSUMER_THREADS + 128;
constexpr int BLOCKS = MI * CONSUMERS;  // of 64 rows of W in a tile
constexpr int ROW = 128;                // bytes of a slab's row of A
constexpr int GRANULES = SLABS * 4 / GRAIN;
static_assert(GRANULES % 2 == 0, "granules alternate between two sets of registers");

// What a pair of rows g, g + 8 has of scales and zero points in a slab: [row][group], in bytes; zero points two to one.
constexpr int SCALE_BYTES = SCALES == SCALES_NONE ? 0 : SCALES == SCALES_F32 ? 4 : SCALES >= SCALES_E4M3 ? 1 : 2;
constexpr int GROUPS = GROUP == 0 || GROUP >= 64 ? 1 : 64 / GROUP;  // of a slab
constexpr int PAIR_BYTES = 2 * GROUPS * SCALE_BYTES;
constexpr int PAIR_WORDS = PAIR_BYTES / 4;
constexpr int GROUP_SLABS = GROUP == 0 ? 1 << 30 : GROUP < 64 ? 1 : GROUP / 64;
constexpr int SIDES = GROUP_SLABS >= SLABS ? 1 : SLABS;  // of scales that a stage holds
static_assert(GROUP_SLABS < 2 || GROUP_SLABS % SLABS == 0, "a stage's slabs share a group, or have their own");
static_assert(PAIR_BYTES % 4 == 0, "scales are read in words");

constexpr int CODES_AT = SLABS * TILE_N * ROW;
constexpr int BLOCK_BYTES = 2048;  // of codes: 64 rows of a slab
constexpr int SCALES_AT = CODES_AT + SLABS * BLOCKS * BLOCK_BYTES;
constexpr int SCALES_SIZE = BLOCKS * 32 * PAIR_BYTES;
constexpr int ZEROS_AT = SCALES_AT + SIDES * SCALES_SIZE;
constexpr int ZEROS_SIZE = ZEROS ? BLOCKS * 32 * GROUPS : 0;
constexpr int STAGE_BYTES = (ZEROS_AT + SIDES * ZEROS_SIZE + 1023) / 1024 * 1024;

// The epilogue's pieces: PIECE rows of D by 64 columns.
constexpr int ELEMENT_BYTES = epilogue::ELEMENT_BYTES;
constexpr int WIDEST = ELEMENT_BYTES == 2 ? 64 : 32;
constexpr int PIECE = TILE_N < WIDEST ? TILE_N : WIDEST;
constexpr int PIECES = TILE_N / PIECE;
constexpr int BUFFERS = MI * PIECES > 1 ? 2 : 1;
constexpr int BUFFER_BYTES = PIECE * 64 * ELEMENT_BYTES;
// Narrow tiles have registers to hold their factors through the products, and are too short to wait for them after.
constexpr bool FETCH_EARLY = MI * TILE_N <= 64;
static_assert(!TMA_STORE || (PIECE % 16 == 0 && ELEMENT_BYTES >= 2), "stmatrix writes 16 columns of 16 bits");

// Both halves of a register the same.
QK_PURE constexpr uint32_t both(uint32_t half) { return half * 0x10001u; }
constexpr uint32_t MINUS_ZERO = 0x80008000u;
constexpr uint32_t ONE = BF ? 0x3f803f80u : 0x3c003c00u;
QK_FUNCTION uint32_t multiply(uint32_t a, uint32_t b) { return fma_pair<Type>(a, b, MINUS_ZERO); }
QK_FUNCTION uint32_t add(uint32_t a, uint32_t b) { return fma_pair<Type>(a, ONE, b); }
QK_FUNCTION uint32_t pack_twice(float x) { return BF ? pack_bf16(x, x) : pack_f16(x, x); }
QK_FUNCTION float unpacked(uint32_t pair) { return BF ? bf16_low(pair) : f16_low(pair); }

// Scales in A's type need no second part.
constexpr bool SPLIT = SCALES == SCALES_F32 || SCALES == (BF ? SCALES_F16 : SCALES_BF16);
// What the sums lack: 2^7 that integers and e4m3 were scaled down by, the half that MXFP4 was not.
constexpr float REBASE = CODES == CODES_E2M1 ? (SCALES == SCALES_E8M0 ? 0.5f : 128.0f)
                         : BF                ? 128.0f
                         : SCALES == SCALES_NONE ? 1.0f
                         : SCALES == SCALES_F16  ? 16.0f : 1.0f / 2048.0f;

// What codes of one row and group are decoded with; each in both halves.
struct Factor { uint32_t scale, rest, offset; };

// Scale `i` of a pair's words.
QK_FUNCTION Factor factor_of(const uint32_t (&raw)[PAIR_WORDS + 1], int i) {
  Factor f{0, 0, 0};
  if constexpr (SCALES == SCALES_NONE) {
    f.scale = BF ? both(0x7e80) : ONE;  // 2^126
  } else if constexpr (SCALES == SCALES_E4M3) {
    const uint32_t code = prmt(raw[i / 4], 0, 0x4040 + i % 4 * 0x0101);
    f.scale = BF ? code * 16 + both(0x7600) : code * 128 + both(0x3000);
  } else if constexpr (SCALES == SCALES_E8M0) {
    if (BF) {
      f.scale = prmt(raw[i / 4], 0, 0x4040 + i % 4 * 0x0101) * 128;
    } else {
      const int exponent = static_cast<int>(raw[i / 4] >> i % 4 * 8 & 0xff) - 224;
      f.scale = both(exponent < 0 ? 0 : exponent << 10);
    }
  } else if constexpr (!SPLIT) {
    const uint32_t scale = prmt(raw[i / 2], 0, i % 2 ? 0x3232 : 0x1010);
    f.scale = multiply(scale, BF ? both(0x7e80) : both(0x2c00));  // 2^126; 2^-4
  } else {
    float scale;
    if (SCALES == SCALES_F32) scale = portable::bits_float(raw[i]) * (BF ? 0x1p126f : 2048.0f);
    else if (BF) scale = (i % 2 ? f16_high(raw[i / 2]) : f16_low(raw[i / 2])) * 0x1p111f;
    else scale = (i % 2 ? bf16_high(raw[i / 2]) : bf16_low(raw[i / 2])) * 2048.0f;
    f.scale = pack_twice(scale);
    f.rest = pack_twice(scale - unpacked(f.scale));
  }
  return f;
}
// With the zero point, or 8.
QK_FUNCTION void set_zero(Factor& f, uint32_t zero, int row) {
  if (CODES != CODES_INT4) return;
  if (BF && !ZEROS && !SPLIT) f.offset = multiply(f.scale, both(0x8008));  // -8 S 2^-133
  else if (BF) f.offset = both(0x8000 + zero);
  else f.offset = row == 0 ? both(0xe400 + zero) : both(0xd400 + zero * 16);  // -(1024 + zero), -(64 + zero)
}

// Eight codes to the four registers of wgmma's A fragment.
QK_FUNCTION void decode(uint32_t word, const Factor& upper, const Factor& lower, Registers<uint32_t, 4>& to) {
  QK_UNROLL for (int r = 0; r < 4; r++) {
    const Factor& f = r % 2 ? lower : upper;
    if constexpr (CODES == CODES_INT4) {
      uint32_t value;
      if constexpr (BF) {
        const uint32_t code = word >> 4 * r & both(0x000f);
        if constexpr (!ZEROS && !SPLIT) {
          to[r] = fma_pair<Type>(code, f.scale, f.offset);
          continue;
        }
        value = add(code, f.offset);
      } else {
        const uint32_t near = r < 2 ? word : word >> 8;
        if (r % 2 == 0) value = add(lop3<(0xf0 & 0xcc) | 0xaa>(near, both(0x000f), both(0x6400)), f.offset);
        else value = fma_pair<Type>(lop3<(0xf0 & 0xcc) | 0xaa>(near, both(0x00f0), both(0x6400)), both(0x2c00), f.offset);
      }
      if constexpr (SPLIT) to[r] = fma_pair<Type>(value, f.scale, multiply(value, f.rest));
      else if constexpr (!BF && SCALES == SCALES_NONE) to[r] = value;
      else to[r] = multiply(value, f.scale);
    } else {
      // Sign and magnitude of codes 0 … 2 lie three bits apart, in the distance that bf16 wants; of code 3 in the gaps.
      uint32_t bits;
      if (r < 3) bits = (word << 3 * r) & both(0x81c0);
      else bits = ((word << 1) & both(0x8000)) | ((word >> 5) & both(0x0100)) | ((word >> 4) & both(0x00c0));
      if (!BF) bits = (bits & both(0x8000)) | (bits & both(0x01c0)) << 3;
      to[r] = multiply(bits, f.scale);
    }
  }
}

// Tile and steps of K: what a block does next. Both of its roles ask in the same way.
struct Segment { int tile, begin, end; };
// Steps of the tiles that are cut, laid end to end: `share` for each block, and one more for the first `extra` of them.
struct Shares {
  int share, extra;
  QK_FUNCTION int start_of(const Shares& s, int block) { return block * s.share + (block < s.extra ? block : s.extra); }
  QK_FUNCTION int owner_of(const Shares& s, int unit) {
    const int longer = s.extra * (s.share + 1);
    return unit < longer ? unit / (s.share + 1) : s.extra + (unit - longer) / s.share;
  }
};
struct Schedule { int whole, steps, tile, at, end; };
QK_FUNCTION bool take(Schedule& s, Segment& segment) {
  if (s.tile < s.whole) {
    segment = {s.tile, 0, s.steps};
    s.tile += gridDim.x;
    return true;
  }
  if (s.at >= s.end) return false;
  const int tile = s.at / s.steps, begin = s.at - tile * s.steps;
  const int left = s.end - s.at, end = left < s.steps - begin ? begin + left : s.steps;
  segment = {s.whole + tile, begin, end};
  s.at += end - begin;
  return true;
}

// The tile that comes `index`-th: ORDER tiles along W, then the next along A, so that the blocks at work at one time
// share as few rows of both as can be, and those stay in L2.
struct Place { int w, a; };
QK_FUNCTION Place place_of(int index, int tiles_w, int tiles_a) {
  const int group = index / (ORDER * tiles_a), start = group * ORDER;
  const int height = tiles_w - start < ORDER ? tiles_w - start : ORDER;
  const int within = index - group * ORDER * tiles_a;
  return {start + within % height, within / height};
}

// The words of a pair of elements: two of four bytes, or one.
QK_FUNCTION uint32_t first_word(uint32_t pair) { return pair; }
QK_FUNCTION uint32_t first_word(U32x2 pair) { return pair.x; }
QK_FUNCTION uint32_t second_word(uint32_t) { return 0; }
QK_FUNCTION uint32_t second_word(U32x2 pair) { return pair.y; }

QK_FUNCTION uint32_t swizzled(int row, int chunk) { return row * ROW + ((chunk ^ (row & 7)) << 4); }

QK_KERNEL(THREADS, 1)
gemm_w4_sm90(const QK_GRID_CONSTANT TensorMap map_a, const QK_GRID_CONSTANT TensorMap map_d, const uint8_t* codes,
             const uint8_t* scales, const uint8_t* zeros, uint8_t* d, EPILOGUE_PARAMETERS, U32x4* partials,
             uint32_t* arrivals, int slabs, int whole, int share, int extra) {
  const uint32_t base = shared_base(), buffers = base + STAGES * STAGE_BYTES;
  const uint32_t full = buffers + (TMA_STORE ? CONSUMERS * BUFFERS * BUFFER_BYTES : 0), empty = full + 8 * STAGES;
  const uint32_t flags = empty + 8 * STAGES;  // of each consumer: how many had left their sums before it
  const int tid = threadIdx.x;
  const int warpgroup = shuffle(tid / 128, 0);  // the compiler sees that a warp's threads agree
  const int blocks = (n_size + 63) / 64, steps = (slabs + SLABS - 1) / SLABS;
  const int tiles_w = (blocks + BLOCKS - 1) / BLOCKS, tiles_a = (m_size + TILE_N - 1) / TILE_N;

  if (tid == 0) {
    prefetch_tensor_map(&map_a);
    if (TMA_STORE) prefetch_tensor_map(&map_d);
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, CONSUMERS * 4);
    }
    fence_mbarrier_init();
  }
  block_sync();

  const Shares shares{share, extra};
  Schedule schedule{whole, steps, static_cast<int>(blockIdx.x), Shares::start_of(shares, blockIdx.x),
                    Shares::start_of(shares, blockIdx.x + 1)};
  Segment segment;
  if (warpgroup == CONSUMERS) {
    if (CONSUMERS > 1) decrease_registers<56>();
    if (tid == CONSUMER_THREADS) {
      int s = 0;
      uint32_t parity = 1;  // the first round finds every stage empty
      QK_ROLLED while (take(schedule, segment)) {
        const Place place = place_of(segment.tile, tiles_w, tiles_a);
        const int first = place.w * BLOCKS, count = blocks - first < BLOCKS ? blocks - first : BLOCKS;
        QK_ROLLED for (int step = segment.begin; step < segment.end; step++) {
          const uint32_t stage = base + s * STAGE_BYTES, barrier = full + 8 * s;
          mbarrier_wait_ring(empty + 8 * s, parity);
          mbarrier_arrive_expect(barrier, CODES_AT + count * (SLABS * BLOCK_BYTES + SIDES * 32 * PAIR_BYTES +
                                                              (ZEROS ? SIDES * 32 * GROUPS : 0)));
          QK_UNROLL for (int i = 0; i < SLABS; i++) {
            // Beyond K lie zeros of A: any codes and scales will do.
            const int slab = step * SLABS + i, inside = slab < slabs ? slab : slabs - 1;
            bulk_load(stage + CODES_AT + i * BLOCKS * BLOCK_BYTES,
                      codes + (int64_t(inside) * blocks + first) * BLOCK_BYTES, count * BLOCK_BYTES, barrier);
            tma_load(stage + i * TILE_N * ROW, &map_a, barrier, {slab * 64, place.a * TILE_N});
            if (i < SIDES) {
              const int64_t side = (GROUP == 0 ? 0 : int64_t(inside / GROUP_SLABS) * blocks) + first;
              if (SCALES != SCALES_NONE)
                bulk_load(stage + SCALES_AT + i * SCALES_SIZE, scales + side * (32 * PAIR_BYTES),
                          count * 32 * PAIR_BYTES, barrier);
              if (ZEROS)
                bulk_load(stage + ZEROS_AT + i * ZEROS_SIZE, zeros + side * (32 * GROUPS), count * 32 * GROUPS, barrier);
            }
          }
          if (++s == STAGES) {
            s = 0;
            parity ^= 1;
          }
        }
      }
    }
  } else {
    if (CONSUMERS > 1) increase_registers<CONSUMERS == 2 ? 224 : CONSUMERS == 3 ? 152 : 104>();
    const int consumer = warpgroup, thread = tid % 128, warp = thread / 32, lane = tid % 32;
    const epilogue::Output output = EPILOGUE_OUTPUT;
    auto release = [&](int s) {
      if (lane == 0) mbarrier_arrive_ring(empty + 8 * s);
    };
    const int down = warp * 16 + lane / 4, across = lane % 4 * 2;
    epilogue::ColumnFactors columns[MI][2];
    auto fetch_columns = [&](int n0) {
      QK_UNROLL for (int i = 0; i < MI; i++)
        QK_UNROLL for (int h = 0; h < 2; h++)
          columns[i][h] = epilogue::column_factors(output, n0 + i * 64 + down + 8 * h);
    };
    int s = 0, buffer = 0;
    uint32_t parity = 0;
    QK_ROLLED while (take(schedule, segment)) {
      const Place place = place_of(segment.tile, tiles_w, tiles_a);
      const int m0 = place.a * TILE_N, n0 = (place.w * BLOCKS + consumer * MI) * 64;
      if (FETCH_EARLY) fetch_columns(n0);
      Registers<float, TILE_N / 2> sum[MI];
      Registers<uint32_t, 4> fragments[2][MI][GRAIN];
      QK_UNROLL for (int i = 0; i < MI; i++)
        QK_UNROLL for (int v = 0; v < TILE_N / 2; v++) sum[i][v] = 0.0f;
      int previous = 0, step = segment.begin;
      QK_ROLLED do {  // at least one: the compiler has no cause to copy sums where the loop might be left out
        mbarrier_wait_ring(full + 8 * s, parity);
        const uint32_t stage = base + s * STAGE_BYTES;
        const uint64_t of_a = matrix_descriptor(stage, 0, 1024, Swizzle::BYTES_128);
        U32x4 words[SLABS][MI];
        uint32_t raw[SIDES][MI][PAIR_WORDS + 1], zero[SIDES][MI][GROUPS];
        QK_UNROLL for (int i = 0; i < MI; i++) {
          const int block = consumer * MI + i, pair = block * 32 + warp * 8 + lane / 4;
          QK_UNROLL for (int slab = 0; slab < SLABS; slab++)
            words[slab][i] = ld_shared<U32x4>(stage + CODES_AT + (slab * BLOCKS + block) * BLOCK_BYTES + thread * 16);
          QK_UNROLL for (int side = 0; side < SIDES; side++) {
            const uint32_t at = stage + SCALES_AT + side * SCALES_SIZE + pair * PAIR_BYTES;
            if constexpr (PAIR_WORDS == 1) {
              raw[side][i][0] = ld_shared<uint32_t>(at);
            } else if constexpr (PAIR_WORDS == 2) {
              const U32x2 two = ld_shared<U32x2>(at);
              raw[side][i][0] = two.x, raw[side][i][1] = two.y;
            } else if constexpr (PAIR_WORDS == 4) {
              const U32x4 four = ld_shared<U32x4>(at);
              raw[side][i][0] = four.x, raw[side][i][1] = four.y, raw[side][i][2] = four.z, raw[side][i][3] = four.w;
            }
            if constexpr (ZEROS)
              QK_UNROLL for (int group = 0; group < GROUPS; group++)
                zero[side][i][group] =
                    ld_shared<uint8_t>(stage + ZEROS_AT + side * ZEROS_SIZE + pair * GROUPS + group);
          }
        }
        QK_UNROLL for (int granule = 0; granule < GRANULES; granule++) {
          QK_UNROLL for (int k = 0; k < GRAIN; k++) {
            const int depth = granule * GRAIN + k, slab = depth / 4, word = depth % 4;
            const int side = SIDES > 1 ? slab : 0, group = GROUPS > 1 ? word * GROUPS / 4 : 0;
            QK_UNROLL for (int i = 0; i < MI; i++) {
              Factor upper = factor_of(raw[side][i], group), lower = factor_of(raw[side][i], GROUPS + group);
              set_zero(upper, ZEROS ? zero[side][i][group] & 15 : 8, 0);
              set_zero(lower, ZEROS ? zero[side][i][group] >> 4 : 8, 1);
              const U32x4& four = words[slab][i];
              decode(word == 0 ? four.x : word == 1 ? four.y : word == 2 ? four.z : four.w, upper, lower,
                     fragments[granule % 2][i][k]);
            }
          }
          wgmma_fence();
          QK_UNROLL for (int k = 0; k < GRAIN; k++) {
            const int depth = granule * GRAIN + k;
            QK_UNROLL for (int i = 0; i < MI; i++)
              wgmma<Type, TILE_N>(sum[i], fragments[granule % 2][i][k],
                                  of_a + ((depth / 4 * TILE_N * ROW + depth % 4 * 32) >> 4),
                                  true);
          }
          wgmma_commit();
          wgmma_wait<1>();
          if (granule == 0 && step > segment.begin) release(previous);
        }
        previous = s;
        if (++s == STAGES) {
          s = 0;
          parity ^= 1;
        }
      } while (++step < segment.end);
      wgmma_wait<0>();
      QK_UNROLL for (int i = 0; i < MI; i++) wgmma_settle(sum[i]);
      release(previous);
      if (!FETCH_EARLY) fetch_columns(n0);

      if (segment.begin > 0 || segment.end < steps) {
        // Blocks `one` to `last` share this tile. A block has at most two pieces of tiles: where its share begins, and
        // where it ends.
        const int index = segment.tile - whole, first_unit = index * steps;
        const int one = Shares::owner_of(shares, first_unit), last = Shares::owner_of(shares, first_unit + steps - 1);
        constexpr int VECTORS = MI * (TILE_N / 8);  // of a thread
        auto slot_of = [&](int block) {
          const int64_t slot = int64_t(block) * 2 + (Shares::start_of(shares, block) < first_unit);
          return partials + slot * (VECTORS * CONSUMER_THREADS) + tid;
        };
        U32x4* const mine = slot_of(blockIdx.x);
        QK_UNROLL for (int v = 0; v < VECTORS; v++) {
          const auto& of = sum[v / (TILE_N / 8)];
          const int i = v % (TILE_N / 8) * 4;
          st_global(mine + v * CONSUMER_THREADS,
                    U32x4{portable::float_bits(of[i]), portable::float_bits(of[i + 1]),
                          portable::float_bits(of[i + 2]), portable::float_bits(of[i + 3])});
        }
        barrier_sync(1 + consumer, 128);  // the arrival below releases all threads' sums
        if (thread == 0) {
          uint32_t* const counter = arrivals + index * CONSUMERS + consumer;
          const uint32_t arrived = atomic_add_acq_rel(counter, 1);
          if (arrived == last - one) st_global(counter, 0u);  // for the next launch
          st_shared(flags + 4 * consumer, arrived);
        }
        barrier_sync(1 + consumer, 128);
        if (ld_shared<uint32_t>(flags + 4 * consumer) != last - one) continue;
        QK_UNROLL for (int v = 0; v < VECTORS; v++)
          QK_UNROLL for (int e = 0; e < 4; e++) sum[v / (TILE_N / 8)][v % (TILE_N / 8) * 4 + e] = 0.0f;
        constexpr int AT_ONCE = VECTORS <= 4 ? 4 : VECTORS <= 8 ? 2 : 1;  // pieces on their way together
        QK_ROLLED for (int block = one; block <= last; block += AT_ONCE) {
          U32x4 parts[AT_ONCE][VECTORS];
          QK_UNROLL for (int p = 0; p < AT_ONCE; p++)
            QK_UNROLL for (int v = 0; v < VECTORS; v++)
              parts[p][v] = block + p <= last ? ld_global(slot_of(block + p) + v * CONSUMER_THREADS) : U32x4{0, 0, 0, 0};
          QK_UNROLL for (int p = 0; p < AT_ONCE; p++)
            QK_UNROLL for (int v = 0; v < VECTORS; v++) {
              auto& of = sum[v / (TILE_N / 8)];
              const int i = v % (TILE_N / 8) * 4;
              of[i] += portable::bits_float(parts[p][v].x);
              of[i + 1] += portable::bits_float(parts[p][v].y);
              of[i + 2] += portable::bits_float(parts[p][v].z);
              of[i + 3] += portable::bits_float(parts[p][v].w);
            }
        }
      }

      // Sums 4 j + 2 h + e are row 8 j + 2 (lane % 4) + e of D, column 16 warp + lane / 4 + 8 h.
      QK_UNROLL for (int turn = 0; turn < MI * PIECES; turn++) {
        const int i = turn / PIECES, piece = turn % PIECES, m1 = m0 + piece * PIECE, n1 = n0 + i * 64;
        if constexpr (!TMA_STORE) {
          QK_UNROLL for (int j = 0; j < PIECE / 8; j++)
            QK_UNROLL for (int e = 0; e < 2; e++) {
              const int row = m1 + j * 8 + across + e;
              const epilogue::RowFactors of_row = epilogue::row_factors(output, row);
              QK_UNROLL for (int h = 0; h < 2; h++)
                epilogue::store_element(output, d, sum[i][(piece * (PIECE / 8) + j) * 4 + h * 2 + e] * REBASE, of_row,
                                        columns[i][h], row, n1 + down + 8 * h);
            }
        } else {
          const uint32_t to = buffers + (consumer * BUFFERS + buffer) * BUFFER_BYTES;
          if (thread == 0) store_wait_read<BUFFERS - 1>();  // the store before last has left this buffer
          barrier_sync(1 + consumer, 128);
          QK_UNROLL for (int j = 0; j < PIECE / 8; j += 2) {
            epilogue::Pair packed[4];  // rows 8 j + across and the next with columns h = 0, 1, then 8 (j + 1) + across
            QK_UNROLL for (int q = 0; q < 4; q++) {
              const int row = m1 + (j + q / 2) * 8 + across, h = q % 2, column = n1 + down + 8 * h;
              const epilogue::RowFactors rows[2] = {epilogue::row_factors(output, row),
                                                    epilogue::row_factors(output, row + 1)};
              const epilogue::ColumnFactors same[2] = {columns[i][h], columns[i][h]};
              const bool inside = column < n_size;
              const float residuals[2] = {inside && row < m_size ? epilogue::residual_at(output, row, column) : 0.0f,
                                          inside && row + 1 < m_size ? epilogue::residual_at(output, row + 1, column)
                                                                     : 0.0f};
              const int at = (piece * (PIECE / 8) + j) * 4 + q * 2;
              packed[q] = epilogue::element_pair(output, sum[i][at] * REBASE, sum[i][at + 1] * REBASE, rows, same,
                                                 residuals);
            }
            if constexpr (ELEMENT_BYTES == 2) {
              const int matrix = lane / 8;
              stmatrix_x4_transposed(to + swizzled((j + matrix / 2) * 8 + lane % 8, warp * 2 + matrix % 2),
                                     first_word(packed[0]), first_word(packed[1]), first_word(packed[2]),
                                     first_word(packed[3]));
            } else if constexpr (ELEMENT_BYTES == 4) {
              QK_UNROLL for (int q = 0; q < 4; q++) {
                const int row = (j + q / 2) * 8 + across, column = down + q % 2 * 8;
                const uint32_t box = to + column / 32 * PIECE * ROW;  // two boxes of 32 columns
                st_shared(box + swizzled(row, column % 32 / 4) + column % 4 * 4, first_word(packed[q]));
                st_shared(box + swizzled(row + 1, column % 32 / 4) + column % 4 * 4, second_word(packed[q]));
              }
            }
          }
          fence_proxy_async();
          barrier_sync(1 + consumer, 128);
          if (thread == 0) {
            tma_store(&map_d, to, {n1, m1});
            if (ELEMENT_BYTES == 4) tma_store(&map_d, to + PIECE * ROW, {n1 + 32, m1});
            store_commit();
          }
          if (BUFFERS == 2) buffer ^= 1;
        }
      }
    }
    if (TMA_STORE && thread == 0) store_wait_read<0>();  // shared memory lasts as long as the block
  }
}
QK_EXPORT(gemm_w4_sm90)
