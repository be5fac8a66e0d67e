// Global memory: range and alignment, stores that are not yet released, and atomics between blocks.
#include "machine.h"

namespace qk {
namespace emulator {

void check_global(const void* pointer, size_t bytes, int alignment, const char* what) {
  const char* p = static_cast<const char*>(pointer);
  static size_t last = 0;
  auto& buffers = machine->buffers;
  auto inside = [&](const Buffer& b) { return p >= b.start && p + bytes <= b.start + b.bytes; };
  if (last >= buffers.size() || !inside(buffers[last])) {
    size_t i = 0;
    while (i < buffers.size() && !inside(buffers[i])) i++;
    if (i == buffers.size()) {
      for (size_t k = 0; k < buffers.size(); k++)
        if (p >= buffers[k].start - 4096 && p < buffers[k].start + buffers[k].bytes + 4096)
          fail("out of range", "%s %zu bytes at byte %td of buffer %zu, which has %zu bytes", what, bytes,
               p - buffers[k].start, k, buffers[k].bytes);
      fail("out of range", "%s %zu bytes at %p, which is in no buffer of this launch", what, bytes, pointer);
    }
    last = i;
  }
  if (reinterpret_cast<uintptr_t>(p) % alignment)
    fail("misaligned", "%s %zu bytes at byte %td of buffer %zu: not a multiple of %d", what, bytes,
         p - buffers[last].start, last, alignment);
}

// ---- stores that other blocks do not see yet -----------------------------------------------------------------
// In lazy modes a block's plain stores to global memory stay with the block until one of its threads releases
// (fence_gpu, st_release, atomic_add_acq_rel, cluster_arrive) or the launch ends. Its own threads see them at once.

namespace {

void keep_store(Block& block, void* pointer, const void* value, int bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer), start = address % 16;
  StoredLine& line = block.stored[address / 16];
  memcpy(line.bytes + start, value, bytes);
  line.valid |= ((1u << bytes) - 1) << start;
}

void overlay_stores(const Block& block, const void* pointer, void* value, int bytes) {
  if (block.stored.empty()) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer), start = address % 16;
  auto line = block.stored.find(address / 16);
  if (line == block.stored.end()) return;
  for (int i = 0; i < bytes; i++)
    if (line->second.valid >> (start + i) & 1) static_cast<char*>(value)[i] = line->second.bytes[start + i];
}

}  // namespace

void write_stores(const StoredLines& stored) {
  for (auto& [number, line] : stored)
    for (int i = 0; i < 16; i++)
      if (line.valid >> i & 1) reinterpret_cast<char*>(number * 16)[i] = line.bytes[i];
}

void release_stores(Block& block) {
  if (block.stored.empty()) return;
  write_stores(block.stored);
  block.stored.clear();
  machine->idle_polls = 0;
}

// ---- plain accesses ------------------------------------------------------------------------------------------

void load_global(const void* pointer, void* value, int bytes, Place place) {
  enter("ld_global", place);
  check_global(pointer, bytes, bytes, "reads");
  memcpy(value, pointer, bytes);
  if (machine->lazy()) overlay_stores(*self().parent, pointer, value, bytes);
}

void store_global(void* pointer, const void* value, int bytes, Place place) {
  enter("st_global", place);
  check_global(pointer, bytes, bytes, "writes");
  if (machine->lazy()) return keep_store(*self().parent, pointer, value, bytes);
  memcpy(pointer, value, bytes);
  machine->idle_polls = 0;
}

}  // namespace emulator

using namespace emulator;

// ---- between blocks ------------------------------------------------------------------------------------------

namespace {

uint32_t* word(const char* instruction, const void* pointer, Place place, bool polls = false) {
  enter(instruction, place, polls);
  check_global(pointer, 4, 4, "accesses");
  // Atomics act on memory itself: the block's own earlier stores to this line come first.
  if (self().parent->stored.count(reinterpret_cast<uintptr_t>(pointer) / 16)) release_stores(*self().parent);
  return static_cast<uint32_t*>(const_cast<void*>(pointer));
}

}  // namespace

uint32_t ld_acquire(const uint32_t* pointer, Place place) {
  const uint32_t value = *word("ld_acquire", pointer, place, true);
  acquire(machine->time, machine->time);
  poll();
  return value;
}

void st_release(uint32_t* pointer, uint32_t value, Place place) {
  uint32_t* p = word("st_release", pointer, place);
  release_stores(*self().parent);
  *p = value;
  machine->idle_polls = 0;
}

uint32_t atomic_add(uint32_t* pointer, uint32_t value, Place place) {
  uint32_t* p = word("atomic_add", pointer, place);
  const uint32_t old = *p;
  *p = old + value;
  machine->idle_polls = 0;
  return old;
}

uint32_t atomic_add_acq_rel(uint32_t* pointer, uint32_t value, Place place) {
  release_stores(*self().parent);
  acquire(machine->time, machine->time);
  return atomic_add(pointer, value, place);
}

uint32_t atomic_cas(uint32_t* pointer, uint32_t expected, uint32_t value, Place place) {
  uint32_t* p = word("atomic_cas", pointer, place, true);
  const uint32_t old = *p;
  if (old == expected) {
    *p = value;
    machine->idle_polls = 0;
  } else {
    poll();  // most often a lock that is taken
  }
  return old;
}

uint32_t atomic_max(uint32_t* pointer, uint32_t value, Place place) {
  uint32_t* p = word("atomic_max", pointer, place);
  const uint32_t old = *p;
  if (value > old) *p = value;
  return old;
}

void red_add(float* pointer, float value, Place place) {
  word("red_add", pointer, place);
  *pointer += value;
  machine->idle_polls = 0;
}

void red_add(int32_t* pointer, int32_t value, Place place) {
  *word("red_add", pointer, place) += static_cast<uint32_t>(value);
  machine->idle_polls = 0;
}

void fence_gpu(Place place) {
  enter("fence_gpu", place);
  release_stores(*self().parent);
}

}  // namespace qk
