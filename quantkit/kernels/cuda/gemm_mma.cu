// D[m, n] = A[m, k] @ B[n, k].T with mma.sync, for every GPU from sm_80 on: int8, e4m3, bf16, fp16; any m, n, k.
//
//   global memory --cp.async-->  ring of STAGES tiles  --ldmatrix-->  fragments  --mma.sync-->  sums in registers
//                                in shared memory                     (two sets)                epilogue.h, stores
//
// A block computes one TILE_M x TILE_N tile of D, or one slice of its K. All its warps copy and all multiply: while
// they multiply one stage, the next STAGES - 1 are on their way. A stage holds ROW bytes of K of TILE_M rows of A and
// of TILE_N rows of B, in a swizzle that lets ldmatrix read eight rows from all the banks at once.
//
// Warps stand in a grid of WARPS_M x WARPS_N, each with a piece of WARP_M x WARP_N. An instruction multiplies 16 rows
// of A by 8 rows of B over 32 bytes of K; the fragments of the next 32 bytes are read while it runs.
//
// B's rows are dealt to instructions so that a thread's sums are four neighbouring columns of D, not two: of sixteen
// columns one instruction takes 0 1 4 5 8 9 12 13, the other 2 3 6 7 10 11 14 15. Which rows ldmatrix reads is free,
// and four columns from each of four threads fill whole sectors of D's row.
//
// WIDEN: the tensor cores that mma.sync reaches on sm_80, 86, 90 and 100 know no e4m3. Its codes travel and lie as they
// are, and become fp16 in registers.
//
// SPLIT: few tiles leave multiprocessors idle, so blockIdx.y slices K. Each slice's block leaves its sums in the
// workspace; the one that arrives last adds them up, always in the order of the slices, and finishes the tile.
// Which block that is differs between runs; the result does not.
#include "epilogue.h"
#include "tiles.h"

// WIDEN: not at all; by moving bits; by an instruction, where there is one (sm_89).
#define MOVED 1
#define CONVERTED 2

using namespace qk;
using Type = TYPE;
using Accumulator = Type::Accumulator;

constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
constexpr int MI = WARP_M / 16, NI = WARP_N / 8;  // instructions along each side of a warp's piece
constexpr int DEPTHS = ROW / 32;                  // instructions along K in a stage
constexpr int CHUNKS = ROW / 16;                  // what cp.async and ldmatrix move: 16 bytes of a row
constexpr int ROWS_AT_ONCE = THREADS / CHUNKS;    // rows that one copy by each thread covers
constexpr int LOADS_A = TILE_M / ROWS_AT_ONCE, LOADS = LOADS_A + TILE_N / ROWS_AT_ONCE;
constexpr int SECOND = TILE_M * ROW;              // where B lies in a stage
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * ROW;
static_assert(ROW == 64 || ROW == 128, "the swizzles are for two rows in 128 bytes, or one");
static_assert(TILE_M % ROWS_AT_ONCE == 0 && TILE_N % ROWS_AT_ONCE == 0, "threads copy as much as each other");
static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "a warp's piece is made of whole instructions");
static_assert(STAGES >= 2, "one stage is filled while another is read");

// Where the 16 bytes `chunk` of row `row` lie. Shared memory has 128 bytes of banks: the eight rows that ldmatrix reads
// at once must put their chunk at eight different places of them. Of A they are neighbours (bits 0 1 2 of the row
// differ), of B they are dealt out as said above (bits 0 2 3). Rows of 64 bytes lie two to a line, so bit 0 is already
// a place in the line, and the other two choose among four chunks.
QK_FUNCTION uint32_t place_a(int row, int chunk) {
  const int key = ROW == 128 ? row & 7 : row >> 1 & 3;
  return row * ROW + ((chunk ^ key) << 4);
}
QK_FUNCTION uint32_t place_b(int row, int chunk) {
  const int key = ROW == 128 ? (row & 1) | (row >> 1 & 6) : row >> 2 & 3;
  return row * ROW + ((chunk ^ key) << 4);
}

// Column 0 ... 7 of instruction `q` of a pair, as one of the pair's sixteen columns.
QK_FUNCTION int dealt(int column, int q) { return (column & 6) * 2 + q * 2 + (column & 1); }

#if WIDEN
// Four e4m3 codes to fp16, codes 0 1 in `low` and 2 3 in `high`. CONVERTED: by instruction. Else each comes out as 2^-8
// of its value: its bits are moved, its exponent is left as it is, and NaN, the code 0x7f, gets fp16's highest one.
QK_FUNCTION void widen(uint32_t codes, uint32_t& low, uint32_t& high) {
  if (WIDEN == CONVERTED) {
    low = e4m3_to_f16(static_cast<uint16_t>(codes));
    high = e4m3_to_f16(static_cast<uint16_t>(codes >> 16));
  } else {
    const uint32_t magnitude = codes & 0x7f7f7f7fu;
    const uint32_t marked = magnitude | ((magnitude + 0x01010101u) & 0x80808080u);
    const uint32_t upper = (codes & 0x80808080u) | (marked >> 1 & 0x7f7f7f7fu), lower = codes << 7 & 0x80808080u;
    low = prmt(lower, upper, 0x5140);
    high = prmt(lower, upper, 0x7362);
  }
}
#endif
constexpr float WIDENED = WIDEN == MOVED ? 65536.0f : 1.0f;  // what products of two such numbers lack

// The 32 bytes of K of one step: A's fragments and B's.
struct Fragments { uint32_t a[MI][4], b[NI][2]; };

QK_FUNCTION void multiply(Accumulator (&sum)[MI][NI][4], const Fragments& f) {
#if WIDEN
  // Which of K's elements meet in one instruction is free as long as A and B agree: first all codes 0 1 of the words,
  // then all codes 2 3.
  uint32_t b_low[NI][2], b_high[NI][2];
  QK_UNROLL for (int j = 0; j < NI; j++)
    QK_UNROLL for (int e = 0; e < 2; e++) widen(f.b[j][e], b_low[j][e], b_high[j][e]);
  QK_UNROLL for (int i = 0; i < MI; i++) {
    uint32_t a_low[4], a_high[4];
    QK_UNROLL for (int e = 0; e < 4; e++) widen(f.a[i][e], a_low[e], a_high[e]);
    QK_UNROLL for (int j = 0; j < NI; j++) {
      mma<F16>(sum[i][j], a_low, b_low[j]);
      mma<F16>(sum[i][j], a_high, b_high[j]);
    }
  }
#else
  QK_UNROLL for (int i = 0; i < MI; i++)
    QK_UNROLL for (int j = 0; j < NI; j++) mma<Type>(sum[i][j], f.a[i], f.b[j]);
#endif
}

QK_KERNEL(THREADS, 1)
gemm_mma(const uint8_t* a, const uint8_t* b, uint8_t* d, EPILOGUE_PARAMETERS, U32x4* workspace, uint32_t* arrivals,
         int row_bytes, int64_t pitch_a, int64_t pitch_b) {
  const uint32_t base = shared_base();
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int tiles_m = (m_size + TILE_M - 1) / TILE_M, tiles_n = (n_size + TILE_N - 1) / TILE_N;
  const Place place = place_of<GROUP>(blockIdx.x, tiles_m, tiles_n);
  const int m0 = place.first * TILE_M, n0 = place.second * TILE_N;

  // This block's steps along K.
  const int all_steps = (row_bytes + ROW - 1) / ROW;
  const int slices = SPLIT ? gridDim.y : 1, slice = SPLIT ? blockIdx.y : 0;
  const int first_step = static_cast<int>(int64_t(all_steps) * slice / slices);
  const int steps = static_cast<int>(int64_t(all_steps) * (slice + 1) / slices) - first_step;

  // A thread copies the same chunk of a row every ROWS_AT_ONCE rows, first of A, then of B.
  const int copy_row = tid / CHUNKS, copy_chunk = tid % CHUNKS;
  const int rows_a = m_size - m0 - copy_row, rows_b = n_size - n0 - copy_row;  // until the last one
  const uint8_t* const from_a = a + (m0 + copy_row) * pitch_a + copy_chunk * 16;
  const uint8_t* const from_b = b + (n0 + copy_row) * pitch_b + copy_chunk * 16;
  auto load = [&](int step) {
    const uint32_t stage = base + step % STAGES * STAGE_BYTES;
    const int start = (first_step + step) * ROW, left = row_bytes - start - copy_chunk * 16;
    const int wanted = left < 0 ? 0 : left < 16 ? left : 16;
    QK_UNROLL for (int i = 0; i < LOADS; i++) {
      const bool is_a = i < LOADS_A;
      const int skip = (is_a ? i : i - LOADS_A) * ROWS_AT_ONCE;
      const int valid = skip < (is_a ? rows_a : rows_b) ? wanted : 0;
      const uint8_t* source = is_a ? from_a + skip * pitch_a : from_b + skip * pitch_b;
      const uint32_t to = is_a ? place_a(copy_row + skip, copy_chunk) : SECOND + place_b(copy_row + skip, copy_chunk);
      cp_async16(stage + to, valid > 0 ? source + start : a, valid);
    }
  };

  // ldmatrix: lanes 0-7, 8-15, 16-23, 24-31 give the rows of four matrices of 8 rows x 16 bytes. Of A these are the
  // upper and lower rows of chunk 0, then of chunk 1; of B both chunks of one instruction, then of the other.
  const uint32_t fragment_a = place_a(warp / WARPS_N * WARP_M + lane % 16, lane / 16);
  const uint32_t fragment_b = SECOND + place_b(warp % WARPS_N * WARP_N + dealt(lane % 8, lane / 16), lane / 8 % 2);
  Fragments fragments[2];
  auto fetch = [&](Fragments& to, int step, int k) {
    const uint32_t stage = base + step % STAGES * STAGE_BYTES;
    // Moving on by 32 bytes is flipping bits 5 and 6 of the address: rows are whole powers of two.
    QK_UNROLL for (int i = 0; i < MI; i++)
      ldmatrix_x4(to.a[i][0], to.a[i][1], to.a[i][2], to.a[i][3], stage + (fragment_a ^ k * 32) + i * 16 * ROW);
    QK_UNROLL for (int j = 0; j < NI; j += 2)
      ldmatrix_x4(to.b[j][0], to.b[j][1], to.b[j + 1][0], to.b[j + 1][1], stage + (fragment_b ^ k * 32) + j * 8 * ROW);
  };

  Accumulator sum[MI][NI][4];
  QK_UNROLL for (int i = 0; i < MI; i++)
    QK_UNROLL for (int j = 0; j < NI; j++)
      QK_UNROLL for (int e = 0; e < 4; e++) sum[i][j][e] = 0;

  QK_UNROLL for (int step = 0; step < STAGES - 1; step++) {
    if (step < steps) load(step);
    cp_async_commit();  // empty groups too: a stage is always the same number of groups away
  }
  cp_async_wait<STAGES - 2>();
  block_sync();
  if (steps > 0) fetch(fragments[0], 0, 0);
  for (int step = 0; step < steps; step++) {
    QK_UNROLL for (int k = 0; k < DEPTHS; k++) {
      if (k == 0) {  // into the stage that everyone finished reading before the last block_sync
        if (step + STAGES - 1 < steps) load(step + STAGES - 1);
        cp_async_commit();
      }
      if (k + 1 < DEPTHS) {
        fetch(fragments[(k + 1) % 2], step, k + 1);
      } else {
        cp_async_wait<STAGES - 2>();
        block_sync();  // everyone's copies of the next stage are in
        if (step + 1 < steps) fetch(fragments[(k + 1) % 2], step + 1, 0);
      }
      multiply(sum, fragments[k % 2]);
    }
  }

#if SPLIT
  // Sums lie in the workspace as in registers: thread by thread, four at a time.
  const int64_t slice_words = int64_t(TILE_M) * TILE_N / 4;
  U32x4* const of_tile = workspace + blockIdx.x * slices * slice_words + tid;
  QK_UNROLL for (int i = 0; i < MI; i++)
    QK_UNROLL for (int j = 0; j < NI; j++) {
      U32x4 four;
      memcpy(&four, sum[i][j], 16);
      st_global(of_tile + slice * slice_words + (i * NI + j) * THREADS, four);
    }
  block_sync();  // the arrival below releases all threads' sums
  if (tid == 0) {
    const uint32_t arrived = atomic_add_acq_rel(arrivals + blockIdx.x, 1);
    if (arrived == slices - 1) st_global(arrivals + blockIdx.x, 0u);  // for the next launch
    st_shared(base, arrived);
  }
  block_sync();
  if (ld_shared<uint32_t>(base) != slices - 1) return;
  QK_UNROLL for (int i = 0; i < MI; i++)
    QK_UNROLL for (int j = 0; j < NI; j++)
      QK_UNROLL for (int e = 0; e < 4; e++) sum[i][j][e] = 0;
  for (int s = 0; s < slices; s++)
    QK_UNROLL for (int i = 0; i < MI; i++)
      QK_UNROLL for (int j = 0; j < NI; j++) {
        Accumulator part[4];
        const U32x4 four = ld_global(of_tile + s * slice_words + (i * NI + j) * THREADS);
        memcpy(part, &four, 16);
        QK_UNROLL for (int e = 0; e < 4; e++) sum[i][j][e] += part[e];
      }
#endif

  // Rows lane / 4 and + 8 of each 16, columns 4 (lane % 4) ... + 3 of each 16 are this thread's.
  const epilogue::Output output = EPILOGUE_OUTPUT;
  const int row0 = m0 + warp / WARPS_N * WARP_M + lane / 4, column0 = n0 + warp % WARPS_N * WARP_N + lane % 4 * 4;
  epilogue::RowFactors rows[MI][2];
  QK_UNROLL for (int i = 0; i < MI; i++)
    QK_UNROLL for (int h = 0; h < 2; h++) rows[i][h] = epilogue::row_factors(output, row0 + i * 16 + h * 8);
  QK_UNROLL for (int j = 0; j < NI; j += 2) {
    const int column = column0 + j * 8;
    epilogue::ColumnFactors columns[2][2];
    QK_UNROLL for (int q = 0; q < 2; q++) {
      if (VECTOR) {
        epilogue::column_factor_pair(output, column + q * 2, columns[q][0], columns[q][1]);
      } else {
        QK_UNROLL for (int e = 0; e < 2; e++) columns[q][e] = epilogue::column_factors(output, column + q * 2 + e);
      }
    }
    QK_UNROLL for (int i = 0; i < MI; i++)
      QK_UNROLL for (int h = 0; h < 2; h++) {
        const int row = row0 + i * 16 + h * 8;
        Accumulator four[2][2];
        QK_UNROLL for (int q = 0; q < 2; q++)
          QK_UNROLL for (int e = 0; e < 2; e++) {
            four[q][e] = sum[i][j + q][h * 2 + e];
            if constexpr (WIDEN) four[q][e] *= WIDENED;
          }
        if (VECTOR) {  // n_size is a multiple of four: all four columns lie inside, or none
          if (row >= m_size || column >= n_size) continue;
          const epilogue::RowFactors both[2] = {rows[i][h], rows[i][h]};
          epilogue::Pair pairs[2];
          QK_UNROLL for (int q = 0; q < 2; q++) {
            const float residuals[2] = {epilogue::residual_at(output, row, column + q * 2),
                                        epilogue::residual_at(output, row, column + q * 2 + 1)};
            pairs[q] = epilogue::element_pair(output, four[q][0], four[q][1], both, columns[q], residuals);
          }
          using Stored = Four<epilogue::ELEMENT_BYTES>;
          const int64_t at = int64_t(row) * n_size + column;
          st_global(reinterpret_cast<Stored::Type*>(d + at * epilogue::ELEMENT_BYTES), Stored::of(pairs[0], pairs[1]));
        } else {
          QK_UNROLL for (int q = 0; q < 2; q++)
            QK_UNROLL for (int e = 0; e < 2; e++)
              epilogue::store_element(output, d, four[q][e], rows[i][h], columns[q][e], row, column + q * 2 + e);
        }
      }
  }
}
QK_EXPORT(gemm_mma)
