// From sums in registers to D, for kernels of mma.sync: slices of K are added up; then a tile passes through shared
// memory, piece by piece, so that each thread finishes and stores four neighbours of a row of D.
//
// Lanes of mma.sync hold two neighbours at most, of D's rows or, with the operands swapped, of its columns. Sums as they
// are go to shared memory wherever they lie, and come back as rows.
#pragma once

#include "epilogue.h"
#include "tiles.h"

namespace qk {
namespace tile {

// Slices of K of tile blockIdx.x, one a block of blockIdx.y: sums go to `workspace`, thread by thread, four at a time.
// True in the block that comes last, whose sums are then those of all slices, added in the slices' order: which block
// that is differs between runs, the result does not. `arrivals` are zero before and after. `base`: 4 bytes of shared
// memory that nobody reads any more.
template <int Threads, int Count, class Sum>
QK_TEMPLATE bool last_of_slices(Sum (&sum)[Count][4], U32x4* workspace, uint32_t* arrivals, uint32_t base) {
  const int slices = gridDim.y, slice = blockIdx.y, tid = threadIdx.x;
  U32x4* const of_tile = workspace + int64_t(blockIdx.x) * slices * (Count * Threads) + tid;
  QK_UNROLL for (int i = 0; i < Count; i++) {
    U32x4 four;
    memcpy(&four, sum[i], 16);
    st_global(of_tile + (slice * Count + i) * Threads, four);
  }
  block_sync();  // the arrival below releases all threads' sums
  if (tid == 0) {
    const uint32_t arrived = atomic_add_acq_rel(arrivals + blockIdx.x, 1);
    if (arrived == slices - 1) st_global(arrivals + blockIdx.x, 0u);  // for the next launch
    st_shared(base, arrived);
  }
  block_sync();
  const bool last = ld_shared<uint32_t>(base) == slices - 1;
  if (!last) return false;
  QK_UNROLL for (int i = 0; i < Count; i++)
    QK_UNROLL for (int e = 0; e < 4; e++) sum[i][e] = 0;
  for (int s = 0; s < slices; s++)
    QK_UNROLL for (int i = 0; i < Count; i++) {
      Sum part[4];
      const U32x4 four = ld_global(of_tile + (s * Count + i) * Threads);
      memcpy(part, &four, 16);
      QK_UNROLL for (int e = 0; e < 4; e++) sum[i][e] += part[e];
    }
  block_sync();  // `base` is free again
  return true;
}

// ---- a piece of the tile in shared memory ------------------------------------------------------------------------

// Rows are padded by 16 bytes: the eight rows or columns that a warp's store meets then lie in banks of their own.
template <int Columns>
QK_PURE uint32_t place(int row, int column) { return row * (Columns * 4 + 16) + column * 4; }

template <int Columns, class Sum>
QK_TEMPLATE void put(uint32_t base, int row, int column, Sum sum) {
  uint32_t bits;
  memcpy(&bits, &sum, 4);
  st_shared(base + place<Columns>(row, column), bits);
}

// What a thread does with the pieces: columns 4 (thread % (Columns / 4)) … + 3 of every Threads / (Columns / 4)-th row.
// Vector: n_size is a multiple of four, so that all four columns lie inside D, or none.
template <class Sum, int Columns, int Threads, bool Vector>
struct Storer {
  static constexpr int QUADS = Columns / 4, ROWS_AT_ONCE = Threads / QUADS;
  static_assert(Threads % QUADS == 0, "a thread keeps its columns");

  const epilogue::Output& output;
  epilogue::ColumnFactors columns[4];
  int first, column;  // of the piece; of D

  Storer(const epilogue::Output& output_, int n0) : output(output_) {
    first = threadIdx.x % QUADS * 4;
    column = n0 + first;
    if (Vector) {
      QK_UNROLL for (int q = 0; q < 4; q += 2)
        epilogue::column_factor_pair(output, column + q, columns[q], columns[q + 1]);
    } else {
      QK_UNROLL for (int q = 0; q < 4; q++) columns[q] = epilogue::column_factors(output, column + q);
    }
  }

  // Finish and store the piece's `rows` rows; `row_of` says which rows of D they are. `scaled`: what happens to a sum
  // before the epilogue.
  template <class RowOf, class Scaled>
  void store(void* d, uint32_t base, int rows, RowOf row_of, Scaled scaled) const {
    for (int r = threadIdx.x / QUADS; r < rows; r += ROWS_AT_ONCE) {
      const int row = row_of(r);
      if (row >= output.m_size || column >= output.n_size) continue;
      const U32x4 four = ld_shared<U32x4>(base + place<Columns>(r, first));
      Sum sum[4];
      memcpy(sum, &four, 16);
      QK_UNROLL for (int q = 0; q < 4; q++) sum[q] = scaled(sum[q]);
      const epilogue::RowFactors of_row = epilogue::row_factors(output, row);
      if constexpr (Vector) {
        epilogue::Pair pairs[2];
        QK_UNROLL for (int q = 0; q < 2; q++) {
          const float residuals[2] = {epilogue::residual_at(output, row, column + q * 2),
                                      epilogue::residual_at(output, row, column + q * 2 + 1)};
          pairs[q] = epilogue::element_pair(output, sum[q * 2], sum[q * 2 + 1], {of_row, of_row},
                                            {columns[q * 2], columns[q * 2 + 1]}, residuals);
        }
        using Stored = Four<epilogue::ELEMENT_BYTES>;
        const int64_t at = int64_t(row) * output.n_size + column;
        st_global(reinterpret_cast<typename Stored::Type*>(static_cast<uint8_t*>(d) + at * epilogue::ELEMENT_BYTES),
                  Stored::of(pairs[0], pairs[1]));
      } else {
        QK_UNROLL for (int q = 0; q < 4; q++)
          epilogue::store_element(output, d, sum[q], of_row, columns[q], row, column + q);
      }
    }
  }
};

}  // namespace tile
}  // namespace qk
