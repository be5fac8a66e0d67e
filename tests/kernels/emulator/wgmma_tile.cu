// D[m, n] = A[m, k] @ B[n, k].T for sm_90a: TMA with 128-byte swizzle into an mbarrier ring, one producer warpgroup,
// two consumer warpgroups with wgmma, persistent blocks, and with CLUSTER 2 one half of B from each block's multicast.
#include "instructions.h"

using namespace qk;
using Type = TYPE;
using Accumulator = Type::Accumulator;
#ifndef TILE_N
#define TILE_N 64
#endif
#ifndef STAGES
#define STAGES 3
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
constexpr int TILE_M = 128, ROW = 128;  // ROW: bytes of K a stage, the width of the swizzle
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * ROW;
constexpr int CONSUMERS = 2;

QK_FUNCTION uint64_t descriptor(uint32_t address) { return matrix_descriptor(address, 0, 1024, Swizzle::BYTES_128); }

QK_CLUSTER_KERNEL(384, 1, CLUSTER)
wgmma_tile(const QK_GRID_CONSTANT TensorMap map_a, const QK_GRID_CONSTANT TensorMap map_b, Accumulator* d, int m_size,
           int n_size, int row_bytes) {
  const uint32_t base = shared_base(), full = base + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
  const int tid = threadIdx.x, warpgroup = tid / 128;
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  const int steps = (row_bytes + ROW - 1) / ROW;
  // The blocks of a cluster take neighbouring tiles along M, so they share the tile of B.
  const int tiles_m = (m_size + TILE_M * CLUSTER - 1) / (TILE_M * CLUSTER), tiles_n = (n_size + TILE_N - 1) / TILE_N;
  const int cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;

  if (tid == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, CONSUMERS * CLUSTER);
    }
    fence_mbarrier_init();
  }
  if (CLUSTER > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    block_sync();
  }

  if (warpgroup == 0) {
    decrease_registers<40>();
    if (tid == 0) {
      int turn = 0;
      for (int tile = cluster; tile < tiles_m * tiles_n; tile += clusters) {
        const int m0 = (tile % tiles_m * CLUSTER + rank) * TILE_M, n0 = tile / tiles_m * TILE_N;
        for (int step = 0; step < steps; step++, turn++) {
          const int s = turn % STAGES;
          const uint32_t stage = base + s * STAGE_BYTES;
          mbarrier_wait(empty + 8 * s, (turn / STAGES & 1) ^ 1);
          mbarrier_arrive_expect(full + 8 * s, STAGE_BYTES);
          const int k = step * ROW / (32 / Type::depth);
          tma_load(stage, &map_a, full + 8 * s, {k, m0});
          if (CLUSTER == 1) {
            tma_load(stage + TILE_M * ROW, &map_b, full + 8 * s, {k, n0});
          } else {
            const int part = TILE_N / CLUSTER * rank;
            tma_load_multicast(stage + TILE_M * ROW + part * ROW, &map_b, full + 8 * s, (1 << CLUSTER) - 1,
                               {k, n0 + part});
          }
        }
      }
    }
  } else {
    increase_registers<232>();
    const int consumer = warpgroup - 1, warp = tid % 128 / 32, lane = tid % 32;
    // A stage is free when the consumers of every block that the multicast reaches have read it.
    auto release = [&](int turn) {
      if (tid % 128 < CLUSTER) {
        const uint32_t barrier = empty + 8 * (turn % STAGES);
        if (CLUSTER == 1) mbarrier_arrive(barrier);
        else mbarrier_arrive_remote(map_to_rank(barrier, tid % 128));
      }
    };
    int turn = 0;
    for (int tile = cluster; tile < tiles_m * tiles_n; tile += clusters) {
      const int m0 = (tile % tiles_m * CLUSTER + rank) * TILE_M, n0 = tile / tiles_m * TILE_N;
      Registers<Accumulator, TILE_N / 2> sum;
      for (int step = 0; step < steps; step++, turn++) {
        const int s = turn % STAGES;
        mbarrier_wait(full + 8 * s, turn / STAGES & 1);
        const uint32_t stage_a = base + s * STAGE_BYTES + consumer * 64 * ROW;
        const uint32_t stage_b = base + s * STAGE_BYTES + TILE_M * ROW;
        wgmma_fence();
        QK_UNROLL for (int k = 0; k < ROW / 32; k++)
          wgmma<Type, TILE_N>(sum, descriptor(stage_a + k * 32), descriptor(stage_b + k * 32), step + k > 0);
        wgmma_commit();
        if (step > 0) {
          wgmma_wait<1>();
          release(turn - 1);
        }
      }
      wgmma_wait<0>();
      release(turn - 1);
      QK_UNROLL for (int j = 0; j < TILE_N / 8; j++)
        QK_UNROLL for (int e = 0; e < 4; e++) {
          const int row = m0 + consumer * 64 + warp * 16 + lane / 4 + e / 2 * 8;
          const int column = n0 + j * 8 + lane % 4 * 2 + e % 2;
          if (row < m_size && column < n_size) st_global(d + int64_t(row) * n_size + column, sum[j * 4 + e]);
        }
    }
  }
  if (CLUSTER > 1) {  // no block leaves while another may still arrive on its barriers
    cluster_arrive();
    cluster_wait();
  }
}
QK_EXPORT(wgmma_tile)
