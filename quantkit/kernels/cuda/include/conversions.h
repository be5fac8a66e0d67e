// Number conversions in plain integer arithmetic: what PTX's `cvt` instructions are defined to do.
//
// The emulator runs them everywhere. The PTX body runs them only on architectures whose `cvt` lacks the type
// (e4m3 before sm_89, e2m1 and ue8m0 outside sm_100a / sm_120a), so both bodies give the same bits.
#pragma once

namespace qk {
namespace portable {

QK_PURE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

QK_PURE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// A small float code without its sign: nearest, ties to even, `largest` for everything beyond it (infinity too).
// Mantissa bits are stored; Bias is the exponent bias. x must not be NaN.
template <int Mantissa, int Bias>
QK_PURE uint32_t encode_magnitude(float x, uint32_t largest) {
  uint32_t a = float_bits(x) & 0x7fffffffu;
  uint32_t code;
  if (a < uint32_t(128 - Bias) << 23) {
    // Subnormal results: adding 2^(23 + smallest exponent) leaves the rounded multiple in the low bits.
    const uint32_t magic = uint32_t(128 - Bias - Mantissa + 23) << 23;
    code = float_bits(bits_float(a) + bits_float(magic)) - magic;
  } else {
    a += (1u << (22 - Mantissa)) - 1 + ((a >> (23 - Mantissa)) & 1);
    code = (a >> (23 - Mantissa)) - (uint32_t(127 - Bias) << Mantissa);
  }
  return code < largest ? code : largest;
}

QK_PURE bool is_nan(float x) { return (float_bits(x) & 0x7fffffffu) > 0x7f800000u; }

QK_PURE uint32_t float_to_e4m3(float x) {
  return is_nan(x) ? 0x7fu : (float_bits(x) >> 24 & 0x80u) | encode_magnitude<3, 7>(x, 0x7e);
}

QK_PURE uint32_t float_to_e5m2(float x) {
  return is_nan(x) ? 0x7fu : (float_bits(x) >> 24 & 0x80u) | encode_magnitude<2, 15>(x, 0x7b);
}

// NaN becomes +6: e2m1 has no code for it.
QK_PURE uint32_t float_to_e2m1(float x) {
  return is_nan(x) ? 7u : (float_bits(x) >> 28 & 8u) | encode_magnitude<1, 1>(x, 7);
}

QK_PURE uint32_t float_to_half(float x) {
  return is_nan(x) ? 0x7fffu : (float_bits(x) >> 16 & 0x8000u) | encode_magnitude<10, 15>(x, 0x7c00);
}

QK_PURE uint32_t float_to_bf16(float x) {
  uint32_t a = float_bits(x);
  return is_nan(x) ? 0x7fffu : (a + 0x7fffu + (a >> 16 & 1)) >> 16;
}

// The power of two at or above x >= 0 (rounded up), as its biased exponent; NaN is 0xff.
QK_PURE uint32_t float_to_e8m0_up(float x) {
  uint32_t a = float_bits(x) & 0x7fffffffu, exponent = a >> 23, mantissa = a & 0x7fffffu;
  if (is_nan(x)) return 0xffu;
  if (exponent == 0) return mantissa > 0x400000u ? 1u : 0u;  // 2^-127 itself is a subnormal float
  exponent += mantissa != 0;
  return exponent < 0xfeu ? exponent : 0xfeu;
}

QK_PURE float e8m0_to_float(uint32_t code) {
  if (code == 0) return bits_float(0x400000u);
  return bits_float(code == 0xffu ? 0x7fffffffu : code << 23);
}

QK_PURE float bf16_to_float(uint32_t code) { return bits_float(code << 16); }

// Widen sign | exponent | mantissa to float32 by moving the bits and rescaling by the difference of the biases.
template <int Mantissa, int Bias, int SignBit>
QK_PURE float decode(uint32_t code) {
  uint32_t magnitude = (code & ((1u << SignBit) - 1)) << (23 - Mantissa), sign = code >> SignBit << 31;
  float scaled = bits_float(magnitude) * bits_float(uint32_t(254 - Bias) << 23);
  return bits_float(float_bits(scaled) | sign);
}

QK_PURE float e4m3_to_float(uint32_t code) {
  return (code & 0x7fu) == 0x7fu ? bits_float(0x7fffffffu) : decode<3, 7, 7>(code & 0xffu);
}

QK_PURE float half_to_float(uint32_t code) {
  if ((code & 0x7c00u) == 0x7c00u)
    return bits_float((code & 0x8000u) << 16 | 0x7f800000u | (code & 0x3ffu) << 13);
  return decode<10, 15, 15>(code & 0xffffu);
}

// e5m2 is the upper half of a float16.
QK_PURE float e5m2_to_float(uint32_t code) { return half_to_float((code & 0xffu) << 8); }

QK_PURE float e2m1_to_float(uint32_t code) { return decode<1, 1, 3>(code & 15u); }

}  // namespace portable
}  // namespace qk
