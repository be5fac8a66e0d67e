// What the matrix products share besides their pipelines: the order of tiles, and four neighbours of a row of D.
#pragma once

#include "instructions.h"

namespace qk {

// A tile: its number along the first operand's rows and along the second's.
struct Place { int first, second; };

// The tile that comes `index`-th: Height tiles along the first operand, then the next along the second, so that the
// blocks at work at one time share as few rows of both as can be, and those stay in L2.
template <int Height>
QK_TEMPLATE Place place_of(int index, int tiles_first, int tiles_second) {
  const int group = index / (Height * tiles_second), start = group * Height;
  const int height = tiles_first - start < Height ? tiles_first - start : Height;
  const int within = index - group * Height * tiles_second;
  return {start + within % height, within / height};
}

// Four neighbours of a row of D, made of two pairs of elements of so many bytes.
template <int Bytes> struct Four;
template <> struct Four<1> {
  using Type = uint32_t;
  QK_FUNCTION Type of(uint16_t low, uint16_t high) { return low | uint32_t(high) << 16; }
};
template <> struct Four<2> {
  using Type = U32x2;
  QK_FUNCTION Type of(uint32_t low, uint32_t high) { return {low, high}; }
};
template <> struct Four<4> {
  using Type = U32x4;
  QK_FUNCTION Type of(U32x2 low, U32x2 high) { return {low.x, low.y, high.x, high.y}; }
};

}  // namespace qk
