// wgmma: descriptors, the registers it owns until it is waited for, and its asynchrony.
#include "machine.h"

namespace qk {
namespace emulator {

namespace {

// Call chunk(row, half, shared offset) for the 16-byte pieces of the `rows` x 32 bytes that a descriptor names.
template <class F>
void for_each_chunk(uint64_t descriptor, int rows, F chunk) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4, base = descriptor >> 49 & 7, mode = descriptor >> 62;
  const uint32_t pitch = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;
  const uint32_t mask = mode == 1 ? 7 : mode == 2 ? 3 : mode == 3 ? 1 : 0;
  for (int row = 0; row < rows; row++)
    for (int half = 0; half < 2; half++) {
      const uint32_t offset = start + row / 8 * stride + row % 8 * pitch + half * (mode ? 16 : leading);
      // The pattern follows address bits 7 and up, counted from base_offset (as an H200 does, both ways of the test).
      chunk(row, half, offset ^ (((offset >> 7) - base) & mask) << 4);
    }
}

void check_descriptor(const Block& block, uint64_t descriptor, int rows) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  for_each_chunk(descriptor, rows, [&](int, int, uint32_t offset) {
    if (offset < SHARED_START || offset + 16 > block.shared.size())
      fail("out of range", "the operand reaches shared offset %d of %zu (start %d, leading %d, stride %d bytes)",
           int(offset) - int(SHARED_START), block.shared.size() - SHARED_START, int(start) - int(SHARED_START),
           int(descriptor >> 16 & 0x3fff) << 4, int(descriptor >> 32 & 0x3fff) << 4);
  });
}

template <class F>
void for_each_operand_chunk(const Wgmma& w, F chunk) {
  if (!w.call.a_registers) for_each_chunk(w.call.a, 64, chunk);
  for_each_chunk(w.call.b, w.call.n, chunk);
}

void execute(Block& block, Wgmma& w) {
  static uint8_t a[64][32], b[256][32];
  static uint32_t d[64][256];
  w.executed = true;
  if (w.call.a_registers) {
    for (int t = 0; t < 128; t++)
      for (int i = 0; i < 4; i++)
        memcpy(&a[t / 32 * 16 + t % 32 / 4 + i % 2 * 8][t % 4 * 4 + i / 2 * 16], &w.a[t][i], 4);
  } else {
    for_each_chunk(w.call.a, 64, [&](int row, int half, uint32_t offset) {
      memcpy(&a[row][half * 16], &block.shared[offset], 16);
    });
  }
  for_each_chunk(w.call.b, w.call.n, [&](int row, int half, uint32_t offset) {
    memcpy(&b[row][half * 16], &block.shared[offset], 16);
  });
  auto each_pair = [&](auto move) {
    for (int t = 0; t < 128; t++)
      for (int j = 0; j < w.call.n / 8; j++)
        for (int h = 0; h < 2; h++)
          move(static_cast<uint32_t*>(w.d[t]) + 4 * j + 2 * h,
               &d[t / 32 * 16 + t % 32 / 4 + 8 * h][8 * j + t % 4 * 2]);
  };
  if (w.call.accumulate) each_pair([](uint32_t* mine, uint32_t* matrix) { memcpy(matrix, mine, 8); });
  else for (auto& row : d) memset(row, 0, w.call.n * 4);
  multiply(w.call.type, 64, w.call.n, a, b, d, true);
  each_pair([](uint32_t* mine, uint32_t* matrix) { memcpy(mine, matrix, 8); });
}

// All 128 threads have issued it: from here on it may read its operands.
void issue(Block& block, Warpgroup& group, Wgmma& w) {
  for_each_operand_chunk(w, [&](int, int, uint32_t offset) {
    block.chunks[offset / 16].reads++;
    block.chunks[offset / 16].reader = w.operation;
  });
  if (!machine->lazy()) execute(block, w);
  wake(group.waiting);
}

Warpgroup& warpgroup(Thread& t) {
  if (t.parent->threads.size() % 128)
    fail("wgmma", "a block of %zu threads has no whole warpgroups", t.parent->threads.size());
  return t.parent->warpgroups[t.linear / 128];
}

}  // namespace

void touch_registers(RegisterState& state, int index, int count) {
  Thread& t = self();
  if (index < 0 || index >= count) fail("out of range", "after it, register %d of %d is touched", index, count);
  if (state.pending)
    fail("wgmma", "after it, a register of the unfinished wgmma at %s is touched; call wgmma_wait first",
         describe(state.issued).c_str());
  state.touched = ++t.touch_clock;
}

void abandon_registers(void* value) {
  static uint32_t nowhere[128];
  Thread& t = self();
  for (Wgmma& w : t.parent->warpgroups[t.linear / 128].queue)
    if (w.d[t.linear % 128] == value) w.d[t.linear % 128] = nowhere;
  // The states that wgmma_wait would settle are gone with their registers.
  for (auto& [state, number] : t.owned)
    if (state && reinterpret_cast<char*>(state) - static_cast<char*>(value) >= 0 &&
        reinterpret_cast<char*>(state) - static_cast<char*>(value) <= 4 * 128)
      state = nullptr;
}

void wgmma(const WgmmaCall& call, Place place) {
  Thread& t = enter("wgmma", place);
  Warpgroup& group = warpgroup(t);
  if (t.wgmma_fence_clock == 0 || call.d_state->touched > t.wgmma_fence_clock ||
      (call.a_state && call.a_state->touched > t.wgmma_fence_clock))
    fail("wgmma", "its registers were touched and no wgmma_fence followed");
  const uint64_t number = t.posted++;
  if (number - group.first == group.queue.size()) {
    Wgmma w{};
    w.call = call;
    w.place = place;
    w.operation = record("wgmma", place);
    check_descriptor(*t.parent, call.b, call.n);
    if (!call.a_registers) check_descriptor(*t.parent, call.a, 64);
    group.queue.push_back(w);
  }
  Wgmma& w = group.queue[number - group.first];
  if (w.call.a != call.a || w.call.b != call.b || w.call.n != call.n || w.call.type != call.type ||
      w.call.accumulate != call.accumulate || !w.call.a_registers != !call.a_registers)
    fail("divergence", "the warpgroup's threads issue different wgmmas: another thread is at %s with %s",
         describe(w.place).c_str(), w.call.accumulate != call.accumulate ? "another accumulate" : "other operands");
  w.d[t.linear % 128] = call.d;
  if (call.a_registers) memcpy(w.a[t.linear % 128], call.a_registers, 16);
  for (RegisterState* state : {call.d_state, call.a_state})
    if (state) {
      state->pending++;
      state->issued = place;
      t.owned.push_back({state, number});
    }
  if (!w.posted++ || t.lane == 0) {  // what it reads must be there, as far as each warp knows
    for_each_operand_chunk(w, [&](int, int, uint32_t offset) { check_read(*t.parent, offset, 16, true); });
  }
  if (w.posted == 128) issue(*t.parent, group, w);
}

void wgmma_wait(int pending, Place place) {
  Thread& t = enter("wgmma_wait", place);
  Warpgroup& group = warpgroup(t);
  if (t.commits <= uint64_t(pending)) return;
  const uint64_t end = group.group_end[t.commits - pending - 1];
  // A wgmma is one operation of four warps: it cannot finish before all of them have issued it.
  while (end > group.first && group.queue[end - 1 - group.first].posted < 128)
    sleep_on(group.waiting, "wgmma_wait (other threads of the warpgroup have not issued the wgmma)");
  for (uint64_t number = group.first; number < end; number++) {
    Wgmma& w = group.queue[number - group.first];
    if (w.finished) continue;
    if (!w.executed) execute(*t.parent, w);
    w.finished = true;
    for_each_operand_chunk(w, [&](int, int, uint32_t offset) {
      t.parent->chunks[offset / 16].reads--;
      note_read(*t.parent, offset, 16, ASYNC);
    });
  }
  acquire(0, machine->time);  // wgmmas are over; other threads may not be
  while (!group.queue.empty() && group.queue.front().finished) {
    group.queue.pop_front();
    group.first++;
  }
  size_t kept = 0;
  for (auto& [state, number] : t.owned) {
    if (number >= end) t.owned[kept++] = {state, number};
    else if (state) state->pending--;
  }
  t.owned.resize(kept);
  t.waited = end;
}

void check_wgmma_end(Thread& t) {
  if (t.posted != t.waited)
    fail("wgmma", "the thread ends with %llu wgmmas that no wgmma_wait covers",
         (unsigned long long)(t.posted - t.waited));
}

}  // namespace emulator

using namespace emulator;

void wgmma_fence(Place place) {
  Thread& t = enter("wgmma_fence", place);
  t.wgmma_fence_clock = ++t.touch_clock;
}

void wgmma_commit(Place place) {
  Thread& t = enter("wgmma_commit", place);
  Warpgroup& group = warpgroup(t);
  const uint64_t number = t.commits++;
  if (number == group.group_end.size()) group.group_end.push_back(t.posted);
  else if (group.group_end[number] != t.posted)
    fail("divergence", "the warpgroup's threads commit different numbers of wgmmas");
}

}  // namespace qk
