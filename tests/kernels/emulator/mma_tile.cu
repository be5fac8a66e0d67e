// D[m, n] = A[m, k] @ B[n, k].T with mma.sync: one 64 x 64 tile a block, cp.async stages, ldmatrix. The smallest
// kernel with every part of a real one: a ring of stages, swizzled shared memory, ragged edges in M, N and K.
#include "instructions.h"

using namespace qk;
using Type = TYPE;
using Accumulator = Type::Accumulator;
#ifndef STAGES
#define STAGES 3
#endif
constexpr int TILE_M = 64, TILE_N = 64, ROW = 64, THREADS = 128;  // ROW: bytes of K a stage
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * ROW;

// Rows of 64 bytes, 16-byte chunks exchanged so that the eight rows of an ldmatrix fall into different banks.
QK_FUNCTION uint32_t chunk_offset(int row, int chunk) { return row * ROW + ((chunk ^ (row >> 1 & 3)) << 4); }

QK_KERNEL(THREADS, 1)
mma_tile(const uint8_t* a, const uint8_t* b, Accumulator* d, int m_size, int n_size, int row_bytes) {
  const uint32_t base = shared_base();
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int m0 = blockIdx.y * TILE_M, n0 = blockIdx.x * TILE_N;
  const int steps = (row_bytes + ROW - 1) / ROW;

  auto load = [&](int step) {
    QK_UNROLL for (int i = 0; i < (TILE_M + TILE_N) * 4 / THREADS; i++) {
      const int id = tid + i * THREADS, row = id / 4, chunk = id % 4, byte = step * ROW + chunk * 16;
      const bool is_a = row < TILE_M;
      const int source_row = is_a ? m0 + row : n0 + row - TILE_M;
      const bool inside = source_row < (is_a ? m_size : n_size) && byte < row_bytes;
      const uint8_t* source = is_a ? a : b;
      cp_async16(base + step % STAGES * STAGE_BYTES + chunk_offset(row, chunk),
                 source + (inside ? int64_t(source_row) * row_bytes + byte : 0), inside ? 16 : 0);
    }
  };

  Accumulator sum[2][4][4];  // this warp's 32 x 32: [16 rows][8 columns][register]
  QK_UNROLL for (int i = 0; i < 2; i++)
    QK_UNROLL for (int j = 0; j < 4; j++)
      QK_UNROLL for (int e = 0; e < 4; e++) sum[i][j][e] = 0;

  for (int step = 0; step < STAGES - 1; step++) {
    if (step < steps) load(step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; step++) {
    cp_async_wait<STAGES - 2>();
    block_sync();  // everyone's copies are in, and everyone has read the stage that is filled next
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    cp_async_commit();
    const uint32_t stage_a = base + step % STAGES * STAGE_BYTES, stage_b = stage_a + TILE_M * ROW;
    QK_UNROLL for (int k = 0; k < ROW / 32; k++) {
      uint32_t fragment_a[2][4], fragment_b[4][2];
      QK_UNROLL for (int i = 0; i < 2; i++)
        ldmatrix_x4(fragment_a[i][0], fragment_a[i][1], fragment_a[i][2], fragment_a[i][3],
                    stage_a + chunk_offset(warp % 2 * 32 + i * 16 + lane % 16, k * 2 + lane / 16));
      QK_UNROLL for (int j = 0; j < 4; j += 2)
        ldmatrix_x4(fragment_b[j][0], fragment_b[j][1], fragment_b[j + 1][0], fragment_b[j + 1][1],
                    stage_b + chunk_offset(warp / 2 * 32 + j * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
      QK_UNROLL for (int i = 0; i < 2; i++)
        QK_UNROLL for (int j = 0; j < 4; j++) mma<Type>(sum[i][j], fragment_a[i], fragment_b[j]);
    }
  }
  QK_UNROLL for (int i = 0; i < 2; i++)
    QK_UNROLL for (int j = 0; j < 4; j++)
      QK_UNROLL for (int e = 0; e < 4; e++) {
        const int row = m0 + warp % 2 * 32 + i * 16 + lane / 4 + e / 2 * 8;
        const int column = n0 + warp / 2 * 32 + j * 8 + lane % 4 * 2 + e % 2;
        if (row < m_size && column < n_size) st_global(d + int64_t(row) * n_size + column, sum[i][j][e]);
      }
}
QK_EXPORT(mma_tile)
