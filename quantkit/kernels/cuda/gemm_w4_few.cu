// D[m, n] = A[m, k] @ W[n, k].T for few rows of A (8 to 64 at a time): W of four bits is read once, as fast as memory
// gives it. For Hopper.
//
//   producer warp: bulk copies and TMA  ->  ring of STAGES in shared memory  ->  consumer warps: decode, mma.sync
//
// wgmma takes as long for 8 rows of A as for 64, so that it would bind before memory does; mma.sync does not. A warp
// multiplies MI groups of 16 rows of W (mma's M, from registers) by TILE_N rows of A (its N). WARPS_W warps lie side by
// side along W; WARPS_K sets of them take the stages in turn, so that one decodes while another multiplies and a third
// waits for memory, and add up their sums through shared memory at the end. A stage is always the same set's: who waits
// for a phase of a barrier has seen the one before it, and parity tells no more than two apart.
//
// A block has one tile: 16 * WARPS_W * MI rows of W and all of K. That is chosen so that there are just as many blocks as
// multiprocessors, or little fewer; then nobody waits for another block. The blocks of a CLUSTER fetch A's slabs in turn
// and multicast them to each other.
#include "epilogue.h"
#include "w4_decode.h"

using namespace qk;
using namespace qk::w4;

constexpr int WARPS = WARPS_W * WARPS_K, THREADS = 32 * (WARPS + 1);
constexpr int TILE = WARPS_W * MI;       // groups of 16 rows of W
constexpr int ROW = 128;                 // bytes of a slab's row of A
constexpr int GROUP_BYTES = 512;         // codes of 16 rows and a plane, 64 of K
static_assert(STAGES % WARPS_K == 0, "every stage is the same set's, round after round");
// Products of a sum follow each other at their latency. Where few warps hide it, odd depths of K have sums of their own.
constexpr int CHAINS = WARPS <= 16 && MI * TILE_N <= 32 ? 2 : 1;

constexpr int SIDES = GROUP_SLABS >= SLABS ? 1 : SLABS / GROUP_SLABS;  // of scales that a stage holds
constexpr int SHARED_BY = SLABS / SIDES;  // slabs of a stage, one after the other, that have the same scales
// Many warps have no registers to keep factors of columns through the products: those that add up sums fetch them while
// they wait for the others.
constexpr bool FETCH_EARLY = WARPS <= 20;
static_assert(GROUP_SLABS % SLABS == 0 || SLABS % GROUP_SLABS == 0, "stages and groups begin together");
constexpr int CODES_AT = SLABS * TILE_N * ROW;
constexpr int SCALES_AT = CODES_AT + SLABS * PLANES * TILE * GROUP_BYTES;
constexpr int SCALES_SIZE = TILE * 8 * PAIR_BYTES;
constexpr int ZEROS_AT = SCALES_AT + SIDES * SCALES_SIZE;
// Zero points are copied from an even group on: copies move 16 bytes.
constexpr int ZEROS_SIZE = ZEROS ? (TILE + 3) / 2 * 16 * GROUPS : 0;
constexpr int STAGE_BYTES = (ZEROS_AT + SIDES * ZEROS_SIZE + 1023) / 1024 * 1024;

QK_FUNCTION uint32_t swizzled(int row, int chunk) { return row * ROW + ((chunk ^ (row & 7)) << 4); }

QK_CLUSTER_KERNEL(THREADS, 1, CLUSTER)
gemm_w4_few(const QK_GRID_CONSTANT TensorMap map_a, const uint8_t* codes, const uint8_t* scales, const uint8_t* zeros,
            uint8_t* d, EPILOGUE_PARAMETERS, int planes) {
  const uint32_t base = shared_base(), full = base + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp = shuffle(tid / 32, 0);  // the compiler sees that a warp's threads agree
  const int groups = (n_size + 63) / 64 * 4, first = blockIdx.x * TILE;
  const int left = groups - first, count = left < 0 ? 0 : left < TILE ? left : TILE;
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  const int slabs = (planes + PLANES - 1) / PLANES, steps = (slabs + SLABS - 1) / SLABS, m0 = blockIdx.y * TILE_N;

  if (tid == THREADS - 1) {
    prefetch_tensor_map(&map_a);
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, WARPS_W * CLUSTER);
    }
    fence_mbarrier_init();
  }
  if (CLUSTER > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    block_sync();
  }

  int s = 0;
  if (warp == WARPS) {
    if (elect_one()) {  // one thread, and the compiler knows: copies then need no loop over lanes
      uint32_t parity = 1;  // the first round finds every stage empty
      const int even = first & ~1, zero_groups = ((first + count + 1) & ~1) - even;
      QK_ROLLED for (int step = 0; step < steps; step++) {
        const uint32_t stage = base + s * STAGE_BYTES, barrier = full + 8 * s;
        mbarrier_wait_ring(empty + 8 * s, parity);
        mbarrier_arrive_expect(barrier, CODES_AT + count * (SLABS * PLANES * GROUP_BYTES + SIDES * 8 * PAIR_BYTES) +
                                            (ZEROS ? SIDES * zero_groups * 8 * GROUPS : 0));
        QK_UNROLL for (int i = 0; i < SLABS; i++) {
          // Beyond K lie zeros of A: any codes and scales will do.
          const int slab = step * SLABS + i, inside = slab < slabs ? slab : slabs - 1;
          if (CLUSTER == 1)
            tma_load(stage + i * TILE_N * ROW, &map_a, barrier, {slab * SLAB, m0});
          else if (i % CLUSTER == rank)
            tma_load_multicast(stage + i * TILE_N * ROW, &map_a, barrier, (1 << CLUSTER) - 1, {slab * SLAB, m0});
          if (CLUSTER > 1 && count == 0) continue;
          QK_UNROLL for (int p = 0; p < PLANES; p++) {
            const int plane = slab * PLANES + p;  // the last slab may have but one
            bulk_load(stage + CODES_AT + (i * PLANES + p) * TILE * GROUP_BYTES,
                      codes + (int64_t(plane < planes ? plane : planes - 1) * groups + first) * GROUP_BYTES,
                      count * GROUP_BYTES, barrier);
          }
          if (i % SHARED_BY == 0 && (SCALES != SCALES_NONE || ZEROS)) {
            const int number = i / SHARED_BY;
            const int64_t side = inside / GROUP_SLABS;
            if (SCALES != SCALES_NONE)
              bulk_load(stage + SCALES_AT + number * SCALES_SIZE, scales + (side * groups + first) * (8 * PAIR_BYTES),
                        count * 8 * PAIR_BYTES, barrier);
            if (ZEROS)
              bulk_load(stage + ZEROS_AT + number * ZEROS_SIZE, zeros + (side * groups + even) * (8 * GROUPS),
                        zero_groups * 8 * GROUPS, barrier);
          }
        }
        if (++s == STAGES) {
          s = 0;
          parity ^= 1;
        }
      }
    }
  } else {
    const int along_w = warp % WARPS_W, along_k = warp / WARPS_W;
    const epilogue::Output output = EPILOGUE_OUTPUT;
    // Sums 4 j + 2 h + e are row 8 j + 2 (lane % 4) + e of D, column lane / 4 + 8 h of the group.
    const int n0 = (first + along_w * MI) * 16 + lane / 4, across = lane % 4 * 2;
    epilogue::ColumnFactors columns[MI][2];
    auto fetch_columns = [&] {
      QK_UNROLL for (int i = 0; i < MI; i++)
        QK_UNROLL for (int h = 0; h < 2; h++) columns[i][h] = epilogue::column_factors(output, n0 + i * 16 + 8 * h);
    };
    if (FETCH_EARLY) fetch_columns();
    Sum sums[CHAINS][MI][TILE_N / 8][4];
    QK_UNROLL for (int c = 0; c < CHAINS; c++)
      QK_UNROLL for (int i = 0; i < MI; i++)
        QK_UNROLL for (int j = 0; j < TILE_N / 8; j++)
          QK_UNROLL for (int e = 0; e < 4; e++) sums[c][i][j][e] = 0;
    // Where this lane reads in a stage; the rest is known when it is compiled.
    const int group0 = along_w * MI;
    const uint32_t codes_at = CODES_AT + group0 * GROUP_BYTES + lane * 16;
    const uint32_t scales_at = SCALES_AT + (group0 * 8 + lane / 4) * PAIR_BYTES;
    const uint32_t zeros_at = ZEROS_AT + (group0 * 8 + lane / 4 + first % 2 * 8) * GROUPS;
    const uint32_t a_at = swizzled(lane % 8, lane / 8);
    const uint32_t above = bits_above(planes);
    uint32_t parity = 0;
    s = along_k;
    QK_ROLLED for (int step = along_k; step < steps; step += WARPS_K) {
      mbarrier_wait_ring(full + 8 * s, parity);
      const uint32_t stage = base + s * STAGE_BYTES;
      uint32_t raw[MI][PAIR_WORDS + 1], zero[MI][GROUPS];
      QK_UNROLL for (int o = 0; o < SLABS; o++) {
        const int side = o / SHARED_BY;
        U32x4 words[MI][PLANES];
        QK_UNROLL for (int i = 0; i < MI; i++) {
          QK_UNROLL for (int plane = 0; plane < PLANES; plane++)
            words[i][plane] = ld_shared<U32x4>(stage + codes_at + ((o * PLANES + plane) * TILE + i) * GROUP_BYTES);
          if (o % SHARED_BY != 0) continue;
          load_pair(raw[i], stage + scales_at + side * SCALES_SIZE + i * 8 * PAIR_BYTES, above);
          if constexpr (ZEROS)
            QK_UNROLL for (int g = 0; g < GROUPS; g++)
              zero[i][g] = ld_shared<uint8_t>(stage + zeros_at + side * ZEROS_SIZE + i * 8 * GROUPS + g);
        }
        QK_UNROLL for (int half = 0; half < 2; half++) {
          uint32_t of_a[TILE_N / 8][4];  // 32 of K of eight rows of A
          QK_UNROLL for (int j = 0; j < TILE_N / 8; j++)
            ldmatrix_x4(of_a[j][0], of_a[j][1], of_a[j][2], of_a[j][3],
                        ((stage + a_at) ^ half * 64) + (o * TILE_N + j * 8) * ROW);
          QK_UNROLL for (int k = 0; k < 2; k++)
            QK_UNROLL for (int i = 0; i < MI; i++) {
              Registers<uint32_t, 4> fragment;
              decode_depth(words[i], half * 2 + k, raw[i], zero[i], fragment);
              QK_UNROLL for (int j = 0; j < TILE_N / 8; j++)
                mma<Type>(sums[k % CHAINS][i][j], fragment.value, {of_a[j][k * 2], of_a[j][k * 2 + 1]});
            }
        }
      }
      if (lane < CLUSTER) {  // the multicast of every block of the cluster writes here, and waits for all of them
        if (CLUSTER == 1) mbarrier_arrive_ring(empty + 8 * s);
        else mbarrier_arrive_ring(map_to_rank(empty + 8 * s, lane));
      }
      s += WARPS_K;
      if (s >= STAGES) {
        s -= STAGES;
        parity ^= 1;
      }
    }

    Sum(&sum)[MI][TILE_N / 8][4] = sums[0];
    if (CHAINS > 1)
      QK_UNROLL for (int i = 0; i < MI; i++)
        QK_UNROLL for (int j = 0; j < TILE_N / 8; j++)
          QK_UNROLL for (int e = 0; e < 4; e++) sum[i][j][e] += sums[CHAINS - 1][i][j][e];

    if (!FETCH_EARLY && along_k == 0) fetch_columns();
    if constexpr (WARPS_K > 1) {
      constexpr int VECTORS = MI * (TILE_N / 8);
      barrier_sync(1, 32 * WARPS);  // everyone has read all of the ring
      const uint32_t at = base + (along_w * VECTORS * 32 + lane) * 16;
      if (along_k > 0)
        QK_UNROLL for (int v = 0; v < VECTORS; v++) {
          U32x4 four;
          memcpy(&four, sum[v / (TILE_N / 8)][v % (TILE_N / 8)], 16);
          st_shared(at + ((along_k - 1) * WARPS_W * VECTORS + v) * 512, four);
        }
      barrier_sync(1, 32 * WARPS);
      QK_UNROLL for (int other = 0; other < (along_k > 0 ? 0 : WARPS_K - 1); other++)
        QK_UNROLL for (int v = 0; v < VECTORS; v++) {
          const U32x4 four = ld_shared<U32x4>(at + (other * WARPS_W * VECTORS + v) * 512);
          Sum part[4];
          memcpy(part, &four, 16);
          QK_UNROLL for (int e = 0; e < 4; e++) sum[v / (TILE_N / 8)][v % (TILE_N / 8)][e] += part[e];
        }
    }
    if (along_k == 0)
      QK_UNROLL for (int j = 0; j < TILE_N / 8; j++)
      QK_UNROLL for (int e = 0; e < 2; e++) {
        const int row = m0 + j * 8 + across + e;
        const epilogue::RowFactors of_row = epilogue::row_factors(output, row);
        QK_UNROLL for (int i = 0; i < MI; i++)
          QK_UNROLL for (int h = 0; h < 2; h++)
            epilogue::store_element(output, d, rebased(sum[i][j][h * 2 + e]), of_row, columns[i][h], row,
                                    n0 + i * 16 + 8 * h);
      }
  }
  if (CLUSTER > 1) {  // no block leaves while another may still arrive on its barriers
    cluster_arrive();
    cluster_wait();
  }
}
QK_EXPORT(gemm_w4_few)
