// What happens to a sum before it is stored: the same operations, in the same order, in every GEMM kernel.
//
//   x = float(sum - zero_point[row] * weight_sum[column])        ZERO_POINT: int8 codes of asymmetric activations
//   x = x * row_scale[row]                                       ROW_SCALE
//   x = x * column_scale[column]                                 COLUMN_SCALE
//   x = x + bias[column]                                         BIAS
//   x = x + residual[row, column]                                RESIDUAL BEFORE the activation
//   x = activation(x)                                            ACTIVATION
//   x = x + residual[row, column]                                RESIDUAL AFTER it
//   D[row, column] = x rounded to OUTPUT                         int8, e4m3: x / scale, + zero point, saturated
//
// Every line is compiled in or out by the macros below; each operation rounds to float32 once. A kernel fetches the
// factors of its rows and columns when it likes (row_factors, column_factors), and brings them back with the sum:
// `element` gives the finished element, `store_element` also stores it, `element_pair` packs two neighbours of a row.
#pragma once

#include "instructions.h"

// Element types of D and of the residual.
#define OUTPUT_S32 0  // the bare sum, less the zero point's part: no other line applies
#define OUTPUT_F32 1
#define OUTPUT_BF16 2
#define OUTPUT_F16 3
#define OUTPUT_S8 4
#define OUTPUT_E4M3 5
// Factors of rows or columns: none, one for all, one each.
#define SCALE_NONE 0
#define SCALE_ONE 1
#define SCALE_EACH 2
#define ACTIVATION_NONE 0
#define ACTIVATION_RELU 1
#define ACTIVATION_CLIP 2
#define ACTIVATION_GELU 3
#define ACTIVATION_GELU_TANH 4
#define ACTIVATION_SILU 5
#define RESIDUAL_NONE 0
#define RESIDUAL_BEFORE 1
#define RESIDUAL_AFTER 2

#ifndef OUTPUT
#define OUTPUT OUTPUT_BF16
#endif
#ifndef ROW_SCALE
#define ROW_SCALE SCALE_NONE
#endif
#ifndef COLUMN_SCALE
#define COLUMN_SCALE SCALE_NONE
#endif
#ifndef ZERO_POINT
#define ZERO_POINT SCALE_NONE
#endif
#ifndef BIAS
#define BIAS 0
#endif
#ifndef ACTIVATION
#define ACTIVATION ACTIVATION_NONE
#endif
#ifndef RESIDUAL
#define RESIDUAL RESIDUAL_NONE
#endif
#ifndef RESIDUAL_TYPE
#define RESIDUAL_TYPE OUTPUT_BF16
#endif
#ifndef OUTPUT_ZERO_POINT
#define OUTPUT_ZERO_POINT 0
#endif

namespace qk {
namespace epilogue {

QK_PURE constexpr int bytes_of(int type) {
  return type == OUTPUT_S32 || type == OUTPUT_F32 ? 4 : type == OUTPUT_BF16 || type == OUTPUT_F16 ? 2 : 1;
}
constexpr int ELEMENT_BYTES = bytes_of(OUTPUT);

// One element of D, and two neighbours of a row.
template <int Bytes> struct Words;
template <> struct Words<1> { using Code = uint8_t; using Pair = uint16_t; };
template <> struct Words<2> { using Code = uint16_t; using Pair = uint32_t; };
template <> struct Words<4> { using Code = uint32_t; using Pair = U32x2; };
using Code = Words<ELEMENT_BYTES>::Code;
using Pair = Words<ELEMENT_BYTES>::Pair;

// What the host passes by value.
struct Numbers {
  float low, high;                        // Clip
  float scale, reciprocal, zero_point;    // of an int8 or e4m3 D; reciprocal is 1 / scale to the nearest float
  float residual_scale, residual_zero_point;  // of an int8 or e4m3 residual
};

// What the epilogue knows of the tensors. Pointers that the macros leave out may be null.
struct Output {
  const float* row_scale;      // of rows of D: one or m_size
  const float* column_scale;   // of columns of D: one or n_size
  const float* bias;           // n_size
  const int32_t* zero_point;   // of rows of D: one or m_size
  const int32_t* weight_sum;   // n_size: sums of the weight's codes over K
  const void* residual;        // [m_size, n_size]
  Numbers numbers;
  int m_size, n_size;
};

struct RowFactors {
  float scale;
  int32_t zero_point;
};
struct ColumnFactors {
  float scale, bias;
  int32_t weight_sum;
};

// Rows and columns beyond the ends get zeros, and read nothing.
QK_FUNCTION RowFactors row_factors(const Output& output, int row) {
  const bool inside = row < output.m_size;
  RowFactors factors{1.0f, 0};
  if (ROW_SCALE == SCALE_ONE) factors.scale = ld_global(output.row_scale);
  if (ROW_SCALE == SCALE_EACH) factors.scale = inside ? ld_global(output.row_scale + row) : 0.0f;
  if (ZERO_POINT == SCALE_ONE) factors.zero_point = ld_global(output.zero_point);
  if (ZERO_POINT == SCALE_EACH) factors.zero_point = inside ? ld_global(output.zero_point + row) : 0;
  return factors;
}
QK_FUNCTION ColumnFactors column_factors(const Output& output, int column) {
  const bool inside = column < output.n_size;
  ColumnFactors factors{1.0f, 0.0f, 0};
  if (COLUMN_SCALE == SCALE_ONE) factors.scale = ld_global(output.column_scale);
  if (COLUMN_SCALE == SCALE_EACH) factors.scale = inside ? ld_global(output.column_scale + column) : 0.0f;
  if (BIAS) factors.bias = inside ? ld_global(output.bias + column) : 0.0f;
  if (ZERO_POINT != SCALE_NONE) factors.weight_sum = inside ? ld_global(output.weight_sum + column) : 0;
  return factors;
}
// Columns `column` and `column` + 1, the first even, both inside or neither (n_size is even): one load brings both.
QK_FUNCTION void column_factor_pair(const Output& output, int column, ColumnFactors& low, ColumnFactors& high) {
  low = high = {1.0f, 0.0f, 0};
  const bool inside = column < output.n_size;
  auto load = [&](const void* from) {
    return inside ? ld_global(reinterpret_cast<const U32x2*>(from) + column / 2) : U32x2{0, 0};
  };
  if (COLUMN_SCALE == SCALE_ONE) low.scale = high.scale = ld_global(output.column_scale);
  if (COLUMN_SCALE == SCALE_EACH) {
    const U32x2 pair = load(output.column_scale);
    low.scale = portable::bits_float(pair.x);
    high.scale = portable::bits_float(pair.y);
  }
  if (BIAS) {
    const U32x2 pair = load(output.bias);
    low.bias = portable::bits_float(pair.x);
    high.bias = portable::bits_float(pair.y);
  }
  if (ZERO_POINT != SCALE_NONE) {
    const U32x2 pair = load(output.weight_sum);
    low.weight_sum = static_cast<int32_t>(pair.x);
    high.weight_sum = static_cast<int32_t>(pair.y);
  }
}

// Codes of two residuals, held until they are needed.
using ResidualCode = Words<bytes_of(RESIDUAL_TYPE)>::Code;
using ResidualPair = Words<bytes_of(RESIDUAL_TYPE)>::Pair;

QK_FUNCTION ResidualCode residual_code(const Output& output, int row, int column) {
  return ld_global(static_cast<const ResidualCode*>(output.residual) + (int64_t(row) * output.n_size + column));
}
// Of two neighbours of a row inside D, the first in an even column, where n_size is even.
QK_FUNCTION ResidualPair residual_pair(const Output& output, int row, int column) {
  return ld_global(static_cast<const ResidualPair*>(output.residual) + (int64_t(row) * output.n_size + column) / 2);
}
QK_PURE U32x2 joined(uint32_t low, uint32_t high) { return {low, high}; }
QK_PURE uint32_t joined(uint16_t low, uint16_t high) { return low | uint32_t(high) << 16; }
QK_PURE uint16_t joined(uint8_t low, uint8_t high) { return static_cast<uint16_t>(low | high << 8); }

QK_FUNCTION void residual_values(const Output&, U32x2 pair, float (&values)[2]) {
  values[0] = portable::bits_float(pair.x);
  values[1] = portable::bits_float(pair.y);
}
QK_FUNCTION void residual_values(const Output&, uint32_t pair, float (&values)[2]) {
  values[0] = RESIDUAL_TYPE == OUTPUT_BF16 ? bf16_low(pair) : f16_low(pair);
  values[1] = RESIDUAL_TYPE == OUTPUT_BF16 ? bf16_high(pair) : f16_high(pair);
}
QK_FUNCTION void residual_values(const Output& output, uint16_t pair, float (&values)[2]) {
  if (RESIDUAL_TYPE == OUTPUT_S8) {
    values[0] = static_cast<float>(static_cast<int8_t>(pair & 0xff));
    values[1] = static_cast<float>(static_cast<int8_t>(pair >> 8));
  } else {
    const uint32_t halves = e4m3_to_f16(pair);
    values[0] = f16_low(halves);
    values[1] = f16_high(halves);
  }
  for (float& value : values)
    value = (value - output.numbers.residual_zero_point) * output.numbers.residual_scale;
}

// The residual at a place inside D; 0 without one.
QK_FUNCTION float residual_at(const Output& output, int row, int column) {
  if (RESIDUAL == RESIDUAL_NONE) return 0.0f;
  float values[2];
  residual_values(output, joined(residual_code(output, row, column), ResidualCode(0)), values);
  return values[0];
}

// 1 / (1 + e^-x).
QK_FUNCTION float sigmoid(float x) { return reciprocal_approx(1.0f + exp2_approx(x * -1.44269504f)); }

// The normal distribution's mass beyond |x|: t P(t) e^(-x^2 / 2) with t = 1 / (1 + 0.32526912 |x|). P was fitted to the
// scaled complementary error function for least relative error, 7e-7.
QK_FUNCTION float normal_tail(float x) {
  const float t = reciprocal_approx(1.0f + 0.32526912f * (x < 0.0f ? -x : x));
  float p = 0.0338571715f;
  p = fused_multiply_add(p, t, -0.1133146239f);
  p = fused_multiply_add(p, t, 0.08459545539f);
  p = fused_multiply_add(p, t, 0.02630535669f);
  p = fused_multiply_add(p, t, 0.09342386974f);
  p = fused_multiply_add(p, t, 0.1155909483f);
  p = fused_multiply_add(p, t, 0.1297786319f);
  p = fused_multiply_add(p, t, 0.1297635294f);
  return p * t * exp2_approx(x * x * -0.72134752f);
}

// NaN stays NaN. Gelu and Silu of finite numbers lie within 2^-15 of their true value's own size, or within 2^-120.
QK_FUNCTION float activated(const Numbers& numbers, float x) {
  if (ACTIVATION == ACTIVATION_RELU) return x < 0.0f ? 0.0f : x;
  if (ACTIVATION == ACTIVATION_CLIP) {
    x = x < numbers.low ? numbers.low : x;
    return x > numbers.high ? numbers.high : x;
  }
  if (ACTIVATION == ACTIVATION_GELU) {
    const float tail = normal_tail(x);
    return x * (x < 0.0f ? tail : 1.0f - tail);
  }
  // 0.5 (1 + tanh u) = 1 / (1 + e^-2u), with u = sqrt(2 / pi) (x + 0.044715 x^3).
  if (ACTIVATION == ACTIVATION_GELU_TANH) return x * sigmoid(x * (1.59576912f + 0.0713548163f * (x * x)));
  if (ACTIVATION == ACTIVATION_SILU) return x * sigmoid(x);
  return x;
}

// x / scale as a division rounds it: two corrections of the product with the reciprocal. Beyond 4096 no output type
// needs them (and infinities would become NaN). scale lies in 2^-100 ... 2^100.
QK_FUNCTION float divided(const Numbers& numbers, float x) {
  const float q = x * numbers.reciprocal;
  float better = fused_multiply_add(fused_multiply_add(-q, numbers.scale, x), numbers.reciprocal, q);
  better = fused_multiply_add(fused_multiply_add(-better, numbers.scale, x), numbers.reciprocal, better);
  if (OUTPUT == OUTPUT_E4M3 && q == 0.0f) return q;  // corrections lose the sign of zero
  return q < 4096.0f && q > -4096.0f ? better : q;
}

// x / scale to the nearest integer, ties to even, plus the zero point, saturated; NaN gives 0.
QK_FUNCTION int8_t quantized(const Numbers& numbers, float x) {
  float q = divided(numbers, x);
  if (!OUTPUT_ZERO_POINT) return float_to_s8(q);
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: from there on floats are whole
  q = q < 4096.0f && q > -4096.0f ? (q + to_integer) - to_integer : q;
  return float_to_s8(q + numbers.zero_point);
}

template <int Type = OUTPUT>
QK_TEMPLATE typename Words<bytes_of(Type)>::Code encode(const Numbers& numbers, float x) {
  if constexpr (Type == OUTPUT_S8) return static_cast<uint8_t>(quantized(numbers, x));
  else if constexpr (Type == OUTPUT_E4M3) return static_cast<uint8_t>(pack_e4m3(divided(numbers, x), 0.0f));
  else if constexpr (Type == OUTPUT_BF16) return static_cast<uint16_t>(pack_bf16(x, 0.0f));
  else if constexpr (Type == OUTPUT_F16) return static_cast<uint16_t>(pack_f16(x, 0.0f));
  else return portable::float_bits(x);
}
template <int Type = OUTPUT>
QK_TEMPLATE typename Words<bytes_of(Type)>::Pair encode_pair(const Numbers& numbers, float low, float high) {
  if constexpr (Type == OUTPUT_S8)
    return static_cast<uint16_t>(static_cast<uint8_t>(quantized(numbers, low)) |
                                 static_cast<uint8_t>(quantized(numbers, high)) << 8);
  else if constexpr (Type == OUTPUT_E4M3) return pack_e4m3(divided(numbers, low), divided(numbers, high));
  else if constexpr (Type == OUTPUT_BF16) return pack_bf16(low, high);
  else if constexpr (Type == OUTPUT_F16) return pack_f16(low, high);
  else return U32x2{portable::float_bits(low), portable::float_bits(high)};
}

template <class Sum>
QK_TEMPLATE Sum corrected(Sum sum, RowFactors row, ColumnFactors column) {
  if constexpr (ZERO_POINT != SCALE_NONE)  // unsigned: what wraps here comes back in the difference
    return static_cast<Sum>(uint32_t(sum) - uint32_t(row.zero_point) * uint32_t(column.weight_sum));
  return sum;
}

// Everything but the rounding to OUTPUT.
template <class Sum>
QK_TEMPLATE float finish(const Output& output, Sum sum, RowFactors row, ColumnFactors column, float residual) {
  float x = static_cast<float>(corrected(sum, row, column));
  if (ROW_SCALE != SCALE_NONE) x = x * row.scale;
  if (COLUMN_SCALE != SCALE_NONE) x = x * column.scale;
  if (BIAS) x = x + column.bias;
  if (RESIDUAL == RESIDUAL_BEFORE) x = x + residual;
  x = activated(output.numbers, x);
  if (RESIDUAL == RESIDUAL_AFTER) x = x + residual;
  return x;
}

// The finished element. `residual` is residual_at's, or 0.
template <class Sum, int Type = OUTPUT>
QK_TEMPLATE typename Words<bytes_of(Type)>::Code element(const Output& output, Sum sum, RowFactors row,
                                                         ColumnFactors column, float residual) {
  if constexpr (Type == OUTPUT_S32) return static_cast<uint32_t>(corrected(sum, row, column));
  else return encode(output.numbers, finish(output, sum, row, column, residual));
}
// Two elements, packed: those of one row and two columns, or of two rows and one column.
template <class Sum, int Type = OUTPUT>
QK_TEMPLATE typename Words<bytes_of(Type)>::Pair element_pair(const Output& output, Sum low, Sum high,
                                                              const RowFactors (&rows)[2],
                                                              const ColumnFactors (&columns)[2],
                                                              const float (&residuals)[2]) {
  if constexpr (Type == OUTPUT_S32)
    return U32x2{static_cast<uint32_t>(corrected(low, rows[0], columns[0])),
                 static_cast<uint32_t>(corrected(high, rows[1], columns[1]))};
  else
    return encode_pair(output.numbers, finish(output, low, rows[0], columns[0], residuals[0]),
                       finish(output, high, rows[1], columns[1], residuals[1]));
}

// Finish and store one element, if it lies inside D.
template <class Sum>
QK_TEMPLATE void store_element(const Output& output, void* d, Sum sum, RowFactors row_of, ColumnFactors column_of,
                               int row, int column) {
  if (row >= output.m_size || column >= output.n_size) return;
  const Code code = element(output, sum, row_of, column_of, residual_at(output, row, column));
  st_global(static_cast<Code*>(d) + (int64_t(row) * output.n_size + column), code);
}

}  // namespace epilogue
}  // namespace qk

// The kernel parameters that an Output is made of, in the order in which the launchers pass them.
#define EPILOGUE_PARAMETERS                                                                                        \
  const float *row_scale, const float *column_scale, const float *bias, const int32_t *zero_point,                 \
      const int32_t *weight_sum, const void *residual, const ::qk::epilogue::Numbers numbers, int m_size, int n_size
#define EPILOGUE_OUTPUT \
  ::qk::epilogue::Output { row_scale, column_scale, bias, zero_point, weight_sum, residual, numbers, m_size, n_size }
