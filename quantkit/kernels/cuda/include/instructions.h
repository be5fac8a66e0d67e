// The instruction layer: every GPU instruction that quantkit's kernels use, as a thin function.
//
// This header is the contract. It has two bodies: ptx.h (one inline PTX instruction each, for NVRTC and nvcc) and
// emulated.h (the CPU emulator, for g++). A kernel includes nothing else, so NVRTC needs no toolkit headers, and
// the same kernel source runs on a GPU and, bit for bit, in the test suite.
//
// Words: a *shared address* is the 32-bit address of shared memory that PTX uses. Addresses of other blocks of the
// cluster come from map_to_rank. "Warp" functions are called by all 32 lanes together, "warpgroup" functions by
// all 128 threads of four consecutive warps starting at a multiple of four. Barriers count threads.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define QK_EMULATED 0
#else
#define QK_EMULATED 1
#endif

#ifdef __CUDACC_RTC__
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <stdint.h>
#endif

#if QK_EMULATED
#include "emulator.h"
#define QK_DEVICE                                        // a function of this layer
#define QK_TEMPLATE static inline                        // the same, when it is a template
#define QK_PURE static inline                            // plain C++ that both bodies share
#define QK_FUNCTION static inline                        // a kernel's own helper
#define QK_UNROLL
#define QK_ROLLED
#define QK_GRID_CONSTANT
#define QK_KERNEL(threads, blocks_per_multiprocessor) static void
#define QK_CLUSTER_KERNEL(threads, blocks_per_multiprocessor, cluster_size) static void
#define QK_AT , ::qk::emulator::Place place = ::qk::emulator::Place::here()  // the caller's file and line
#define QK_AT_ONLY ::qk::emulator::Place place = ::qk::emulator::Place::here()
#else
#define QK_DEVICE static __device__ __forceinline__
#define QK_TEMPLATE static __device__ __forceinline__
#define QK_PURE static __device__ __forceinline__
#define QK_FUNCTION static __device__ __forceinline__
#define QK_UNROLL _Pragma("unroll")
#define QK_ROLLED _Pragma("unroll 1")                    // code that runs once or twice is fetched, not run
#define QK_GRID_CONSTANT __grid_constant__
#define QK_KERNEL(threads, blocks_per_multiprocessor) \
  extern "C" __global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
#define QK_CLUSTER_KERNEL(threads, blocks_per_multiprocessor, cluster_size) \
  extern "C" __global__ void __cluster_dims__(cluster_size, 1, 1) \
      __launch_bounds__(threads, blocks_per_multiprocessor)
#define QK_EXPORT(kernel)  // the emulator's entry point; a GPU finds the kernel by its name
#define QK_AT
#define QK_AT_ONLY
#endif

#include "conversions.h"

namespace qk {

// ---- types ---------------------------------------------------------------------------------------------------

struct alignas(8) U32x2 { uint32_t x, y; };
struct alignas(16) U32x4 { uint32_t x, y, z, w; };

// What cuTensorMapEncodeTiled writes; passed by value as a QK_GRID_CONSTANT kernel parameter.
struct alignas(64) TensorMap { uint8_t opaque[128]; };

// Element types of the matrix instructions. K is the depth of one instruction: always 32 bytes of a row.
struct S8 { using Accumulator = int32_t; static constexpr int depth = 32; static constexpr int code = 0; };
struct E4M3 { using Accumulator = float; static constexpr int depth = 32; static constexpr int code = 1; };
struct E5M2 { using Accumulator = float; static constexpr int depth = 32; static constexpr int code = 2; };
struct BF16 { using Accumulator = float; static constexpr int depth = 16; static constexpr int code = 3; };
struct F16 { using Accumulator = float; static constexpr int depth = 16; static constexpr int code = 4; };

// Codes whose scales go by blocks along K, `scales` of them in one instruction's K: e4m3 and e2m1 by 32 with scales in
// e8m0, e2m1 by 16 with scales in e4m3 that have no sign.
struct MXFP8 { static constexpr int depth = 32, scales = 1, code = 5; };
struct MXFP4 { static constexpr int depth = 64, scales = 2, code = 6; };
struct NVFP4 { static constexpr int depth = 64, scales = 4, code = 7; };

// Registers that wgmma reads or writes while the thread runs on: accumulators and A fragments. Touching one
// between the wgmma and the wgmma_wait that covers it is an error, which the emulator reports.
template <class T, int Count>
struct Registers;

// ---- who am I ------------------------------------------------------------------------------------------------
// threadIdx, blockIdx, blockDim and gridDim are CUDA's own.

QK_DEVICE uint32_t lane_id();
// Rank of this block in its cluster, and the number of blocks in it (1 without clusters). sm_90+.
QK_DEVICE uint32_t cluster_rank();
QK_DEVICE uint32_t cluster_size();
// True in exactly one lane of the converged warp. Warp function; sm_90+.
QK_DEVICE bool elect_one(QK_AT_ONLY);

// ---- memory --------------------------------------------------------------------------------------------------

// Shared address of the launch's dynamic shared memory, 1024-byte aligned.
QK_DEVICE uint32_t shared_base();
// T of 1, 2, 4, 8 or 16 bytes; the address is a multiple of its size.
template <class T> QK_TEMPLATE T ld_shared(uint32_t address QK_AT);
template <class T> QK_TEMPLATE void st_shared(uint32_t address, T value QK_AT);
// Add to a word of this block's shared memory and return nothing; threads may add to one word without meeting.
QK_DEVICE void red_add_shared(uint32_t address, uint32_t value QK_AT);
template <class T> QK_TEMPLATE T ld_global(const T* pointer QK_AT);
template <class T> QK_TEMPLATE void st_global(T* pointer, T value QK_AT);
// Memory that no thread writes during the launch, read once: not kept in L1.
template <class T> QK_TEMPLATE T ld_global_once(const T* pointer QK_AT);

// Flags and counters between blocks: acquire / release at GPU scope. Loops around ld_acquire are busy waits.
QK_DEVICE uint32_t ld_acquire(const uint32_t* pointer QK_AT);
QK_DEVICE void st_release(uint32_t* pointer, uint32_t value QK_AT);
// Return the value before the addition. acq_rel orders the thread's other accesses around it.
QK_DEVICE uint32_t atomic_add(uint32_t* pointer, uint32_t value QK_AT);
QK_DEVICE uint32_t atomic_add_acq_rel(uint32_t* pointer, uint32_t value QK_AT);
QK_DEVICE uint32_t atomic_cas(uint32_t* pointer, uint32_t expected, uint32_t value QK_AT);
QK_DEVICE uint32_t atomic_max(uint32_t* pointer, uint32_t value QK_AT);
// Add to memory and return nothing. The order of float additions is not defined.
QK_DEVICE void red_add(float* pointer, float value QK_AT);
QK_DEVICE void red_add(int32_t* pointer, int32_t value QK_AT);
// fence.acq_rel.gpu
QK_DEVICE void fence_gpu(QK_AT_ONLY);

// ---- asynchronous copies of sm_80 ----------------------------------------------------------------------------

// Copy 16 bytes from global to shared memory: `valid_bytes` of them, the rest zeros. Nothing is read when it is 0,
// but the pointer must still be a valid one.
QK_DEVICE void cp_async16(uint32_t shared, const void* global, int valid_bytes QK_AT);
// Copy 4 or 8 bytes (row tails that are not multiples of 16).
template <int Bytes> QK_TEMPLATE void cp_async_small(uint32_t shared, const void* global, int valid_bytes QK_AT);
QK_DEVICE void cp_async_commit(QK_AT_ONLY);
// Wait until at most Pending of this thread's committed groups are unfinished.
template <int Pending> QK_TEMPLATE void cp_async_wait(QK_AT_ONLY);

// ---- matrix fragments and mma.sync ---------------------------------------------------------------------------

// Load 8x8 matrices of 16-bit elements (8 rows of 16 bytes). Lanes 8i … 8i+7 give the row addresses of matrix i;
// lane l receives bytes 4 (l % 4) … +3 of row l / 4. Warp function.
QK_DEVICE void ldmatrix_x2(uint32_t& r0, uint32_t& r1, uint32_t address QK_AT);
QK_DEVICE void ldmatrix_x4(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address QK_AT);
// The same with each 8x8 matrix of 16-bit elements transposed.
QK_DEVICE void ldmatrix_x4_transposed(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address QK_AT);
// The inverse of ldmatrix. Warp function; sm_90+.
QK_DEVICE void stmatrix_x2(uint32_t address, uint32_t r0, uint32_t r1 QK_AT);
QK_DEVICE void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3 QK_AT);
QK_DEVICE void stmatrix_x4_transposed(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3 QK_AT);

// D[16, 8] += A[16, K] @ B[8, K].T, with g = lane / 4 and t = lane % 4: a[0] holds bytes 4t … 4t+3 of row g, a[1] of
// row g+8, a[2] and a[3] the same 16 bytes further on; b[0], b[1] likewise for row g of B; d[0], d[1] are columns
// 2t, 2t+1 of row g, d[2], d[3] of row g+8. Warp function. E4M3 and E5M2 need sm_89.
template <class Type>
QK_TEMPLATE void mma(typename Type::Accumulator (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] QK_AT);

// The same of codes times the scales of their blocks; two e2m1 lie in a byte, the first in the low nibble. Of the scales
// a warp's registers hold more than one instruction takes: those of A's rows g and g + 8 come from lanes
// 4 g + 2 ThreadA and 4 g + 2 ThreadA + 1, those of B's row g from lane 4 g + ThreadB, Type::scales bytes from byte
// `Byte` on, the first for the first codes. Byte is a multiple of Type::scales, ThreadA 0 or 1, ThreadB 0 … 3; what
// other lanes and bytes hold does not matter. Warp function; sm_120a.
template <class Type, int Byte, int ThreadA, int ThreadB>
QK_TEMPLATE void mma_blocks(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t scale_a,
                            uint32_t scale_b QK_AT);

// ---- barriers ------------------------------------------------------------------------------------------------

QK_DEVICE void block_sync(QK_AT_ONLY);
QK_DEVICE void warp_sync(QK_AT_ONLY);
// Named barriers 1 … 15 (0 is block_sync's). `threads` counts all who sync or arrive: a multiple of 32.
QK_DEVICE void barrier_sync(int id, int threads QK_AT);
QK_DEVICE void barrier_arrive(int id, int threads QK_AT);
// All threads of the cluster. Arrive releases, wait acquires; sm_90+.
QK_DEVICE void cluster_arrive(QK_AT_ONLY);
QK_DEVICE void cluster_wait(QK_AT_ONLY);

// mbarriers: 8-byte objects in shared memory. A phase completes when `count` arrivals and all expected bytes are
// in; waiting for parity P returns once a phase of that parity (0 first) has completed. sm_90+.
QK_DEVICE void mbarrier_init(uint32_t barrier, int count QK_AT);
QK_DEVICE void mbarrier_invalidate(uint32_t barrier QK_AT);
// Makes initialisations visible to the async proxy and to the cluster: before the barrier that publishes them.
QK_DEVICE void fence_mbarrier_init(QK_AT_ONLY);
QK_DEVICE void mbarrier_arrive(uint32_t barrier QK_AT);
// Expect `bytes` more in this phase, then arrive.
QK_DEVICE void mbarrier_arrive_expect(uint32_t barrier, int bytes QK_AT);
// `barrier` is a cluster address (map_to_rank), perhaps another block's.
QK_DEVICE void mbarrier_arrive_remote(uint32_t barrier QK_AT);
QK_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity QK_AT);
// The same two for a ring that only the copy engine writes and only wgmma reads: they order no ordinary accesses of
// other blocks, and so cost neither a fence of the whole GPU (the arrival) nor the L1 cache (the wait).
QK_TEMPLATE void mbarrier_arrive_ring(uint32_t barrier QK_AT);
QK_TEMPLATE void mbarrier_wait_ring(uint32_t barrier, uint32_t parity QK_AT);
// One look, true when the phase has completed.
QK_DEVICE bool mbarrier_test(uint32_t barrier, uint32_t parity QK_AT);

// ---- clusters ------------------------------------------------------------------------------------------------

// The cluster address of what `address` is in block `rank`.
QK_DEVICE uint32_t map_to_rank(uint32_t address, uint32_t rank QK_AT);
QK_DEVICE uint32_t ld_cluster(uint32_t address QK_AT);
QK_DEVICE void st_cluster(uint32_t address, uint32_t value QK_AT);

// ---- bulk copies and TMA, sm_90+ -----------------------------------------------------------------------------

// Order this thread's earlier writes to shared memory before later reads by TMA stores and wgmma (the async proxy).
// Every thread that wrote calls it, before the barrier after which they are read.
QK_DEVICE void fence_proxy_async(QK_AT_ONLY);
QK_DEVICE void prefetch_tensor_map(const TensorMap* map QK_AT);
// Load the map's box at element coordinates `at` (innermost first); its bytes complete on `barrier`. Elements out of
// bounds are filled, and counted. `shared` is 128-byte aligned, and 1024 / 512 / 256 with 128 / 64 / 32-byte swizzle.
// at[0] is a multiple of 16 bytes.
template <int Rank>
QK_TEMPLATE void tma_load(uint32_t shared, const TensorMap* map, uint32_t barrier, const int (&at)[Rank] QK_AT);
// The same into the same offsets of every block of the cluster whose bit is set, completing on each one's barrier.
// sm_90a and sm_100a.
template <int Rank>
QK_TEMPLATE void tma_load_multicast(uint32_t shared, const TensorMap* map, uint32_t barrier, uint16_t blocks,
                                    const int (&at)[Rank] QK_AT);
// Store a box from shared memory; what lies beyond the tensor's ends is left out. No coordinate is negative.
template <int Rank>
QK_TEMPLATE void tma_store(const TensorMap* map, uint32_t shared, const int (&at)[Rank] QK_AT);
// Add a box to global memory (float32 or s32 maps).
template <int Rank>
QK_TEMPLATE void tma_reduce_add(const TensorMap* map, uint32_t shared, const int (&at)[Rank] QK_AT);
// `bytes` contiguous bytes, a multiple of 16, all addresses multiples of 16.
QK_DEVICE void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier QK_AT);
QK_DEVICE void bulk_store(void* global, uint32_t shared, int bytes QK_AT);
// Groups of this thread's stores: tma_store, tma_reduce_add and bulk_store.
QK_DEVICE void store_commit(QK_AT_ONLY);
// Wait until at most Pending groups still have to read shared memory (then it may be written again) …
template <int Pending> QK_TEMPLATE void store_wait_read(QK_AT_ONLY);
// … or still have to be visible in global memory.
template <int Pending> QK_TEMPLATE void store_wait(QK_AT_ONLY);

// ---- wgmma, sm_90a -------------------------------------------------------------------------------------------

enum class Swizzle : uint32_t { NONE = 0, BYTES_128 = 1, BYTES_64 = 2, BYTES_32 = 3 };

// Where wgmma finds a K-major operand in shared memory. Swizzled: rows of 128 / 64 / 32 bytes, `stride_bytes` from
// one group of eight rows to the next, leading_bytes unused; advance along K by adding bytes to the address.
// Without swizzle: core matrices of 8 rows x 16 bytes, 128 contiguous bytes each; leading_bytes to the next one
// along K, stride_bytes to the next along M or N.
QK_PURE uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes, Swizzle swizzle,
                                   uint32_t base_offset = 0) {
  return uint64_t((address & 0x3ffffu) >> 4) | uint64_t((leading_bytes & 0x3ffffu) >> 4) << 16 |
         uint64_t((stride_bytes & 0x3ffffu) >> 4) << 32 | uint64_t(base_offset & 7u) << 49 | uint64_t(swizzle) << 62;
}

// D[64, N] = A[64, K] @ B[N, K].T + (accumulate ? D : 0), A and B in shared memory. With w = warp % 4, g = lane / 4,
// t = lane % 4: d[4j + 2h + e] is row 16w + g + 8h, column 8j + 2t + e. Warpgroup function; it returns at once.
// N is a multiple of 8 up to 256; for S8 one of 8, 16, 24, 32, 48, 64, and so on in steps of 16.
template <class Type, int Columns>
QK_TEMPLATE void wgmma(Registers<typename Type::Accumulator, Columns / 2>& d, uint64_t a, uint64_t b,
                       bool accumulate QK_AT);
// The same with A in registers: each warp's 16 rows as in mma.
template <class Type, int Columns>
QK_TEMPLATE void wgmma(Registers<typename Type::Accumulator, Columns / 2>& d, Registers<uint32_t, 4>& a, uint64_t b,
                       bool accumulate QK_AT);
// Before the first wgmma, and whenever its registers were touched by anything else.
QK_DEVICE void wgmma_fence(QK_AT_ONLY);
QK_DEVICE void wgmma_commit(QK_AT_ONLY);
// Wait until at most Pending committed groups are unfinished.
template <int Pending> QK_TEMPLATE void wgmma_wait(QK_AT_ONLY);
// After the wait: keeps the compiler from reading these registers, or copying them, before it.
template <class T, int Count> QK_TEMPLATE void wgmma_settle(Registers<T, Count>& registers);
// Take registers from, or give them to, the block's pool. Warpgroup functions; Count is a multiple of 8, 24 … 256.
template <int Count> QK_TEMPLATE void increase_registers(QK_AT_ONLY);
template <int Count> QK_TEMPLATE void decrease_registers(QK_AT_ONLY);

// ---- between lanes -------------------------------------------------------------------------------------------

// Another lane's value. Warp functions; T of 4 bytes.
template <class T> QK_TEMPLATE T shuffle(T value, int lane QK_AT);
template <class T> QK_TEMPLATE T shuffle_xor(T value, int mask QK_AT);
// Lane l receives lane l + delta's, its own beyond the end.
template <class T> QK_TEMPLATE T shuffle_down(T value, int delta QK_AT);
QK_DEVICE uint32_t vote(bool predicate QK_AT);

// ---- arithmetic ----------------------------------------------------------------------------------------------

// Any bitwise function of three words: Table is f(0xf0, 0xcc, 0xaa).
template <int Table> QK_TEMPLATE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c);
// Four bytes chosen out of b:a by the nibbles of selector; its top bit replicates the byte's sign.
QK_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector);
// Both halves of a word its low half (0), or its high one (1). Instructions on pairs take their operands so for nothing.
template <int Half> QK_TEMPLATE uint32_t twice(uint32_t pair);
// c + the dot product of four signed bytes.
QK_DEVICE int32_t dp4a(int32_t a, int32_t b, int32_t c);
// One rounding. Kernels are compiled without contraction, so a * b + c has two, everywhere.
QK_DEVICE float fused_multiply_add(float a, float b, float c);
// The same on two bf16 (Type BF16) or two fp16 (F16) at once, each rounded to its own type. Subnormals are kept.
template <class Type> QK_TEMPLATE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c);
QK_DEVICE float square_root(float x);  // rounded to nearest
// The greater of a and |x|; NaN loses against any number.
QK_DEVICE float max_magnitude(float a, float x);
// The lesser and the greater; NaN loses against any number, and which zero comes first is not defined.
QK_DEVICE float lesser(float a, float b);
QK_DEVICE float greater(float a, float b);
QK_DEVICE double magnitude(double x);
// 1 / x, 2 ** x and tanh x as the hardware approximates them: within 1, 2 and 2**-10.987 relative (ulp, ulp, -).
// The emulator computes them to the nearest float, so kernels that use them are compared within those bounds.
QK_DEVICE float reciprocal_approx(float x);
QK_DEVICE float exp2_approx(float x);
QK_DEVICE float tanh_approx(float x);

// ---- conversions ---------------------------------------------------------------------------------------------
// Two results are packed with the first argument in the low half. Nearest, ties to even.

QK_DEVICE uint32_t pack_bf16(float low, float high);
QK_DEVICE uint32_t pack_f16(float low, float high);
// 8- and 4-bit floats saturate to their largest finite value; NaN stays NaN (e2m1: its largest).
QK_DEVICE uint16_t pack_e4m3(float low, float high);
QK_DEVICE uint16_t pack_e5m2(float low, float high);
QK_DEVICE uint8_t pack_e2m1(float low, float high);
// Scales of MX formats, rounded up; arguments >= 0.
QK_DEVICE uint16_t pack_e8m0_up(float low, float high);
// Nearest integer, ties to even, saturated to int8; NaN gives 0.
QK_DEVICE int8_t float_to_s8(float x);
QK_DEVICE float bf16_low(uint32_t pair);
QK_DEVICE float bf16_high(uint32_t pair);
QK_DEVICE float f16_low(uint32_t pair);
QK_DEVICE float f16_high(uint32_t pair);
// Two e4m3 (e5m2) codes to two float16, exactly.
QK_DEVICE uint32_t e4m3_to_f16(uint16_t pair);
QK_DEVICE uint32_t e5m2_to_f16(uint16_t pair);

}  // namespace qk

#if QK_EMULATED
#include "emulated.h"
#else
#include "ptx.h"
#endif
