// What a kernel sees of the emulator: its coordinates, and the runtime-parameter forms of the layer's templates.
// Everything here is defined in the emulator's own library; a kernel compiles against this header in a second.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

namespace qk {
namespace emulator {

// Where in the kernel's source an instruction stands.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Dim { unsigned x, y, z; };

// The running thread's coordinates: what threadIdx and its companions read.
struct Coordinates { Dim thread, block, block_dim, grid_dim; };
extern Coordinates* current;

// What is known of a set of wgmma registers: how many unfinished wgmmas own it, and when it was last touched.
struct RegisterState {
  int pending = 0;
  uint64_t touched = 0;
  Place issued = {nullptr, 0};
};

void touch_registers(RegisterState& state, int index, int count);
void abandon_registers(void* value);

void load_shared(uint32_t address, void* value, int bytes, Place place);
void store_shared(uint32_t address, const void* value, int bytes, Place place);
void load_global(const void* pointer, void* value, int bytes, Place place);
void store_global(void* pointer, const void* value, int bytes, Place place);

void cp_async(uint32_t shared, const void* global, int bytes, int valid_bytes, Place place);
void cp_async_wait(int pending, Place place);
void mma(int type, void* d, const uint32_t* a, const uint32_t* b, Place place);

// Which of a warp's scales one instruction takes.
struct ScaleChoice { int byte, thread_a, thread_b; };
void mma_blocks(int type, ScaleChoice choice, float* d, const uint32_t* a, const uint32_t* b, uint32_t scale_a,
                uint32_t scale_b, Place place);

// blocks: bit r selects block r of the cluster; 0 is this block alone.
void tma_load(uint32_t shared, const void* map, uint32_t barrier, uint32_t blocks, const int* at, int rank,
              Place place);
void tma_store(const void* map, uint32_t shared, const int* at, int rank, bool add, Place place);
void store_wait(int pending, bool read_only, Place place);

// `a_registers` is null when A is in shared memory.
struct WgmmaCall {
  int type, n;
  uint64_t a, b;
  bool accumulate;
  void* d;
  RegisterState* d_state;
  const uint32_t* a_registers;
  RegisterState* a_state;
};
void wgmma(const WgmmaCall& call, Place place);
uint32_t fma_pair(int type, uint32_t a, uint32_t b, uint32_t c);
void wgmma_wait(int pending, Place place);
void set_registers(int count, bool increase, Place place);

// mode: the lane's own number replaced by `operand`, xor-ed with it, or increased by it.
enum class Shuffle { INDEX, XOR, DOWN };
uint32_t shuffle(uint32_t value, Shuffle mode, int operand, Place place);

}  // namespace emulator
}  // namespace qk

#define threadIdx (::qk::emulator::current->thread)
#define blockIdx (::qk::emulator::current->block)
#define blockDim (::qk::emulator::current->block_dim)
#define gridDim (::qk::emulator::current->grid_dim)
