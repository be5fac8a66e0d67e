// The warp's matrix instructions: ldmatrix, stmatrix, mma.
#include "machine.h"

namespace qk {
namespace emulator {

namespace {

// Lanes 8i … 8i+7 address the rows of matrix i.
void load_matrices(int count, bool transposed, uint32_t address, uint32_t* registers) {
  Thread& t = self();
  Block& block = *t.parent;
  uint32_t offset = 0;
  if (t.lane < 8 * count) {
    SharedAddress s = resolve(address, 16, 16);
    if (s.block != &block) fail("out of range", "ldmatrix reads the block's own shared memory");
    check_read(block, s.offset, 16, false);
    note_read(block, s.offset, 16);
    offset = s.offset;
  }
  meet_warp(&offset, registers, [&](Warp& warp) {
    for (int m = 0; m < count; m++) {
      uint16_t matrix[8][8];
      for (int row = 0; row < 8; row++)
        memcpy(matrix[row], &block.shared[*static_cast<const uint32_t*>(warp.input[8 * m + row])], 16);
      for (int lane = 0; lane < 32; lane++) {
        const int row = lane / 4, column = lane % 4 * 2;
        const uint16_t low = transposed ? matrix[column][row] : matrix[row][column];
        const uint16_t high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
        static_cast<uint32_t*>(warp.output[lane])[m] = low | uint32_t(high) << 16;
      }
    }
  });
}

void store_matrices(int count, bool transposed, uint32_t address, const uint32_t* registers) {
  Thread& t = self();
  Block& block = *t.parent;
  struct Input { uint32_t offset; const uint32_t* registers; int thread; } input{0, registers, t.linear};
  if (t.lane < 8 * count) {
    SharedAddress s = resolve(address, 16, 16);
    if (s.block != &block) fail("out of range", "stmatrix writes the block's own shared memory");
    check_write(block, s.offset, 16, false);
    input.offset = s.offset;
  }
  meet_warp(&input, nullptr, [&](Warp& warp) {
    for (int m = 0; m < count; m++)
      for (int lane = 0; lane < 32; lane++) {
        const Input& from = *static_cast<const Input*>(warp.input[lane]);
        const uint32_t pair = from.registers[m];
        for (int half = 0; half < 2; half++) {
          const int row = transposed ? lane % 4 * 2 + half : lane / 4;
          const int column = transposed ? lane / 4 : lane % 4 * 2 + half;
          const uint32_t to = static_cast<const Input*>(warp.input[8 * m + row])->offset + column * 2;
          const uint16_t value = pair >> (16 * half);
          memcpy(&block.shared[to], &value, 2);
          note_write(block, to, 2, from.thread);
        }
      }
  });
}

}  // namespace

namespace {

// What one mma multiplies, gathered from a warp's lanes: rows of 32 bytes, and sums.
struct Tile {
  uint8_t a[16][32], b[8][32];
  uint32_t sum[16][256];
};
struct Fragment { const uint32_t *a, *b; uint32_t scale_a, scale_b; };

template <class Multiply>
void with_tile(const Fragment& mine, void* d, Multiply multiply) {
  meet_warp(&mine, d, [&multiply](Warp& warp) {
    static Tile tile;
    auto each_pair = [&](auto move) {
      for (int lane = 0; lane < 32; lane++)
        for (int h = 0; h < 2; h++)
          move(static_cast<uint32_t*>(warp.output[lane]) + 2 * h, &tile.sum[lane / 4 + 8 * h][lane % 4 * 2]);
    };
    for (int lane = 0; lane < 32; lane++) {
      const Fragment& from = *static_cast<const Fragment*>(warp.input[lane]);
      for (int i = 0; i < 4; i++) memcpy(&tile.a[lane / 4 + i % 2 * 8][lane % 4 * 4 + i / 2 * 16], &from.a[i], 4);
      for (int i = 0; i < 2; i++) memcpy(&tile.b[lane / 4][lane % 4 * 4 + i * 16], &from.b[i], 4);
    }
    each_pair([](uint32_t* own, uint32_t* matrix) { memcpy(matrix, own, 8); });
    multiply(tile, warp);
    each_pair([](uint32_t* own, uint32_t* matrix) { memcpy(own, matrix, 8); });
  });
}

}  // namespace

void mma(int type, void* d, const uint32_t* a, const uint32_t* b, Place place) {
  enter("mma", place);
  with_tile({a, b, 0, 0}, d, [type](Tile& tile, Warp&) { multiply(type, 16, 8, tile.a, tile.b, tile.sum, false); });
}

void mma_blocks(int type, ScaleChoice choice, float* d, const uint32_t* a, const uint32_t* b, uint32_t scale_a,
                uint32_t scale_b, Place place) {
  enter("mma_blocks", place);
  with_tile({a, b, scale_a, scale_b}, d, [type, choice](Tile& tile, Warp& warp) {
    uint8_t scales_a[16][4] = {}, scales_b[8][4] = {};
    auto held = [&](int lane) -> const Fragment& { return *static_cast<const Fragment*>(warp.input[lane]); };
    auto from_byte = [&](uint8_t (&row)[4], uint32_t scales) {
      scales >>= 8 * choice.byte;
      memcpy(row, &scales, 4);
    };
    for (int row = 0; row < 16; row++)
      from_byte(scales_a[row], held(4 * (row % 8) + 2 * choice.thread_a + row / 8).scale_a);
    for (int row = 0; row < 8; row++) from_byte(scales_b[row], held(4 * row + choice.thread_b).scale_b);
    multiply_blocks(type, 16, 8, tile.a, tile.b, scales_a, scales_b, tile.sum);
  });
}

}  // namespace emulator

using namespace emulator;

void ldmatrix_x2(uint32_t& r0, uint32_t& r1, uint32_t address, Place place) {
  enter("ldmatrix_x2", place);
  uint32_t r[2];
  load_matrices(2, false, address, r);
  r0 = r[0], r1 = r[1];
}

void ldmatrix_x4(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address, Place place) {
  enter("ldmatrix_x4", place);
  uint32_t r[4];
  load_matrices(4, false, address, r);
  r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3];
}

void ldmatrix_x4_transposed(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address, Place place) {
  enter("ldmatrix_x4_transposed", place);
  uint32_t r[4];
  load_matrices(4, true, address, r);
  r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3];
}

void stmatrix_x2(uint32_t address, uint32_t r0, uint32_t r1, Place place) {
  enter("stmatrix_x2", place);
  const uint32_t r[] = {r0, r1};
  store_matrices(2, false, address, r);
}

void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3, Place place) {
  enter("stmatrix_x4", place);
  const uint32_t r[] = {r0, r1, r2, r3};
  store_matrices(4, false, address, r);
}

void stmatrix_x4_transposed(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3, Place place) {
  enter("stmatrix_x4_transposed", place);
  const uint32_t r[] = {r0, r1, r2, r3};
  store_matrices(4, true, address, r);
}

}  // namespace qk
