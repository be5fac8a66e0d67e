// Kernels that each break one rule. None of them is ever run on a GPU.
#include "instructions.h"

using namespace qk;

#define FAULT(name, threads) QK_KERNEL(threads, 1) name
#define FIRST (threadIdx.x == 0)

FAULT(shared_past_the_end, 32)(uint8_t*) { st_shared<uint32_t>(shared_base() + 1024, 1); }
QK_EXPORT(shared_past_the_end)
FAULT(shared_misaligned, 32)(uint8_t*) { ld_shared<uint32_t>(shared_base() + 2); }
QK_EXPORT(shared_misaligned)
FAULT(global_past_the_end, 32)(uint8_t* data) { st_global(data + threadIdx.x * 16 + 15, uint8_t(1)); }
QK_EXPORT(global_past_the_end)
FAULT(global_misaligned, 32)(uint8_t* data) { ld_global(reinterpret_cast<uint32_t*>(data + 2)); }
QK_EXPORT(global_misaligned)
FAULT(plain_pointer_past_the_end, 32)(volatile uint8_t* data) {
  block_sync();
  if (FIRST) data[256] = 1;
}
QK_EXPORT(plain_pointer_past_the_end)
FAULT(null_pointer, 32)(volatile uint8_t* data) { *reinterpret_cast<volatile int*>(uintptr_t(8)) = 1; }
QK_EXPORT(null_pointer)
FAULT(too_deep, 32)(uint8_t* data) {
  volatile char big[60000];
  for (int i = 59999; i >= 0; i -= 100) big[i] = 1;
  volatile char more[30000];
  for (int i = 29999; i >= 0; i -= 100) more[i] = big[i];
}
QK_EXPORT(too_deep)

FAULT(copy_read_too_early, 32)(uint8_t* data) {
  cp_async16(shared_base(), data, 16);
  cp_async_commit();
  ld_shared<uint32_t>(shared_base());
}
QK_EXPORT(copy_read_too_early)
FAULT(copy_group_not_committed, 32)(uint8_t* data) {
  cp_async16(shared_base() + threadIdx.x * 16, data, 16);
  cp_async_wait<0>();
  ld_shared<uint32_t>(shared_base() + threadIdx.x * 16);
}
QK_EXPORT(copy_group_not_committed)
FAULT(copies_collide, 32)(uint8_t* data) { cp_async16(shared_base(), data, 16); }
QK_EXPORT(copies_collide)
FAULT(unordered_write_and_read, 64)(uint8_t* data) {
  st_shared(shared_base() + threadIdx.x * 4, threadIdx.x);
  ld_shared<uint32_t>(shared_base() + (threadIdx.x ^ 33) * 4);
}
QK_EXPORT(unordered_write_and_read)
FAULT(unordered_reads_and_write, 64)(uint8_t* data) {
  st_shared(shared_base() + threadIdx.x * 4, threadIdx.x);
  block_sync();
  ld_shared<uint32_t>(shared_base() + (threadIdx.x ^ 33) * 4);
  st_shared(shared_base() + threadIdx.x * 4, threadIdx.x);
}
QK_EXPORT(unordered_reads_and_write)

FAULT(barrier_of_odd_size, 64)(uint8_t*) { barrier_sync(1, 33); }
QK_EXPORT(barrier_of_odd_size)
FAULT(barrier_of_two_sizes, 64)(uint8_t*) { barrier_sync(1, threadIdx.x < 32 ? 64 : 32); }
QK_EXPORT(barrier_of_two_sizes)
FAULT(barrier_short_of_a_warp, 64)(uint8_t*) {
  if (threadIdx.x < 32) barrier_sync(1, 64);
}
QK_EXPORT(barrier_short_of_a_warp)
FAULT(half_a_warp, 32)(uint8_t*) {
  if (threadIdx.x < 16) warp_sync();
  else vote(true);
}
QK_EXPORT(half_a_warp)

FAULT(mbarrier_not_initialised, 32)(uint8_t*) { mbarrier_arrive(shared_base()); }
QK_EXPORT(mbarrier_not_initialised)
FAULT(mbarrier_arrives_too_often, 32)(uint8_t*) {
  if (FIRST) {
    mbarrier_init(shared_base(), 1);
    mbarrier_arrive_expect(shared_base(), 16);
    mbarrier_arrive(shared_base());
  }
}
QK_EXPORT(mbarrier_arrives_too_often)
FAULT(mbarrier_never_completes, 32)(uint8_t*) {
  if (FIRST) mbarrier_init(shared_base(), 33);
  block_sync();
  mbarrier_arrive(shared_base());
  mbarrier_wait(shared_base(), 0);
}
QK_EXPORT(mbarrier_never_completes)
FAULT(mbarrier_overwritten, 32)(uint8_t*) {
  if (FIRST) {
    mbarrier_init(shared_base(), 1);
    st_shared<uint32_t>(shared_base() + 4, 0);
  }
}
QK_EXPORT(mbarrier_overwritten)
FAULT(mbarrier_polled_for_ever, 32)(uint8_t*) {
  if (FIRST) mbarrier_init(shared_base(), 2);
  block_sync();
  while (!mbarrier_test(shared_base(), 0)) {}
}
QK_EXPORT(mbarrier_polled_for_ever)
FAULT(flag_never_set, 32)(uint8_t* data) {
  while (ld_acquire(reinterpret_cast<uint32_t*>(data)) != 99) {}
}
QK_EXPORT(flag_never_set)
FAULT(busy_for_ever, 32)(uint8_t* data) {
  for (uint32_t i = 0; i != 1; i += 2) block_sync();
}
QK_EXPORT(busy_for_ever)

FAULT(bulk_read_too_early, 32)(uint8_t* data) {
  const uint32_t barrier = shared_base() + 256;
  if (FIRST) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(barrier, 256);
    bulk_load(shared_base(), data, 256, barrier);
  }
  block_sync();
  ld_shared<uint32_t>(shared_base());
  mbarrier_wait(barrier, 0);
}
QK_EXPORT(bulk_read_too_early)
FAULT(mbarrier_not_published, 32)(uint8_t* data) {
  const uint32_t barrier = shared_base() + 256;
  if (FIRST) {
    mbarrier_init(barrier, 1);
    mbarrier_arrive_expect(barrier, 256);
    bulk_load(shared_base(), data, 256, barrier);
  }
}
QK_EXPORT(mbarrier_not_published)
FAULT(store_without_proxy_fence, 32)(uint8_t* data) {
  st_shared<uint32_t>(shared_base() + threadIdx.x * 4, 1);
  block_sync();
  if (FIRST) {
    bulk_store(data, shared_base(), 128);
    store_commit();
    store_wait<0>();
  }
}
QK_EXPORT(store_without_proxy_fence)
FAULT(stored_memory_rewritten, 32)(uint8_t* data) {
  if (FIRST) {
    bulk_store(data, shared_base(), 128);
    store_commit();
    st_shared<uint32_t>(shared_base(), 1);
  }
}
QK_EXPORT(stored_memory_rewritten)
FAULT(block_ends_before_its_copy, 32)(uint8_t* data) {
  block_sync();
  const uint32_t barrier = shared_base() + 256;
  if (FIRST) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(barrier, 256);
    bulk_load(shared_base(), data, 256, barrier);
  }
}
QK_EXPORT(block_ends_before_its_copy)
FAULT(block_ends_before_its_store, 32)(uint8_t* data) {
  if (FIRST) bulk_store(data, shared_base(), 128);
}
QK_EXPORT(block_ends_before_its_store)

FAULT(map_box_off_sixteen_bytes, 32)(const QK_GRID_CONSTANT TensorMap map) {
  const uint32_t barrier = shared_base() + 512;
  if (FIRST) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(barrier, 512);
    tma_load(shared_base(), &map, barrier, {1, 0});
  }
}
QK_EXPORT(map_box_off_sixteen_bytes)
FAULT(map_stored_before_its_start, 32)(const QK_GRID_CONSTANT TensorMap map) {
  if (FIRST) tma_store(&map, shared_base(), {0, -1});
}
QK_EXPORT(map_stored_before_its_start)
FAULT(map_of_other_rank, 32)(const QK_GRID_CONSTANT TensorMap map) {
  if (FIRST) tma_store(&map, shared_base(), {0, 0, 0});
}
QK_EXPORT(map_of_other_rank)
FAULT(map_destination_misaligned, 32)(const QK_GRID_CONSTANT TensorMap map) {
  if (FIRST) tma_store(&map, shared_base() + 64, {0, 0});
}
QK_EXPORT(map_destination_misaligned)

// Four 64 x 32-byte operands fit into 8192 bytes; B is A.
QK_FUNCTION uint64_t operand() { return matrix_descriptor(shared_base(), 0, 256, Swizzle::BYTES_32); }

FAULT(wgmma_result_read_too_early, 128)(float* out) {
  Registers<float, 4> d;
  wgmma_fence();
  wgmma<E4M3, 8>(d, operand(), operand(), false);
  wgmma_commit();
  st_global(out, d[0]);
  wgmma_wait<0>();
}
QK_EXPORT(wgmma_result_read_too_early)
FAULT(wgmma_without_fence, 128)(float* out) {
  Registers<float, 4> d;
  wgmma_fence();
  d[0] = 1;
  wgmma<E4M3, 8>(d, operand(), operand(), true);
}
QK_EXPORT(wgmma_without_fence)
FAULT(wgmma_never_waited_for, 128)(float* out) {
  Registers<float, 4> d;
  wgmma_fence();
  wgmma<E4M3, 8>(d, operand(), operand(), false);
  wgmma_commit();
}
QK_EXPORT(wgmma_never_waited_for)
FAULT(wgmma_fragment_changed, 128)(float* out) {
  Registers<float, 4> d;
  Registers<uint32_t, 4> a;
  wgmma_fence();
  wgmma<E4M3, 8>(d, a, operand(), false);
  wgmma_commit();
  a[0] = 1;
}
QK_EXPORT(wgmma_fragment_changed)
FAULT(wgmma_operand_rewritten, 128)(float* out) {
  Registers<float, 4> d;
  wgmma_fence();
  wgmma<E4M3, 8>(d, operand(), operand(), false);
  wgmma_commit();
  block_sync();
  if (FIRST) st_shared<uint32_t>(shared_base() + 64, 1);
  wgmma_wait<0>();
}
QK_EXPORT(wgmma_operand_rewritten)
FAULT(wgmma_operand_not_fenced, 128)(float* out) {
  Registers<float, 4> d;
  st_shared<uint32_t>(shared_base() + threadIdx.x * 4, 0);
  block_sync();
  wgmma_fence();
  wgmma<E4M3, 8>(d, operand(), operand(), false);
}
QK_EXPORT(wgmma_operand_not_fenced)
FAULT(wgmma_operand_past_the_end, 128)(float* out) {
  Registers<float, 4> d;
  wgmma_fence();
  wgmma<E4M3, 8>(d, operand() + 128, operand(), false);
}
QK_EXPORT(wgmma_operand_past_the_end)
FAULT(wgmma_of_three_warps, 128)(float* out) {
  Registers<float, 4> d;
  if (threadIdx.x < 96) {
    wgmma_fence();
    wgmma<E4M3, 8>(d, operand(), operand(), false);
    wgmma_commit();
    wgmma_wait<0>();
  }
}
QK_EXPORT(wgmma_of_three_warps)
FAULT(wgmma_operands_disagree, 128)(float* out) {
  Registers<float, 4> d;
  wgmma_fence();
  wgmma<E4M3, 8>(d, operand(), operand() + threadIdx.x / 96 * 16, false);
  wgmma_commit();
  wgmma_wait<0>();
}
QK_EXPORT(wgmma_operands_disagree)
FAULT(register_index_past_the_end, 128)(float* out) {
  Registers<float, 4> d;
  wgmma_fence();
  for (int i = 0; i <= 4; i++) d[i] = 0;
}
QK_EXPORT(register_index_past_the_end)

FAULT(registers_from_nowhere, 384)(uint8_t*) { increase_registers<232>(); }
QK_EXPORT(registers_from_nowhere)
FAULT(registers_the_wrong_way, 384)(uint8_t*) { decrease_registers<232>(); }
QK_EXPORT(registers_the_wrong_way)

FAULT(neighbour_has_ended, 32)(uint8_t*) {
  cluster_arrive();
  cluster_wait();
  if (cluster_rank() == 0) {
    st_cluster(map_to_rank(shared_base(), 1), 1);
  }
}
QK_EXPORT(neighbour_has_ended)
FAULT(cluster_waits_unasked, 32)(uint8_t*) { cluster_wait(); }
QK_EXPORT(cluster_waits_unasked)
