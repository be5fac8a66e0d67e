// Fibers, the scheduler, and the life of a launch: which thread runs next, and how a run ends.
#include "machine.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <map>

namespace qk {
namespace emulator {

Coordinates* current = nullptr;
Machine* machine = nullptr;

namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t PAGE = 4096;

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

}  // namespace

// ---- the context switch --------------------------------------------------------------------------------------
// Saves the callee-saved registers on the stack, stores the stack pointer in *from, and continues at `to`.

extern "C" void qk_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.type qk_switch,@function
.globl qk_switch
qk_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size qk_switch, .-qk_switch
)");

// A fresh stack: six register slots, then the address to "return" to, then a null return address for it.
static void* prepare_stack(char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(top - 64);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.type qk_switch,%function
.globl qk_switch
qk_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size qk_switch, .-qk_switch
)");

static void* prepare_stack(char* top, void (*entry)()) {
  char* sp = top - 64 - 160;
  memset(sp, 0, 160);
  *reinterpret_cast<void**>(sp + 88) = reinterpret_cast<void*>(entry);  // x30
  return sp;
}
#else
#error "the emulator's context switch is written for x86-64 and aarch64"
#endif

// ---- messages ------------------------------------------------------------------------------------------------

std::string describe(Place place) {
  if (!place.file) return "its start";
  const char* name = strrchr(place.file, '/');
  return std::string(name ? name + 1 : place.file) + ":" + std::to_string(place.line);
}

std::string describe(uint32_t operation) {
  const Operation& o = machine->operations[operation];
  return std::string(o.name) + " at " + describe(o.place) + " by thread " + std::to_string(o.thread) + " of block (" +
         std::to_string(o.block.x) + ", " + std::to_string(o.block.y) + ", " + std::to_string(o.block.z) + ")";
}

uint32_t record(const char* name, Place place) {
  machine->operations.push_back({name, place, self().block, self().linear});
  return static_cast<uint32_t>(machine->operations.size() - 1);
}

void fail(const char* kind, const char* format, ...) {
  char text[4096];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  machine->failed = true;
  machine->error_kind = kind;
  machine->error = text;
  if (current) {
    Thread& t = self();
    machine->error_place = t.place;
    machine->error_block = t.block;
    machine->error_thread = t.thread;
    // A copy that lands fails on its own account, not on that of the thread that happens to run.
    machine->error = (machine->landing ? describe(machine->landing) : std::string(t.instruction)) + ": " + machine->error;
  }
  void* abandoned;  // nobody resumes this fiber
  qk_switch(&abandoned, machine->main_stack_pointer);
  abort();
}

// ---- the scheduler -------------------------------------------------------------------------------------------

void make_ready(Thread* thread) {
  machine->ready.push_back(thread);
  machine->idle_polls = 0;
}

void wake(std::vector<Thread*>& waiting) {
  for (Thread* thread : waiting) make_ready(thread);
  waiting.clear();
}

namespace {

size_t ready_count() { return machine->ready.size() - machine->ready_head; }

// One line for every group of threads that wait at the same place for the same thing.
std::string who_waits() {
  std::map<std::string, int> groups;
  for (auto& cluster : machine->clusters)
    for (auto& block : cluster->blocks)
      for (Thread& t : block->threads) {
        if (t.done) continue;
        std::string line = std::string(t.waits_for ? t.waits_for : t.instruction) + " at " + describe(t.place);
        auto barrier = t.waits_on ? block->mbarriers.find(t.waits_on) : block->mbarriers.end();
        if (barrier != block->mbarriers.end())
          line += " (mbarrier " + std::to_string(t.waits_on) + ": " + std::to_string(barrier->second.phase) +
                  " phases done, " + std::to_string(barrier->second.pending) + " of " +
                  std::to_string(barrier->second.count) + " arrivals and " + std::to_string(barrier->second.bytes) +
                  " bytes missing)";
        groups[line]++;
      }
  std::string text;
  int lines = 0;
  for (auto& [line, count] : groups) {
    if (++lines > 8) return text + "; …";
    text += (text.empty() ? "" : "; ") + std::to_string(count) + " wait in " + line;
  }
  return text;
}

Thread* first_waiting() {
  for (auto& cluster : machine->clusters)
    for (auto& block : cluster->blocks)
      for (Thread& t : block->threads)
        if (!t.done) return &t;
  return &self();
}

Thread* pick() {
  Machine& m = *machine;
  if (m.shuffled() && !m.lazy() && !m.arrivals.empty() && m.next_random() % 8 == 0) land_one();
  const int patience = int(ready_count()) * (m.shuffled() ? 64 : 2) + 8;  // a random choice may miss one for long
  for (;;) {
    // A full round of busy waits without any event: as late as legal is now.
    const bool only_polls = ready_count() > 0 && m.idle_polls > patience;
    if (ready_count() > 0 && !only_polls) break;
    if (!m.arrivals.empty()) {
      land_one();
      m.idle_polls = 0;
      continue;
    }
    current = first_waiting();  // the report is about a thread that waits, not the last one that ran
    fail("deadlock", "%s: %s", only_polls ? "every thread that can run is in a busy wait" : "no thread can run",
         who_waits().c_str());
  }
  if (m.shuffled()) std::swap(m.ready[m.ready_head], m.ready[m.ready_head + m.next_random() % ready_count()]);
  Thread* next = m.ready[m.ready_head++];
  if (m.ready_head > 4096 && m.ready_head * 2 > m.ready.size()) {
    m.ready.erase(m.ready.begin(), m.ready.begin() + m.ready_head);
    m.ready_head = 0;
  }
  if (!next->polling) m.idle_polls = 0;
  return next;
}

void switch_to_next() {
  Thread& me = self();
  if ((++machine->steps & 0xffff) == 0 && now() > machine->deadline)
    fail("timeout", "the launch ran out of its time limit: %s", who_waits().c_str());
  Thread* next = pick();
  if (next == &me) return;
  current = next;
  qk_switch(&me.stack_pointer, next->stack_pointer);
}

}  // namespace

void sleep_on(std::vector<Thread*>& waiting, const char* what) {
  Thread& me = self();
  me.waits_for = what;
  waiting.push_back(&me);
  switch_to_next();
  me.waits_for = nullptr;
}

void poll() {
  Thread& me = self();
  machine->idle_polls++;
  machine->ready.push_back(&me);
  me.polling = true;
  switch_to_next();
  me.polling = false;
}

Thread& enter(const char* instruction, Place place, bool polls) {
  Thread& t = self();
  if (!polls) machine->idle_polls = 0;
  t.instruction = instruction;
  t.place = place;
  if (machine->shuffled() && machine->next_random() % 16 == 0) {
    machine->ready.push_back(&t);
    t.polling = polls;
    switch_to_next();
    t.polling = false;
  }
  return t;
}

void meet_warp(const void* input, void* output, const std::function<void(Warp&)>& finish) {
  Thread& t = self();
  Warp& warp = t.parent->warps[t.linear / 32];
  Meeting& meeting = warp.meeting;
  if (meeting.arrived == 0) {
    meeting.instruction = t.instruction;
    meeting.place = t.place;
  } else if (strcmp(meeting.instruction, t.instruction) != 0) {
    fail("divergence", "another lane of the warp is at %s at %s; all 32 lanes must be here together",
         meeting.instruction, describe(meeting.place).c_str());
  }
  warp.input[t.lane] = input;
  warp.output[t.lane] = output;
  tell(meeting.async_known);
  if (++meeting.arrived == 32) {
    finish(warp);
    meeting.arrived = 0;
    meeting.generation++;
    meeting.completed_at = machine->time;
    wake(meeting.waiting);
  } else {
    const uint64_t generation = meeting.generation;
    while (meeting.generation == generation) sleep_on(meeting.waiting, t.instruction);
  }
}

// ---- launches ------------------------------------------------------------------------------------------------

namespace {

// Stacks live in one reservation, each above a guard page; they are kept from launch to launch.
std::vector<char*>& stack_pool() {
  static std::vector<char*> pool;
  return pool;
}

char* take_stack() {
  auto& pool = stack_pool();
  if (pool.empty()) {
    const size_t count = 128, stride = STACK_BYTES + PAGE;
    void* memory = mmap(nullptr, count * stride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                        -1, 0);
    if (memory == MAP_FAILED) fail("resources", "no memory for the stacks of 128 more threads");
    for (size_t i = 0; i < count; i++) {
      char* base = static_cast<char*>(memory) + i * stride;
      mprotect(base, PAGE, PROT_NONE);
      pool.push_back(base + PAGE);
    }
  }
  char* stack = pool.back();
  pool.pop_back();
  return stack;
}

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
    release_stores(*t.parent);
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
    for (Thread& t : block->threads) stack_pool().push_back(t.stack);
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
      start_cluster(order[clusters - m.waiting_clusters--]);
      m.running_clusters++;
    }
    if (m.running_clusters == 0) break;
    Thread* thread = m.ready[m.ready_head++];
    current = thread;
    qk_switch(&m.main_stack_pointer, thread->stack_pointer);
    current = nullptr;
  }
  for (auto& cluster : m.clusters) release_stacks(*cluster);

  sigaction(SIGSEGV, &previous_segv, nullptr);
  sigaction(SIGBUS, &previous_bus, nullptr);
  sigaltstack(&previous_stack, nullptr);
  current = nullptr;
}

}  // namespace emulator
}  // namespace qk
