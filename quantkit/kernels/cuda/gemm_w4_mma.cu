// D[m, n] = A[m, k] @ W[n, k].T by mma.sync, W of four bits, for every GPU from sm_80 on; any m, n, k.
//
//   codes, scales --cp.async-->  ring of STAGES  --16 bytes a lane-->  decoded in registers: mma's A --+
//   rows of A     --cp.async-->  in shared memory  --ldmatrix------->  fragments: mma's B -------------+--mma.sync--> sums
//
// Operands are swapped: rows of W stand where mma.sync has sixteen, rows of A where it has eight, so that one row of
// activations wastes an eighth as much as it would the other way. The weight lies in the order of the fragments
// (w4/layout.py), so no lane reads a code that it does not multiply; w4_decode.h says how codes become numbers.
//
// A block computes TILE_W rows of W times TILE_A rows of A, or one slice of their K (SLICED: blockIdx.y; see
// tile_store.h). Its warps stand in a grid of WARPS_W x WARPS_A. A code is decoded once for all rows of A that its warp
// has: WARPS_A is 1 but where registers cannot hold the sums. A stage holds SLABS slabs, each 128 bytes of A's rows.
//
// One turn: decode what is in registers; fetch what comes next from shared memory into the same registers; multiply.
// The tensor core works while the loads are under way and the next codes are decoded.
//
// There is no path without the tensor core for one to four rows: it is there to take, and takes less. For eight codes of
// a lane int4 needs 20 instructions (counted in sm_80's machine code, with copies and loop), one and a half of which are
// mma and ldmatrix. Without them eight numbers would be converted to float32, and for each row of A two loads and eight
// multiply-adds made: 37 at the least, 67 for four rows, and the bytes are the same.
#include "tile_store.h"
#include "w4_decode.h"

using namespace qk;
using namespace qk::w4;

constexpr int THREADS = 32 * WARPS_W * WARPS_A;
constexpr int ROW = 128;                    // bytes of a slab's row of A
constexpr int BLOCKS = TILE_W / 16;         // of 16 rows of W
constexpr int MI = BLOCKS / WARPS_W;        // of those a warp has
constexpr int WARP_A = TILE_A / WARPS_A, NI = WARP_A / 8;
constexpr int BLOCK_BYTES = 512;            // codes of 16 rows and a plane, 64 of K
static_assert(TILE_W % 64 == 0, "rows of W are packed by 64");
static_assert(BLOCKS % WARPS_W == 0 && TILE_A % (8 * WARPS_A) == 0, "a warp's piece is made of whole instructions");
static_assert(NI == 1 || NI % 2 == 0, "ldmatrix brings two instructions' rows");
static_assert(STAGES >= 2, "one stage is filled while another is read");
static_assert(TILE_A * 8 * SLABS % THREADS == 0, "threads copy as much of A as each other");

// A stage: rows of A by slab, codes by slab, scales and zero points by side (slabs that share scales).
constexpr int SIDES = GROUP_SLABS >= SLABS ? 1 : SLABS / GROUP_SLABS;
static_assert(GROUP_SLABS % SLABS == 0 || SLABS % GROUP_SLABS == 0, "stages and groups begin together");
constexpr int CODES_AT = SLABS * TILE_A * ROW;
constexpr int PLANE_SIZE = BLOCKS * BLOCK_BYTES;
constexpr int SCALES_AT = CODES_AT + SLABS * PLANES * PLANE_SIZE;
constexpr int SCALES_SIZE = BLOCKS * 8 * PAIR_BYTES;
constexpr int ZEROS_AT = SCALES_AT + SIDES * SCALES_SIZE;
constexpr int ZEROS_SIZE = ZEROS ? BLOCKS * 8 * GROUPS : 0;
constexpr int STAGE_BYTES = ZEROS_AT + SIDES * ZEROS_SIZE;

// ldmatrix reads a chunk of eight neighbouring rows at once: they must lie in banks of their own.
QK_FUNCTION uint32_t swizzled(int row, int chunk) { return row * ROW + ((chunk ^ (row & 7)) << 4); }

// What a lane has of a slab of W, for each of its warp's groups of 16 rows.
struct Codes {
  U32x4 words[MI][PLANES];
  uint32_t raw[MI][PAIR_WORDS + 1], zero[MI][GROUPS];
};

// `Bytes` in a row, the first `valid` of them from global memory, 16 a thread. `any`: a pointer that is valid.
template <int Bytes>
QK_TEMPLATE void copy(uint32_t to, const uint8_t* from, int valid, const uint8_t* any) {
  QK_UNROLL for (int start = 0; start < Bytes; start += THREADS * 16) {
    const int at = start + threadIdx.x * 16;
    if (start + THREADS * 16 <= Bytes || at < Bytes)
      cp_async16(to + at, at < valid ? from + at : any, at < valid ? 16 : 0);
  }
}

QK_KERNEL(THREADS, 1)
gemm_w4_mma(const uint8_t* a, const uint8_t* codes, const uint8_t* scales, const uint8_t* zeros, uint8_t* d,
            EPILOGUE_PARAMETERS, U32x4* workspace, uint32_t* arrivals, int row_bytes, int64_t pitch, int planes) {
  const uint32_t base = shared_base();
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int warp_w = warp / WARPS_A, warp_a = warp % WARPS_A;
  const int groups = (n_size + 63) / 64 * 4;  // of 16 rows, of the whole of W
  const Place place = place_of<ORDER>(blockIdx.x, (n_size + TILE_W - 1) / TILE_W, (m_size + TILE_A - 1) / TILE_A);
  const int first = place.first * BLOCKS, m0 = place.second * TILE_A;
  const int count = groups - first < BLOCKS ? groups - first : BLOCKS;  // of groups that this tile has

  // This block's steps along K.
  const int slabs = (planes + PLANES - 1) / PLANES, all_steps = (slabs + SLABS - 1) / SLABS;
  const int slices = SLICED ? gridDim.y : 1, slice = SLICED ? blockIdx.y : 0;
  const int first_step = static_cast<int>(int64_t(all_steps) * slice / slices);
  const int steps = static_cast<int>(int64_t(all_steps) * (slice + 1) / slices) - first_step;

  auto load = [&](int step) {
    const uint32_t stage = base + step % STAGES * STAGE_BYTES;
    const int first_slab = (first_step + step) * SLABS;
    QK_UNROLL for (int i = 0; i < TILE_A * 8 * SLABS / THREADS; i++) {
      const int item = i * THREADS + tid, chunk = item % 8, row = item / 8 % TILE_A, slab = item / (8 * TILE_A);
      const int start = (first_slab + slab) * ROW + chunk * 16, left = row_bytes - start;
      const int valid = m0 + row >= m_size || left < 0 ? 0 : left < 16 ? left : 16;
      cp_async16(stage + slab * TILE_A * ROW + swizzled(row, chunk),
                 valid > 0 ? a + (m0 + row) * pitch + start : a, valid);
    }
    QK_UNROLL for (int i = 0; i < SLABS; i++) {
      // Beyond K lie zeros of A: any codes will do, and rows of W beyond the last are not stored.
      const int slab = first_slab + i;
      QK_UNROLL for (int p = 0; p < PLANES; p++) {
        const int plane = slab * PLANES + p;  // the last slab may have but one
        copy<PLANE_SIZE>(stage + CODES_AT + (i * PLANES + p) * PLANE_SIZE,
                         codes + (int64_t(plane) * groups + first) * BLOCK_BYTES,
                         plane < planes ? count * BLOCK_BYTES : 0, a);
      }
    }
    QK_UNROLL for (int i = 0; i < SIDES; i++) {
      const int slab = first_slab + i * (SLABS / SIDES);
      const int64_t side = slab / GROUP_SLABS;
      if constexpr (SCALES != SCALES_NONE)
        copy<SCALES_SIZE>(stage + SCALES_AT + i * SCALES_SIZE, scales + (side * groups + first) * (8 * PAIR_BYTES),
                          slab < slabs ? count * 8 * PAIR_BYTES : 0, a);
      if constexpr (ZEROS)
        copy<ZEROS_SIZE>(stage + ZEROS_AT + i * ZEROS_SIZE, zeros + (side * groups + first) * (8 * GROUPS),
                         slab < slabs ? count * 8 * GROUPS : 0, a);
    }
  };

  const uint32_t above = bits_above(planes);
  Codes held;
  auto fetch_codes = [&](int step, int slab) {
    const uint32_t stage = base + step % STAGES * STAGE_BYTES;
    const int side = SIDES > 1 ? slab / (SLABS / SIDES) : 0;
    QK_UNROLL for (int i = 0; i < MI; i++) {
      const int group = warp_w * MI + i, pair = group * 8 + lane / 4;
      QK_UNROLL for (int plane = 0; plane < PLANES; plane++)
        held.words[i][plane] =
            ld_shared<U32x4>(stage + CODES_AT + (slab * PLANES + plane) * PLANE_SIZE + group * BLOCK_BYTES + lane * 16);
      load_pair(held.raw[i], stage + SCALES_AT + side * SCALES_SIZE + pair * PAIR_BYTES, above);
      if constexpr (ZEROS)
        QK_UNROLL for (int g = 0; g < GROUPS; g++)
          held.zero[i][g] = ld_shared<uint8_t>(stage + ZEROS_AT + side * ZEROS_SIZE + pair * GROUPS + g);
    }
  };
  // ldmatrix: lanes 0-7, 8-15, 16-23, 24-31 give the rows of four matrices of 8 rows x 16 bytes: both chunks of one
  // instruction's rows of A, then of the next one's. With eight rows alone, both chunks of this depth and of the next.
  constexpr int SETS = NI > 1 ? 2 : 4;
  const int row_of_lane = warp_a * WARP_A + lane % 8 + (NI > 1 ? lane / 16 * 8 : 0);
  const int chunk_of_lane = NI > 1 ? lane / 8 % 2 : lane / 8;
  uint32_t of_a[SETS][NI][2];
  auto fetch_a = [&](int step, int slab, int depth) {
    const uint32_t from = base + step % STAGES * STAGE_BYTES + slab * TILE_A * ROW +
                          swizzled(row_of_lane, depth * 2 + chunk_of_lane);
    if constexpr (NI > 1) {
      auto& to = of_a[depth % 2];
      QK_UNROLL for (int j = 0; j < NI; j += 2)
        ldmatrix_x4(to[j][0], to[j][1], to[j + 1][0], to[j + 1][1], from + j * 8 * ROW);
    } else if (depth % 2 == 0) {
      auto &now = of_a[depth % SETS][0], &next = of_a[(depth + 1) % SETS][0];
      ldmatrix_x4(now[0], now[1], next[0], next[1], from);
    }
  };

  Sum sum[MI * NI][4];
  QK_UNROLL for (int i = 0; i < MI * NI; i++)
    QK_UNROLL for (int e = 0; e < 4; e++) sum[i][e] = 0;

  QK_ROLLED for (int step = 0; step < STAGES - 1; step++) {
    if (step < steps) load(step);
    cp_async_commit();  // empty groups too: a stage is always the same number of groups away
  }
  cp_async_wait<STAGES - 2>();
  block_sync();
  if (steps > 0) {
    fetch_codes(0, 0);
    fetch_a(0, 0, 0);
  }
  for (int step = 0; step < steps; step++) {
    // Into the stage that everyone finished reading before the last block_sync.
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    cp_async_commit();
    // The last step fetches itself once more, in vain: a branch here would take the registers of both its ways.
    const int next = step + 1 < steps ? step + 1 : step;
    QK_UNROLL for (int slab = 0; slab < SLABS; slab++)
      QK_UNROLL for (int depth = 0; depth < 4; depth++) {
        Registers<uint32_t, 4> of_w[MI];
        QK_UNROLL for (int i = 0; i < MI; i++)
          decode_depth(held.words[i], depth, held.raw[i], held.zero[i], of_w[i]);
        if (depth < 3) {
          fetch_a(step, slab, depth + 1);
        } else {
          if (slab + 1 == SLABS) {
            cp_async_wait<STAGES - 2>();
            block_sync();  // everyone's copies of the next stage are in
          }
          const int at = slab + 1 < SLABS ? step : next;
          fetch_codes(at, (slab + 1) % SLABS);
          fetch_a(at, (slab + 1) % SLABS, 0);
        }
        QK_UNROLL for (int i = 0; i < MI; i++)
          QK_UNROLL for (int j = 0; j < NI; j++) mma<Type>(sum[i * NI + j], of_w[i].value, of_a[depth % SETS][j]);
      }
  }

  block_sync();  // the ring is read, and free for sums
  if constexpr (SLICED)
    if (!tile::last_of_slices<THREADS>(sum, workspace, arrivals, base)) return;

  // Sums 2 h + e of instruction j are row 8 j + 2 (lane % 4) + e of D, column lane / 4 + 8 h of a group.
  constexpr int AT_ONCE = NI < 4 ? NI : 4;  // instructions along A in a piece
  static_assert(NI % AT_ONCE == 0, "pieces are alike");
  const epilogue::Output output = EPILOGUE_OUTPUT;
  const tile::Storer<Sum, TILE_W, THREADS, VECTOR> storer(output, first * 16);
  QK_UNROLL for (int j0 = 0; j0 < NI; j0 += AT_ONCE) {
    if (j0 > 0) block_sync();  // everyone has read the piece before
    QK_UNROLL for (int i = 0; i < MI; i++)
      QK_UNROLL for (int j = 0; j < AT_ONCE; j++)
        QK_UNROLL for (int e = 0; e < 4; e++)
          tile::put<TILE_W>(base, (warp_a * AT_ONCE + j) * 8 + lane % 4 * 2 + e % 2,
                            (warp_w * MI + i) * 16 + lane / 4 + e / 2 * 8, sum[i * NI + j0 + j][e]);
    block_sync();
    storer.store(
        d, base, WARPS_A * AT_ONCE * 8,
        [&](int r) { return m0 + r / (AT_ONCE * 8) * WARP_A + j0 * 8 + r % (AT_ONCE * 8); },
        [](Sum x) { return rebased(x); });
  }
}
QK_EXPORT(gemm_w4_mma)
