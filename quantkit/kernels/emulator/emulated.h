// The emulator body of instructions.h: its templates, handed to the emulator's library with their parameters as
// ordinary arguments. Functions that are not templates are defined in that library directly.
#pragma once

namespace qk {

// A set of registers that reports being touched while a wgmma still owns it.
template <class T, int Count>
struct Registers {
  T value[Count];
  mutable emulator::RegisterState state;

  Registers() { memset(value, 0xcd, sizeof value); }
  ~Registers() {
    if (state.pending) emulator::abandon_registers(value);
  }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;
  T& operator[](int i) {
    emulator::touch_registers(state, i, Count);
    return value[i];
  }
  const T& operator[](int i) const {
    emulator::touch_registers(state, i, Count);
    return value[i];
  }
};

template <class T>
QK_TEMPLATE T ld_shared(uint32_t address, emulator::Place place) {
  T value;
  emulator::load_shared(address, &value, sizeof value, place);
  return value;
}
template <class T>
QK_TEMPLATE void st_shared(uint32_t address, T value, emulator::Place place) {
  emulator::store_shared(address, &value, sizeof value, place);
}
template <class T>
QK_TEMPLATE T ld_global(const T* pointer, emulator::Place place) {
  T value;
  emulator::load_global(pointer, &value, sizeof value, place);
  return value;
}
template <class T>
QK_TEMPLATE void st_global(T* pointer, T value, emulator::Place place) {
  emulator::store_global(pointer, &value, sizeof value, place);
}
template <class T>
QK_TEMPLATE T ld_global_once(const T* pointer, emulator::Place place) {
  return ld_global(pointer, place);
}

template <int Bytes>
QK_TEMPLATE void cp_async_small(uint32_t shared, const void* global, int valid_bytes, emulator::Place place) {
  static_assert(Bytes == 4 || Bytes == 8, "cp.async copies 4, 8 or 16 bytes");
  emulator::cp_async(shared, global, Bytes, valid_bytes, place);
}
template <int Pending>
QK_TEMPLATE void cp_async_wait(emulator::Place place) {
  emulator::cp_async_wait(Pending, place);
}

template <class Type>
QK_TEMPLATE void mma(typename Type::Accumulator (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     emulator::Place place) {
  emulator::mma(Type::code, d, a, b, place);
}
template <class Type, int Byte, int ThreadA, int ThreadB>
QK_TEMPLATE void mma_blocks(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t scale_a,
                            uint32_t scale_b, emulator::Place place) {
  static_assert(Byte >= 0 && Byte < 4 && Byte % Type::scales == 0, "the scales of one instruction are neighbours");
  static_assert((ThreadA == 0 || ThreadA == 1) && ThreadB >= 0 && ThreadB < 4, "a pair of lanes, and a lane, of four");
  emulator::mma_blocks(Type::code, {Byte, ThreadA, ThreadB}, d, a, b, scale_a, scale_b, place);
}

QK_TEMPLATE void mbarrier_arrive_ring(uint32_t barrier, emulator::Place place) {
  mbarrier_arrive_remote(barrier, place);
}
QK_TEMPLATE void mbarrier_wait_ring(uint32_t barrier, uint32_t parity, emulator::Place place) {
  mbarrier_wait(barrier, parity, place);
}

template <int Rank>
QK_TEMPLATE void tma_load(uint32_t shared, const TensorMap* map, uint32_t barrier, const int (&at)[Rank],
                          emulator::Place place) {
  emulator::tma_load(shared, map, barrier, 0, at, Rank, place);
}
template <int Rank>
QK_TEMPLATE void tma_load_multicast(uint32_t shared, const TensorMap* map, uint32_t barrier, uint16_t blocks,
                                    const int (&at)[Rank], emulator::Place place) {
  emulator::tma_load(shared, map, barrier, blocks | 0x10000u, at, Rank, place);
}
template <int Rank>
QK_TEMPLATE void tma_store(const TensorMap* map, uint32_t shared, const int (&at)[Rank], emulator::Place place) {
  emulator::tma_store(map, shared, at, Rank, false, place);
}
template <int Rank>
QK_TEMPLATE void tma_reduce_add(const TensorMap* map, uint32_t shared, const int (&at)[Rank], emulator::Place place) {
  emulator::tma_store(map, shared, at, Rank, true, place);
}
template <int Pending>
QK_TEMPLATE void store_wait_read(emulator::Place place) {
  emulator::store_wait(Pending, true, place);
}
template <int Pending>
QK_TEMPLATE void store_wait(emulator::Place place) {
  emulator::store_wait(Pending, false, place);
}

template <class Type, int Columns>
constexpr bool wgmma_has_n =
    Columns % 8 == 0 && Columns >= 8 && Columns <= 256 &&
    (Type::code != S8::code || Columns <= 24 || Columns % 16 == 0);

template <class Type, int Columns>
QK_TEMPLATE void wgmma(Registers<typename Type::Accumulator, Columns / 2>& d, uint64_t a, uint64_t b, bool accumulate,
                       emulator::Place place) {
  static_assert(wgmma_has_n<Type, Columns>, "wgmma has no instruction of this N");
  emulator::wgmma({Type::code, Columns, a, b, accumulate, d.value, &d.state, nullptr, nullptr}, place);
}
template <class Type, int Columns>
QK_TEMPLATE void wgmma(Registers<typename Type::Accumulator, Columns / 2>& d, Registers<uint32_t, 4>& a, uint64_t b,
                       bool accumulate, emulator::Place place) {
  static_assert(wgmma_has_n<Type, Columns>, "wgmma has no instruction of this N");
  emulator::wgmma({Type::code, Columns, 0, b, accumulate, d.value, &d.state, a.value, &a.state}, place);
}
template <int Pending>
QK_TEMPLATE void wgmma_wait(emulator::Place place) {
  emulator::wgmma_wait(Pending, place);
}
template <class T, int Count>
QK_TEMPLATE void wgmma_settle(Registers<T, Count>&) {}
template <int Count>
QK_TEMPLATE void increase_registers(emulator::Place place) {
  static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0, "setmaxnreg takes multiples of 8 from 24 to 256");
  emulator::set_registers(Count, true, place);
}
template <int Count>
QK_TEMPLATE void decrease_registers(emulator::Place place) {
  static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0, "setmaxnreg takes multiples of 8 from 24 to 256");
  emulator::set_registers(Count, false, place);
}

namespace emulator {
template <class T>
static inline T shuffle_any(T value, Shuffle mode, int operand, Place place) {
  static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = shuffle(bits, mode, operand, place);
  memcpy(&value, &bits, 4);
  return value;
}
}  // namespace emulator
template <class T>
QK_TEMPLATE T shuffle(T value, int lane, emulator::Place place) {
  return emulator::shuffle_any(value, emulator::Shuffle::INDEX, lane, place);
}
template <class T>
QK_TEMPLATE T shuffle_xor(T value, int mask, emulator::Place place) {
  return emulator::shuffle_any(value, emulator::Shuffle::XOR, mask, place);
}
template <class T>
QK_TEMPLATE T shuffle_down(T value, int delta, emulator::Place place) {
  return emulator::shuffle_any(value, emulator::Shuffle::DOWN, delta, place);
}

template <int Half>
QK_TEMPLATE uint32_t twice(uint32_t pair) {
  return (pair >> (16 * Half) & 0xffff) * 0x10001u;
}
template <int Table>
QK_TEMPLATE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 8; i++)  // one minterm a bit of the table
    if (Table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return d;
}

template <class Type>
QK_TEMPLATE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(Type::code == BF16::code || Type::code == F16::code, "pairs are of bf16 or fp16");
  return emulator::fma_pair(Type::code, a, b, c);
}

namespace emulator {
// A launch hands over parameters as the driver does: an array of pointers, copied byte by byte.
template <class T>
static inline T parameter(void* pointer) {
  alignas(T) unsigned char bytes[sizeof(T)];
  memcpy(bytes, pointer, sizeof(T));
  return *reinterpret_cast<T*>(bytes);
}
template <class... P, int... I>
static inline void call(void (*kernel)(P...), void** arguments, std::integer_sequence<int, I...>) {
  kernel(parameter<std::remove_const_t<P>>(arguments[I])...);
}
template <class... P>
static inline void call(void (*kernel)(P...), void** arguments) {
  call(kernel, arguments, std::make_integer_sequence<int, sizeof...(P)>());
}
struct ParameterSizes {
  uint64_t count;
  uint64_t bytes[64];
};
template <class... P>
constexpr ParameterSizes parameter_sizes(void (*)(P...)) {
  return {sizeof...(P), {sizeof(P)...}};
}
}  // namespace emulator
}  // namespace qk

#define QK_EXPORT(kernel)                                                                                        \
  extern "C" void qk_entry_##kernel(void** arguments) { ::qk::emulator::call(kernel, arguments); }               \
  extern "C" const ::qk::emulator::ParameterSizes qk_parameters_##kernel;                                        \
  const ::qk::emulator::ParameterSizes qk_parameters_##kernel = ::qk::emulator::parameter_sizes(kernel);
