// Float activations to 8- or 4-bit codes and their scales, a row of x at a time: read once, written once.
//
//   x[row, column] --norm--> --multiplier[column]--> y --amax of what shares a scale--> scale --round(y / scale)--> code
//
// ROW_THREADS threads take a row, in chunks of eight neighbouring elements (16 bytes of fp16): thread t has chunks
// t, t + ROW_THREADS, ... and keeps CHUNKS of them in registers. Longer rows are taken in spans of
// ROW_THREADS * CHUNKS chunks: where something is known of a row only when all of it was seen (norms, scales of rows)
// by reading it again for each thing, else by other blocks (blockIdx.y).
//
// Who shares a scale: all of x, which then brings it along (STATIC); a row (TOKEN); BLOCK neighbours in a row (BLOCKS).
// Every operation rounds to float32 as in quantkit.formats, so codes and scales are NumPy's, bit for bit. Sums of norms
// have an order of their own, that of quantize_reference.py.
#include "instructions.h"

using namespace qk;
using portable::bits_float;
using portable::float_bits;

#define INPUT_F32 0
#define INPUT_F16 1
#define INPUT_BF16 2
#define CODES_S8 0
#define CODES_U8 1
#define CODES_E4M3 2
#define CODES_E2M1 3  // two to a byte, the first in the low nibble
#define STATIC 0
#define TOKEN 1
#define BLOCKS 2
#define SCALES_F32 0
#define SCALES_E8M0 1
#define SCALES_E4M3 2  // in units of a global scale
#define NORM_NONE 0
#define NORM_RMS 1
#define NORM_LAYER 2

// Where no instruction makes e2m1, this file has a shorter way than conversions.h.
#if !QK_EMULATED && QK_FP4_CONVERSIONS
#define QK_HAS_E2M1 1
#else
#define QK_HAS_E2M1 0
#endif

constexpr int CHUNK = 8;
constexpr int THREADS = ROW_THREADS * ROWS, WARPS = ROW_THREADS < 32 ? 1 : ROW_THREADS / 32;
constexpr int SPAN = ROW_THREADS * CHUNK * CHUNKS;
constexpr bool WHOLE_ROWS = SHARING == TOKEN || NORM != NORM_NONE;  // a row is one block's
constexpr bool TRANSFORMED = NORM != NORM_NONE || MULTIPLY;
// Threads that registers are shared out to: as many rows on their way as can be without spilling.
constexpr int SHARERS = CHUNKS > 4 || NORM == NORM_LAYER ? (VECTOR ? 512 : 256) : !VECTOR || TRANSFORMED ? 768 : 1024;
constexpr int AT_ONCE = SHARERS < THREADS ? 1 : SHARERS / THREADS;
constexpr float LARGEST = CODES == CODES_E4M3 ? 448.0f : CODES == CODES_E2M1 ? 6.0f : 127.0f;
constexpr float SMALLEST_SCALE = 1.17549435e-38f;  // the smallest normal number
static_assert((ROW_THREADS & (ROW_THREADS - 1)) == 0 && THREADS % 32 == 0, "rows are whole parts of warps, or warps");
static_assert(SHARING != BLOCKS || (BLOCK % CHUNK == 0 && BLOCK / CHUNK <= 32 && ROW_THREADS % (BLOCK / CHUNK) == 0),
              "the chunks of a block are neighbours in a warp");

// ---- dividing ------------------------------------------------------------------------------------------------
// x / scale as IEEE rounds it, for one reciprocal a scale and six cheap operations an element: the quotient's estimate
// is corrected twice by its exact remainder (Markstein 1990). Both operands are brought to scale's binade first, where
// neither remainders nor the reciprocal leave the range of normal numbers. scale is a normal number.

struct Divisor { float power, scale, reciprocal; };

QK_FUNCTION Divisor divisor(float scale) {
  const uint32_t exponent = float_bits(scale) >> 23;
  const float mantissa = bits_float((float_bits(scale) & 0x7fffffu) | 0x3f800000u);
  const float power = bits_float(exponent < 254 ? (254 - exponent) << 23 : 0x400000u);
  // One step of Newton's from the hardware's estimate: the nearest float.
  const float estimate = reciprocal_approx(mantissa);
  return {power, mantissa, fused_multiply_add(fused_multiply_add(-mantissa, estimate, 1.0f), estimate, estimate)};
}

QK_FUNCTION float corrected(float quotient, float x, float scale, float reciprocal) {
  const float better = fused_multiply_add(fused_multiply_add(-quotient, scale, x), reciprocal, quotient);
  return fused_multiply_add(fused_multiply_add(-better, scale, x), reciprocal, better);
}

QK_FUNCTION float divided(float x, const Divisor& by) {
  if constexpr (SCALES == SCALES_E8M0) return x * by.power;
  x = x * by.power;
  const float q = x * by.reciprocal;
  float better = corrected(q, x, by.scale, by.reciprocal);
  // A negative zero has lost its sign to the remainder's positive one; float codes keep it.
  if (CODES == CODES_E4M3 || CODES == CODES_E2M1) better = bits_float(float_bits(better) | (float_bits(x) & 0x80000000u));
  // With a scale of its own no element leaves the codes' range. Else infinities must not become NaN.
  return SHARING != STATIC || (q < 4096.0f && q > -4096.0f) ? better : q;
}

// ---- scales --------------------------------------------------------------------------------------------------

// amax / LARGEST; 1 where all is zero.
QK_FUNCTION float float_scale(float amax) {
  const float ratio = corrected(amax * (1.0f / LARGEST), amax, LARGEST, 1.0f / LARGEST);
  return amax == 0.0f ? 1.0f : ratio < SMALLEST_SCALE ? SMALLEST_SCALE : ratio;
}

// The least power of two, as its biased exponent, under which amax stays within LARGEST (1.75 * 2^8, 1.5 * 2^2).
QK_FUNCTION uint32_t power_of_two_scale(float amax) {
  constexpr uint32_t mantissa = CODES == CODES_E4M3 ? 0x600000u : 0x400000u;
  constexpr int shift = CODES == CODES_E4M3 ? 8 : 2;
  const uint32_t bits = float_bits(amax);
  const int exponent = static_cast<int>(bits >> 23) - shift + ((bits & 0x7fffffu) > mantissa);
  return amax == 0.0f ? 127u : static_cast<uint32_t>(exponent < 0 ? 0 : exponent);
}

// The e4m3 code nearest to amax / (LARGEST * global), `reciprocal` being about 1 / (LARGEST * global). The quotient's
// rounding to float32 decides only where that lies next to the middle of two codes; there, and of codes below normal
// size, double precision, which holds the product exactly, divides.
QK_FUNCTION uint32_t e4m3_scale(float amax, float global, float reciprocal) {
  if (amax == 0.0f) return 0x38u;
  float ratio = amax * reciprocal;
  const uint32_t beyond = float_bits(ratio) & 0xfffffu;  // what a code of normal size does not hold
  if (ratio < 0.015625f || (beyond > 0x7fff0u && beyond < 0x80010u))
    ratio = static_cast<float>(static_cast<double>(amax) / (static_cast<double>(LARGEST) * static_cast<double>(global)));
  ratio = ratio < 0.001953125f ? 0.001953125f : ratio;
  return pack_e4m3(ratio, 0.0f) & 0xffu;
}

// ---- codes ---------------------------------------------------------------------------------------------------

// zero: the zero point, less 128 of unsigned codes. NaN becomes 0 (128 of unsigned codes).
QK_FUNCTION uint32_t integer_code(float q, float zero) {
  if (ZERO) {
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: from there on floats are whole
    q = ((q + to_integer) - to_integer) + zero;  // what is too large for that saturates whatever it is
  }
  return static_cast<uint8_t>(float_to_s8(q)) ^ (CODES == CODES_U8 ? 0x80u : 0u);
}

#if !QK_HAS_E2M1
// The e2m1 code nearest to q, ties to even, saturated (NaN too). From an octave on codes are half an octave's width
// apart: adding 1.5 * 2^22 times the octave's start leaves them counted in the sum's low bits. Below 1 they are as far
// apart as from 1 to 2.
QK_FUNCTION uint32_t e2m1_code(float q) {
  const uint32_t sign = float_bits(q) >> 28 & 8u;
  float a = bits_float(float_bits(q) & 0x7fffffffu);
  a = a < 6.0f ? a : 6.0f;
  uint32_t octave = float_bits(a) & 0x7f800000u;
  octave = octave < 0x3f800000u ? 0x3f800000u : octave;
  // Times 1.5 * 2^22: the exponent of 1.5 is that of 1. The sum's own exponent then tells the octave again, and each
  // octave has two codes.
  const uint32_t sum = float_bits(a + bits_float(octave + 0x0b400000u));
  return sign | ((sum & 7u) + (sum >> 22) - (0x4ac00000u >> 22));
}
#endif

// The codes of a chunk, in the order of the elements: 8 bytes, or 4 of e2m1.
QK_FUNCTION U32x2 encoded(const float (&q)[CHUNK], float zero) {
  uint32_t word[2] = {0, 0};
  if (CODES == CODES_E4M3) {
    QK_UNROLL for (int i = 0; i < CHUNK; i += 2) word[i / 4] |= uint32_t(pack_e4m3(q[i], q[i + 1])) << (i % 4 * 8);
  } else if (CODES == CODES_E2M1) {
#if QK_HAS_E2M1
    QK_UNROLL for (int i = 0; i < CHUNK; i += 2) word[0] |= uint32_t(pack_e2m1(q[i], q[i + 1])) << (i * 4);
#else
    QK_UNROLL for (int i = 0; i < CHUNK; i++) word[0] |= e2m1_code(q[i]) << (i * 4);
#endif
  } else {
    QK_UNROLL for (int i = 0; i < CHUNK; i++) word[i / 4] |= integer_code(q[i], zero) << (i % 4 * 8);
  }
  return {word[0], word[1]};
}

// ---- rows ----------------------------------------------------------------------------------------------------

// A chunk as it lies in memory.
constexpr int WORDS = INPUT == INPUT_F32 ? 8 : 4;

QK_FUNCTION void load_chunk(const void* x, int64_t at, uint32_t (&words)[WORDS]) {
  constexpr int bytes = WORDS * 4 / CHUNK;
  const U32x4* from = reinterpret_cast<const U32x4*>(static_cast<const uint8_t*>(x) + at * bytes);
  QK_UNROLL for (int h = 0; h < WORDS / 4; h++) {
    const U32x4 four = ld_global_once(from + h);
    memcpy(words + h * 4, &four, 16);
  }
}
QK_FUNCTION void load_element(const void* x, int64_t at, int i, uint32_t (&words)[WORDS]) {
  if constexpr (INPUT == INPUT_F32) words[i] = ld_global(static_cast<const uint32_t*>(x) + at);
  else words[i / 2] |= uint32_t(ld_global(static_cast<const uint16_t*>(x) + at)) << (i % 2 * 16);
}
QK_FUNCTION void widened(const uint32_t (&words)[WORDS], float (&value)[CHUNK]) {
  QK_UNROLL for (int i = 0; i < CHUNK; i++) {
    if constexpr (INPUT == INPUT_F32) value[i] = bits_float(words[i]);
    else if (INPUT == INPUT_BF16) value[i] = i % 2 ? bf16_high(words[i / 2]) : bf16_low(words[i / 2]);
    else value[i] = i % 2 ? f16_high(words[i / 2]) : f16_low(words[i / 2]);
  }
}

// Eight of a vector with a float for each column; anything beyond its end.
QK_FUNCTION void vector_chunk(const float* from, int column, int columns, float (&value)[CHUNK]) {
  if (VECTOR) {
    from += FULL || column < columns ? column : 0;
    QK_UNROLL for (int h = 0; h < 2; h++) {
      const U32x4 four = ld_global(reinterpret_cast<const U32x4*>(from) + h);
      memcpy(value + h * 4, &four, 16);
    }
  } else {
    QK_UNROLL for (int i = 0; i < CHUNK; i++) value[i] = column + i < columns ? ld_global(from + column + i) : 0.0f;
  }
}

// Over the threads of a row: butterflies inside a warp, then between the warps' results.
template <class Combine>
QK_TEMPLATE float over_row(float mine, uint32_t scratch, Combine combine) {
  QK_UNROLL for (int mask = ROW_THREADS < 32 ? ROW_THREADS / 2 : 16; mask > 0; mask /= 2)
    mine = combine(mine, shuffle_xor(mine, mask));
  if (WARPS > 1) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) st_shared(scratch + warp * 4, mine);
    block_sync();
    mine = ld_shared<float>(scratch + (warp / WARPS * WARPS + lane % WARPS) * 4);
    QK_UNROLL for (int mask = WARPS / 2; mask > 0; mask /= 2) mine = combine(mine, shuffle_xor(mine, mask));
    block_sync();  // before the next one writes
  }
  return mine;
}
QK_FUNCTION float sum_of_chunk(const float (&x)[CHUNK]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}
QK_FUNCTION float amax_of_chunk(const float (&x)[CHUNK], float amax) {
  QK_UNROLL for (int i = 0; i < CHUNK; i++) amax = max_magnitude(amax, x[i]);
  return amax;
}

QK_KERNEL(THREADS, AT_ONCE)
quantize(const void* x, uint8_t* codes, void* scales, const float* static_scale, const float* global_scale,
         const float* norm_weight, const float* norm_bias, const float* multiplier, float zero, float epsilon, int rows,
         int columns, int64_t pitch_x, int64_t pitch_codes, int64_t pitch_scales) {
  const uint32_t scratch = shared_base();
  const int thread = threadIdx.x % ROW_THREADS, row = blockIdx.x * ROWS + threadIdx.x / ROW_THREADS;
  const bool is_row = ROWS == 1 || row < rows;  // threads of no row go along: shuffles and barriers count everyone
  const int spans = WHOLE_ROWS ? (columns + SPAN - 1) / SPAN : 1, first_span = WHOLE_ROWS ? 0 : blockIdx.y;

  uint32_t loaded[CHUNKS][WORDS];                  // of this thread, as they lie in memory: half the registers
  float made[TRANSFORMED ? CHUNKS : 1][CHUNK];  // of them, by norm and multiplier
  auto column_of = [&](int span, int c) { return span * SPAN + (c * ROW_THREADS + thread) * CHUNK; };
  auto is_column = [&](int column) { return FULL || column < columns; };
  // Elements of no row and no column are zeros.
  auto load = [&](int span) {
    QK_UNROLL for (int c = 0; c < CHUNKS; c++) {
      const int column = column_of(span, c);
      QK_UNROLL for (int w = 0; w < WORDS; w++) loaded[c][w] = 0;
      if (VECTOR) {
        if (is_row && is_column(column)) load_chunk(x, row * pitch_x + column, loaded[c]);
      } else {
        QK_UNROLL for (int i = 0; i < CHUNK; i++)
          if (is_row && is_column(column + i)) load_element(x, row * pitch_x + column + i, i, loaded[c]);
      }
    }
  };
  auto elements = [&](int c, float (&value)[CHUNK]) {
    if (TRANSFORMED) {
      QK_UNROLL for (int i = 0; i < CHUNK; i++) value[i] = made[c][i];
    } else {
      widened(loaded[c], value);
    }
  };

  float mean = 0.0f, normed = 1.0f;
  auto transform = [&](int span) {
    QK_UNROLL for (int c = 0; c < CHUNKS; c++) {
      const int column = column_of(span, c);
      float (&y)[CHUNK] = made[c];
      widened(loaded[c], y);
      QK_UNROLL for (int i = 0; i < CHUNK; i++) {
        if (NORM == NORM_LAYER) y[i] = y[i] - mean;
        if (NORM != NORM_NONE) y[i] = y[i] * normed;
      }
      float factor[CHUNK];
      if (NORM_WEIGHT) {
        vector_chunk(norm_weight, column, columns, factor);
        QK_UNROLL for (int i = 0; i < CHUNK; i++) y[i] = y[i] * factor[i];
      }
      if (NORM_BIAS) {
        vector_chunk(norm_bias, column, columns, factor);
        QK_UNROLL for (int i = 0; i < CHUNK; i++) y[i] = y[i] + factor[i];
      }
      if (MULTIPLY) {
        vector_chunk(multiplier, column, columns, factor);
        QK_UNROLL for (int i = 0; i < CHUNK; i++) y[i] = y[i] * factor[i];
      }
      if (NORM == NORM_LAYER || NORM_BIAS) {  // what is no element has to stay zero
        QK_UNROLL for (int i = 0; i < CHUNK; i++) y[i] = is_column(VECTOR ? column : column + i) ? y[i] : 0.0f;
      }
    }
  };
  // Calls visit(span) with the row's elements in `loaded`, and in `made` where they are to be transformed. A row of one
  // span stays there.
  bool transformed = false;
  auto each_span = [&](bool want_transformed, auto visit) {
    for (int s = 0; s < spans; s++) {
      const int span = first_span + s;
      if (!RESIDENT) load(span);
      if (TRANSFORMED && want_transformed && !(RESIDENT && transformed)) transform(span);
      visit(span);
    }
    transformed = want_transformed;
  };
  if (RESIDENT) load(first_span);

  if (NORM != NORM_NONE) {
    auto mean_of = [&](auto term) {  // term(x) summed over the row's elements, over their number
      float sum = 0.0f;
      each_span(false, [&](int span) {
        QK_UNROLL for (int c = 0; c < CHUNKS; c++) {
          const int column = column_of(span, c);
          float terms[CHUNK];
          widened(loaded[c], terms);
          QK_UNROLL for (int i = 0; i < CHUNK; i++)
            terms[i] = VECTOR || is_column(column + i) ? term(terms[i]) : 0.0f;
          sum = sum + (VECTOR && !is_column(column) ? 0.0f : sum_of_chunk(terms));
        }
      });
      return over_row(sum, scratch, [](float a, float b) { return a + b; }) / static_cast<float>(columns);
    };
    if (NORM == NORM_LAYER) mean = mean_of([](float value) { return value; });
    const float square = mean_of([&](float value) { return (value - mean) * (value - mean); });
    normed = 1.0f / square_root(square + epsilon);
  }

  Divisor by{1.0f, 1.0f, 1.0f};
  if (SHARING == STATIC) by = divisor(ld_global(static_scale));
  if (SHARING == TOKEN) {
    float amax = 0.0f;
    each_span(true, [&](int) {
      QK_UNROLL for (int c = 0; c < CHUNKS; c++) {
        float value[CHUNK];
        elements(c, value);
        amax = amax_of_chunk(value, amax);
      }
    });
    const float scale = float_scale(over_row(amax, scratch, [](float a, float b) { return max_magnitude(a, b); }));
    if (is_row && thread == 0) st_global(static_cast<float*>(scales) + row, scale);
    by = divisor(scale);
  }
  const float global = SCALES == SCALES_E4M3 ? ld_global(global_scale) : 1.0f;
  const float reciprocal = 1.0f / (LARGEST * global);

  each_span(true, [&](int span) {
    QK_UNROLL for (int c = 0; c < CHUNKS; c++) {
      const int column = column_of(span, c);
      const bool inside = is_row && is_column(column);
      float q[CHUNK];
      elements(c, q);
      if (SHARING == BLOCKS) {
        float amax = amax_of_chunk(q, 0.0f);
        QK_UNROLL for (int mask = BLOCK / CHUNK / 2; mask > 0; mask /= 2)
          amax = max_magnitude(amax, shuffle_xor(amax, mask));
        const int64_t at = row * pitch_scales + column / BLOCK;
        const bool writes = inside && column % BLOCK == 0;
        if (SCALES == SCALES_F32) {
          const float scale = float_scale(amax);
          if (writes) st_global(static_cast<float*>(scales) + at, scale);
          by = divisor(scale);
        } else if (SCALES == SCALES_E8M0) {
          const uint32_t code = power_of_two_scale(amax);
          if (writes) st_global(static_cast<uint8_t*>(scales) + at, static_cast<uint8_t>(code));
          by.power = bits_float(code < 254 ? (254 - code) << 23 : 0x400000u);  // 2^(127 - code)
        } else {
          const uint32_t code = e4m3_scale(amax, global, reciprocal);
          if (writes) st_global(static_cast<uint8_t*>(scales) + at, static_cast<uint8_t>(code));
          by = divisor(f16_low(e4m3_to_f16(static_cast<uint16_t>(code))) * global);
        }
      }
      QK_UNROLL for (int i = 0; i < CHUNK; i++) q[i] = divided(q[i], by);
      const U32x2 eight = encoded(q, zero);
      if (!inside) continue;
      if (CODES == CODES_E2M1) {
        uint8_t* to = codes + row * pitch_codes + column / 2;
        if (VECTOR) {
          st_global(reinterpret_cast<uint32_t*>(to), eight.x);
        } else {
          QK_UNROLL for (int i = 0; i < CHUNK; i += 2)
            if (column + i < columns) st_global(to + i / 2, static_cast<uint8_t>(eight.x >> (i * 4)));
        }
      } else {
        uint8_t* to = codes + row * pitch_codes + column;
        if (VECTOR) {
          st_global(reinterpret_cast<U32x2*>(to), eight);
        } else {
          QK_UNROLL for (int i = 0; i < CHUNK; i++)
            if (column + i < columns) st_global(to + i, static_cast<uint8_t>((i < 4 ? eight.x : eight.y) >> (i % 4 * 8)));
        }
      }
    }
  });
}
QK_EXPORT(quantize)
