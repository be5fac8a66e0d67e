// One small kernel for each instruction, or family of them: operands come in, results go out, Python has the oracle.
#include "instructions.h"

using namespace qk;
#ifndef CLUSTER
#define CLUSTER 1
#endif

// Copy `bytes` (a multiple of 16) between global and shared memory, by all threads of the block.
QK_FUNCTION void fill_shared(uint32_t to, const uint8_t* from, int bytes) {
  for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
    st_shared(to + i, ld_global(reinterpret_cast<const U32x4*>(from + i)));
}
QK_FUNCTION void dump_shared(uint8_t* to, uint32_t from, int bytes) {
  for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
    st_global(reinterpret_cast<U32x4*>(to + i), ld_shared<U32x4>(from + i));
}

// ---- memory --------------------------------------------------------------------------------------------------

template <class T>
QK_FUNCTION void copy_as(const uint8_t* in, uint8_t* out, uint32_t shared) {
  const int at = threadIdx.x * sizeof(T);
  st_shared(shared + at, ld_global(reinterpret_cast<const T*>(in + at)));
  warp_sync();
  st_global(reinterpret_cast<T*>(out + at), ld_shared<T>(shared + at));
  warp_sync();
}
QK_KERNEL(32, 1) widths(const uint8_t* in, uint8_t* out) {
  const uint32_t base = shared_base();
  copy_as<uint8_t>(in, out, base);
  copy_as<uint16_t>(in + 512, out + 512, base + 512);
  copy_as<uint32_t>(in + 1024, out + 1024, base + 1024);
  copy_as<U32x2>(in + 1536, out + 1536, base + 1536);
  copy_as<U32x4>(in + 2048, out + 2048, base + 2048);
  st_global(out + 2560 + threadIdx.x * 1, ld_global_once(in + 2560 + threadIdx.x));
  const U32x4 wide = ld_global_once(reinterpret_cast<const U32x4*>(in + 3072) + threadIdx.x);
  st_global(reinterpret_cast<U32x4*>(out + 3072) + threadIdx.x, wide);
}
QK_EXPORT(widths)

// Every lane copies one piece of each width with its own number of valid bytes.
QK_KERNEL(32, 1) cp_async(const uint8_t* in, uint8_t* out, const int* valid) {
  const uint32_t base = shared_base();
  const int lane = threadIdx.x;
  cp_async16(base + lane * 16, in + lane * 16, valid[lane]);
  cp_async_commit();
  cp_async_small<8>(base + 512 + lane * 8, in + 512 + lane * 8, valid[32 + lane]);
  cp_async_commit();
  cp_async_small<4>(base + 768 + lane * 4, in + 768 + lane * 4, valid[64 + lane]);
  cp_async_commit();
  cp_async_wait<2>();
  warp_sync();
  dump_shared(out, base, 512);
  cp_async_wait<0>();
  warp_sync();
  dump_shared(out + 512, base + 512, 384);
}
QK_EXPORT(cp_async)

// ---- fragments -----------------------------------------------------------------------------------------------

QK_KERNEL(32, 1) ldmatrix(const uint8_t* in, uint32_t* out) {
  const uint32_t base = shared_base(), lane = lane_id();
  fill_shared(base, in, 512);
  warp_sync();
  uint32_t r[10];
  ldmatrix_x4(r[0], r[1], r[2], r[3], base + lane * 16);
  ldmatrix_x4_transposed(r[4], r[5], r[6], r[7], base + lane * 16);
  ldmatrix_x2(r[8], r[9], base + 128 + lane % 16 * 16);
  for (int i = 0; i < 10; i++) st_global(out + i * 32 + lane, r[i]);
}
QK_EXPORT(ldmatrix)

#if QK_EMULATED || __CUDA_ARCH__ >= 900
QK_KERNEL(32, 1) stmatrix(const uint32_t* in, uint8_t* out) {
  const uint32_t base = shared_base(), lane = lane_id();
  uint32_t r[4];
  for (int i = 0; i < 4; i++) r[i] = ld_global(in + i * 32 + lane);
  stmatrix_x4(base + lane * 16, r[0], r[1], r[2], r[3]);
  stmatrix_x4_transposed(base + 512 + lane * 16, r[0], r[1], r[2], r[3]);
  stmatrix_x2(base + 1024 + lane % 16 * 16, r[0], r[1]);
  warp_sync();
  dump_shared(out, base, 1280);
}
QK_EXPORT(stmatrix)
#endif

#ifdef TYPE
// Registers of lane l at [register][lane].
QK_KERNEL(32, 1) mma_once(const uint32_t* a, const uint32_t* b, TYPE::Accumulator* d) {
  const int lane = threadIdx.x;
  uint32_t fragment_a[4], fragment_b[2];
  TYPE::Accumulator sum[4];
  QK_UNROLL for (int i = 0; i < 4; i++) fragment_a[i] = ld_global(a + i * 32 + lane);
  QK_UNROLL for (int i = 0; i < 2; i++) fragment_b[i] = ld_global(b + i * 32 + lane);
  QK_UNROLL for (int i = 0; i < 4; i++) sum[i] = ld_global(d + i * 32 + lane);
  mma<TYPE>(sum, fragment_a, fragment_b);
  QK_UNROLL for (int i = 0; i < 4; i++) st_global(d + i * 32 + lane, sum[i]);
}
QK_EXPORT(mma_once)
#endif

#ifdef BLOCK_TYPE
QK_KERNEL(32, 1)
mma_blocks_once(const uint32_t* a, const uint32_t* b, const uint32_t* scales_a, const uint32_t* scales_b, float* d) {
  const int lane = threadIdx.x;
  uint32_t fragment_a[4], fragment_b[2];
  float sum[4];
  QK_UNROLL for (int i = 0; i < 4; i++) fragment_a[i] = ld_global(a + i * 32 + lane);
  QK_UNROLL for (int i = 0; i < 2; i++) fragment_b[i] = ld_global(b + i * 32 + lane);
  QK_UNROLL for (int i = 0; i < 4; i++) sum[i] = ld_global(d + i * 32 + lane);
  mma_blocks<BLOCK_TYPE, BYTE, THREAD_A, THREAD_B>(sum, fragment_a, fragment_b, ld_global(scales_a + lane),
                                                   ld_global(scales_b + lane));
  QK_UNROLL for (int i = 0; i < 4; i++) st_global(d + i * 32 + lane, sum[i]);
}
QK_EXPORT(mma_blocks_once)
#endif

#if QK_EMULATED || __CUDA_ARCH__ >= 900

// ---- bulk copies ---------------------------------------------------------------------------------------------

#ifdef RANK
#if RANK == 1
#define AT {c0}
#elif RANK == 2
#define AT {c0, c1}
#elif RANK == 3
#define AT {c0, c1, c2}
#elif RANK == 4
#define AT {c0, c1, c2, c3}
#else
#define AT {c0, c1, c2, c3, c4}
#endif
// The box's shared memory image.
QK_KERNEL(128, 1) tma_load_box(const QK_GRID_CONSTANT TensorMap map, uint8_t* out, int bytes, int c0, int c1, int c2,
                               int c3, int c4) {
  const uint32_t base = shared_base(), barrier = base + bytes;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&map);
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  block_sync();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, bytes);
    tma_load(base, &map, barrier, AT);
  }
  mbarrier_wait(barrier, 0);
  dump_shared(out, base, bytes);
}
QK_EXPORT(tma_load_box)

QK_KERNEL(128, 1) tma_store_box(const QK_GRID_CONSTANT TensorMap map, const uint8_t* in, int bytes, int add, int c0,
                                int c1, int c2, int c3, int c4) {
  const uint32_t base = shared_base();
  fill_shared(base, in, bytes);
  fence_proxy_async();
  block_sync();
  if (threadIdx.x == 0) {
    if (add) tma_reduce_add(&map, base, AT);
    else tma_store(&map, base, AT);
    store_commit();
    store_wait<0>();
  }
}
QK_EXPORT(tma_store_box)
#endif

QK_KERNEL(128, 1) bulk_copy(const uint8_t* in, uint8_t* out, int bytes) {
  const uint32_t base = shared_base(), barrier = base + bytes;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  block_sync();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, bytes);
    bulk_load(base, in, bytes, barrier);
    mbarrier_wait(barrier, 0);
    bulk_store(out, base, bytes);
    store_commit();
    store_wait_read<0>();
    store_wait<0>();
    mbarrier_invalidate(barrier);
  }
}
QK_EXPORT(bulk_copy)

// ---- barriers and clusters -----------------------------------------------------------------------------------

// Two halves of the block hand a counter back and forth; out[i] is what the second half saw in round i.
QK_KERNEL(64, 1) mbarrier_rounds(uint32_t* out, int rounds) {
  const uint32_t base = shared_base(), ready = base + 16, taken = base + 24;
  if (threadIdx.x == 0) {
    mbarrier_init(ready, 32);
    mbarrier_init(taken, 32);
    fence_mbarrier_init();
  }
  block_sync();
  for (int i = 0; i < rounds; i++) {
    if (threadIdx.x < 32) {
      if (i > 0) mbarrier_wait(taken, (i - 1) & 1);
      if (threadIdx.x == 0) st_shared<uint32_t>(base, i * i + 1);
      mbarrier_arrive(ready);
    } else {
      if (i % 2) mbarrier_wait(ready, i & 1);
      else while (!mbarrier_test(ready, i & 1)) {}
      const uint32_t seen = ld_shared<uint32_t>(base);
      if (threadIdx.x == 32) st_global(out + i, seen);
      mbarrier_arrive(taken);
    }
  }
}
QK_EXPORT(mbarrier_rounds)

// Each block sends its rank * 100 + lane to its right neighbour and reads from its left one what it had itself.
QK_CLUSTER_KERNEL(32, 1, CLUSTER) cluster_ring(uint32_t* out) {
  const uint32_t base = shared_base(), lane = threadIdx.x, rank = cluster_rank(), size = cluster_size();
  const uint32_t barrier = base + 512, right = (rank + 1) % size, left = (rank + size - 1) % size;
  st_shared<uint32_t>(base + lane * 4, 7 * rank + lane);
  if (lane == 0) {
    mbarrier_init(barrier, 32);
    fence_mbarrier_init();
  }
  cluster_arrive();
  cluster_wait();
  st_cluster(map_to_rank(base + 128 + lane * 4, right), rank * 100 + lane);
  mbarrier_arrive_remote(map_to_rank(barrier, right));
  mbarrier_wait(barrier, 0);
  st_global(out + (blockIdx.x * 2 + 0) * 32 + lane, ld_shared<uint32_t>(base + 128 + lane * 4));
  st_global(out + (blockIdx.x * 2 + 1) * 32 + lane, ld_cluster(map_to_rank(base + lane * 4, left)));
  cluster_arrive();
  cluster_wait();
}
QK_EXPORT(cluster_ring)

#if QK_EMULATED || QK_MULTICAST_INSTRUCTIONS
// Block r loads row block r of the map into every block of the cluster whose bit is set in `blocks`.
QK_CLUSTER_KERNEL(128, 1, CLUSTER) multicast(const QK_GRID_CONSTANT TensorMap map, uint8_t* out, int bytes,
                                                  int rows, int blocks) {
  const uint32_t base = shared_base(), rank = cluster_rank(), size = cluster_size(), barrier = base + bytes * size;
  const bool receives = blocks >> rank & 1;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    if (receives) mbarrier_arrive_expect(barrier, bytes * size);
  }
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0) tma_load_multicast(base + bytes * rank, &map, barrier, blocks, {0, int(rank) * rows});
  if (receives) {
    mbarrier_wait(barrier, 0);
    dump_shared(out + blockIdx.x * bytes * size, base, bytes * size);
  }
  cluster_arrive();
  cluster_wait();
}
QK_EXPORT(multicast)
#endif

// Named barriers: warps 1 to 3 add into a slot of warp 0's; nobody meets the whole block.
QK_KERNEL(128, 1) named_barriers(uint32_t* out, int rounds) {
  const uint32_t base = shared_base(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < rounds; i++) {
    if (warp > 0) {
      if (i > 0) barrier_sync(2, 128);
      st_shared<uint32_t>(base + warp * 128 + lane * 4, i * 1000 + warp * 100 + lane);
      barrier_arrive(1, 128);
    } else {
      barrier_sync(1, 128);
      uint32_t sum = 0;
      for (int w = 1; w < 4; w++) sum += ld_shared<uint32_t>(base + w * 128 + lane * 4);
      st_global(out + i * 32 + lane, sum);
      if (i + 1 < rounds) barrier_arrive(2, 128);
    }
  }
}
QK_EXPORT(named_barriers)

#endif  // sm_90

// ---- between blocks ------------------------------------------------------------------------------------------

// Blocks take turns by a flag; the last to arrive at a counter adds up what all have left. Needs all blocks resident.
QK_KERNEL(32, 1) turns(uint32_t* flag, uint32_t* counter, uint32_t* slots, uint32_t* out, float* sum, int32_t* isum) {
  const uint32_t block = blockIdx.x, blocks = gridDim.x, lane = threadIdx.x;
  if (lane == 0)
    while (ld_acquire(flag) != block) {}
  warp_sync();
  st_global(slots + block * 32 + lane, (block > 0 ? ld_global(slots + (block - 1) * 32 + lane) : 0) + block + lane);
  warp_sync();
  fence_gpu();
  if (lane == 0) st_release(flag, block + 1);
  red_add(sum, 0.5f);
  red_add(isum, -2);
  atomic_max(out + 1, block * 32 + lane);
  uint32_t last = 0;
  if (lane == 0) last = atomic_add_acq_rel(counter, 1) == blocks - 1;
  if (shuffle(last, 0)) {
    if (lane == 0) {
      atomic_cas(out + 2, 5, 9);
      st_global(out, atomic_add(counter, 10));
    }
    st_global(out + 32 + lane, ld_global(slots + (blocks - 1) * 32 + lane));
  }
}
QK_EXPORT(turns)

// ---- lanes and arithmetic ------------------------------------------------------------------------------------

QK_KERNEL(32, 1) lanes(const float* in, float* out, uint32_t* bits) {
  const int lane = threadIdx.x;
  const float x = ld_global(in + lane);
  st_global(out + lane, shuffle(x, 5));
  st_global(out + 32 + lane, shuffle(x, lane * 7));
  st_global(out + 64 + lane, shuffle_xor(x, 13));
  st_global(out + 96 + lane, shuffle_down(x, 3));
  const uint32_t votes = vote(x > 0);
  if (lane == 0) st_global(bits, votes);
}
QK_EXPORT(lanes)

QK_KERNEL(32, 1) integers(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int count) {
  for (int i = threadIdx.x; i < count; i += 32) {
    const uint32_t x = ld_global(a + i), y = ld_global(b + i), z = ld_global(c + i);
    st_global(out + i, lop3<(0xf0 & 0xcc) | 0xaa>(x, y, z));
    st_global(out + count + i, lop3<0x96>(x, y, z));
    st_global(out + 2 * count + i, prmt(x, y, z));
    st_global(out + 3 * count + i, static_cast<uint32_t>(dp4a(x, y, z)));
    st_global(out + 4 * count + i, twice<0>(x));
    st_global(out + 5 * count + i, twice<1>(x));
  }
}
QK_EXPORT(integers)

QK_KERNEL(32, 1) narrow(const float* low, const float* high, uint32_t* out, int count) {
  for (int i = threadIdx.x; i < count; i += 32) {
    const float x = ld_global(low + i), y = ld_global(high + i);
    st_global(out + i, pack_bf16(x, y));
    st_global(out + count + i, pack_f16(x, y));
    st_global<uint32_t>(out + 2 * count + i, pack_e4m3(x, y));
    st_global<uint32_t>(out + 3 * count + i, pack_e5m2(x, y));
    st_global<uint32_t>(out + 4 * count + i, pack_e2m1(x, y));
    st_global<uint32_t>(out + 5 * count + i, static_cast<uint8_t>(float_to_s8(x)));
  }
}
QK_EXPORT(narrow)

QK_KERNEL(32, 1) scales(const float* low, const float* high, uint32_t* out, int count) {
  for (int i = threadIdx.x; i < count; i += 32)
    st_global<uint32_t>(out + i, pack_e8m0_up(ld_global(low + i), ld_global(high + i)));
}
QK_EXPORT(scales)

QK_KERNEL(32, 1) widen(const uint32_t* in, float* out, int count) {
  for (int i = threadIdx.x; i < count; i += 32) {
    const uint32_t pair = ld_global(in + i);
    st_global(out + i, bf16_low(pair));
    st_global(out + count + i, bf16_high(pair));
    st_global(out + 2 * count + i, f16_low(pair));
    st_global(out + 3 * count + i, f16_high(pair));
    const uint32_t e4m3 = e4m3_to_f16(static_cast<uint16_t>(pair)), e5m2 = e5m2_to_f16(static_cast<uint16_t>(pair));
    st_global(out + 4 * count + i, f16_low(e4m3));
    st_global(out + 5 * count + i, f16_high(e4m3));
    st_global(out + 6 * count + i, f16_low(e5m2));
    st_global(out + 7 * count + i, f16_high(e5m2));
  }
}
QK_EXPORT(widen)

QK_KERNEL(32, 1) approximate(const float* in, float* out, int count) {
  for (int i = threadIdx.x; i < count; i += 32) {
    const float x = ld_global(in + i);
    st_global(out + i, reciprocal_approx(x));
    st_global(out + count + i, exp2_approx(x));
    st_global(out + 2 * count + i, tanh_approx(x));
    st_global(out + 3 * count + i, fused_multiply_add(x, x, -1.0f));
    st_global(out + 4 * count + i, x * x - 1.0f);
    st_global(out + 5 * count + i, square_root(x));
    st_global(out + 6 * count + i, max_magnitude(ld_global(in), x));
  }
}
QK_EXPORT(approximate)

#if QK_EMULATED || __CUDA_ARCH__ >= 900
QK_KERNEL(32, 1) elect(uint32_t* out) {
  if (elect_one()) atomic_add(out, 1);
}
QK_EXPORT(elect)
#endif

// ---- wgmma ---------------------------------------------------------------------------------------------------

#if defined(WGMMA_TYPE) && (QK_EMULATED || QK_WGMMA_INSTRUCTIONS)
#ifndef STEPS
#define STEPS 1
#endif
// Shared memory image in, D out at [register][thread]. A in registers comes at [register][thread], a step after the
// other. `a_step`, `b_step`: bytes from the operands of one step to those of the next.
QK_KERNEL(128, 1) wgmma_steps(const uint8_t* image, int image_bytes, const uint32_t* a_registers, uint64_t a,
                              uint64_t b, int a_step, int b_step, int accumulate, WGMMA_TYPE::Accumulator* d) {
  const uint32_t base = shared_base();
  const int tid = threadIdx.x;
  fill_shared(base, image, image_bytes);
  fence_proxy_async();
  block_sync();
  Registers<WGMMA_TYPE::Accumulator, N / 2> sum;
  QK_UNROLL for (int i = 0; i < N / 2; i++) sum[i] = ld_global(d + i * 128 + tid);
  const uint64_t start = base >> 4;  // descriptors come relative to the base
#if A_REGISTERS
  Registers<uint32_t, 4> fragment[STEPS];
  QK_UNROLL for (int s = 0; s < STEPS; s++)
    QK_UNROLL for (int i = 0; i < 4; i++) fragment[s][i] = ld_global(a_registers + (s * 4 + i) * 128 + tid);
#endif
  wgmma_fence();
  QK_UNROLL for (int s = 0; s < STEPS; s++) {
#if A_REGISTERS
    wgmma<WGMMA_TYPE, N>(sum, fragment[s], b + start + s * b_step / 16, accumulate || s > 0);
#else
    wgmma<WGMMA_TYPE, N>(sum, a + start + s * a_step / 16, b + start + s * b_step / 16, accumulate || s > 0);
#endif
  }
  wgmma_commit();
  wgmma_wait<0>();
  QK_UNROLL for (int i = 0; i < N / 2; i++) st_global(d + i * 128 + tid, sum[i]);
}
QK_EXPORT(wgmma_steps)
#endif

#if QK_EMULATED || QK_SETMAXNREG_INSTRUCTIONS
// Three warpgroups trade registers: 168 each at launch.
QK_KERNEL(384, 1) trade_registers(uint32_t* out) {
  if (threadIdx.x < 128) {
    decrease_registers<40>();
  } else {
    increase_registers<232>();
    atomic_add(out, 1);
  }
}
QK_EXPORT(trade_registers)
#endif
