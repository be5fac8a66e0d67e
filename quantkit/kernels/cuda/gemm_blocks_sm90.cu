// D[m, n] = sum over blocks b of K of a_scale[m, b] * w_scale[n, b] * (A[m, b] @ W[n, b].T) for sm_90a: e4m3 codes
// whose scales go by blocks along K, and the epilogue of epilogue.h.
//
//   BLOCK 128   scales of A for 1 x 128, of W for 128 x 128 elements, float32
//   BLOCK 32    MXFP8: both for 1 x 32, e8m0
//
// wgmma multiplies one block of K into registers that start from zero: `partial`. Then the ordinary cores add it to the
// tile's float32 sums, sum = fma(partial, scale, sum): the promotion. It also mends what fp8's accumulators lose, which
// keep 14 bits. One consumer's promotion runs under the other's products:
//
//   producer warp 0    TMA: codes of both operands              ->  ring of STAGES, 128 of K each: full, empty
//   producer warps 1-3 scales from memory, as float32           ->  planes beside the codes: ready, drained
//   consumer 0         wgmma | promote | wgmma | promote | ...
//   consumer 1                 wgmma | promote | wgmma | ...
//
// A wave is what one consumer multiplies between two promotions: 64 rows of the first operand, TILE_N of the second,
// one block of K. With 128 columns its products take the tensor core 256 cycles (64 with BLOCK 32), its promotion 64
// instructions of each warp (128: two scales have to be multiplied for each sum).
//
// As in gemm_sm90.cu the first operand lies on wgmma's M, the second on its N; they are A and W, or with SWAP, for few
// rows of A, W and A. CLUSTER 2: two blocks with neighbouring tiles of the second operand share the first one's, the
// taller; each fetches half of it for both.
//
// SPLIT: the blocks of a cluster take one tile together, each a part of K, where there are too few tiles to occupy the
// GPU. The first one finishes the tile: the others write their sums into its buffers, and it adds them to its own in
// the order of their parts.
//
//   others    wait for room    write into the first one's buffers    arrive on its `partials`
//   first     wait for partials    add    finish and store    arrive on their `room`
#include "epilogue.h"
#include "tiles.h"

using namespace qk;
using namespace qk::epilogue;
using Accumulator = float;

constexpr int ROW = 128;                      // bytes, and codes, of K in a stage
constexpr int TILE_M = 64 * MI * CONSUMERS;
constexpr int SECOND = TILE_M * ROW;          // where the second operand lies in a stage
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * ROW;
constexpr int BLOCKS = ROW / BLOCK;           // of K in a stage
constexpr bool MX = BLOCK == 32;
static_assert(BLOCK == 32 || BLOCK == 128, "a block of K is one wgmma, or a stage");
constexpr int SIZE = CLUSTER * SPLIT;         // blocks of a cluster
static_assert(MX || SWAP || 128 % TILE_N == 0, "the columns of a tile lie in one 128 x 128 block of the weight");
static_assert(CLUSTER == 1 || SPLIT == 1, "a cluster shares a tile of the first operand, or K");

// Waves of a step: blocks of 64 rows, and of each all blocks of K. Two sets of partial sums, where there is room, let a
// consumer's own products run under its promotion too.
constexpr int WAVES = MI * BLOCKS;
constexpr int PARTIALS = WAVES > 1 && MI * TILE_N / 2 + TILE_N <= 192 ? 2 : 1;

// Scales of a stage, in planes of floats: `DOWN` of them for each row of the first operand, `ACROSS` for each of the
// second. The weight's scale of a 128 x 128 block is multiplied into the activations', once for each of the BANDS of
// 128 rows in a tile; MX keeps both, for every block of K.
constexpr int BANDS = SWAP && TILE_M > 128 ? TILE_M / 128 : 1;
constexpr int DOWN = MX ? BLOCKS : SWAP ? 0 : 1;
constexpr int ACROSS = MX ? BLOCKS : SWAP ? BANDS : 0;
constexpr int SCALE_BYTES = (DOWN * TILE_M + ACROSS * TILE_N) * 4;
constexpr int LOADERS = 3;                    // warps that bring them

// Registers of a thread, 504 in all (3 x 168 at the launch): MX has more to decode, and fewer sums.
constexpr int OF_PRODUCER = MX ? 56 : 40, OF_CONSUMER = MX ? 224 : 232;

// The epilogue works in pieces, PIECE columns of the sums each: at most 8 KB of output in two buffers, or 4 KB in three
// where a fourth stage wants the room. A staged row is 128 bytes; 64 of small pieces and of one-byte elements.
constexpr bool SMALL_PIECES = BUFFERS == 3;
constexpr int BUFFER_BYTES = SMALL_PIECES ? 4096 : 8192;
static_assert(BUFFERS == 2 || (SMALL_PIECES && !SWAP), "two buffers, or three small ones");
constexpr int PART_BYTES = MI * TILE_N * 256;  // sums of a consumer
static_assert(SPLIT == 1 || (SPLIT - 1) * PART_BYTES <= BUFFERS * BUFFER_BYTES, "the others' sums fit in the buffers");
constexpr int STAGED_ROW = ELEMENT_BYTES == 1 || SMALL_PIECES ? 64 : 128;
constexpr int WIDEST = SWAP ? (ELEMENT_BYTES == 4 ? 32 : 64) : STAGED_ROW / ELEMENT_BYTES;
constexpr int PIECE = TILE_N < WIDEST ? TILE_N : WIDEST;
constexpr int PIECES = TILE_N / PIECE;
// What a thread holds of factors and residuals at a time.
constexpr int SPAN = PIECE > 32 ? 32 : PIECE;
constexpr int SPANS = PIECE / SPAN;
static_assert(TILE_N % PIECE == 0 && PIECE % 16 == 0, "TILE_N is a whole number of pieces, a piece of stmatrix's");
static_assert(SWAP || !TMA_STORE || PIECE == WIDEST, "a stored row is whole");

#include "staging.h"

QK_FUNCTION uint64_t descriptor(uint32_t address) { return matrix_descriptor(address, 0, 1024, Swizzle::BYTES_128); }
// What to add to a descriptor to move it on: its address counts 16 bytes and has room for all of shared memory.
QK_FUNCTION uint64_t advance(int bytes) { return bytes >> 4; }

// Where a column's scale lies in its plane: the four that a thread needs for two neighbouring 8 x 8 pieces of the sums,
// columns 2t, 2t + 1, 8 + 2t and 9 + 2t, follow each other.
QK_FUNCTION int place_across(int column) {
  return (column & ~15) | (column & 6) << 1 | (column & 8) >> 2 | (column & 1);
}

// A matrix of scales: 4 bytes of a row for each stage, rows `pitch` bytes apart, a multiple of 16.
struct Scales {
  const uint8_t* data;
  int64_t pitch;
  int rows;
};
// Those of a row for four stages, of which `step`, a multiple of four, is the first; zeros beyond the last row.
QK_FUNCTION U32x4 four_stages(const Scales& scales, int row, int step) {
  if (row >= scales.rows) return {0, 0, 0, 0};
  return ld_global(reinterpret_cast<const U32x4*>(scales.data + row * scales.pitch + step * 4));
}
QK_FUNCTION uint32_t word_of(const U32x4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

QK_CLUSTER_KERNEL(128 * (CONSUMERS + 1), 1, SIZE)
gemm_blocks_sm90(const QK_GRID_CONSTANT TensorMap map_first, const QK_GRID_CONSTANT TensorMap map_second,
                 const QK_GRID_CONSTANT TensorMap map_d, uint8_t* d, int k_size, const uint8_t* a_scales,
                 int64_t a_pitch, const uint8_t* w_scales, int64_t w_pitch, EPILOGUE_PARAMETERS) {
  const uint32_t base = shared_base(), buffers = base + STAGES * STAGE_BYTES;
  const uint32_t planes = buffers + (TMA_STORE || SPLIT > 1 ? CONSUMERS * BUFFERS * BUFFER_BYTES : 0);
  const uint32_t full = planes + STAGES * SCALE_BYTES, empty = full + 8 * STAGES;
  const uint32_t ready = empty + 8 * STAGES, drained = ready + 8 * STAGES;
  const uint32_t partials = drained + 8 * STAGES, room = partials + 8 * CONSUMERS;  // SPLIT: one of each a consumer
  const int tid = threadIdx.x;
  const int warpgroup = shuffle(tid / 128, 0);  // the compiler sees that a warp's threads agree
  const int rank = SIZE > 1 ? cluster_rank() : 0, neighbour = CLUSTER > 1 ? rank : 0;
  // Parts of K begin where a load of four stages' scales may.
  const int all_steps = (k_size + ROW - 1) / ROW, fours = (all_steps + 3) / 4;
  const int first_step = SPLIT > 1 ? fours * rank / SPLIT * 4 : 0;
  const int steps = (SPLIT > 1 && rank + 1 < SPLIT ? fours * (rank + 1) / SPLIT * 4 : all_steps) - first_step;
  const int first_size = SWAP ? n_size : m_size, second_size = SWAP ? m_size : n_size;
  const int tiles_first = (first_size + TILE_M - 1) / TILE_M;
  const int tiles_second = (second_size + TILE_N * CLUSTER - 1) / (TILE_N * CLUSTER);
  const int tiles = tiles_first * tiles_second;
  const int cluster = blockIdx.x / SIZE, clusters = gridDim.x / SIZE;

  if (tid == 0) {
    prefetch_tensor_map(&map_first);
    prefetch_tensor_map(&map_second);
    if (TMA_STORE) prefetch_tensor_map(&map_d);
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, CONSUMERS * CLUSTER);
      mbarrier_init(ready + 8 * s, LOADERS);
      mbarrier_init(drained + 8 * s, 4 * CONSUMERS);
    }
    for (int c = 0; SPLIT > 1 && c < CONSUMERS; c++) {  // one arrival a warp
      mbarrier_init(partials + 8 * c, 4 * (SPLIT - 1));
      mbarrier_init(room + 8 * c, 4);
    }
    fence_mbarrier_init();
  }
  if (SIZE > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    block_sync();
  }

  if (warpgroup == 0) {
    if (CONSUMERS > 1) decrease_registers<OF_PRODUCER>();
    int s = 0;
    uint32_t parity = 1;  // the first round finds every stage empty
    auto next = [&] {
      if (++s == STAGES) {
        s = 0;
        parity ^= 1;
      }
    };
    if (shuffle(tid / 32, 0) == 0) {
      if (elect_one()) {
        QK_ROLLED for (int tile = cluster; tile < tiles; tile += clusters) {
          const Place place = place_of<GROUP>(tile, tiles_first, tiles_second);
          const int first = place.first * TILE_M, second = (place.second * CLUSTER + neighbour) * TILE_N;
          QK_ROLLED for (int step = 0; step < steps; step++) {
            const uint32_t stage = base + s * STAGE_BYTES;
            const int k = (first_step + step) * ROW;
            mbarrier_wait_ring(empty + 8 * s, parity);
            mbarrier_arrive_expect(full + 8 * s, STAGE_BYTES);
            if (CLUSTER == 1) {
              tma_load(stage, &map_first, full + 8 * s, {k, first});
            } else {
              const int part = TILE_M / CLUSTER * rank;
              tma_load_multicast(stage + part * ROW, &map_first, full + 8 * s, (1 << CLUSTER) - 1, {k, first + part});
            }
            tma_load(stage + SECOND, &map_second, full + 8 * s, {k, second});
            next();
          }
        }
      }
    } else {
      const Scales of_a{a_scales, a_pitch, m_size};
      const Scales of_w{w_scales, w_pitch, MX ? n_size : (n_size + 127) / 128};
      const Scales &of_first = SWAP ? of_w : of_a, &of_second = SWAP ? of_a : of_w;
      const int blocks = (k_size + BLOCK - 1) / BLOCK;
      // Rows whose scales this thread brings: of both operands, first those of the first, or of the activations alone.
      constexpr int ROWS = MX ? TILE_M + TILE_N : SWAP ? TILE_N : TILE_M;
      constexpr int EACH = (ROWS + 32 * LOADERS - 1) / (32 * LOADERS);
      const int loader = tid - 32;
      QK_ROLLED for (int tile = cluster; tile < tiles; tile += clusters) {
        const Place place = place_of<GROUP>(tile, tiles_first, tiles_second);
        const int first = place.first * TILE_M, second = (place.second * CLUSTER + neighbour) * TILE_N;
        QK_ROLLED for (int start = first_step; start < first_step + steps; start += 4) {
          U32x4 held[EACH], of_band[BANDS];
          QK_UNROLL for (int i = 0; i < EACH; i++) {
            const int row = loader + i * 32 * LOADERS;
            if (MX) {
              held[i] = row < TILE_M ? four_stages(of_first, first + row, start)
                        : row < ROWS ? four_stages(of_second, second + row - TILE_M, start)
                                     : U32x4{0, 0, 0, 0};
            } else {
              held[i] = row < ROWS ? four_stages(of_a, (SWAP ? second : first) + row, start) : U32x4{0, 0, 0, 0};
            }
          }
          if (!MX)
            QK_UNROLL for (int band = 0; band < BANDS; band++)
              of_band[band] = four_stages(of_w, (SWAP ? first : second) / 128 + band, start);
          QK_UNROLL for (int q = 0; q < 4; q++) {
            if (start + q >= first_step + steps) break;
            const uint32_t plane = planes + s * SCALE_BYTES;
            mbarrier_wait_ring(drained + 8 * s, parity);
            QK_UNROLL for (int i = 0; i < EACH; i++) {
              const int row = loader + i * 32 * LOADERS;
              if (row >= ROWS) continue;
              const uint32_t word = word_of(held[i], q);
              if (MX) {
                const bool is_first = row < TILE_M;
                const uint32_t to = plane + (is_first ? row * 4 : DOWN * TILE_M * 4 + place_across(row - TILE_M) * 4);
                QK_UNROLL for (int b = 0; b < BLOCKS; b++) {
                  // Beyond K codes are zeros, whatever follows the scales.
                  const bool inside = (start + q) * BLOCKS + b < blocks;
                  const float scale = inside ? portable::e8m0_to_float(word >> (8 * b) & 0xff) : 0.0f;
                  st_shared(to + b * (is_first ? TILE_M : TILE_N) * 4, scale);
                }
              } else {
                const int at = SWAP ? place_across(row) : row;
                QK_UNROLL for (int band = 0; band < BANDS; band++)
                  st_shared(plane + (band * TILE_N + at) * 4,
                            portable::bits_float(word) * portable::bits_float(word_of(of_band[band], q)));
              }
            }
            warp_sync();
            if (tid % 32 == 0) mbarrier_arrive(ready + 8 * s);
            next();
          }
        }
      }
    }
  } else {
    if (CONSUMERS > 1) increase_registers<OF_CONSUMER>();
    const int consumer = warpgroup - 1, thread = tid % 128, warp = thread / 32, lane = tid % 32;
    const Output output = EPILOGUE_OUTPUT;
    // Row 16 warp + lane / 4 + 8 h, columns 8 j + 2 (lane % 4) + e of the sums are this thread's.
    const int down = warp * 16 + lane / 4, across = lane % 4 * 2;
    // The codes of a stage are read when the consumers of every block that the multicast reaches have read them.
    auto release = [&](int s) {
      if (thread < CLUSTER) {
        if (CLUSTER == 1) mbarrier_arrive(empty + 8 * s);
        else mbarrier_arrive_ring(map_to_rank(empty + 8 * s, thread));
      }
    };
    const uint32_t own_buffers = buffers + consumer * BUFFERS * BUFFER_BYTES;
    int s = 0, buffer = 0;
    uint32_t parity = 0, exchange = 0;
    QK_ROLLED for (int tile = cluster; tile < tiles; tile += clusters) {
      const Place place = place_of<GROUP>(tile, tiles_first, tiles_second);
      const int first = place.first * TILE_M + consumer * MI * 64;
      const int second = (place.second * CLUSTER + neighbour) * TILE_N;

      float sum[MI][TILE_N / 2];
      QK_UNROLL for (int i = 0; i < MI; i++)
        QK_UNROLL for (int at = 0; at < TILE_N / 2; at++) sum[i][at] = 0.0f;

      QK_ROLLED for (int step = 0; step < steps; step++) {
        Registers<float, TILE_N / 2> partial[PARTIALS];
        const uint64_t of_first = descriptor(base) + advance(s * STAGE_BYTES + consumer * MI * 64 * ROW);
        const uint64_t of_second = descriptor(base) + advance(s * STAGE_BYTES + SECOND);
        const uint32_t plane = planes + s * SCALE_BYTES;
        // Start the products of a wave: rows 64 i, block b of K.
        auto start = [&](int wave) {
          const int i = wave / BLOCKS, b = wave % BLOCKS;
          wgmma_fence();
          QK_UNROLL for (int k = 0; k < BLOCK / 32; k++)
            wgmma<E4M3, TILE_N>(partial[wave % PARTIALS], of_first + advance(i * 64 * ROW + b * BLOCK + k * 32),
                                of_second + advance(b * BLOCK + k * 32), k > 0);
          wgmma_commit();
        };
        mbarrier_wait_ring(full + 8 * s, parity);
        start(0);
        mbarrier_wait_ring(ready + 8 * s, parity);
        QK_UNROLL for (int wave = 0; wave < WAVES; wave++) {
          const int i = wave / BLOCKS, b = wave % BLOCKS;
          const bool more = wave + 1 < WAVES;
          if (PARTIALS > 1 && more) start(wave + 1);
          float scale_down[2] = {1.0f, 1.0f};
          if (DOWN > 0)
            QK_UNROLL for (int h = 0; h < 2; h++)
              scale_down[h] = ld_shared<float>(plane + (b * TILE_M + consumer * MI * 64 + i * 64 + down + 8 * h) * 4);
          const int band = BANDS > 1 ? (consumer * MI + i) / 2 : 0;
          const uint32_t plane_across = plane + (DOWN * TILE_M + (MX ? b : band) * TILE_N + across * 2) * 4;
          if (PARTIALS > 1 && more) wgmma_wait<1>();
          else wgmma_wait<0>();
          Registers<float, TILE_N / 2>& made = partial[wave % PARTIALS];
          wgmma_settle(made);
          if (!more) release(s);
          QK_UNROLL for (int j = 0; j < TILE_N / 8; j += 2) {
            U32x4 four{0, 0, 0, 0};
            if (ACROSS > 0) four = ld_shared<U32x4>(plane_across + j * 32);
            QK_UNROLL for (int q = 0; q < 8; q++) {
              const int at = j * 4 + q, h = q / 2 % 2;
              const float scale_across = portable::bits_float(word_of(four, q / 4 * 2 + q % 2));
              const float scale = ACROSS == 0 ? scale_down[h]
                                  : DOWN == 0 ? scale_across
                                              : scale_down[h] * scale_across;
              sum[i][at] = fused_multiply_add(made[at], scale, sum[i][at]);
            }
          }
          if (PARTIALS == 1 && more) start(wave + 1);
        }
        warp_sync();
        if (lane == 0) mbarrier_arrive(drained + 8 * s);
        if (++s == STAGES) {
          s = 0;
          parity ^= 1;
        }
      }

      if constexpr (SPLIT > 1) {
        const uint32_t slot = thread * 4;
        if (rank > 0) {
          mbarrier_wait(room + 8 * consumer, exchange ^ 1);
          const uint32_t to = map_to_rank(own_buffers - PART_BYTES + rank * PART_BYTES + slot, 0);
          QK_UNROLL for (int i = 0; i < MI; i++)
            QK_UNROLL for (int at = 0; at < TILE_N / 2; at++)
              st_cluster(to + (i * (TILE_N / 2) + at) * 512, portable::float_bits(sum[i][at]));
          warp_sync();
          if (lane == 0) mbarrier_arrive_remote(map_to_rank(partials + 8 * consumer, 0));
          exchange ^= 1;
          continue;
        }
        mbarrier_wait(partials + 8 * consumer, exchange);
        QK_UNROLL for (int part = 1; part < SPLIT; part++)
          QK_UNROLL for (int i = 0; i < MI; i++)
            QK_UNROLL for (int at = 0; at < TILE_N / 2; at++)
              sum[i][at] = sum[i][at] + ld_shared<float>(own_buffers + (part - 1) * PART_BYTES + slot +
                                                         (i * (TILE_N / 2) + at) * 512);
        // Output is staged where those sums were, after the barrier that comes before that.
        exchange ^= 1;
      }

      // Asked anew for each tile, lest the many addresses made of it stay in registers through the products.
      const int lane_now = shuffle(lane, lane);
      Down rows[MI][2];
      QK_UNROLL for (int i = 0; i < MI; i++)
        QK_UNROLL for (int h = 0; h < 2; h++) fetch_factors(output, first + i * 64 + down + 8 * h, rows[i][h]);
      // Factors of a span's columns are on their way while the span before is finished.
      Across columns[2][SPAN / 4];
      auto fetch = [&](int turn) {
        QK_UNROLL for (int j = 0; j < SPAN / 4; j += 2)
          fetch_pair(output, second + turn % (PIECES * SPANS) * SPAN + j * 4 + across, columns[turn % 2][j],
                     columns[turn % 2][j + 1]);
      };
      fetch(0);
      QK_UNROLL for (int turn = 0; turn < MI * PIECES * SPANS; turn++) {
        const int i = turn / (PIECES * SPANS), within = turn % (PIECES * SPANS);
        const int piece = within / SPANS, span = within % SPANS;
        const int r = first + i * 64, c = second + within * SPAN;
        const Across(&of_columns)[SPAN / 4] = columns[turn % 2];
        if (turn + 1 < MI * PIECES * SPANS) fetch(turn + 1);
        ResidualPair held[SPAN / 8][2];
        if (RESIDUAL != RESIDUAL_NONE && TMA_STORE) {
          QK_UNROLL for (int j = 0; j < SPAN / 8; j++)
            QK_UNROLL for (int h = 0; h < 2; h++)
              held[j][h] = fetch_residuals(output, r + down + h * 8, c + j * 8 + across);
        }
        const uint32_t to = own_buffers + buffer * BUFFER_BYTES;
        if (TMA_STORE && span == 0) {
          if (thread == 0) store_wait_read<BUFFERS - 1>();  // the last store from this buffer has left it
          barrier_sync(1 + consumer, 128);
        }
        QK_UNROLL for (int j = 0; j < SPAN / 8; j += 2) {
          Pair pairs[4];  // columns 8 j with rows h = 0, 1, then columns 8 (j + 1)
          QK_UNROLL for (int q = 0; q < 4; q++) {
            const int h = q % 2, block = j + q / 2, at = within * (SPAN / 2) + block * 4 + h * 2;
            if (TMA_STORE) {
              float residual[2] = {0.0f, 0.0f};
              if (RESIDUAL != RESIDUAL_NONE) residual_values(output, held[block][h], residual);
              pairs[q] = finish_pair(output, sum[i][at], sum[i][at + 1], rows[i][h], of_columns[block * 2],
                                     of_columns[block * 2 + 1], residual);
            } else {
              QK_UNROLL for (int e = 0; e < 2; e++)
                store_one(output, d, sum[i][at + e], rows[i][h], of_columns[block * 2 + e], r + down + h * 8,
                          c + block * 8 + across + e);
            }
          }
          if (TMA_STORE) stage(to, warp, lane_now, span * (SPAN / 8) + j, pairs);
        }
        if (!TMA_STORE || span + 1 < SPANS) continue;
        fence_proxy_async();
        barrier_sync(1 + consumer, 128);
        if (thread == 0) {
          const int begin = second + piece * PIECE;
          if (!SWAP) {
            tma_store(&map_d, to, {begin, r});
          } else {
            tma_store(&map_d, to, {r, begin});
            if (ELEMENT_BYTES == 4) tma_store(&map_d, to + PIECE * STAGED_ROW, {r + 32, begin});
          }
          store_commit();
        }
        buffer = buffer + 1 == BUFFERS ? 0 : buffer + 1;
      }
      if (SPLIT > 1) {
        if (TMA_STORE) {
          if (thread == 0) store_wait_read<0>();
          barrier_sync(1 + consumer, 128);
        }
        if (lane == 0)
          QK_UNROLL for (int other = 1; other < SPLIT; other++)
            mbarrier_arrive_remote(map_to_rank(room + 8 * consumer, other));
      }
    }
    if (TMA_STORE && thread == 0) store_wait_read<0>();  // shared memory lasts as long as the block
  }
  if (SIZE > 1) {  // no block leaves while another may still write to it or arrive on its barriers
    cluster_arrive();
    cluster_wait();
  }
}
QK_EXPORT(gemm_blocks_sm90)
