// D[m, n] = A[m, k] @ B[n, k].T of codes with block scales on both sides (MXFP8, MXFP4, NVFP4) by mma.sync that knows of
// scales. For sm_120a; any m, n, k. Compiled and emulated; no GPU has run it yet.
//
//   codes  --cp.async-->  ring of STAGES     --ldmatrix-->  fragments --+
//   scales --cp.async-->  in shared memory   ----lds---->  scales -----+--mma.sync--> sums in registers
//                                                                         tile_store.h
//
// The tensor core multiplies codes, scales their products and adds them up: nothing is promoted or decoded. Both
// operands lie as quantize.cu writes activations: rows of codes (two e2m1 a byte), and rows of scales, each at multiples
// of 16 bytes. A stage holds 128 bytes of codes of each row, four instructions deep, and their scales: 4, 8, 16 bytes.
//
// Scales. An instruction reads those of A's sixteen rows from two lanes of each four, those of B's eight rows from one,
// and is told which. So the registers of a warp hold the scales of 32 rows at a time, each lane one row's: of A rows g,
// g + 8, g + 16, g + 24 in lanes 4 g … 4 g + 3, of B rows g, g + 8, g + 16, g + 24 likewise. A 64 x 64 piece of a warp
// needs two registers for each side and each 4 bytes of a row's scales.
//
// SLICED: blockIdx.y slices K, as tile_store.h says.
#include "tile_store.h"

using namespace qk;
using Type = TYPE;

constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
constexpr int MI = WARP_M / 16, NI = WARP_N / 8;  // instructions along each side of a warp's piece
constexpr int ROW = 128, DEPTHS = 4;              // bytes of a row in a stage; instructions along them
constexpr int SCALES = DEPTHS * Type::scales;     // bytes of a row's scales in a stage
constexpr int WORDS = SCALES / 4;
constexpr int HELD_A = (MI + 1) / 2, HELD_B = (NI + 3) / 4;  // registers of scales, for each word of them
constexpr int ROWS_AT_ONCE = THREADS / 8;         // rows that one copy by each thread covers
constexpr int ROWS = TILE_M + TILE_N;             // of both operands, A's first, in codes as in scales
constexpr int SCALES_AT = ROWS * ROW;
constexpr int STAGE_BYTES = SCALES_AT + ROWS * SCALES;
static_assert(TILE_M % ROWS_AT_ONCE == 0 && TILE_N % ROWS_AT_ONCE == 0, "threads copy as much as each other");
static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "a warp's piece is made of whole instructions");
static_assert((MI == 1 || MI % 2 == 0) && (NI == 2 || NI % 4 == 0), "registers of scales are full, or hold one piece's");
static_assert(STAGES >= 2, "one stage is filled while another is read");

// ldmatrix reads a chunk of eight neighbouring rows at once: they must lie in banks of their own.
QK_FUNCTION uint32_t swizzled(int row, int chunk) { return row * ROW + ((chunk ^ (row & 7)) << 4); }

// f(0), f(1) … f(N - 1) with numbers that the compiler knows: an instruction's choice of scales is part of it.
template <int Value>
struct Number { static constexpr int value = Value; };
template <int N, int First = 0, class F>
QK_TEMPLATE void each(F f) {
  if constexpr (First < N) {
    f(Number<First>{});
    each<N, First + 1>(f);
  }
}

struct Fragments { uint32_t a[MI][4], b[NI][2]; };
// Of this lane's rows, for a whole stage.
struct Scales { uint32_t a[HELD_A][WORDS], b[HELD_B][WORDS]; };

// Products of the `Depth`-th 32 bytes.
template <int Depth>
QK_TEMPLATE void multiply(float (&sum)[MI * NI][4], const Fragments& f, const Scales& scales) {
  constexpr int word = Depth * Type::scales / 4, byte = Depth * Type::scales % 4;
  each<MI>([&](auto i) {
    each<NI>([&](auto j) {
      constexpr int thread_a = decltype(i)::value % 2, thread_b = decltype(j)::value % 4;
      mma_blocks<Type, byte, thread_a, thread_b>(sum[i.value * NI + j.value], f.a[i.value], f.b[j.value],
                                                 scales.a[i.value / 2][word], scales.b[j.value / 4][word]);
    });
  });
}

// A row's scales, and as many bytes of them as are there.
QK_FUNCTION void copy_scales(uint32_t to, const uint8_t* from, int valid) {
  if constexpr (SCALES == 16) cp_async16(to, from, valid);
  else cp_async_small<SCALES>(to, from, valid);
}
QK_FUNCTION void load_scales(uint32_t (&to)[WORDS], uint32_t from) {
  if constexpr (WORDS == 1) {
    to[0] = ld_shared<uint32_t>(from);
  } else if constexpr (WORDS == 2) {
    const U32x2 two = ld_shared<U32x2>(from);
    to[0] = two.x, to[WORDS - 1] = two.y;
  } else {
    const U32x4 four = ld_shared<U32x4>(from);
    to[0] = four.x, to[1] = four.y, to[WORDS - 2] = four.z, to[WORDS - 1] = four.w;
  }
}

// row_bytes: of codes; row_scales: of scales. pitch_…: from one row to the next.
QK_KERNEL(THREADS, 1)
gemm_blocks_sm120(const uint8_t* a, const uint8_t* b, const uint8_t* scales_a, const uint8_t* scales_b, uint8_t* d,
                  EPILOGUE_PARAMETERS, U32x4* workspace, uint32_t* arrivals, int row_bytes, int row_scales,
                  int64_t pitch_a, int64_t pitch_b, int64_t pitch_scales_a, int64_t pitch_scales_b) {
  const uint32_t base = shared_base();
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
  const Place place = place_of<ORDER>(blockIdx.x, (m_size + TILE_M - 1) / TILE_M, (n_size + TILE_N - 1) / TILE_N);
  const int m0 = place.first * TILE_M, n0 = place.second * TILE_N;

  // This block's steps along K.
  const int all_steps = (row_bytes + ROW - 1) / ROW;
  const int slices = SLICED ? gridDim.y : 1, slice = SLICED ? blockIdx.y : 0;
  const int first_step = static_cast<int>(int64_t(all_steps) * slice / slices);
  const int steps = static_cast<int>(int64_t(all_steps) * (slice + 1) / slices) - first_step;

  const int copy_row = tid / 8, copy_chunk = tid % 8;
  auto load = [&](int step) {
    const uint32_t stage = base + step % STAGES * STAGE_BYTES;
    const int start = (first_step + step) * ROW + copy_chunk * 16, left = row_bytes - start;
    const int wanted = left < 0 ? 0 : left < 16 ? left : 16;
    QK_UNROLL for (int i = 0; i < ROWS / ROWS_AT_ONCE; i++) {
      const int row = copy_row + i * ROWS_AT_ONCE;
      const bool is_a = i < TILE_M / ROWS_AT_ONCE;
      const int64_t at = is_a ? m0 + row : n0 + row - TILE_M;
      const int valid = at < (is_a ? m_size : n_size) ? wanted : 0;
      cp_async16(stage + swizzled(row, copy_chunk), valid > 0 ? (is_a ? a + at * pitch_a : b + at * pitch_b) + start : a,
                 valid);
    }
    const int scale = (first_step + step) * SCALES, scales_left = row_scales - scale;
    const int scales_wanted = scales_left < SCALES ? scales_left : SCALES;
    QK_UNROLL for (int first = 0; first < ROWS; first += THREADS) {
      const int row = first + tid;
      if (first + THREADS <= ROWS || row < ROWS) {
        const bool is_a = row < TILE_M;
        const int64_t at = is_a ? m0 + row : n0 + row - TILE_M;
        const int valid = at < (is_a ? m_size : n_size) ? scales_wanted : 0;
        const uint8_t* const from = is_a ? scales_a + at * pitch_scales_a : scales_b + at * pitch_scales_b;
        copy_scales(stage + SCALES_AT + row * SCALES, valid > 0 ? from + scale : scales_a, valid);
      }
    }
  };

  // ldmatrix: lanes 0-7, 8-15, 16-23, 24-31 give the rows of four matrices of 8 rows x 16 bytes. Of A these are the
  // upper and lower rows of chunk 0, then of chunk 1; of B both chunks of one instruction, then of the next.
  const int row_a = warp_m * WARP_M + lane % 16, chunk_a = lane / 16;
  const int row_b = TILE_M + warp_n * WARP_N + lane % 8 + lane / 16 * 8, chunk_b = lane / 8 % 2;
  Fragments fragments[2];
  auto fetch = [&](Fragments& to, int step, int depth) {
    const uint32_t stage = base + step % STAGES * STAGE_BYTES;
    const uint32_t from_a = stage + swizzled(row_a, depth * 2 + chunk_a);
    const uint32_t from_b = stage + swizzled(row_b, depth * 2 + chunk_b);
    QK_UNROLL for (int i = 0; i < MI; i++)
      ldmatrix_x4(to.a[i][0], to.a[i][1], to.a[i][2], to.a[i][3], from_a + i * 16 * ROW);
    QK_UNROLL for (int j = 0; j < NI; j += 2)
      ldmatrix_x4(to.b[j][0], to.b[j][1], to.b[j + 1][0], to.b[j + 1][1], from_b + j * 8 * ROW);
  };
  // Lane 4 g + t has row g + 8 t of each 32, as far as there are that many.
  const int scale_row = lane / 4, scale_a = warp_m * WARP_M + scale_row + lane % (MI == 1 ? 2 : 4) * 8;
  const int scale_b = TILE_M + warp_n * WARP_N + scale_row + lane % (NI == 2 ? 2 : 4) * 8;
  auto fetch_scales = [&](Scales& to, int step) {
    const uint32_t from = base + step % STAGES * STAGE_BYTES + SCALES_AT;
    QK_UNROLL for (int i = 0; i < HELD_A; i++) load_scales(to.a[i], from + (scale_a + i * 32) * SCALES);
    QK_UNROLL for (int j = 0; j < HELD_B; j++) load_scales(to.b[j], from + (scale_b + j * 32) * SCALES);
  };

  float sum[MI * NI][4];
  QK_UNROLL for (int i = 0; i < MI * NI; i++)
    QK_UNROLL for (int e = 0; e < 4; e++) sum[i][e] = 0;

  QK_ROLLED for (int step = 0; step < STAGES - 1; step++) {
    if (step < steps) load(step);
    cp_async_commit();  // empty groups too: a stage is always the same number of groups away
  }
  cp_async_wait<STAGES - 2>();
  block_sync();
  Scales next;
  if (steps > 0) {
    fetch_scales(next, 0);
    fetch(fragments[0], 0, 0);
  }
  for (int step = 0; step < steps; step++) {
    // Into the stage that everyone finished reading before the last block_sync.
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    cp_async_commit();
    const Scales scales = next;
    each<DEPTHS>([&](auto depth) {
      if constexpr (depth.value + 1 < DEPTHS) {
        fetch(fragments[(depth.value + 1) % 2], step, depth.value + 1);
      } else {
        cp_async_wait<STAGES - 2>();
        block_sync();  // everyone's copies of the next stage are in
        // The last step fetches itself once more, in vain: a branch here would take the registers of both its ways.
        const int following = step + 1 < steps ? step + 1 : step;
        fetch_scales(next, following);
        fetch(fragments[0], following, 0);
      }
      multiply<depth.value>(sum, fragments[depth.value % 2], scales);
    });
  }

  block_sync();  // the ring is read, and free for sums
  if constexpr (SLICED)
    if (!tile::last_of_slices<THREADS>(sum, workspace, arrivals, base)) return;

  // Rows lane / 4 and + 8 of each 16, columns 2 (lane % 4) and the next of each 8 are this thread's.
  const epilogue::Output output = EPILOGUE_OUTPUT;
  const tile::Storer<float, TILE_N, THREADS, VECTOR> storer(output, n0);
  QK_UNROLL for (int i = 0; i < MI; i++) {
    if (i > 0) block_sync();  // everyone has read the piece before
    QK_UNROLL for (int j = 0; j < NI; j++)
      QK_UNROLL for (int e = 0; e < 4; e++)
        tile::put<TILE_N>(base, warp_m * 16 + lane / 4 + e / 2 * 8, warp_n * WARP_N + j * 8 + lane % 4 * 2 + e % 2,
                          sum[i * NI + j][e]);
    block_sync();
    storer.store(
        d, base, WARPS_M * 16, [&](int r) { return m0 + r / 16 * WARP_M + i * 16 + r % 16; },
        [](float x) { return x; });
  }
}
QK_EXPORT(gemm_blocks_sm120)
