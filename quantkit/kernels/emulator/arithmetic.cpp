// Lane exchange, integer tricks and conversions.
#include <math.h>

#include "machine.h"

namespace qk {
namespace emulator {

uint32_t shuffle(uint32_t value, Shuffle mode, int operand, Place place) {
  enter("shuffle", place);
  struct Input { uint32_t value; int lane; } input{value, 0};
  const int lane = self().lane;
  input.lane = mode == Shuffle::INDEX ? operand & 31 : mode == Shuffle::XOR ? lane ^ (operand & 31) : lane + operand;
  if (input.lane < 0 || input.lane > 31) input.lane = lane;
  uint32_t result;
  meet_warp(&input, &result, [](Warp& warp) {
    for (int i = 0; i < 32; i++) {
      const int from = static_cast<const Input*>(warp.input[i])->lane;
      *static_cast<uint32_t*>(warp.output[i]) = static_cast<const Input*>(warp.input[from])->value;
    }
  });
  return result;
}

namespace {

// To a float32 whose lowest bit also stands for everything below it: rounding that to 11 bits or fewer is then
// rounding x itself, subnormal results included.
float sticky_float(double x) {
  const float near = static_cast<float>(x);
  if (double(near) == x || !isfinite(near)) return near;
  const float below = fabs(double(near)) > fabs(x) ? nextafterf(near, 0.0f) : near;
  return portable::bits_float(portable::float_bits(below) | 1);
}

// a * b + c of 16-bit floats in double: the product is exact, and what the sum loses goes into its lowest bit.
double sticky_sum(double product, double c) {
  const double sum = product + c, back = sum - product, error = (product - (sum - back)) + (c - back);
  if (error == 0 || !isfinite(sum)) return sum;
  uint64_t bits;
  memcpy(&bits, &sum, 8);
  if (bits & 1) return sum;
  return nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}

}  // namespace

uint32_t fma_pair(int type, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t pair = 0;
  for (int half = 0; half < 2; half++) {
    const uint32_t codes[] = {a >> 16 * half & 0xffff, b >> 16 * half & 0xffff, c >> 16 * half & 0xffff};
    double x[3];
    for (int i = 0; i < 3; i++)
      x[i] = type == BF16::code ? portable::bf16_to_float(codes[i]) : portable::half_to_float(codes[i]);
    const float d = sticky_float(sticky_sum(x[0] * x[1], x[2]));
    // Overflow is infinity, as cvt has it.
    pair |= (type == BF16::code ? portable::float_to_bf16(d) : portable::float_to_half(d)) << 16 * half;
  }
  return pair;
}

}  // namespace emulator

using namespace emulator;

uint32_t vote(bool predicate, Place place) {
  enter("vote", place);
  uint32_t result;
  meet_warp(&predicate, &result, [](Warp& warp) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= uint32_t(*static_cast<const bool*>(warp.input[i])) << i;
    for (int i = 0; i < 32; i++) *static_cast<uint32_t*>(warp.output[i]) = bits;
  });
  return result;
}

void warp_sync(Place place) {
  enter("warp_sync", place);
  meet_warp(nullptr, nullptr, [](Warp&) {});
  const Meeting& meeting = self().parent->warps[self().linear / 32].meeting;
  acquire(meeting.completed_at, meeting.async_known);
}

// Which lane is elected is not defined: any would do, so lane 0 unless threads are shuffled.
bool elect_one(Place place) {
  enter("elect_one", place);
  uint32_t result;
  meet_warp(nullptr, &result, [](Warp& warp) {
    const uint32_t elected = machine->shuffled() ? machine->next_random() % 32 : 0;
    for (uint32_t i = 0; i < 32; i++) *static_cast<uint32_t*>(warp.output[i]) = i == elected;
  });
  return result != 0;
}

uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | uint64_t(b) << 32;
  uint32_t d = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = bytes >> (8 * (nibble & 7)) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    d |= byte << (8 * i);
  }
  return d;
}

int32_t dp4a(int32_t a, int32_t b, int32_t c) {
  uint32_t sum = c;
  for (int i = 0; i < 4; i++) sum += int8_t(a >> (8 * i)) * int8_t(b >> (8 * i));
  return static_cast<int32_t>(sum);
}

float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
float square_root(float x) { return sqrtf(x); }
float max_magnitude(float a, float x) { return fmaxf(a, fabsf(x)); }
float lesser(float a, float b) { return fminf(a, b); }
float greater(float a, float b) { return fmaxf(a, b); }
double magnitude(double x) { return fabs(x); }
float reciprocal_approx(float x) { return 1.0f / x; }
float exp2_approx(float x) { return static_cast<float>(exp2(double(x))); }
float tanh_approx(float x) { return static_cast<float>(tanh(double(x))); }

uint32_t pack_bf16(float low, float high) {
  return portable::float_to_bf16(low) | portable::float_to_bf16(high) << 16;
}
uint32_t pack_f16(float low, float high) { return portable::float_to_half(low) | portable::float_to_half(high) << 16; }
uint16_t pack_e4m3(float low, float high) {
  return static_cast<uint16_t>(portable::float_to_e4m3(low) | portable::float_to_e4m3(high) << 8);
}
uint16_t pack_e5m2(float low, float high) {
  return static_cast<uint16_t>(portable::float_to_e5m2(low) | portable::float_to_e5m2(high) << 8);
}
uint8_t pack_e2m1(float low, float high) {
  return static_cast<uint8_t>(portable::float_to_e2m1(low) | portable::float_to_e2m1(high) << 4);
}
uint16_t pack_e8m0_up(float low, float high) {
  return static_cast<uint16_t>(portable::float_to_e8m0_up(low) | portable::float_to_e8m0_up(high) << 8);
}
int8_t float_to_s8(float x) {
  if (portable::is_nan(x)) return 0;
  const float rounded = nearbyintf(x);
  return static_cast<int8_t>(rounded < -128.0f ? -128.0f : rounded > 127.0f ? 127.0f : rounded);
}
float bf16_low(uint32_t pair) { return portable::bits_float(pair << 16); }
float bf16_high(uint32_t pair) { return portable::bits_float(pair & 0xffff0000u); }
float f16_low(uint32_t pair) { return portable::half_to_float(pair & 0xffffu); }
float f16_high(uint32_t pair) { return portable::half_to_float(pair >> 16); }
uint32_t e4m3_to_f16(uint16_t pair) {
  return portable::float_to_half(portable::e4m3_to_float(pair & 0xffu)) |
         portable::float_to_half(portable::e4m3_to_float(pair >> 8)) << 16;
}
uint32_t e5m2_to_f16(uint16_t pair) { return uint32_t(pair & 0xffu) << 8 | uint32_t(pair >> 8) << 24; }

}  // namespace qk
