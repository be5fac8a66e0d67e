// D[m, n] = A[m, k] @ B[n, k].T for sm_90a, with scales, bias and activation, for int8, e4m3 and bf16.
//
//   producer warpgroup            consumer warpgroups                       copy engine
//   one thread: TMA loads  ->  ring of STAGES tiles in shared memory
//                              wgmma, accumulators in registers
//                              scale, round, stmatrix  ->  two buffers  ->  TMA store
//
// Blocks stay and take tile after tile: while the consumers finish one tile the producer fills the ring for the next,
// and stores drain behind the next tile's products. A stage holds 128 bytes of K of TILE_M rows of the first operand
// and of TILE_N rows of the second, in the 128-byte swizzle that TMA writes and wgmma reads.
//
// The first operand lies on wgmma's M (64 rows an instruction), the second on its N (8 to 256). Usually they are A
// and B. SWAP exchanges them, for few rows of A: the weights then fill the 64 rows and only the tile of A shrinks.
//
// Work: TILE_M = 64 * MI rows a consumer. Cooperative: the consumers split one tile. PINGPONG: each takes a tile of
// its own and the products of one hide the epilogue of the other. With CLUSTER 2 two blocks with neighbouring first
// tiles fetch half of the second tile each and multicast it to both.
#include "instructions.h"

using namespace qk;
using Type = TYPE;
using Accumulator = Type::Accumulator;

#define OUTPUT_S32 0
#define OUTPUT_F32 1
#define OUTPUT_BF16 2
#define OUTPUT_F16 3
// SCALE of rows or columns: none, one for all, one each.
#define SCALE_NONE 0
#define SCALE_ONE 1
#define SCALE_EACH 2

constexpr int ROW = 128;                                 // bytes of K in a stage
constexpr int SHARED_ROWS = PINGPONG ? 1 : CONSUMERS;    // consumers that split a tile
constexpr int TILE_M = 64 * MI * SHARED_ROWS;
constexpr int SECOND = TILE_M * ROW;                     // where the second operand lies in a stage
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * ROW;
constexpr int ELEMENT_BYTES = OUTPUT == OUTPUT_BF16 || OUTPUT == OUTPUT_F16 ? 2 : 4;

// The epilogue works in pieces of at most 8 KB of output, PIECE columns of the accumulators each.
constexpr int BUFFER_BYTES = 8192;
constexpr int WIDEST = SWAP ? (ELEMENT_BYTES == 2 ? 64 : 32) : ROW / ELEMENT_BYTES;
constexpr int PIECE = TILE_N < WIDEST ? TILE_N : WIDEST;
constexpr int PIECES = TILE_N / PIECE;
// Narrow tiles have registers to hold their factors through the products, and are too short to wait for them after.
constexpr bool FETCH_EARLY = MI * TILE_N <= 64;
static_assert(TILE_N % PIECE == 0, "TILE_N is a whole number of pieces");
static_assert(SWAP || !TMA_STORE || PIECE == WIDEST, "a stored row is 128 bytes");
static_assert(PIECE % 16 == 0, "stmatrix writes 16 columns");

// Where the 16 bytes `chunk` of row `row` lie in the 128-byte swizzle.
QK_FUNCTION uint32_t swizzled(int row, int chunk) { return row * ROW + ((chunk ^ (row & 7)) << 4); }

QK_FUNCTION uint64_t descriptor(uint32_t address) { return matrix_descriptor(address, 0, 1024, Swizzle::BYTES_128); }
// What to add to a descriptor to move it on: its address counts 16 bytes and has room for all of shared memory.
QK_FUNCTION uint64_t advance(int bytes) { return bytes >> 4; }

// What the epilogue knows of the tensors.
struct Output {
  const float* row_scale;     // of rows of D: one or m_size
  const float* column_scale;  // of columns of D: one or n_size
  const float* bias;          // n_size
  int m_size, n_size;
};

// Scales and bias that a row or a column brings to its elements.
struct Factors {
  float scale, bias;
};

QK_FUNCTION Factors row_factors(const Output& output, int row) {
  if (ROW_SCALE == SCALE_NONE) return {1.0f, 0.0f};
  if (ROW_SCALE == SCALE_ONE) return {ld_global(output.row_scale), 0.0f};
  return {row < output.m_size ? ld_global(output.row_scale + row) : 0.0f, 0.0f};
}
QK_FUNCTION Factors column_factors(const Output& output, int column) {
  Factors factors{1.0f, 0.0f};
  if (COLUMN_SCALE == SCALE_ONE) factors.scale = ld_global(output.column_scale);
  if (COLUMN_SCALE == SCALE_EACH) factors.scale = column < output.n_size ? ld_global(output.column_scale + column) : 0.0f;
  if (BIAS) factors.bias = column < output.n_size ? ld_global(output.bias + column) : 0.0f;
  return factors;
}
// Of index i along the accumulators' columns, and along their rows.
QK_FUNCTION Factors across_factors(const Output& o, int i) { return SWAP ? row_factors(o, i) : column_factors(o, i); }
QK_FUNCTION Factors down_factors(const Output& o, int i) { return SWAP ? column_factors(o, i) : row_factors(o, i); }

// Two neighbours across, the first of them even. Where D's rows are whole 16 bytes n_size is even, so that both
// columns exist or neither, and one load brings both.
QK_FUNCTION void across_pair(const Output& o, int i, Factors& low, Factors& high) {
  if constexpr (SWAP || !TMA_STORE) {
    low = across_factors(o, i);
    high = across_factors(o, i + 1);
  } else {
    low = high = {1.0f, 0.0f};
    const bool inside = i < o.n_size;
    auto load = [&](const float* from) {
      return inside ? ld_global(reinterpret_cast<const U32x2*>(from + i)) : U32x2{0, 0};
    };
    if (COLUMN_SCALE == SCALE_ONE) low.scale = high.scale = ld_global(o.column_scale);
    if (COLUMN_SCALE == SCALE_EACH) {
      const U32x2 pair = load(o.column_scale);
      low.scale = portable::bits_float(pair.x);
      high.scale = portable::bits_float(pair.y);
    }
    if (BIAS) {
      const U32x2 pair = load(o.bias);
      low.bias = portable::bits_float(pair.x);
      high.bias = portable::bits_float(pair.y);
    }
  }
}

QK_FUNCTION float finish(Accumulator sum, Factors down, Factors across) {
  const Factors row = SWAP ? across : down, column = SWAP ? down : across;
  float x = static_cast<float>(sum);
  if (ROW_SCALE != SCALE_NONE) x = x * row.scale;
  if (COLUMN_SCALE != SCALE_NONE) x = x * column.scale;
  if (BIAS) x = x + column.bias;
  if (RELU) x = x < 0.0f ? 0.0f : x;
  return x;
}
QK_FUNCTION uint32_t pack(float low, float high) {
  return OUTPUT == OUTPUT_F16 ? pack_f16(low, high) : pack_bf16(low, high);
}
QK_FUNCTION uint32_t word(Accumulator sum, Factors down, Factors across) {
  if constexpr (OUTPUT == OUTPUT_S32) {
    return static_cast<uint32_t>(sum);
  } else {
    return portable::float_bits(finish(sum, down, across));
  }
}

// The tile that comes `index`-th: GROUP tiles along the first operand, then the next along the second, so that the
// blocks at work at one time share as few rows of both as can be, and those stay in L2.
struct Place { int first, second; };
QK_FUNCTION Place place_of(int index, int tiles_first, int tiles_second) {
  const int group = index / (GROUP * tiles_second), start = group * GROUP;
  const int height = tiles_first - start < GROUP ? tiles_first - start : GROUP;
  const int within = index - group * GROUP * tiles_second;
  return {start + within % height, within / height};
}

QK_CLUSTER_KERNEL(128 * (CONSUMERS + 1), 1, CLUSTER)
gemm_sm90(const QK_GRID_CONSTANT TensorMap map_first, const QK_GRID_CONSTANT TensorMap map_second,
          const QK_GRID_CONSTANT TensorMap map_d, uint8_t* d, const float* row_scale, const float* column_scale,
          const float* bias, int m_size, int n_size, int row_bytes) {
  const uint32_t base = shared_base(), buffers = base + STAGES * STAGE_BYTES;
  const uint32_t full = buffers + (TMA_STORE ? CONSUMERS * 2 * BUFFER_BYTES : 0), empty = full + 8 * STAGES;
  const uint32_t turns = empty + 8 * STAGES;  // PINGPONG: whose products may start
  const int tid = threadIdx.x;
  const int warpgroup = shuffle(tid / 128, 0);  // the compiler sees that a warp's threads agree
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  const int steps = (row_bytes + ROW - 1) / ROW;
  const int first_size = SWAP ? n_size : m_size, second_size = SWAP ? m_size : n_size;
  const int tiles_first = (first_size + TILE_M * CLUSTER - 1) / (TILE_M * CLUSTER);
  const int tiles_second = (second_size + TILE_N - 1) / TILE_N;
  const int tiles = tiles_first * tiles_second;
  const int cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;

  if (tid == 0) {
    prefetch_tensor_map(&map_first);
    prefetch_tensor_map(&map_second);
    if (TMA_STORE) prefetch_tensor_map(&map_d);
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, SHARED_ROWS * CLUSTER);
    }
    mbarrier_init(turns, 1);
    mbarrier_init(turns + 8, 1);
    fence_mbarrier_init();
  }
  if (CLUSTER > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    block_sync();
  }

  if (warpgroup == 0) {
    if (CONSUMERS > 1) decrease_registers<40>();
    if (tid == 0) {
      int s = 0;
      uint32_t parity = 1;  // the first round finds every stage empty
      for (int tile = cluster; tile < tiles; tile += clusters) {
        const Place place = place_of(tile, tiles_first, tiles_second);
        const int first = (place.first * CLUSTER + rank) * TILE_M, second = place.second * TILE_N;
        for (int step = 0; step < steps; step++) {
          const uint32_t stage = base + s * STAGE_BYTES;
          mbarrier_wait_ring(empty + 8 * s, parity);
          mbarrier_arrive_expect(full + 8 * s, STAGE_BYTES);
          const int k = step * (ROW / 32) * Type::depth;
          tma_load(stage, &map_first, full + 8 * s, {k, first});
          if (CLUSTER == 1) {
            tma_load(stage + SECOND, &map_second, full + 8 * s, {k, second});
          } else {
            const int part = TILE_N / CLUSTER * rank;
            tma_load_multicast(stage + SECOND + part * ROW, &map_second, full + 8 * s, (1 << CLUSTER) - 1,
                               {k, second + part});
          }
          if (++s == STAGES) {
            s = 0;
            parity ^= 1;
          }
        }
      }
    }
  } else {
    if (CONSUMERS > 1) increase_registers<232>();
    const int consumer = warpgroup - 1, thread = tid % 128, warp = thread / 32, lane = tid % 32;
    const Output output{row_scale, column_scale, bias, m_size, n_size};
    // A stage is free when the consumers of every block that the multicast reaches have read it.
    auto release = [&](int s) {
      if (thread < CLUSTER) {
        if (CLUSTER == 1) mbarrier_arrive(empty + 8 * s);
        else mbarrier_arrive_ring(map_to_rank(empty + 8 * s, thread));
      }
    };
    int s = 0, buffer = 0, round = 0;
    uint32_t parity = 0;
    auto skip = [&](int count) {  // PINGPONG: past the stages that the other consumer takes
      const int rounds = (s + count) / STAGES;
      s += count - rounds * STAGES;
      parity ^= rounds & 1;
    };
    if (PINGPONG && consumer == 1) skip(steps);
    for (int tile = cluster + (PINGPONG ? consumer * clusters : 0); tile < tiles;
         tile += (PINGPONG ? CONSUMERS : 1) * clusters) {
      const Place place = place_of(tile, tiles_first, tiles_second);
      const int first = (place.first * CLUSTER + rank) * TILE_M + (PINGPONG ? 0 : consumer * MI * 64);
      const int second = place.second * TILE_N;
      // Consumer 0 goes first: its round r follows consumer 1's round r - 1.
      if (PINGPONG) mbarrier_wait_ring(turns + 8 * consumer, (round & 1) ^ (consumer == 0));

      // Row 16 warp + lane / 4 + 8 h, columns 8 j + 2 (lane % 4) + e of the accumulators are this thread's.
      const int down = warp * 16 + lane / 4, across = lane % 4 * 2;
      // Factors of a piece's columns are fetched while the piece before is on its way.
      constexpr int EACH = PIECE / 4;
      Factors columns[EACH], rows[MI][2];
      auto fetch = [&](int piece) {
        QK_UNROLL for (int j = 0; j < EACH; j += 2)
          across_pair(output, second + piece * PIECE + j * 4 + across, columns[j], columns[j + 1]);
      };
      auto fetch_first = [&] {
        fetch(0);
        QK_UNROLL for (int i = 0; i < MI; i++)
          QK_UNROLL for (int h = 0; h < 2; h++) rows[i][h] = down_factors(output, first + i * 64 + down + 8 * h);
      };
      if (FETCH_EARLY) fetch_first();

      Registers<Accumulator, TILE_N / 2> sum[MI];
      int previous = 0;
      for (int step = 0; step < steps; step++) {
        mbarrier_wait_ring(full + 8 * s, parity);
        const uint64_t stage = descriptor(base) + advance(s * STAGE_BYTES);
        const uint64_t of_first = stage + advance(PINGPONG ? 0 : consumer * MI * 64 * ROW);
        const uint64_t of_second = stage + advance(SECOND);
        wgmma_fence();
        QK_UNROLL for (int k = 0; k < ROW / 32; k++)
          QK_UNROLL for (int i = 0; i < MI; i++)
            wgmma<Type, TILE_N>(sum[i], of_first + advance(i * 64 * ROW + k * 32), of_second + advance(k * 32),
                                step + k > 0);
        wgmma_commit();
        if (step > 0) {
          wgmma_wait<1>();
          release(previous);
        }
        previous = s;
        if (++s == STAGES) {
          s = 0;
          parity ^= 1;
        }
      }
      if (PINGPONG) {
        if (thread == 0) mbarrier_arrive(turns + 8 * (consumer ^ 1));
        skip(steps);
        round++;
      }

      if (!FETCH_EARLY) fetch_first();
      wgmma_wait<0>();
      release(previous);

      QK_UNROLL for (int turn = 0; turn < MI * PIECES; turn++) {
        const int i = turn / PIECES, piece = turn % PIECES;
        if (!TMA_STORE) {
          QK_UNROLL for (int j = 0; j < PIECE / 8; j++)
            QK_UNROLL for (int e = 0; e < 4; e++) {
              const int r = first + i * 64 + down + e / 2 * 8;
              const int c = second + piece * PIECE + j * 8 + across + e % 2;
              const int row = SWAP ? c : r, column = SWAP ? r : c;
              if (row < m_size && column < n_size) {
                const int64_t at = int64_t(row) * n_size + column;
                const Accumulator value = sum[i][(piece * (PIECE / 8) + j) * 4 + e];
                const Factors of_row = rows[i][e / 2], of_column = columns[j * 2 + e % 2];
                if constexpr (ELEMENT_BYTES == 4) {
                  st_global(reinterpret_cast<uint32_t*>(d) + at, word(value, of_row, of_column));
                } else {
                  st_global(reinterpret_cast<uint16_t*>(d) + at,
                            static_cast<uint16_t>(pack(finish(value, of_row, of_column), 0.0f)));
                }
              }
            }
          if (turn + 1 < MI * PIECES) fetch((turn + 1) % PIECES);
        } else {
          const uint32_t to = buffers + (consumer * 2 + buffer) * BUFFER_BYTES;
          if (thread == 0) store_wait_read<1>();  // the store before last has left this buffer
          barrier_sync(1 + consumer, 128);
          QK_UNROLL for (int j = 0; j < PIECE / 8; j += 2) {
            const int at = (piece * (PIECE / 8) + j) * 4;
            if constexpr (ELEMENT_BYTES == 2) {
              uint32_t packed[4];  // columns 8 j with rows h = 0, 1, then columns 8 (j + 1)
              QK_UNROLL for (int q = 0; q < 4; q++)
                packed[q] = pack(finish(sum[i][at + q * 2], rows[i][q % 2], columns[(j + q / 2) * 2]),
                                 finish(sum[i][at + q * 2 + 1], rows[i][q % 2], columns[(j + q / 2) * 2 + 1]));
              const int matrix = lane / 8;
              if constexpr (SWAP) {
                const uint32_t address = to + swizzled((j + matrix / 2) * 8 + lane % 8, warp * 2 + matrix % 2);
                stmatrix_x4_transposed(address, packed[0], packed[1], packed[2], packed[3]);
              } else {
                const uint32_t address = to + swizzled(warp * 16 + matrix % 2 * 8 + lane % 8, j + matrix / 2);
                stmatrix_x4(address, packed[0], packed[1], packed[2], packed[3]);
              }
            } else {
              QK_UNROLL for (int q = 0; q < 4; q++) {
                const int h = q % 2, c = (j + q / 2) * 8 + across, r = down + 8 * h;
                const uint32_t low = word(sum[i][at + q * 2], rows[i][h], columns[(j + q / 2) * 2]);
                const uint32_t high = word(sum[i][at + q * 2 + 1], rows[i][h], columns[(j + q / 2) * 2 + 1]);
                if constexpr (SWAP) {  // two boxes of 32 columns of D
                  const uint32_t box = to + r / 32 * PIECE * ROW;
                  st_shared(box + swizzled(c, r % 32 / 4) + r % 4 * 4, low);
                  st_shared(box + swizzled(c + 1, r % 32 / 4) + r % 4 * 4, high);
                } else {
                  st_shared(to + swizzled(r, c / 4) + c % 4 * 4, U32x2{low, high});
                }
              }
            }
          }
          if (turn + 1 < MI * PIECES) fetch((turn + 1) % PIECES);
          fence_proxy_async();
          barrier_sync(1 + consumer, 128);
          if (thread == 0) {
            const int r = first + i * 64, c = second + piece * PIECE;
            if (!SWAP) {
              tma_store(&map_d, to, {c, r});
            } else {
              tma_store(&map_d, to, {r, c});
              if (ELEMENT_BYTES == 4) tma_store(&map_d, to + PIECE * ROW, {r + 32, c});
            }
            store_commit();
          }
          buffer ^= 1;
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
QK_EXPORT(gemm_sm90)
