// D[m, n] = A[m, k] @ W[n, k].T for sm_90a: W of four bits, decoded in registers, A bf16, fp16, int8 or e4m3.
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
// The tensor core adds products of e4m3 in some 14 bits: with PROMOTE a stage's 128 of K are summed apart, from zero, and
// added to the float sums, times the scale of their group where W are integers; meanwhile the tensor core has the other
// consumers' products.
//
// Work: the first `whole` tiles are dealt out one by one; the rest of the tiles, laid end to end along K, is cut into
// one equal piece a block (stream-K). Pieces of one tile leave their sums in `partials`; the consumer that arrives last
// adds them in the order of K, so the result does not depend on who that is. With CLUSTER 2 two blocks take neighbouring
// tiles along W together, fetch half of A's rows each and multicast them to both; "block" is a cluster then.
#include "epilogue.h"
#include "tiles.h"
#include "w4_decode.h"

using namespace qk;
using namespace qk::w4;
constexpr int CONSUMER_THREADS = 128 * CONSUMERS, THREADS = CONSUMER_THREADS + 128;
// Registers of a consumer's thread once the producer has given up most of its own; 0: they stay as they are.
constexpr int RAISED = CONSUMERS == 2 ? 224 : CONSUMERS == 3 ? 152 : CONSUMERS == 4 ? 104 : 0;
constexpr int BLOCKS = MI * CONSUMERS;  // of 64 rows of W in a tile
constexpr int ROW = 128;                // bytes of a slab's row of A
constexpr int GRANULES = SLABS * 4 / GRAIN;
static_assert(GRANULES % 2 == 0, "granules alternate between two sets of registers");
constexpr bool PROMOTE = FP8;
static_assert(!PROMOTE || SLABS == 1, "128 of K are summed apart");

constexpr int SIDES = GROUP_SLABS >= SLABS ? 1 : SLABS;  // of scales that a stage holds
static_assert(GROUP_SLABS < 2 || GROUP_SLABS % SLABS == 0, "a stage's slabs share a group, or have their own");

constexpr int CODES_AT = SLABS * TILE_N * ROW;
constexpr int BLOCK_BYTES = 2048;  // of codes: 64 rows and a plane, 64 of K
constexpr int SCALES_AT = CODES_AT + SLABS * PLANES * BLOCKS * BLOCK_BYTES;
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
struct Schedule { int whole, steps, tile, stride, at, end; };
QK_FUNCTION bool take(Schedule& s, Segment& segment) {
  if (s.tile < s.whole) {
    segment = {s.tile, 0, s.steps};
    s.tile += s.stride;
    return true;
  }
  if (s.at >= s.end) return false;
  const int tile = s.at / s.steps, begin = s.at - tile * s.steps;
  const int left = s.end - s.at, end = left < s.steps - begin ? begin + left : s.steps;
  segment = {s.whole + tile, begin, end};
  s.at += end - begin;
  return true;
}

// The words of a pair of elements: two of four bytes, or one.
struct Words {
  QK_FUNCTION uint32_t first(uint32_t pair) { return pair; }
  QK_FUNCTION uint32_t first(U32x2 pair) { return pair.x; }
  QK_FUNCTION uint32_t second(uint32_t) { return 0; }
  QK_FUNCTION uint32_t second(U32x2 pair) { return pair.y; }
};

QK_FUNCTION uint32_t swizzled(int row, int chunk) { return row * ROW + ((chunk ^ (row & 7)) << 4); }

QK_CLUSTER_KERNEL(THREADS, 1, CLUSTER)
gemm_w4_sm90(const QK_GRID_CONSTANT TensorMap map_a, const QK_GRID_CONSTANT TensorMap map_d, const uint8_t* codes,
             const uint8_t* scales, const uint8_t* zeros, uint8_t* d, EPILOGUE_PARAMETERS, U32x4* partials,
             uint32_t* arrivals, int planes, int whole, int share, int extra) {
  const uint32_t base = shared_base(), buffers = base + STAGES * STAGE_BYTES;
  const uint32_t full = buffers + (TMA_STORE ? CONSUMERS * BUFFERS * BUFFER_BYTES : 0), empty = full + 8 * STAGES;
  const uint32_t flags = empty + 8 * STAGES;  // of each consumer and piece: whether it is the last to leave it
  const int tid = threadIdx.x;
  const int warpgroup = shuffle(tid / 128, 0);  // the compiler sees that a warp's threads agree
  const int slabs = (planes + PLANES - 1) / PLANES, blocks = (n_size + 63) / 64, steps = (slabs + SLABS - 1) / SLABS;
  const int rank = CLUSTER > 1 ? cluster_rank() : 0, cluster = blockIdx.x / CLUSTER;
  const int tiles_w = (blocks + BLOCKS * CLUSTER - 1) / (BLOCKS * CLUSTER), tiles_a = (m_size + TILE_N - 1) / TILE_N;

  if (tid == 0) {
    prefetch_tensor_map(&map_a);
    if (TMA_STORE) prefetch_tensor_map(&map_d);
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, CONSUMERS * 4 * CLUSTER);
    }
    fence_mbarrier_init();
  }
  if (CLUSTER > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    block_sync();
  }

  const Shares shares{share, extra};
  Schedule schedule{whole, steps, cluster, static_cast<int>(gridDim.x) / CLUSTER, Shares::start_of(shares, cluster),
                    Shares::start_of(shares, cluster + 1)};
  Segment segment;
  if (warpgroup == CONSUMERS) {
    if (RAISED) decrease_registers<56>();
    if (shuffle(tid / 32, 0) == CONSUMERS * 4 && elect_one()) {  // the compiler knows that it is one thread
      int s = 0;
      uint32_t parity = 1;  // the first round finds every stage empty
      QK_ROLLED while (take(schedule, segment)) {
        const Place place = place_of<ORDER>(segment.tile, tiles_w, tiles_a);
        const int first = (place.first * CLUSTER + rank) * BLOCKS, left = blocks - first;
        const int count = left < 0 ? 0 : left < BLOCKS ? left : BLOCKS;
        QK_ROLLED for (int step = segment.begin; step < segment.end; step++) {
          const uint32_t stage = base + s * STAGE_BYTES, barrier = full + 8 * s;
          mbarrier_wait_ring(empty + 8 * s, parity);
          mbarrier_arrive_expect(barrier, CODES_AT + count * (SLABS * PLANES * BLOCK_BYTES + SIDES * 32 * PAIR_BYTES +
                                                              (ZEROS ? SIDES * 32 * GROUPS : 0)));
          QK_UNROLL for (int i = 0; i < SLABS; i++) {
            // Beyond K lie zeros of A: any codes and scales will do.
            const int slab = step * SLABS + i, inside = slab < slabs ? slab : slabs - 1;
            if (CLUSTER == 1) {
              tma_load(stage + i * TILE_N * ROW, &map_a, barrier, {slab * SLAB, place.second * TILE_N});
            } else {
              const int part = TILE_N / CLUSTER * rank;
              tma_load_multicast(stage + (i * TILE_N + part) * ROW, &map_a, barrier, (1 << CLUSTER) - 1,
                                 {slab * SLAB, place.second * TILE_N + part});
            }
            if (CLUSTER > 1 && count == 0) continue;
            QK_UNROLL for (int p = 0; p < PLANES; p++) {
              const int plane = slab * PLANES + p;  // the last slab may have but one
              bulk_load(stage + CODES_AT + (i * PLANES + p) * BLOCKS * BLOCK_BYTES,
                        codes + (int64_t(plane < planes ? plane : planes - 1) * blocks + first) * BLOCK_BYTES,
                        count * BLOCK_BYTES, barrier);
            }
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
    if (RAISED) increase_registers<RAISED ? RAISED : 24>();
    const int consumer = warpgroup, thread = tid % 128, warp = thread / 32, lane = tid % 32;
    const epilogue::Output output = EPILOGUE_OUTPUT;
    auto release = [&](int s) {
      if (lane < CLUSTER) {  // the multicast of every block of the cluster writes here, and waits for all of them
        if (CLUSTER == 1) mbarrier_arrive_ring(empty + 8 * s);
        else mbarrier_arrive_ring(map_to_rank(empty + 8 * s, lane));
      }
    };
    const int down = warp * 16 + lane / 4, across = lane % 4 * 2;
    epilogue::ColumnFactors columns[MI][2];
    auto fetch_columns = [&](int n0) {
      QK_UNROLL for (int i = 0; i < MI; i++)
        QK_UNROLL for (int h = 0; h < 2; h++)
          columns[i][h] = epilogue::column_factors(output, n0 + i * 64 + down + 8 * h);
    };
    const uint32_t above = bits_above(planes);
    int s = 0, buffer = 0;
    uint32_t parity = 0;
    int pieces[2] = {-1, -1};  // tiles of which a piece was left: where the share begins, and where it ends
    int told = -1;             // of the two, whose arrival was looked at last
    QK_ROLLED while (true) {
      Registers<Sum, TILE_N / 2> sum[MI];
      QK_UNROLL for (int i = 0; i < MI; i++)
        QK_UNROLL for (int v = 0; v < TILE_N / 2; v++) sum[i][v] = 0;
      const bool more = take(schedule, segment);
      if (!more) {
        if (told < 0) {
          // Pieces are made known when the products are done: by then their sums have long left, and nobody waits.
          barrier_sync(1 + consumer, 128);
          if (thread == 0) {
            QK_UNROLL for (int p = 0; p < 2; p++)
              if (pieces[p] >= 0) {
                const int first_unit = (pieces[p] - whole) * steps;
                const uint32_t others =
                    Shares::owner_of(shares, first_unit + steps - 1) - Shares::owner_of(shares, first_unit);
                uint32_t* const counter = arrivals + ((pieces[p] - whole) * CLUSTER + rank) * CONSUMERS + consumer;
                const bool is_last = atomic_add_acq_rel(counter, 1) == others;
                if (is_last) st_global(counter, 0u);  // for the next launch
                st_shared<uint32_t>(flags + 8 * consumer + 4 * p, is_last);
              }
          }
          barrier_sync(1 + consumer, 128);
        }
        if (++told == 2) break;
        segment.tile = told == 0 ? pieces[0] : pieces[1];
        if (segment.tile < 0 || !ld_shared<uint32_t>(flags + 8 * consumer + 4 * told)) continue;
      }
      const Place place = place_of<ORDER>(segment.tile, tiles_w, tiles_a);
      const int m0 = place.second * TILE_N, n0 = ((place.first * CLUSTER + rank) * BLOCKS + consumer * MI) * 64;
      if (FETCH_EARLY) fetch_columns(n0);
      constexpr int VECTORS = MI * (TILE_N / 8);  // of a thread's sums
      const int first_unit = (segment.tile - whole) * steps;
      auto slot_of = [&](int block) {
        const int64_t slot = (int64_t(block) * 2 + (Shares::start_of(shares, block) < first_unit)) * CLUSTER + rank;
        return partials + slot * (VECTORS * CONSUMER_THREADS) + tid;
      };
      if (more) {
      Registers<uint32_t, 4> fragments[2][MI][GRAIN];
      Registers<Sum, TILE_N / 2> apart[MI];
      Registers<Sum, TILE_N / 2>(&running)[MI] = PROMOTE ? apart : sum;
      int previous = 0, step = segment.begin;
      QK_ROLLED do {  // at least one: the compiler has no cause to copy sums where the loop might be left out
        mbarrier_wait_ring(full + 8 * s, parity);
        const uint32_t stage = base + s * STAGE_BYTES;
        U32x4 words[SLABS][MI][PLANES];
        uint32_t raw[SIDES][MI][PAIR_WORDS + 1], zero[SIDES][MI][GROUPS];
        QK_UNROLL for (int i = 0; i < MI; i++) {
          const int block = consumer * MI + i, pair = block * 32 + warp * 8 + lane / 4;
          QK_UNROLL for (int slab = 0; slab < SLABS; slab++)
            QK_UNROLL for (int plane = 0; plane < PLANES; plane++)
              words[slab][i][plane] =
                  ld_shared<U32x4>(stage + CODES_AT + ((slab * PLANES + plane) * BLOCKS + block) * BLOCK_BYTES +
                                   warp * 512 + lane * 16);
          QK_UNROLL for (int side = 0; side < SIDES; side++) {
            load_pair(raw[side][i], stage + SCALES_AT + side * SCALES_SIZE + pair * PAIR_BYTES, above);
            if constexpr (ZEROS)
              QK_UNROLL for (int group = 0; group < GROUPS; group++)
                zero[side][i][group] =
                    ld_shared<uint8_t>(stage + ZEROS_AT + side * ZEROS_SIZE + pair * GROUPS + group);
          }
        }
        const uint64_t of_a = matrix_descriptor(stage, 0, 1024, Swizzle::BYTES_128);
        QK_UNROLL for (int granule = 0; granule < GRANULES; granule++) {
          QK_UNROLL for (int k = 0; k < GRAIN; k++) {
            const int depth = granule * GRAIN + k, slab = depth / 4, word = depth % 4, side = SIDES > 1 ? slab : 0;
            QK_UNROLL for (int i = 0; i < MI; i++) {
              decode_depth(words[slab][i], word, raw[side][i], zero[side][i], fragments[granule % 2][i][k]);
            }
          }
          wgmma_fence();
          QK_UNROLL for (int k = 0; k < GRAIN; k++) {
            const int depth = granule * GRAIN + k;
            QK_UNROLL for (int i = 0; i < MI; i++)
              wgmma<Type, TILE_N>(running[i], fragments[granule % 2][i][k],
                                  of_a + ((depth / 4 * TILE_N * ROW + depth % 4 * 32) >> 4), !PROMOTE || depth > 0);
          }
          wgmma_commit();
          wgmma_wait<1>();
          if (!PROMOTE && granule == 0 && step > segment.begin) release(previous);
        }
        if constexpr (PROMOTE) {
          wgmma_wait<0>();
          release(s);
          QK_UNROLL for (int i = 0; i < MI; i++) {
            wgmma_settle(apart[i]);
            if constexpr (SCALED_SUMS && SCALES != SCALES_NONE) {
              const float scales[2] = {sum_scale(raw[0][i], 0), sum_scale(raw[0][i], 1)};
              QK_UNROLL for (int v = 0; v < TILE_N / 2; v++)
                sum[i][v] = fused_multiply_add(apart[i][v], scales[v / 2 % 2], sum[i][v]);
            } else {
              QK_UNROLL for (int v = 0; v < TILE_N / 2; v++) sum[i][v] += apart[i][v];
            }
          }
        }
        previous = s;
        if (++s == STAGES) {
          s = 0;
          parity ^= 1;
        }
      } while (++step < segment.end);
      if constexpr (!PROMOTE) {
        wgmma_wait<0>();
        QK_UNROLL for (int i = 0; i < MI; i++) wgmma_settle(sum[i]);
        release(previous);
      }
      if (segment.begin > 0 || segment.end < steps) {
        U32x4* const mine = slot_of(cluster);
        QK_UNROLL for (int v = 0; v < VECTORS; v++) {
          const auto& of = sum[v / (TILE_N / 8)];
          const int i = v % (TILE_N / 8) * 4;
          st_global(mine + v * CONSUMER_THREADS,
                    U32x4{bits_of(of[i]), bits_of(of[i + 1]), bits_of(of[i + 2]), bits_of(of[i + 3])});
        }
        if (pieces[0] < 0) pieces[0] = segment.tile;
        else pieces[1] = segment.tile;
        continue;
      }
      } else {
        // The last of the blocks that share this tile adds up what they left.
        const int one = Shares::owner_of(shares, first_unit), last = Shares::owner_of(shares, first_unit + steps - 1);
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
              of[i] += sum_of(parts[p][v].x);
              of[i + 1] += sum_of(parts[p][v].y);
              of[i + 2] += sum_of(parts[p][v].z);
              of[i + 3] += sum_of(parts[p][v].w);
            }
        }
      }
      if (!FETCH_EARLY) fetch_columns(n0);

      // Sums 4 j + 2 h + e are row 8 j + 2 (lane % 4) + e of D, column 16 warp + lane / 4 + 8 h.
      QK_UNROLL for (int turn = 0; turn < MI * PIECES; turn++) {
        const int i = turn / PIECES, piece = turn % PIECES, m1 = m0 + piece * PIECE, n1 = n0 + i * 64;
        if constexpr (!TMA_STORE) {
          QK_UNROLL for (int j = 0; j < PIECE / 8; j++)
            QK_UNROLL for (int e = 0; e < 2; e++) {
              const int row = m1 + j * 8 + across + e;
              const epilogue::RowFactors of_row = epilogue::row_factors(output, row);
              QK_UNROLL for (int h = 0; h < 2; h++)
                epilogue::store_element(output, d, rebased(sum[i][(piece * (PIECE / 8) + j) * 4 + h * 2 + e]), of_row,
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
              packed[q] = epilogue::element_pair(output, rebased(sum[i][at]), rebased(sum[i][at + 1]), rows, same,
                                                 residuals);
            }
            if constexpr (ELEMENT_BYTES == 2) {
              const int matrix = lane / 8;
              stmatrix_x4_transposed(to + swizzled((j + matrix / 2) * 8 + lane % 8, warp * 2 + matrix % 2),
                                     Words::first(packed[0]), Words::first(packed[1]), Words::first(packed[2]),
                                     Words::first(packed[3]));
            } else if constexpr (ELEMENT_BYTES == 4) {
              QK_UNROLL for (int q = 0; q < 4; q++) {
                const int row = (j + q / 2) * 8 + across, column = down + q % 2 * 8;
                const uint32_t box = to + column / 32 * PIECE * ROW;  // two boxes of 32 columns
                st_shared(box + swizzled(row, column % 32 / 4) + column % 4 * 4, Words::first(packed[q]));
                st_shared(box + swizzled(row + 1, column % 32 / 4) + column % 4 * 4, Words::second(packed[q]));
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
  if (CLUSTER > 1) {  // no block leaves while another may still arrive on its barriers
    cluster_arrive();
    cluster_wait();
  }
}
QK_EXPORT(gemm_w4_sm90)
