// Barriers: of the block (named and not), of the cluster, and mbarriers with their transaction counts; setmaxnreg.
#include "machine.h"

namespace qk {
namespace emulator {

namespace {

void complete(Meeting& meeting) {
  meeting.arrived = 0;
  meeting.generation++;
  meeting.completed_at = machine->time;
  wake(meeting.waiting);
}

// `threads` of 0 means all that have not ended.
void meet(int id, int threads, bool wait) {
  Thread& t = self();
  if (id < 0 || id > 15) fail("barrier", "barrier %d; there are barriers 0 to 15", id);
  if (threads % 32 || threads < 0 || threads > int(t.parent->threads.size()))
    fail("barrier", "%d threads in a block of %zu; a barrier counts a multiple of 32", threads,
         t.parent->threads.size());
  Meeting& meeting = t.parent->barriers[id];
  if (meeting.arrived && meeting.expected != threads)
    fail("barrier", "barrier %d is in use for %d threads (%s at %s), not for %d", id, meeting.expected,
         meeting.instruction, describe(meeting.place).c_str(), threads);
  meeting.expected = threads;
  meeting.instruction = t.instruction;
  meeting.place = t.place;
  meeting.arrived++;
  tell(meeting.async_known);
  if (meeting.arrived >= (threads ? threads : t.parent->live)) {
    complete(meeting);
  } else if (wait) {
    const uint64_t generation = meeting.generation;
    while (meeting.generation == generation) sleep_on(meeting.waiting, t.instruction);
  }
  if (wait) acquire(meeting.completed_at, meeting.async_known);
}

void complete_cluster(Cluster& cluster) {
  cluster.arrived = 0;
  cluster.phase++;
  cluster.completed_at = machine->time;
  wake(cluster.waiting);
}

}  // namespace

void thread_left(Thread& thread) {
  Meeting& block = thread.parent->barriers[0];
  if (block.arrived && !block.expected && block.arrived >= thread.parent->live) complete(block);
  Cluster& cluster = *thread.parent->cluster;
  if (thread.cluster_arrived && thread.cluster_phase == cluster.phase) cluster.arrived--;  // counted as left now
  if (cluster.arrived && cluster.arrived >= cluster.live) complete_cluster(cluster);
}

// ---- mbarriers -----------------------------------------------------------------------------------------------

Mbarrier& mbarrier_at(Block& block, uint32_t offset) {
  auto found = block.mbarriers.find(offset);
  if (found == block.mbarriers.end())
    fail("mbarrier", "shared offset %u holds no initialised mbarrier", offset - SHARED_START);
  const Mbarrier& barrier = found->second;
  const Thread& t = self();
  const bool own = &block == t.parent;
  if (!machine->landing && (own ? barrier.initialiser != t.linear && barrier.initialised_at > t.acquired_at
                                : barrier.initialised_at > t.cluster_met_at))
    fail("race", "uses the mbarrier at shared offset %u, which thread %d%s initialised with no barrier between",
         offset - SHARED_START, barrier.initialiser, own ? "" : " of another block");
  return found->second;
}

namespace {

constexpr int64_t MOST_BYTES = (1 << 20) - 1;

void complete_if_due(Mbarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.count;
    barrier.phase++;
    barrier.completed_at = machine->time;
    wake(barrier.waiting);
  }
}

void arrive(Block& block, uint32_t offset, int64_t bytes) {
  Mbarrier& barrier = mbarrier_at(block, offset);
  tell(barrier.async_known);
  barrier.bytes += bytes;
  if (barrier.bytes > MOST_BYTES)
    fail("mbarrier", "expects %lld bytes; the limit is 2^20 - 1", (long long)barrier.bytes);
  if (barrier.pending == 0)
    fail("mbarrier", "one arrival more than the %d it was initialised for (%lld bytes of this phase are missing)",
         barrier.count, (long long)barrier.bytes);
  barrier.pending--;
  complete_if_due(barrier);
}

}  // namespace

void complete_bytes(Block& block, uint32_t offset, int64_t bytes) {
  Mbarrier& barrier = mbarrier_at(block, offset);
  barrier.bytes -= bytes;
  barrier.async_known = machine->time;
  if (barrier.bytes < -MOST_BYTES)
    fail("mbarrier", "%lld bytes arrived that nobody expects", (long long)-barrier.bytes);
  complete_if_due(barrier);
}

// ---- setmaxnreg ----------------------------------------------------------------------------------------------

void set_registers(int count, bool increase, Place place) {
  Thread& t = enter(increase ? "increase_registers" : "decrease_registers", place);
  Block& block = *t.parent;
  Warpgroup& group = block.warpgroups[t.linear / 128];
  // The change happens when the warpgroup's first thread comes; the others find it done.
  if (group.setting++ == 0) {
    if (increase && count < group.registers)
      fail("registers", "%d registers a thread are fewer than the %d it has", count, group.registers);
    if (!increase && count > group.registers)
      fail("registers", "%d registers a thread are more than the %d it has", count, group.registers);
    if (!increase) {
      block.free_registers += (group.registers - count) * 128;
      group.registers = count;
      wake(block.waiting_registers);
    }
  }
  if (group.setting == 128) group.setting = 0;
  if (!increase) return;
  while (group.registers < count) {
    const int more = (count - group.registers) * 128;
    if (block.free_registers >= more) {
      block.free_registers -= more;
      group.registers = count;
      wake(block.waiting_registers);
    } else {
      sleep_on(block.waiting_registers, "increase_registers (the pool lacks registers)");
    }
  }
}

}  // namespace emulator

using namespace emulator;

void block_sync(Place place) {
  enter("block_sync", place);
  meet(0, 0, true);
}

void barrier_sync(int id, int threads, Place place) {
  enter("barrier_sync", place);
  if (threads <= 0) fail("barrier", "%d threads", threads);
  meet(id, threads, true);
}

void barrier_arrive(int id, int threads, Place place) {
  enter("barrier_arrive", place);
  if (threads <= 0) fail("barrier", "%d threads", threads);
  meet(id, threads, false);
}

void cluster_arrive(Place place) {
  Thread& t = enter("cluster_arrive", place);
  Cluster& cluster = *t.parent->cluster;
  if (t.cluster_arrived) fail("barrier", "a second arrival without cluster_wait between");
  t.cluster_arrived = true;
  t.cluster_phase = cluster.phase;
  tell(cluster.async_known);
  release_stores(*t.parent);
  if (++cluster.arrived >= cluster.live) complete_cluster(cluster);
}

void cluster_wait(Place place) {
  Thread& t = enter("cluster_wait", place);
  Cluster& cluster = *t.parent->cluster;
  if (!t.cluster_arrived) fail("barrier", "waits without having called cluster_arrive");
  while (cluster.phase == t.cluster_phase) sleep_on(cluster.waiting, "cluster_wait");
  t.cluster_arrived = false;
  acquire(cluster.completed_at, cluster.async_known);
  t.cluster_met_at = cluster.completed_at;
}

void mbarrier_init(uint32_t address, int count, Place place) {
  enter("mbarrier_init", place);
  SharedAddress s = resolve(address, 8, 8);
  if (count < 1 || count >= 1 << 20) fail("mbarrier", "a count of %d; 1 to 2^20 - 1 are possible", count);
  if (s.block != self().parent) fail("mbarrier", "a block initialises its own mbarriers only");
  check_write(*s.block, s.offset, 8, false);
  Mbarrier barrier;
  barrier.initialiser = self().linear;
  barrier.initialised_at = ++machine->time;
  barrier.count = barrier.pending = count;
  s.block->mbarriers[s.offset] = barrier;
  s.block->words[s.offset / 4].barrier = s.block->words[s.offset / 4 + 1].barrier = true;
}

void mbarrier_invalidate(uint32_t address, Place place) {
  enter("mbarrier_invalidate", place);
  SharedAddress s = resolve(address, 8, 8);
  if (!mbarrier_at(*s.block, s.offset).waiting.empty()) fail("mbarrier", "threads are waiting on it");
  s.block->mbarriers.erase(s.offset);
  s.block->words[s.offset / 4].barrier = s.block->words[s.offset / 4 + 1].barrier = false;
}

void fence_mbarrier_init(Place place) {
  Thread& t = enter("fence_mbarrier_init", place);
  for (auto& [offset, barrier] : t.parent->mbarriers)
    if (barrier.initialiser == t.linear) barrier.published = true;
}

void mbarrier_arrive(uint32_t address, Place place) {
  enter("mbarrier_arrive", place);
  SharedAddress s = resolve(address, 8, 8);
  arrive(*s.block, s.offset, 0);
}

void mbarrier_arrive_expect(uint32_t address, int bytes, Place place) {
  enter("mbarrier_arrive_expect", place);
  SharedAddress s = resolve(address, 8, 8);
  if (bytes < 0) fail("mbarrier", "%d bytes", bytes);
  arrive(*s.block, s.offset, bytes);
}

void mbarrier_arrive_remote(uint32_t address, Place place) {
  enter("mbarrier_arrive_remote", place);
  SharedAddress s = resolve(address, 8, 8);
  if (!mbarrier_at(*s.block, s.offset).published)
    fail("mbarrier", "the mbarrier was initialised and no fence_mbarrier_init followed");
  arrive(*s.block, s.offset, 0);
}

bool mbarrier_test(uint32_t address, uint32_t parity, Place place) {
  enter("mbarrier_test", place, true);
  SharedAddress s = resolve(address, 8, 8);
  const bool done = (mbarrier_at(*s.block, s.offset).phase & 1) != parity;
  const Mbarrier& barrier = mbarrier_at(*s.block, s.offset);
  if (done) acquire(barrier.completed_at, barrier.async_known);
  else poll();
  return done;
}

void mbarrier_wait(uint32_t address, uint32_t parity, Place place) {
  Thread& t = enter("mbarrier_wait", place);
  if (parity > 1) fail("mbarrier", "parity %u; it is 0 or 1", parity);
  SharedAddress s = resolve(address, 8, 8);
  if (s.block != t.parent) fail("mbarrier", "a thread can wait only on its own block's mbarriers");
  while ((mbarrier_at(*s.block, s.offset).phase & 1) == parity) {
    t.waits_on = s.offset;
    sleep_on(mbarrier_at(*s.block, s.offset).waiting, "mbarrier_wait");
    t.waits_on = 0;
  }
  const Mbarrier& barrier = mbarrier_at(*s.block, s.offset);
  acquire(barrier.completed_at, barrier.async_known);
}

}  // namespace qk
