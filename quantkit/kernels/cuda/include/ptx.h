// The PTX body of instructions.h: one inline instruction a function.
//
// Functions that the target architecture lacks are declared and not defined, so that using one does not compile.
// "memory" clobbers keep the compiler from moving memory accesses across instructions that order them.
#pragma once

#define QK_SM90_INSTRUCTIONS (__CUDA_ARCH__ >= 900)
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QK_WGMMA_INSTRUCTIONS 1
#else
#define QK_WGMMA_INSTRUCTIONS 0
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM120_ALL)
#define QK_SETMAXNREG_INSTRUCTIONS 1
#else
#define QK_SETMAXNREG_INSTRUCTIONS 0
#endif
// sm_120 has clusters and takes multicast, but the assembler warns that it is slow there.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
#define QK_MULTICAST_INSTRUCTIONS 1
#else
#define QK_MULTICAST_INSTRUCTIONS 0
#endif
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM120_ALL)
#define QK_FP4_CONVERSIONS 1
#else
#define QK_FP4_CONVERSIONS 0
#endif

namespace qk {

extern __shared__ __align__(1024) unsigned char dynamic_shared[];

template <class T, int Count>
struct Registers {
  T value[Count];
  __device__ __forceinline__ T& operator[](int i) { return value[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return value[i]; }
};

QK_DEVICE uint32_t lane_id() {
  uint32_t lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// ---- memory --------------------------------------------------------------------------------------------------

QK_DEVICE uint32_t shared_base() { return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared)); }

template <class T>
QK_TEMPLATE T ld_shared(uint32_t address) {
  T value;
  if constexpr (sizeof(T) == 16) {
    U32x4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    memcpy(&value, &v, 16);
  } else if constexpr (sizeof(T) == 8) {
    U32x2 v;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    memcpy(&value, &v, 8);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    memcpy(&value, &v, 4);
  } else if constexpr (sizeof(T) == 2) {
    uint16_t v;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
    memcpy(&value, &v, 2);
  } else {
    static_assert(sizeof(T) == 1, "1, 2, 4, 8 or 16 bytes");
    uint32_t v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    value = static_cast<T>(v);
  }
  return value;
}

template <class T>
QK_TEMPLATE void st_shared(uint32_t address, T value) {
  if constexpr (sizeof(T) == 16) {
    U32x4 v;
    memcpy(&v, &value, 16);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    U32x2 v;
    memcpy(&v, &value, 8);
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" :: "r"(address), "r"(v.x), "r"(v.y) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    memcpy(&v, &value, 4);
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(address), "r"(v) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    uint16_t v;
    memcpy(&v, &value, 2);
    asm volatile("st.shared.b16 [%0], %1;" :: "r"(address), "h"(v) : "memory");
  } else {
    static_assert(sizeof(T) == 1, "1, 2, 4, 8 or 16 bytes");
    uint32_t v = static_cast<uint8_t>(value);
    asm volatile("st.shared.u8 [%0], %1;" :: "r"(address), "r"(v) : "memory");
  }
}

QK_DEVICE void red_add_shared(uint32_t address, uint32_t value) {
  asm volatile("red.relaxed.cta.shared::cta.add.u32 [%0], %1;" :: "r"(address), "r"(value) : "memory");
}

// The compiler emits ld.global / st.global of T's width by itself.
template <class T>
QK_TEMPLATE T ld_global(const T* pointer) { return *pointer; }
template <class T>
QK_TEMPLATE void st_global(T* pointer, T value) { *pointer = value; }

template <class T>
QK_TEMPLATE T ld_global_once(const T* pointer) {
  T value;
  if constexpr (sizeof(T) == 16) {
    U32x4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(pointer));
    memcpy(&value, &v, 16);
  } else if constexpr (sizeof(T) == 8) {
    U32x2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(pointer));
    memcpy(&value, &v, 8);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(v) : "l"(pointer));
    memcpy(&value, &v, 4);
  } else {
    value = *pointer;
  }
  return value;
}

QK_DEVICE uint32_t ld_acquire(const uint32_t* pointer) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}
QK_DEVICE void st_release(uint32_t* pointer, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" :: "l"(pointer), "r"(value) : "memory");
}
QK_DEVICE uint32_t atomic_add(uint32_t* pointer, uint32_t value) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(pointer), "r"(value) : "memory");
  return old;
}
QK_DEVICE uint32_t atomic_add_acq_rel(uint32_t* pointer, uint32_t value) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(pointer), "r"(value) : "memory");
  return old;
}
QK_DEVICE uint32_t atomic_cas(uint32_t* pointer, uint32_t expected, uint32_t value) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(old) : "l"(pointer), "r"(expected), "r"(value) : "memory");
  return old;
}
QK_DEVICE uint32_t atomic_max(uint32_t* pointer, uint32_t value) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.max.u32 %0, [%1], %2;" : "=r"(old) : "l"(pointer), "r"(value) : "memory");
  return old;
}
QK_DEVICE void red_add(float* pointer, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" :: "l"(pointer), "f"(value) : "memory");
}
QK_DEVICE void red_add(int32_t* pointer, int32_t value) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" :: "l"(pointer), "r"(value) : "memory");
}
QK_DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// ---- asynchronous copies of sm_80 ----------------------------------------------------------------------------

QK_DEVICE void cp_async16(uint32_t shared, const void* global, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared), "l"(global), "r"(valid_bytes) : "memory");
}
template <int Bytes>
QK_TEMPLATE void cp_async_small(uint32_t shared, const void* global, int valid_bytes) {
  static_assert(Bytes == 4 || Bytes == 8, "cp.async copies 4, 8 or 16 bytes");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               :: "r"(shared), "l"(global), "n"(Bytes), "r"(valid_bytes) : "memory");
}
QK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
QK_TEMPLATE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(Pending) : "memory"); }

// ---- matrix fragments and mma.sync ---------------------------------------------------------------------------

QK_DEVICE void ldmatrix_x2(uint32_t& r0, uint32_t& r1, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r0), "=r"(r1) : "r"(address) : "memory");
}
QK_DEVICE void ldmatrix_x4(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(address) : "memory");
}
QK_DEVICE void ldmatrix_x4_transposed(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(address) : "memory");
}

#define QK_MMA(shape_and_types, constraint)                                                             \
  asm volatile("mma.sync.aligned." shape_and_types                                                      \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                       \
               : constraint(d[0]), constraint(d[1]), constraint(d[2]), constraint(d[3])                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class Type>
QK_TEMPLATE void mma(typename Type::Accumulator (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (Type::code == S8::code) QK_MMA("m16n8k32.row.col.s32.s8.s8.s32", "+r");
  else if constexpr (Type::code == BF16::code) QK_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "+f");
  else if constexpr (Type::code == F16::code) QK_MMA("m16n8k16.row.col.f32.f16.f16.f32", "+f");
  else {
    static_assert(__CUDA_ARCH__ >= 890 || sizeof(Type) == 0, "fp8 mma.sync starts at sm_89");
#if __CUDA_ARCH__ >= 890
    if constexpr (Type::code == E4M3::code) QK_MMA("m16n8k32.row.col.f32.e4m3.e4m3.f32", "+f");
    else QK_MMA("m16n8k32.row.col.f32.e5m2.e5m2.f32", "+f");
#endif
  }
}
#undef QK_MMA

#if defined(__CUDA_ARCH_FEAT_SM120_ALL)
#define QK_MMA_BLOCKS(shape_and_kind, types)                                                            \
  asm volatile("mma.sync.aligned." shape_and_kind types                                                 \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3},"                       \
               " %10, {%12, %13}, %11, {%12, %14};"                                                     \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scale_a),        \
                 "r"(scale_b), "n"(Byte), "n"(ThreadA), "n"(ThreadB))

template <class Type, int Byte, int ThreadA, int ThreadB>
QK_TEMPLATE void mma_blocks(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t scale_a,
                            uint32_t scale_b) {
  static_assert(Byte % Type::scales == 0, "the scales of one instruction are neighbours");
  if constexpr (Type::code == MXFP8::code)
    QK_MMA_BLOCKS("m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X", ".f32.e4m3.e4m3.f32.ue8m0");
  else if constexpr (Type::code == MXFP4::code)
    QK_MMA_BLOCKS("m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X", ".f32.e2m1.e2m1.f32.ue8m0");
  else
    QK_MMA_BLOCKS("m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X", ".f32.e2m1.e2m1.f32.ue4m3");
}
#undef QK_MMA_BLOCKS
#endif

// ---- barriers ------------------------------------------------------------------------------------------------

QK_DEVICE void block_sync() { __syncthreads(); }
QK_DEVICE void warp_sync() { __syncwarp(); }
QK_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
QK_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

#if QK_SM90_INSTRUCTIONS
QK_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
QK_DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
QK_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}
QK_DEVICE void stmatrix_x2(uint32_t address, uint32_t r0, uint32_t r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};"
               :: "r"(address), "r"(r0), "r"(r1) : "memory");
}
QK_DEVICE void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}
QK_DEVICE void stmatrix_x4_transposed(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}
QK_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
QK_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

QK_DEVICE void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}
QK_DEVICE void mbarrier_invalidate(uint32_t barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" :: "r"(barrier) : "memory");
}
// Two fences: the cluster's view of the initialisation, and this block's async proxy.
QK_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
QK_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
QK_DEVICE void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
QK_DEVICE void mbarrier_arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" :: "r"(barrier) : "memory");
}
QK_DEVICE bool mbarrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done != 0;
}
// acquire.cluster: a phase may have been completed by another block's arrival or multicast.
QK_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "again_%=:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again_%=;\n}" :: "r"(barrier), "r"(parity) : "memory");
}

QK_TEMPLATE void mbarrier_arrive_ring(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(barrier) : "memory");
}
QK_TEMPLATE void mbarrier_wait_ring(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "again_%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again_%=;\n}" :: "r"(barrier), "r"(parity) : "memory");
}

// ---- clusters ------------------------------------------------------------------------------------------------

QK_DEVICE uint32_t map_to_rank(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
QK_DEVICE uint32_t ld_cluster(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
QK_DEVICE void st_cluster(uint32_t address, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(address), "r"(value) : "memory");
}

// ---- bulk copies and TMA -------------------------------------------------------------------------------------

QK_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
QK_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}

// `head` ends before the coordinates, `tail` follows them; operands 0 … 3 are the caller's, coordinates from %4 on.
#define QK_TMA(kind, head, tail, ...)                                                                            \
  if constexpr (Rank == 1) {                                                                                     \
    asm volatile(kind ".1d" head "{%4}" tail :: __VA_ARGS__, "r"(at[0]) : "memory");                             \
  } else if constexpr (Rank == 2) {                                                                              \
    asm volatile(kind ".2d" head "{%4, %5}" tail :: __VA_ARGS__, "r"(at[0]), "r"(at[1]) : "memory");             \
  } else if constexpr (Rank == 3) {                                                                              \
    asm volatile(kind ".3d" head "{%4, %5, %6}" tail                                                             \
                 :: __VA_ARGS__, "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory");                                 \
  } else if constexpr (Rank == 4) {                                                                              \
    asm volatile(kind ".4d" head "{%4, %5, %6, %7}" tail                                                         \
                 :: __VA_ARGS__, "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory");                     \
  } else {                                                                                                       \
    static_assert(Rank == 5, "tensor maps have one to five dimensions");                                         \
    asm volatile(kind ".5d" head "{%4, %5, %6, %7, %8}" tail                                                     \
                 :: __VA_ARGS__, "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]) : "memory");         \
  }

template <int Rank>
QK_TEMPLATE void tma_load(uint32_t shared, const TensorMap* map, uint32_t barrier, const int (&at)[Rank]) {
  QK_TMA("cp.async.bulk.tensor", ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, ", "], [%2];",
         "r"(shared), "l"(map), "r"(barrier), "r"(0))
}
#if QK_MULTICAST_INSTRUCTIONS
template <int Rank>
QK_TEMPLATE void tma_load_multicast(uint32_t shared, const TensorMap* map, uint32_t barrier, uint16_t blocks,
                                    const int (&at)[Rank]) {
  QK_TMA("cp.async.bulk.tensor",
         ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, ", "], [%2], %3;",
         "r"(shared), "l"(map), "r"(barrier), "h"(blocks))
}
#endif
template <int Rank>
QK_TEMPLATE void tma_store(const TensorMap* map, uint32_t shared, const int (&at)[Rank]) {
  QK_TMA("cp.async.bulk.tensor", ".global.shared::cta.bulk_group [%0, ", "], [%1];",
         "l"(map), "r"(shared), "r"(0), "r"(0))
}
template <int Rank>
QK_TEMPLATE void tma_reduce_add(const TensorMap* map, uint32_t shared, const int (&at)[Rank]) {
  QK_TMA("cp.reduce.async.bulk.tensor", ".global.shared::cta.add.bulk_group [%0, ", "], [%1];",
         "l"(map), "r"(shared), "r"(0), "r"(0))
}
#undef QK_TMA

QK_DEVICE void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(shared), "l"(global), "r"(bytes), "r"(barrier) : "memory");
}
QK_DEVICE void bulk_store(void* global, uint32_t shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               :: "l"(global), "r"(shared), "r"(bytes) : "memory");
}
QK_DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int Pending>
QK_TEMPLATE void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(Pending) : "memory"); }
template <int Pending>
QK_TEMPLATE void store_wait() { asm volatile("cp.async.bulk.wait_group %0;" :: "n"(Pending) : "memory"); }
#endif  // QK_SM90_INSTRUCTIONS

// ---- wgmma ---------------------------------------------------------------------------------------------------

#if QK_WGMMA_INSTRUCTIONS
QK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
QK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
QK_TEMPLATE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(Pending) : "memory"); }
template <int Count>
QK_TEMPLATE void wgmma_settle(Registers<float, Count>& registers) {
  QK_UNROLL for (int i = 0; i < Count; i++) asm volatile("" : "+f"(registers.value[i]) :: "memory");
}
template <int Count>
QK_TEMPLATE void wgmma_settle(Registers<int32_t, Count>& registers) {
  QK_UNROLL for (int i = 0; i < Count; i++) asm volatile("" : "+r"(registers.value[i]) :: "memory");
}
#endif
#if QK_SETMAXNREG_INSTRUCTIONS
template <int Count>
QK_TEMPLATE void increase_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(Count)); }
template <int Count>
QK_TEMPLATE void decrease_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(Count)); }
#endif

// ---- between lanes -------------------------------------------------------------------------------------------

template <class T>
QK_TEMPLATE T shuffle(T value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
template <class T>
QK_TEMPLATE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
template <class T>
QK_TEMPLATE T shuffle_down(T value, int delta) { return __shfl_down_sync(0xffffffffu, value, delta); }
QK_DEVICE uint32_t vote(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// ---- arithmetic ----------------------------------------------------------------------------------------------

template <int Table>
QK_TEMPLATE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return d;
}
QK_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
template <int Half>
QK_TEMPLATE uint32_t twice(uint32_t pair) {
  uint32_t d;
  // As halves, not bytes: then it becomes a modifier of the operand.
  if (Half == 0) asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l}; }" : "=r"(d) : "r"(pair));
  else asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h}; }" : "=r"(d) : "r"(pair));
  return d;
}
QK_DEVICE int32_t dp4a(int32_t a, int32_t b, int32_t c) {
  int32_t d;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
QK_DEVICE float fused_multiply_add(float a, float b, float c) {
  float d;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}
QK_DEVICE float square_root(float x) {
  float y;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <class Type>
QK_TEMPLATE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(Type::code == BF16::code || Type::code == F16::code, "pairs are of bf16 or fp16");
  uint32_t d;
  if constexpr (Type::code == BF16::code) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
QK_DEVICE float max_magnitude(float a, float x) { return fmaxf(a, fabsf(x)); }
QK_DEVICE float lesser(float a, float b) { return fminf(a, b); }
QK_DEVICE float greater(float a, float b) { return fmaxf(a, b); }
QK_DEVICE double magnitude(double x) { return fabs(x); }
QK_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
QK_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
QK_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- conversions ---------------------------------------------------------------------------------------------
// cvt's packing forms take the high half first.

QK_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
QK_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
QK_DEVICE uint16_t pack_e4m3(float low, float high) {
#if __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return static_cast<uint16_t>(portable::float_to_e4m3(low) | portable::float_to_e4m3(high) << 8);
#endif
}
QK_DEVICE uint16_t pack_e5m2(float low, float high) {
#if __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return static_cast<uint16_t>(portable::float_to_e5m2(low) | portable::float_to_e5m2(high) << 8);
#endif
}
QK_DEVICE uint8_t pack_e2m1(float low, float high) {
#if QK_FP4_CONVERSIONS
  uint16_t pair;
  asm("{\n.reg .b8 b;\ncvt.rn.satfinite.e2m1x2.f32 b, %1, %2;\nmov.b16 %0, {b, 0};\n}"
      : "=h"(pair) : "f"(high), "f"(low));
  return static_cast<uint8_t>(pair);
#else
  return static_cast<uint8_t>(portable::float_to_e2m1(low) | portable::float_to_e2m1(high) << 4);
#endif
}
QK_DEVICE uint16_t pack_e8m0_up(float low, float high) {
#if QK_FP4_CONVERSIONS
  uint16_t pair;
  asm("cvt.rp.satfinite.ue8m0x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return static_cast<uint16_t>(portable::float_to_e8m0_up(low) | portable::float_to_e8m0_up(high) << 8);
#endif
}
QK_DEVICE int8_t float_to_s8(float x) {
  int32_t rounded;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return static_cast<int8_t>(rounded);
}
QK_DEVICE float bf16_low(uint32_t pair) { return portable::bits_float(pair << 16); }
QK_DEVICE float bf16_high(uint32_t pair) { return portable::bits_float(pair & 0xffff0000u); }
QK_DEVICE float f16_low(uint32_t pair) {
  float x;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}" : "=f"(x) : "r"(pair));
  return x;
}
QK_DEVICE float f16_high(uint32_t pair) {
  float x;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, high;\n}" : "=f"(x) : "r"(pair));
  return x;
}
QK_DEVICE uint32_t e4m3_to_f16(uint16_t pair) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  return halves;
#else
  return portable::float_to_half(portable::e4m3_to_float(pair & 0xffu)) |
         portable::float_to_half(portable::e4m3_to_float(pair >> 8)) << 16;
#endif
}
QK_DEVICE uint32_t e5m2_to_f16(uint16_t pair) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(halves) : "h"(pair));
  return halves;
#else
  return uint32_t(pair & 0xffu) << 8 | uint32_t(pair >> 8) << 24;
#endif
}

}  // namespace qk

#if QK_WGMMA_INSTRUCTIONS
#include "wgmma_ptx.h"
#endif
