// Shared memory: range, alignment, unfinished asynchronous accesses, races; plain loads and stores, and cp.async.
#include <algorithm>

#include "machine.h"

namespace qk {
namespace emulator {

SharedAddress resolve(uint32_t address, int bytes, int alignment) {
  Thread& t = self();
  Block* block = t.parent;
  const uint32_t rank = address >> RANK_SHIFT, offset = address & ((1u << RANK_SHIFT) - 1);
  if (rank) {
    if (rank > block->cluster->blocks.size())
      fail("out of range", "shared address 0x%x is of block %u of the cluster, which has %zu", address, rank - 1,
           block->cluster->blocks.size());
    block = block->cluster->blocks[rank - 1].get();
    if (block->ended)
      fail("out of range", "block %u of the cluster has ended, its shared memory is gone; "
           "let all blocks meet in cluster_wait before they end", rank - 1);
  }
  if (offset < SHARED_START || offset + uint64_t(bytes) > block->shared.size())
    fail("out of range", "%d bytes at shared offset %lld, but the launch has %zu bytes of shared memory", bytes,
         (long long)offset - SHARED_START, block->shared.size() - SHARED_START);
  if (offset % alignment)
    fail("misaligned", "shared offset %lld is not a multiple of %d", (long long)offset - SHARED_START, alignment);
  return {block, offset};
}

// ---- what is in flight ---------------------------------------------------------------------------------------

static std::string who(uint16_t thread) {
  if (thread == SEVERAL) return "several threads";
  return thread == ASYNC ? "an asynchronous operation" : "thread " + std::to_string(thread);
}

// Whether the current thread cannot know that an access of the past is over.
static bool unordered(uint16_t thread, uint64_t time) {
  const Thread& t = self();
  return thread == ASYNC ? time > t.async_known : thread != t.linear && time > t.acquired_at;
}

void check_read(Block& block, uint32_t offset, int bytes, bool async_proxy) {
  for (uint32_t c = offset / 16; c * 16 < offset + bytes; c++)
    if (block.chunks[c].writes)
      fail("unfinished copy", "reads shared offset %u, which an unfinished operation still writes: %s; wait for it",
           c * 16 - SHARED_START, describe(block.chunks[c].writer).c_str());
  for (uint32_t w = offset / 4; w * 4 < offset + bytes; w++) {
    const Word& word = block.words[w];
    if (word.barrier)
      fail("mbarrier", "reads shared offset %u, which is an mbarrier's", w * 4 - SHARED_START);
    if (async_proxy && word.writer < SEVERAL && word.written_at > block.threads[word.writer].fenced_at)
      fail("proxy", "reads shared offset %u through the async proxy, but thread %u wrote it and has not called "
           "fence_proxy_async since", w * 4 - SHARED_START, word.writer);
    if (bytes >= 4 && &block == self().parent && unordered(word.writer, word.written_at))
      fail("race", "reads shared offset %u, which %s wrote with no barrier between", w * 4 - SHARED_START,
           who(word.writer).c_str());
  }
}

void check_write(Block& block, uint32_t offset, int bytes, bool async_proxy) {
  for (uint32_t c = offset / 16; c * 16 < offset + bytes; c++) {
    const Chunk& chunk = block.chunks[c];
    if (chunk.reads)
      fail("overwrite", "writes shared offset %u, which an unfinished operation may still read: %s; wait for it",
           c * 16 - SHARED_START, describe(chunk.reader).c_str());
    if (chunk.writes)
      fail("overwrite", "writes shared offset %u, which an unfinished operation still writes: %s; wait for it",
           c * 16 - SHARED_START, describe(chunk.writer).c_str());
  }
  const bool own = &block == self().parent;
  for (uint32_t w = offset / 4; w * 4 < offset + bytes; w++) {
    const Word& word = block.words[w];
    if (word.barrier)
      fail("mbarrier", "writes shared offset %u, which is an mbarrier's; it was not invalidated",
           w * 4 - SHARED_START);
    if (!own || bytes < 4) continue;  // bytes beside another thread's in one word are no race
    if (unordered(word.reader, word.read_at))
      fail("race", "%s shared offset %u, which %s reads with no barrier between",
           async_proxy ? "copies to" : "writes", w * 4 - SHARED_START, who(word.reader).c_str());
    if (unordered(word.writer, word.written_at))
      fail("race", "%s shared offset %u, which %s wrote with no barrier between",
           async_proxy ? "copies to" : "writes", w * 4 - SHARED_START, who(word.writer).c_str());
  }
}

void acquire(uint64_t time, uint64_t async_known) {
  Thread& t = self();
  t.acquired_at = std::max(t.acquired_at, time);
  t.async_known = std::max(t.async_known, async_known);
}

void tell(uint64_t& async_known) { async_known = std::max(async_known, self().async_known); }

void note_read(Block& block, uint32_t offset, int bytes, int thread) {
  const uint64_t time = ++machine->time;
  for (uint32_t w = offset / 4; w * 4 < offset + bytes; w++) {
    block.words[w].read_at = time;
    block.words[w].reader = thread < 0 ? self().linear : thread;
  }
}

void note_write(Block& block, uint32_t offset, int bytes, int thread) {
  const uint64_t time = ++machine->time;
  for (uint32_t w = offset / 4; w * 4 < offset + bytes; w++) {
    block.words[w].written_at = time;
    // A cluster neighbour's write is kept under this block's thread of the same number.
    block.words[w].writer = thread < 0 ? self().linear : thread;
    block.words[w].added = false;
  }
}

void begin_write(Block& block, uint32_t offset, uint32_t bytes, uint32_t operation) {
  for (uint32_t c = offset / 16; c * 16 < offset + bytes; c++) {
    block.chunks[c].writes++;
    block.chunks[c].writer = operation;
  }
}

void end_write(Block& block, uint32_t offset, uint32_t bytes) {
  for (uint32_t c = offset / 16; c * 16 < offset + bytes; c++) block.chunks[c].writes--;
}

// ---- plain accesses ------------------------------------------------------------------------------------------

void load_shared(uint32_t address, void* value, int bytes, Place place) {
  enter("ld_shared", place);
  SharedAddress s = resolve(address, bytes, bytes);
  check_read(*s.block, s.offset, bytes, false);
  memcpy(value, &s.block->shared[s.offset], bytes);
  note_read(*s.block, s.offset, bytes);
}

void store_shared(uint32_t address, const void* value, int bytes, Place place) {
  enter("st_shared", place);
  SharedAddress s = resolve(address, bytes, bytes);
  check_write(*s.block, s.offset, bytes, false);
  memcpy(&s.block->shared[s.offset], value, bytes);
  note_write(*s.block, s.offset, bytes);
}

}  // namespace emulator

using namespace emulator;

void red_add_shared(uint32_t address, uint32_t value, Place place) {
  enter("red_add_shared", place);
  SharedAddress s = resolve(address, 4, 4);
  Word& word = s.block->words[s.offset / 4];
  // Additions are in no order among each other, so that of another thread is no race.
  const bool others = word.added && unordered(word.writer, word.written_at);
  // What this thread stored itself, and has told nobody of, stays a store.
  const bool stored = !word.added && word.writer == self().linear && word.written_at > self().acquired_at;
  if (others) word.writer = self().linear;
  check_write(*s.block, s.offset, 4, false);
  uint32_t sum;
  memcpy(&sum, &s.block->shared[s.offset], 4);
  sum += value;
  memcpy(&s.block->shared[s.offset], &sum, 4);
  note_write(*s.block, s.offset, 4);
  word.added = !stored;
  if (others) word.writer = SEVERAL;
}

namespace emulator {

// ---- cp.async ------------------------------------------------------------------------------------------------

static void copy_now(Block& block, const Copy& copy) {
  uint8_t* destination = &block.shared[copy.offset];
  if (copy.valid) memcpy(destination, copy.source, copy.valid);
  memset(destination + copy.valid, 0, copy.bytes - copy.valid);
}

void cp_async(uint32_t shared, const void* global, int bytes, int valid_bytes, Place place) {
  Thread& t = enter(bytes == 16 ? "cp_async16" : "cp_async_small", place);
  SharedAddress s = resolve(shared, bytes, bytes);
  if (valid_bytes < 0 || valid_bytes > bytes)
    fail("out of range", "%d valid bytes of %d", valid_bytes, bytes);
  check_global(global, valid_bytes, bytes, "reads");
  // Smaller copies may share a chunk with each other; whole chunks belong to one copy.
  if (bytes == 16) check_write(*s.block, s.offset, bytes, false);
  Copy copy{s.offset, static_cast<const char*>(global), bytes, valid_bytes, t.copy_groups,
            record(t.instruction, place)};
  begin_write(*s.block, s.offset, bytes, copy.operation);
  if (machine->lazy()) memset(&s.block->shared[s.offset], 0xee, bytes);
  else copy_now(*s.block, copy);
  t.copies.push_back(copy);
}

void finish_copies(Thread& t, int groups) {
  size_t kept = 0;
  for (Copy& copy : t.copies) {
    if (copy.group >= groups) {
      t.copies[kept++] = copy;
      continue;
    }
    if (machine->lazy()) copy_now(*t.parent, copy);
    end_write(*t.parent, copy.offset, copy.bytes);
    note_write(*t.parent, copy.offset, copy.bytes);
  }
  t.copies.resize(kept);
}

void cp_async_wait(int pending, Place place) {
  Thread& t = enter("cp_async_wait", place);
  finish_copies(t, t.copy_groups - pending);
}

}  // namespace emulator

using namespace emulator;

void cp_async16(uint32_t shared, const void* global, int valid_bytes, Place place) {
  cp_async(shared, global, 16, valid_bytes, place);
}

void cp_async_commit(Place place) { enter("cp_async_commit", place).copy_groups++; }

uint32_t shared_base() { return SHARED_START; }

void fence_proxy_async(Place place) { enter("fence_proxy_async", place).fenced_at = machine->time; }

// ---- clusters ------------------------------------------------------------------------------------------------

uint32_t map_to_rank(uint32_t address, uint32_t rank, Place place) {
  Thread& t = enter("map_to_rank", place);
  if (rank >= t.parent->cluster->blocks.size())
    fail("out of range", "rank %u in a cluster of %zu blocks", rank, t.parent->cluster->blocks.size());
  if (address >> RANK_SHIFT) fail("out of range", "0x%x is already a cluster address", address);
  return (rank + 1) << RANK_SHIFT | address;
}

uint32_t ld_cluster(uint32_t address, Place place) {
  enter("ld_cluster", place);
  SharedAddress s = resolve(address, 4, 4);
  check_read(*s.block, s.offset, 4, false);
  uint32_t value;
  memcpy(&value, &s.block->shared[s.offset], 4);
  if (s.block == self().parent) note_read(*s.block, s.offset, 4);
  return value;
}

void st_cluster(uint32_t address, uint32_t value, Place place) {
  enter("st_cluster", place);
  SharedAddress s = resolve(address, 4, 4);
  check_write(*s.block, s.offset, 4, false);
  memcpy(&s.block->shared[s.offset], &value, 4);
  note_write(*s.block, s.offset, 4);
}

uint32_t cluster_rank() { return self().parent->rank; }
uint32_t cluster_size() { return self().parent->cluster->blocks.size(); }
uint32_t lane_id() { return self().lane; }

}  // namespace qk
