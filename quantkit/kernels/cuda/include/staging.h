// From wgmma's accumulators to D, for either way round of the operands (SWAP), with or without TMA (TMA_STORE).
//
// Included by a kernel that has said TILE_N, PIECE and STAGED_ROW, and uses the namespace of epilogue.h. Row r and
// column c are the accumulators' own: with SWAP r counts D's columns and c its rows.
#pragma once

// Where byte `byte` of row `row` lies in the swizzle of the output's tensor map.
QK_FUNCTION uint32_t staged(int row, int byte) {
  const int chunk = byte >> 4 ^ (STAGED_ROW == 128 ? row & 7 : row >> 1 & 3);
  return row * STAGED_ROW + (chunk << 4) + (byte & 15);
}

// Along the accumulators' columns lie D's columns, or its rows with SWAP; along their rows the others.
template <bool First, class A, class B> struct Either { using Type = A; };
template <class A, class B> struct Either<false, A, B> { using Type = B; };
using Across = Either<SWAP, RowFactors, ColumnFactors>::Type;
using Down = Either<SWAP, ColumnFactors, RowFactors>::Type;

QK_FUNCTION void fetch_factors(const Output& output, int row, RowFactors& factors) {
  factors = row_factors(output, row);
}
QK_FUNCTION void fetch_factors(const Output& output, int column, ColumnFactors& factors) {
  factors = column_factors(output, column);
}
// Two neighbours across, the first of them even. Where D's rows are whole 16 bytes n_size is even, so that both
// columns exist or neither, and one load brings both.
QK_FUNCTION void fetch_pair(const Output& output, int row, RowFactors& low, RowFactors& high) {
  low = row_factors(output, row);
  high = row_factors(output, row + 1);
}
QK_FUNCTION void fetch_pair(const Output& output, int column, ColumnFactors& low, ColumnFactors& high) {
  if (TMA_STORE) {
    column_factor_pair(output, column, low, high);
  } else {
    low = column_factors(output, column);
    high = column_factors(output, column + 1);
  }
}
// Two sums that are neighbours across, finished.
QK_FUNCTION Pair finish_pair(const Output& output, Accumulator low, Accumulator high, RowFactors down,
                             ColumnFactors across_low, ColumnFactors across_high, const float (&residual)[2]) {
  return element_pair(output, low, high, {down, down}, {across_low, across_high}, residual);
}
QK_FUNCTION Pair finish_pair(const Output& output, Accumulator low, Accumulator high, ColumnFactors down,
                             RowFactors across_low, RowFactors across_high, const float (&residual)[2]) {
  return element_pair(output, low, high, {across_low, across_high}, {down, down}, residual);
}
QK_FUNCTION void store_one(const Output& output, void* d, Accumulator sum, RowFactors down, ColumnFactors across, int r,
                           int c) {
  store_element(output, d, sum, down, across, r, c);
}
QK_FUNCTION void store_one(const Output& output, void* d, Accumulator sum, ColumnFactors down, RowFactors across, int r,
                           int c) {
  store_element(output, d, sum, across, down, c, r);
}
// The residuals of the sums at row r and columns c and c + 1, if they lie inside D.
QK_FUNCTION ResidualPair fetch_residuals(const Output& output, int r, int c) {
  if (!SWAP) return r < output.m_size && c < output.n_size ? residual_pair(output, r, c) : ResidualPair{};
  const bool inside = r < output.n_size;
  const ResidualCode low = inside && c < output.m_size ? residual_code(output, c, r) : ResidualCode(0);
  const ResidualCode high = inside && c + 1 < output.m_size ? residual_code(output, c + 1, r) : ResidualCode(0);
  return joined(low, high);
}

// Four finished pairs into the buffer at `to`: columns 8 j of the accumulators with rows h = 0, 1, then 8 (j + 1).
QK_FUNCTION void stage(uint32_t to, int warp, int lane, int j, const uint32_t (&pairs)[4]) {
  const int matrix = lane / 8, within = lane % 8;
  if (SWAP)
    stmatrix_x4_transposed(to + staged((j + matrix / 2) * 8 + within, warp * 32 + matrix % 2 * 16), pairs[0], pairs[1],
                           pairs[2], pairs[3]);
  else
    stmatrix_x4(to + staged(warp * 16 + matrix % 2 * 8 + within, (j + matrix / 2) * 16), pairs[0], pairs[1], pairs[2],
                pairs[3]);
}
QK_FUNCTION void stage(uint32_t to, int warp, int lane, int j, const U32x2 (&pairs)[4]) {
  QK_UNROLL for (int q = 0; q < 4; q++) {
    const int r = warp * 16 + lane / 4 + 8 * (q % 2), c = (j + q / 2) * 8 + lane % 4 * 2;
    if (SWAP) {  // two boxes of 32 columns of D
      const uint32_t box = to + r / 32 * PIECE * STAGED_ROW;
      st_shared(box + staged(c, r % 32 * 4), pairs[q].x);
      st_shared(box + staged(c + 1, r % 32 * 4), pairs[q].y);
    } else {
      st_shared(to + staged(r, c * 4), pairs[q]);
    }
  }
}
QK_FUNCTION void stage(uint32_t to, int warp, int lane, int j, const uint16_t (&pairs)[4]) {
  QK_UNROLL for (int q = 0; q < 4; q++) {
    const int r = warp * 16 + lane / 4 + 8 * (q % 2), c = (j + q / 2) * 8 + lane % 4 * 2;
    if (SWAP) {
      st_shared(to + staged(c, r), static_cast<uint8_t>(pairs[q]));
      st_shared(to + staged(c + 1, r), static_cast<uint8_t>(pairs[q] >> 8));
    } else {
      st_shared(to + staged(r, c), pairs[q]);
    }
  }
}

// The bits of a partial sum.
QK_FUNCTION uint32_t bits_of(Accumulator x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
