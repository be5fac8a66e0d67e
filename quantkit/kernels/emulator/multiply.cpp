// The arithmetic inside the matrix instructions, and the model of how they round.
//
// Integers: exact, wrapping at 32 bits.
//
// Floats: products are exact. Tensor cores do not round after every addition: they take `group` products and the
// accumulator together, align all of them to the largest exponent among them (a product's exponent is the sum of its
// factors'), cut each term off below `fraction_bits` bits under that exponent, add the cut terms exactly, and cut the
// sum to `kept_bits` fraction bits. Toward zero everywhere.
//
//   instruction               group  fraction_bits  kept_bits
//   wgmma e4m3, e5m2             32             13         13    "about 14 bits", FP22
//   wgmma and mma bf16, f16      16             25         23
//
// mma.sync of fp8 on sm_90 is two fp16 instructions: K elements 4i, 4i+1 first, then 4i+2, 4i+3, starting from zero,
// and the accumulator is added last, rounded to nearest. (sm_89 and sm_120 have an instruction of their own, not
// measured.) All of this reproduces an H200 bit for bit: tests/kernels/data/sm_90.npz, taken in November 2026.
// Products of codes with block scales (sm_120's mma_blocks) are taken to be exact, scales included, and to be added as
// bf16's are: all of one instruction and the accumulator together, with 25 bits. No GPU has been asked.
// The first description of the fp8 figures is in DeepSeek-V3's technical report, section 3.5.2.
#include <math.h>

#include "machine.h"

namespace qk {
namespace emulator {

namespace {

void multiply_s8(int rows, int columns, const uint8_t (*a)[32], const uint8_t (*b)[32], uint32_t (*d)[256]) {
  static int16_t wide[256][32];
  for (int n = 0; n < columns; n++)
    for (int k = 0; k < 32; k++) wide[n][k] = static_cast<int8_t>(b[n][k]);
  for (int m = 0; m < rows; m++) {
    int16_t row[32];
    for (int k = 0; k < 32; k++) row[k] = static_cast<int8_t>(a[m][k]);
    for (int n = 0; n < columns; n++) {
      int32_t sum = 0;
      for (int k = 0; k < 32; k++) sum += row[k] * wide[n][k];
      d[m][n] += static_cast<uint32_t>(sum);
    }
  }
}

struct Rounding {
  int group, fraction_bits, kept_bits;
};

float element(int type, const uint8_t* row, int k) {
  uint16_t pair;
  memcpy(&pair, row + k * 2, 2);
  switch (type) {
    case E4M3::code: return portable::e4m3_to_float(row[k]);
    case E5M2::code: return portable::e5m2_to_float(row[k]);
    case BF16::code: return portable::bf16_to_float(pair);
    default: return portable::half_to_float(pair);
  }
}

uint64_t double_bits(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits;
}

double bits_double(uint64_t bits) {
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

// The power of two at or below |x|, 0 for 0: what the hardware's exponent field stands for. Every float32, subnormals
// too, is a normal double, so this is a mask.
double magnitude(double x) { return bits_double(double_bits(x) & 0x7ff0000000000000u); }

// Toward zero, to a float32 with `bits` fraction bits.
float cut(double x, int bits) {
  if (fabs(x) >= 0x1p-126) return static_cast<float>(bits_double(double_bits(x) & ~0ull << (52 - bits)));
  return static_cast<float>(trunc(x * 0x1p149) * 0x1p-149);
}

void multiply_floats(int type, int rows, int columns, const uint8_t (*a)[32], const uint8_t (*b)[32],
                     uint32_t (*d)[256], Rounding rounding) {
  const int depth = type == E4M3::code || type == E5M2::code ? 32 : 16;
  static double b_value[32][256], b_power[32][256];
  bool finite = true;
  for (int n = 0; n < columns; n++)
    for (int k = 0; k < depth; k++) {
      b_value[k][n] = element(type, b[n], k);
      b_power[k][n] = magnitude(b_value[k][n]);
      finite = finite && isfinite(b_value[k][n]);
    }
  const double fraction = ldexp(1.0, rounding.fraction_bits);
  for (int m = 0; m < rows; m++) {
    double a_value[32], a_power[32];
    bool row_finite = finite;
    for (int k = 0; k < depth; k++) {
      a_value[k] = element(type, a[m], k);
      a_power[k] = magnitude(a_value[k]);
      row_finite = row_finite && isfinite(a_value[k]);
    }
    float* sums = reinterpret_cast<float*>(d[m]);
    for (int first = 0; first < depth; first += rounding.group) {
      // The loops over n are what the compiler turns into vector instructions.
      static double largest[256], sum[256], scale[256], unit[256];
      for (int n = 0; n < columns; n++) row_finite = row_finite && isfinite(sums[n]);
      if (!row_finite) {  // NaN and infinity follow IEEE whatever the order
        for (int n = 0; n < columns; n++)
          for (int k = first; k < first + rounding.group; k++) sums[n] += float(a_value[k] * b_value[k][n]);
        continue;
      }
      for (int n = 0; n < columns; n++) largest[n] = magnitude(sums[n]);
      for (int k = first; k < first + rounding.group; k++)
        for (int n = 0; n < columns; n++) {
          const double power = a_power[k] * b_power[k][n];
          largest[n] = power > largest[n] ? power : largest[n];
        }
      for (int n = 0; n < columns; n++) {
        const double biggest = largest[n] > 0 ? largest[n] : 1;
        scale[n] = fraction / biggest;  // powers of two: exact
        unit[n] = biggest / fraction;
        sum[n] = trunc(sums[n] * scale[n]);
      }
      for (int k = first; k < first + rounding.group; k++)
        for (int n = 0; n < columns; n++) sum[n] += trunc(a_value[k] * b_value[k][n] * scale[n]);
      for (int n = 0; n < columns; n++) sums[n] = cut(sum[n] * unit[n], rounding.kept_bits);
    }
  }
}

// Two passes of 16 over the halves of each four, from zero, then one ordinary addition.
void multiply_fp8_as_halves(int type, int rows, int columns, const uint8_t (*a)[32], const uint8_t (*b)[32],
                            uint32_t (*d)[256]) {
  static uint8_t ordered_a[64][32], ordered_b[256][32];
  static uint32_t sum[64][256];
  auto reorder = [](const uint8_t* from, uint8_t* to) {
    for (int k = 0; k < 32; k++) to[k % 4 / 2 * 16 + k / 4 * 2 + k % 2] = from[k];
  };
  for (int m = 0; m < rows; m++) {
    reorder(a[m], ordered_a[m]);
    memset(sum[m], 0, columns * 4);
  }
  for (int n = 0; n < columns; n++) reorder(b[n], ordered_b[n]);
  multiply_floats(type, rows, columns, ordered_a, ordered_b, sum, Rounding{16, 25, 23});
  for (int m = 0; m < rows; m++)
    for (int n = 0; n < columns; n++)
      d[m][n] = portable::float_bits(portable::bits_float(d[m][n]) + portable::bits_float(sum[m][n]));
}

// Row of codes as their values times their blocks' scales.
void scaled_row(int type, const uint8_t* codes, const uint8_t* scales, double (&values)[64]) {
  const int depth = type == MXFP8::code ? 32 : 64, block = type == NVFP4::code ? 16 : 32;
  for (int k = 0; k < depth; k++) {
    const float scale = type == NVFP4::code ? portable::e4m3_to_float(scales[k / block] & 0x7fu)
                                            : portable::e8m0_to_float(scales[k / block]);
    const float code = type == MXFP8::code ? portable::e4m3_to_float(codes[k])
                                           : portable::e2m1_to_float(codes[k / 2] >> k % 2 * 4);
    values[k] = double(code) * scale;
  }
}

}  // namespace

void multiply_blocks(int type, int rows, int columns, const uint8_t (*a)[32], const uint8_t (*b)[32],
                     const uint8_t (*scales_a)[4], const uint8_t (*scales_b)[4], uint32_t (*d)[256]) {
  const int depth = type == MXFP8::code ? 32 : 64;
  static double a_value[16][64], b_value[8][64];
  for (int m = 0; m < rows; m++) scaled_row(type, a[m], scales_a[m], a_value[m]);
  for (int n = 0; n < columns; n++) scaled_row(type, b[n], scales_b[n], b_value[n]);
  for (int m = 0; m < rows; m++)
    for (int n = 0; n < columns; n++) {
      const float before = portable::bits_float(d[m][n]);
      double product[64], largest = magnitude(before), sum = 0;
      bool finite = isfinite(before);
      for (int k = 0; k < depth; k++) {
        product[k] = a_value[m][k] * b_value[n][k];
        const double power = magnitude(a_value[m][k]) * magnitude(b_value[n][k]);
        largest = power > largest ? power : largest;
        finite = finite && isfinite(product[k]);
      }
      float result = before;
      if (finite) {
        const double scale = 0x1p25 / (largest > 0 ? largest : 1);  // powers of two: exact
        for (int k = 0; k < depth; k++) sum += trunc(product[k] * scale);
        result = cut((trunc(before * scale) + sum) / scale, 23);
      } else {  // NaN and infinity follow IEEE whatever the order
        for (int k = 0; k < depth; k++) result += float(product[k]);
      }
      d[m][n] = portable::float_bits(result);
    }
}

void multiply(int type, int rows, int columns, const uint8_t (*a)[32], const uint8_t (*b)[32], uint32_t (*d)[256],
              bool warpgroup) {
  const bool fp8 = type == E4M3::code || type == E5M2::code;
  if (type == S8::code) multiply_s8(rows, columns, a, b, d);
  else if (!fp8) multiply_floats(type, rows, columns, a, b, d, Rounding{16, 25, 23});
  else if (warpgroup) multiply_floats(type, rows, columns, a, b, d, Rounding{32, 13, 13});
  else multiply_fp8_as_halves(type, rows, columns, a, b, d);
}

}  // namespace emulator
}  // namespace qk
