// The life of a launch: clusters start when multiprocessors are free, threads run the kernel, and faults are caught.
#include <signal.h>

#include <algorithm>

#include "machine.h"

namespace qk {
namespace emulator {

namespace {

void fiber_main() {
  machine->kernel(machine->arguments);
  Thread& t = self();
  t.instruction = "the end of the kernel";
  finish_copies(t, t.copy_groups + 1);
  if (!t.stores.empty()) {
    for (Store& store : t.stores)
      if (!store.has_read && machine->lazy())
        fail("unfinished store", "the thread ends while a store may still read shared memory; call store_wait_read<0>");
    finish_stores(t, t.store_groups + 1, false);
  }
  check_wgmma_end(t);
  t.done = true;
  t.parent->live--;
  t.parent->cluster->live--;
  machine->idle_polls = 0;
  thread_left(t);
  if (t.parent->live == 0) {
    // Nothing orders a block's end before other blocks' reads: what it did not release may appear last of all.
    machine->late_stores.push_back(std::move(t.parent->stored));
    if (t.parent->incoming)
      for (Arrival& arrival : machine->arrivals)
        if (arrival.block == t.parent)
          fail("unfinished copy", "the block ends while a copy is still to arrive in its shared memory: %s",
               describe(arrival.operation).c_str());
    t.parent->ended = true;
    if (--t.parent->cluster->running == 0) machine->running_clusters--;
  }
  void* abandoned;
  // The launcher runs again only when it has something to do: it must not be the one to find a deadlock.
  const bool cluster_ended = t.parent->cluster->running == 0;
  if (machine->running_clusters == 0 || (cluster_ended && machine->waiting_clusters > 0)) {
    qk_switch(&abandoned, machine->main_stack_pointer);
  } else {
    Thread* next = pick();
    current = next;
    qk_switch(&abandoned, next->stack_pointer);
  }
  abort();
}

void start_cluster(uint64_t first_block) {
  Machine& m = *machine;
  auto cluster = std::make_unique<Cluster>();
  const int threads = m.block_dim.x * m.block_dim.y * m.block_dim.z;
  for (int rank = 0; rank < m.cluster_blocks; rank++) {
    auto block = std::make_unique<Block>();
    const uint64_t i = first_block + rank;
    block->index = {unsigned(i % m.grid.x), unsigned(i / m.grid.x % m.grid.y), unsigned(i / m.grid.x / m.grid.y)};
    block->rank = rank;
    block->cluster = cluster.get();
    block->live = threads;
    const uint32_t end = SHARED_START + m.shared_bytes;
    block->shared.assign(end, 0xcd);
    block->chunks.resize(end / 16 + 1);
    block->words.resize(end / 4 + 1);
    block->warps.resize(threads / 32);
    block->warpgroups = std::vector<Warpgroup>((threads + 127) / 128);
    block->launch_registers = std::min(REGISTER_FILE / threads / 8 * 8, 248);
    for (Warpgroup& group : block->warpgroups) group.registers = block->launch_registers;
    block->threads = std::vector<Thread>(threads);
    for (int k = 0; k < threads; k++) {
      Thread& t = block->threads[k];
      t.linear = k;
      t.lane = k % 32;
      t.parent = block.get();
      t.thread = {k % m.block_dim.x, k / m.block_dim.x % m.block_dim.y, k / m.block_dim.x / m.block_dim.y};
      t.block = block->index;
      t.block_dim = m.block_dim;
      t.grid_dim = m.grid;
      t.stack = take_stack();
      t.stack_pointer = prepare_stack(t.stack + STACK_BYTES, fiber_main);
      make_ready(&t);
    }
    cluster->blocks.push_back(std::move(block));
  }
  cluster->running = m.cluster_blocks;
  cluster->live = threads * m.cluster_blocks;
  m.clusters.push_back(std::move(cluster));
}

void release_stacks(Cluster& cluster) {
  for (auto& block : cluster.blocks)
    for (Thread& t : block->threads) return_stack(t.stack);
}

// A fault inside the kernel: most often a plain pointer that left its buffer and met the guard page.
void on_fault(int signal, siginfo_t* info, void*) {
  const char* address = static_cast<const char*>(info->si_addr);
  if (!current || !machine) {
    ::signal(signal, SIG_DFL);
    return;
  }
  Thread& t = self();
  if (address >= t.stack - PAGE && address < t.stack)
    fail("stack overflow", "a thread's %zu bytes of local memory are used up", STACK_BYTES);
  for (size_t i = 0; i < machine->buffers.size(); i++) {
    const Buffer& b = machine->buffers[i];
    if (address >= b.start - (1 << 20) && address < b.start + b.bytes + (1 << 20))
      fail("out of range", "after it, a plain access at byte %td of buffer %zu, which has %zu bytes",
           address - b.start, i, b.bytes);
  }
  fail("out of range", "after it, a plain access to %p, which is no buffer of this launch",
       static_cast<const void*>(address));
}

}  // namespace

void run() {
  Machine& m = *machine;
  const uint64_t clusters = uint64_t(m.grid.x) * m.grid.y * m.grid.z / m.cluster_blocks;
  std::vector<uint64_t> order(clusters);
  for (uint64_t i = 0; i < clusters; i++) order[i] = i * m.cluster_blocks;
  if (m.shuffled())
    for (uint64_t i = clusters; i > 1; i--) std::swap(order[i - 1], order[m.next_random() % i]);

  static char signal_stack[64 << 10];
  stack_t alternate{signal_stack, 0, sizeof signal_stack}, previous_stack;
  sigaltstack(&alternate, &previous_stack);
  struct sigaction action {}, previous_segv, previous_bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler never returns when it reports
  sigaction(SIGSEGV, &action, &previous_segv);
  sigaction(SIGBUS, &action, &previous_bus);

  m.waiting_clusters = clusters;
  while (!m.failed) {
    for (size_t i = 0; i < m.clusters.size();)
      if (m.clusters[i]->running == 0) {
        release_stacks(*m.clusters[i]);
        m.clusters.erase(m.clusters.begin() + i);
      } else {
        i++;
      }
    while (m.waiting_clusters > 0 && m.running_clusters < m.resident_clusters) {
      try {
        start_cluster(order[clusters - m.waiting_clusters--]);
      } catch (const LaunchFailed&) {
        break;
      }
      m.running_clusters++;
    }
    if (m.failed) break;
    if (m.running_clusters == 0) break;
    Thread* thread = m.ready[m.ready_head++];
    current = thread;
    qk_switch(&m.main_stack_pointer, thread->stack_pointer);
    current = nullptr;
  }
  for (auto& cluster : m.clusters) release_stacks(*cluster);
  for (auto& stored : m.late_stores) write_stores(stored);

  sigaction(SIGSEGV, &previous_segv, nullptr);
  sigaction(SIGBUS, &previous_bus, nullptr);
  sigaltstack(&previous_stack, nullptr);
  current = nullptr;
}

}  // namespace emulator
}  // namespace qk
