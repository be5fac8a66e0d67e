// Weights of four bits, as w4/layout.py packs them, decoded into the registers of a matrix instruction's A operand.
//
// A "slab" is as much of K as 128 bytes of A hold. With A of 16 bits: for every slab and 16 rows a lane has 16 bytes, of
// which word j holds its eight codes of the j-th 16 of K: those of registers 0 … 3 of the A fragment, two each (register
// r is row g + 8 (r % 2), columns 2 t + 8 (r / 2) and the next, with g = lane / 4, t = lane % 4).
//
// Integers: the two codes of register r are nibble r of either half-word, q + 8 for signed ones.
//   bf16: q as a subnormal is q 2^-133. Symmetric: q S - 8 S by one fused multiply-add with S = scale 2^126, so that
//         w = (q - 8) scale rounds once. With zero points: (q - zero) exactly, then times S, which rounds once. Codes of
//         lower rows stay in the nibble above, where the lowest exponent bit makes them 16 q 2^-133 all the same: their
//         S is a sixteenth, and one shift serves four codes. bf16 scales are stored as S.
//   fp16: 1024 + q and 64 + q are numbers whose low bits are q; (q - zero) exactly, then times the scale, rounds once.
//   Scales of another type than A's are split into two parts of A's type; the product is off by 2^-16 of itself at most
//   before it rounds.
// e2m1: its sign, exponent and mantissa are moved to bf16's sign and lowest exponent and highest mantissa bit (fp16's):
//   that is the value times 2^-126 (2^-14). Times the scale as a power of two times e4m3's value or e8m0's: exact.
//   A rotation by 0, 6 and 28 bits does that for three of four codes, two rotations for the fourth.
// Sums are float32; REBASE takes the powers of two back.
//
// With A of int8 a slab is twice as long and a lane has two times 16 bytes: words 2 j and 2 j + 1 hold the codes of the
// j-th 32 of K, registers 0 1 and 2 3 (columns 4 t + 16 (r / 2) and the next three), the first in the low nibbles. A code
// becomes (q - zero) s with a whole s of 8 bits: four at a time, q s + 128 - zero s, whose bytes carry nothing over, and
// the top bits flipped. Sums are int32, exact; the rows' float factors multiply them.
//
// With A of e4m3 words and slabs are those of int8, and codes e2m1 under scales 2^s with s from -8 to 6 (less the row's
// power of two): then every weight is an e4m3 number. A group's eight magnitudes are a table of eight bytes in two
// registers, which prmt looks up four at a time: nibbles 0 ... 3 of a word are magnitudes of the upper row, 4 ... 7 of the
// lower one; bits 7 of its bytes are the upper row's signs, bits 3 the lower one's. DEEP: some s are below -5, whose
// tables hold subnormals.
//
// Integers by A of e4m3 are e4m3's subnormals and first normals, q 2^-9, exactly: a sign and four bits. A word's bits 7
// are signs of the upper row and bits 2 ... 0 below them q, or -1 - q: with the sign added that is the magnitude. Turned
// by four bits it is the lower row's. Sums of 128 of K are multiplied by the scales.
#pragma once

#include "instructions.h"

#define CODES_INT4 0
#define CODES_E2M1 1
// How scales of groups are stored; NONE: one a row, left to the epilogue.
#define SCALES_NONE 0
#define SCALES_BF16 1
#define SCALES_F16 2
#define SCALES_F32 3
#define SCALES_E4M3 4  // as exponent + 15 (five bits) and mantissa: no subnormals
#define SCALES_E8M0 5  // less the row's largest, + 254
#define SCALES_U8 6    // whole numbers, for A of int8
#ifndef DEEP
#define DEEP 0
#endif

namespace qk {
namespace w4 {

using Type = TYPE;
constexpr bool BF = Type::code == BF16::code;
constexpr bool INT8 = Type::code == S8::code, FP8 = Type::code == E4M3::code;
constexpr bool EIGHT = INT8 || FP8;             // bits of A
constexpr int SLAB = EIGHT ? 128 : 64;          // of K
constexpr int PLANES = EIGHT ? 2 : 1;           // 16 bytes that a lane has of a slab
using Sum = Type::Accumulator;
static_assert(INT8 ? CODES == CODES_INT4 && (SCALES == SCALES_NONE || SCALES == SCALES_U8) : SCALES != SCALES_U8,
              "whole scales are for integers times int8");
// Integers by e4m3: scales multiply sums of 128 of K.
constexpr bool SCALED_SUMS = FP8 && CODES == CODES_INT4;
static_assert(!FP8 || SCALED_SUMS || (SCALES == SCALES_E8M0 && GROUP == 32), "of e2m1 MXFP4 alone is exact as e4m3");
static_assert(!SCALED_SUMS || (!ZEROS && GROUP % SLAB == 0 && SCALES <= SCALES_F32), "one scale for 128 of K");

// What a pair of rows g, g + 8 has of scales and zero points in a slab: [row][group], in bytes; zero points two to one.
constexpr int SCALE_BYTES = SCALES == SCALES_NONE ? 0 : SCALES == SCALES_F32 ? 4 : SCALES >= SCALES_E4M3 ? 1 : 2;
constexpr int GROUPS = GROUP == 0 || GROUP >= SLAB ? 1 : SLAB / GROUP;  // of a slab
constexpr int PAIR_BYTES = 2 * GROUPS * SCALE_BYTES;
constexpr int PAIR_WORDS = (PAIR_BYTES + 3) / 4;
constexpr int GROUP_SLABS = GROUP == 0 ? 1 << 30 : GROUP < SLAB ? 1 : GROUP / SLAB;
static_assert(PAIR_BYTES % 2 == 0, "scales are read in words, or half of one");

template <bool Yes, class A, class B> struct Either { using type = A; };
template <class A, class B> struct Either<false, A, B> { using type = B; };

// Both halves of a register the same.
QK_PURE constexpr uint32_t both(uint32_t half) { return half * 0x10001u; }
constexpr uint32_t MINUS_ZERO = 0x80008000u;
constexpr uint32_t ONE = BF ? 0x3f803f80u : 0x3c003c00u;
using Pairs = Either<EIGHT, F16, Type>::type;  // for code that A of int8 leaves out
QK_FUNCTION uint32_t multiply(uint32_t a, uint32_t b) { return fma_pair<Pairs>(a, b, MINUS_ZERO); }
QK_FUNCTION uint32_t add(uint32_t a, uint32_t b) { return fma_pair<Pairs>(a, ONE, b); }
QK_FUNCTION uint32_t pack_twice(float x) { return BF ? pack_bf16(x, x) : pack_f16(x, x); }
QK_FUNCTION float unpacked(uint32_t pair) { return BF ? bf16_low(pair) : f16_low(pair); }

// Scales in A's type need no second part.
constexpr bool SPLIT = SCALES == SCALES_F32 || SCALES == (BF ? SCALES_F16 : SCALES_BF16);
// What sums of decoded weights are multiplied by: the power of two that decoding left out.
constexpr float REBASE = SCALED_SUMS ? 0x1p9f : EIGHT ? 1.0f : CODES == CODES_E2M1 ? (SCALES == SCALES_E8M0   ? 0.5f
                                                : SCALES == SCALES_E4M3 ? 0x1p7f
                                                : BF                    ? 1.0f
                                                                        : 0x1p14f)
                         : BF                ? (SCALES == SCALES_F16 ? 0x1p22f : 0x1p7f)
                         : SCALES == SCALES_NONE ? 1.0f
                         : SCALES == SCALES_F16  ? 0x1p4f
                                                 : 0x1p-11f;

// What codes of one row and group are decoded with; each in both halves. For e4m3: magnitudes 0 ... 3 and 4 ... 7.
struct Factor { uint32_t scale, rest, offset; };

// The bits of bf16 above an e4m3 scale's. Were they known when it is compiled, they would be moved to a register for each
// scale; nothing has fewer than no planes.
QK_FUNCTION uint32_t bits_above(int planes) { return both(0x7000) + (planes >> 31); }

// The scales of a pair of rows, from shared memory, and behind them what `bits_above` said.
QK_FUNCTION void load_pair(uint32_t (&raw)[PAIR_WORDS + 1], uint32_t at, uint32_t above) {
  raw[PAIR_WORDS] = above;
  if constexpr (PAIR_BYTES == 2) {
    raw[0] = ld_shared<uint16_t>(at);
  } else if constexpr (PAIR_WORDS == 1) {
    raw[0] = ld_shared<uint32_t>(at);
  } else if constexpr (PAIR_WORDS == 2) {
    const U32x2 two = ld_shared<U32x2>(at);
    raw[0] = two.x, raw[PAIR_WORDS - 1] = two.y;
  } else if constexpr (PAIR_WORDS == 4) {
    const U32x4 four = ld_shared<U32x4>(at);
    raw[0] = four.x, raw[1] = four.y, raw[PAIR_WORDS - 2] = four.z, raw[PAIR_WORDS - 1] = four.w;
  }
}
// Scales of eight bits, four to a word: those of even numbers stand in its halves where the masks below take them, those
// of odd numbers after a turn by eight bits. A half of a word in both.
QK_FUNCTION uint32_t two_of(uint32_t word, int i) { return i % 2 ? word >> 8 | word << 24 : word; }
QK_FUNCTION uint32_t half_of(uint32_t word, int half) { return half ? twice<1>(word) : twice<0>(word); }

// The magnitudes of e2m1 times 2^(index - 8) as e4m3: from index 3 on the same bytes, eight more for each power of two.
QK_FUNCTION Factor magnitudes(uint32_t index) {
  Factor f{index * 0x08080800u + (0x0c080000u - 2 * 0x08080800u), index * 0x08080808u + (0x1c181410u - 2 * 0x08080808u), 0};
  if (DEEP && index < 3) {
    f.scale = index == 2 ? 0x0c080400u : index == 1 ? 0x06040200u : 0x03020100u;
    f.rest = index == 2 ? 0x1c181410u : index == 1 ? 0x14100c08u : 0x0c080604u;
  }
  return f;
}

// Scale `i` of a pair's words.
QK_FUNCTION Factor factor_of(const uint32_t (&raw)[PAIR_WORDS + 1], int i) {
  Factor f{0, 0, 0};
  const bool lower = i >= GROUPS;  // row g + 8
  if constexpr (SCALED_SUMS) {
    // nothing: see `sum_scale`
  } else if constexpr (FP8) {
    f = magnitudes(raw[i / 4] >> i % 4 * 8 & 0xff);
  } else if constexpr (INT8) {
    f.scale = SCALES == SCALES_NONE ? 1 : raw[i / 4] >> i % 4 * 8 & 0xff;
  } else if constexpr (SCALES == SCALES_NONE) {
    f.scale = !BF || CODES != CODES_INT4 ? (BF ? both(0x7e80) : ONE) : lower ? both(0x7c80) : both(0x7e80);  // 2^126
  } else if constexpr (SCALES == SCALES_E4M3) {
    const uint32_t codes = two_of(raw[i / 4], i) & both(0x0ff0);
    f.scale = half_of(BF ? codes | raw[PAIR_WORDS] : codes << 3, i % 4 / 2);
  } else if constexpr (SCALES == SCALES_E8M0) {
    if (BF) {
      f.scale = half_of(two_of(raw[i / 4], i) & both(0x7f80), i % 4 / 2);
    } else {
      const int exponent = static_cast<int>(two_of(raw[i / 4], i) >> (7 + i % 4 / 2 * 16) & 0xff) - 224;
      f.scale = both(exponent < 0 ? 0 : exponent << 10);
    }
  } else if constexpr (!SPLIT) {
    const uint32_t scale = half_of(raw[i / 2], i % 2);
    f.scale = BF ? scale : multiply(scale, both(0x2c00));  // 2^-4
  } else {
    float scale;
    if (SCALES == SCALES_F32) scale = portable::bits_float(raw[i]) * (!BF ? 2048.0f : lower ? 0x1p122f : 0x1p126f);
    else if (BF) scale = (i % 2 ? f16_high(raw[i / 2]) : f16_low(raw[i / 2])) * (lower ? 0x1p107f : 0x1p111f);
    else scale = (i % 2 ? bf16_high(raw[i / 2]) : bf16_low(raw[i / 2])) * (lower ? 0x1p-111f : 0x1p-115f);
    f.scale = pack_twice(scale);
    f.rest = pack_twice(scale - unpacked(f.scale));
  }
  return f;
}
// With the zero point, or 8.
QK_FUNCTION void set_zero(Factor& f, uint32_t zero, int row) {
  if (CODES != CODES_INT4 || SCALED_SUMS) return;
  if (EIGHT) f.offset = (128 - zero * f.scale) * 0x01010101u;
  else if (BF && !ZEROS && !SPLIT) f.offset = multiply(f.scale, row == 0 ? both(0x8008) : both(0x8080));  // -8 S 2^-133
  else if (BF) f.offset = both(0x8000 + (row == 0 ? zero : zero * 16));
  else f.offset = row == 0 ? both(0xe400 + zero) : both(0xd400 + zero * 16);  // -(1024 + zero), -(64 + zero)
}

// Eight codes to the four registers of wgmma's A fragment.
QK_FUNCTION void decode(uint32_t word, const Factor& upper, const Factor& lower, Registers<uint32_t, 4>& to) {
  QK_UNROLL for (int r = 0; r < 4; r++) {
    const Factor& f = r % 2 ? lower : upper;
    if constexpr (CODES == CODES_INT4) {
      const uint32_t near = r < 2 ? word : word >> 8;
      uint32_t value;
      if constexpr (BF) {
        const uint32_t code = near & (r % 2 == 0 ? both(0x000f) : both(0x00f0));
        if constexpr (!ZEROS && !SPLIT) {
          to[r] = fma_pair<Pairs>(code, f.scale, f.offset);
          continue;
        }
        value = add(code, f.offset);
      } else {
        if (r % 2 == 0) value = add(lop3<(0xf0 & 0xcc) | 0xaa>(near, both(0x000f), both(0x6400)), f.offset);
        else value = fma_pair<Pairs>(lop3<(0xf0 & 0xcc) | 0xaa>(near, both(0x00f0), both(0x6400)), both(0x2c00), f.offset);
      }
      if constexpr (SPLIT) to[r] = fma_pair<Pairs>(value, f.scale, multiply(value, f.rest));
      else if constexpr (!BF && SCALES == SCALES_NONE) to[r] = value;
      else to[r] = multiply(value, f.scale);
    } else {
      uint32_t bits;
      if (r == 0) bits = word & both(0x81c0);
      else if (r == 1) bits = word << 6 & both(0x81c0);
      else if (r == 2) bits = (word >> 4 | word << 28) & both(0x81c0);
      else bits = (word << 2 & both(0x80c0)) | (word >> 6 & both(0x0100));
      if (!BF) bits = (bits & both(0x8000)) | (bits & both(0x01c0)) << 3;
      to[r] = multiply(bits, f.scale);
    }
  }
}

// Sixteen codes to the four registers of an instruction for int8, or e4m3.
QK_FUNCTION void decode_bytes(uint32_t low, uint32_t high, const Factor& upper, const Factor& lower,
                              Registers<uint32_t, 4>& to) {
  QK_UNROLL for (int r = 0; r < 4; r++) {
    const Factor& f = r % 2 ? lower : upper;
    const uint32_t word = r < 2 ? low : high;
    if constexpr (SCALED_SUMS) {
      const uint32_t code = (r % 2 ? word << 4 | word >> 28 : word) & 0x87878787u;
      to[r] = code + (code >> 7 & 0x01010101u);
    } else if constexpr (FP8) {
      const uint32_t selectors = word & 0x77777777u, signs = r % 2 ? word << 4 : word;
      to[r] = prmt(f.scale, f.rest, r % 2 ? selectors >> 16 : selectors) | (signs & 0x80808080u);
    } else {
      const uint32_t codes = word >> r % 2 * 4 & 0x0f0f0f0fu;
      to[r] = (codes * f.scale + f.offset) ^ 0x80808080u;
    }
  }
}

// What sums of a slab are multiplied by, in row g + 8 `row` of a pair.
QK_FUNCTION float sum_scale(const uint32_t (&raw)[PAIR_WORDS + 1], int row) {
  if constexpr (SCALES == SCALES_F32) return portable::bits_float(raw[row]);
  else if constexpr (SCALES == SCALES_F16) return row ? f16_high(raw[0]) : f16_low(raw[0]);
  else return row ? bf16_high(raw[0]) : bf16_low(raw[0]);
}

// What a lane has of instruction `depth` (0 … 3) of a slab, with the pair's scales and zero points there.
QK_FUNCTION void decode_depth(const U32x4 (&words)[PLANES], int depth, const uint32_t (&raw)[PAIR_WORDS + 1],
                              const uint32_t (&zeros)[GROUPS], Registers<uint32_t, 4>& to) {
  const int group = GROUPS > 1 ? depth * GROUPS / 4 : 0;
  Factor upper = factor_of(raw, group), lower = factor_of(raw, GROUPS + group);
  set_zero(upper, ZEROS ? zeros[group] & 15 : 8, 0);
  set_zero(lower, ZEROS ? zeros[group] >> 4 : 8, 1);
  if constexpr (EIGHT) {
    const U32x4& four = words[depth / 2 % PLANES];
    if (depth % 2 == 0) decode_bytes(four.x, four.y, upper, lower, to);
    else decode_bytes(four.z, four.w, upper, lower, to);
  } else {
    const U32x4& four = words[0];
    decode(depth == 0 ? four.x : depth == 1 ? four.y : depth == 2 ? four.z : four.w, upper, lower, to);
  }
}

// Sums as they are exchanged, and as the epilogue takes them.
QK_FUNCTION uint32_t bits_of(float sum) { return portable::float_bits(sum); }
QK_FUNCTION uint32_t bits_of(int32_t sum) { return static_cast<uint32_t>(sum); }
QK_FUNCTION Sum sum_of(uint32_t bits) {
  if constexpr (INT8) return static_cast<Sum>(bits);
  else return portable::bits_float(bits);
}
QK_FUNCTION float rebased(float sum) { return sum * REBASE; }
QK_FUNCTION int32_t rebased(int32_t sum) { return sum; }

}  // namespace w4
}  // namespace qk
