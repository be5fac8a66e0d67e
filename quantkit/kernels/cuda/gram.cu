// G[i, j] += Σ x[t, i] x[t, j] over tokens t, of 16-bit floats: products are exact in float32, sums are float32 over the
// tokens of a launch, and are added to a float64 matrix. Elements i <= j alone: the rest is their mirror image.
//
// A block has a tile of 128 x 128, eight warps 64 x 32 of it each. Tokens are K of mma.sync, and lie along the rows of x:
// 32 rows of 128 channels are staged for the tile's rows and for its columns, and ldmatrix transposes them. Chunk c (16
// bytes) of row t lies at place c xor (t mod 8), so that the eight rows it reads at a time are in eight places.
#include "instructions.h"

using namespace qk;

constexpr int TILE = 128, TOKENS = 32, THREADS = 256, CHUNKS = TILE / 8;
constexpr int PANEL_BYTES = TOKENS * TILE * 2, STAGE_BYTES = 2 * PANEL_BYTES;

// Blocks of a multiprocessor. What the compiler makes for Blackwell needs more than 128 registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int AT_ONCE = 1;
#else
constexpr int AT_ONCE = 2;
#endif

// Where chunk c of row t of a panel lies.
QK_FUNCTION uint32_t place(int t, int c) { return t * (TILE * 2) + ((c ^ (t & 7)) * 16); }

// x: `tokens` rows of `pitch` elements, at multiples of 16 bytes; elements from `size` on are zeros. The first tile's
// columns are the grid's fastest.
QK_KERNEL(THREADS, AT_ONCE)
gram(const uint16_t* x, double* g, int tokens, int size, int pitch) {
  const uint32_t shared = shared_base();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int tiles = (size + TILE - 1) / TILE;
  int row = 0, column = blockIdx.x;
  while (column >= tiles - row) column -= tiles - row, row++;
  column += row;

  // A thread copies one chunk of every 16th row, of both panels.
  constexpr int APART = THREADS / CHUNKS;
  const int own_row = thread / CHUNKS, own_chunk = thread % CHUNKS;
  auto copy = [&](int stage, int step) {
    const uint32_t to = shared + stage * STAGE_BYTES + place(own_row, own_chunk);
    QK_UNROLL for (int panel = 0; panel < 2; panel++) {
      const int channel = (panel ? column : row) * TILE + own_chunk * 8;
      QK_UNROLL for (int i = 0; i < TOKENS / APART; i++) {
        const int token = step * TOKENS + own_row + i * APART;
        const bool is_there = token < tokens && channel < pitch;
        cp_async16(to + panel * PANEL_BYTES + i * APART * TILE * 2,
                   is_there ? x + static_cast<int64_t>(token) * pitch + channel : x, is_there ? 16 : 0);
      }
    }
  };

  float sums[4][4][4];  // of 16 rows, of 8 columns
  QK_UNROLL for (int m = 0; m < 4; m++) {
    QK_UNROLL for (int n = 0; n < 4; n++) {
      QK_UNROLL for (int i = 0; i < 4; i++) sums[m][n][i] = 0.0f;
    }
  }
  const int steps = (tokens + TOKENS - 1) / TOKENS, first_row = warp % 2 * 64, first_column = warp / 2 * 32;
  QK_UNROLL for (int stage = 0; stage < STAGES - 1; stage++) {
    if (stage < steps) copy(stage, stage);
    cp_async_commit();
  }
  QK_ROLLED for (int step = 0; step < steps; step++) {
    cp_async_wait<STAGES - 2>();
    block_sync();  // everybody's part is here, and nobody reads the stage that is written next
    if (step + STAGES - 1 < steps) copy((step + STAGES - 1) % STAGES, step + STAGES - 1);
    cp_async_commit();
    const uint32_t stage = shared + step % STAGES * STAGE_BYTES;
    QK_ROLLED for (int k = 0; k < TOKENS; k += 16) {
      uint32_t a[4][4], b[4][2];
      QK_UNROLL for (int m = 0; m < 4; m++) {
        const int t = k + lane / 16 * 8 + lane % 8, c = (first_row + m * 16) / 8 + lane / 8 % 2;
        ldmatrix_x4_transposed(a[m][0], a[m][1], a[m][2], a[m][3], stage + place(t, c));
      }
      QK_UNROLL for (int n = 0; n < 4; n += 2) {
        const int t = k + lane / 8 % 2 * 8 + lane % 8, c = first_column / 8 + n + lane / 16;
        ldmatrix_x4_transposed(b[n][0], b[n][1], b[n + 1][0], b[n + 1][1], stage + PANEL_BYTES + place(t, c));
      }
      QK_UNROLL for (int m = 0; m < 4; m++) {
        QK_UNROLL for (int n = 0; n < 4; n++) mma<TYPE>(sums[m][n], a[m], b[n]);
      }
    }
  }

  const int r0 = row * TILE + first_row + lane / 4, c0 = column * TILE + first_column + lane % 4 * 2;
  QK_UNROLL for (int m = 0; m < 4; m++) {
    QK_UNROLL for (int h = 0; h < 2; h++) {
      const int r = r0 + m * 16 + h * 8;
      double* line = g + static_cast<int64_t>(r) * size + c0;
      warp_sync();  // no more of G in registers than a row at a time
      QK_UNROLL for (int n = 0; n < 4; n++) {
        QK_UNROLL for (int e = 0; e < 2; e++) {
          double* to = line + n * 8 + e;
          if (r <= c0 + n * 8 + e && c0 + n * 8 + e < size)
            st_global(to, ld_global(to) + static_cast<double>(sums[m][n][2 * h + e]));
        }
      }
    }
  }
}
QK_EXPORT(gram)
