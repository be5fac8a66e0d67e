// The emulated machine: threads as fibers, in warps, warpgroups, blocks and clusters, with what each has in flight.
//
// One operating-system thread runs everything, one fiber at a time, so a run is decided by its mode and seed.
// A fiber leaves the processor only inside instructions of the layer (machine.cpp has the scheduler).
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "instructions.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace qk {
namespace emulator {

constexpr uint32_t SHARED_START = 1024;       // where dynamic shared memory begins in a block's window, as on sm_90
constexpr uint32_t RANK_SHIFT = 24;           // cluster addresses: (rank + 1) << RANK_SHIFT | offset
constexpr int MAX_SHARED = 227 * 1024;        // sm_90's limit for a block
constexpr int REGISTER_FILE = 65536;          // registers of a multiprocessor

struct Block;
struct Thread;

// An asynchronous operation, kept so that a message can name it.
struct Operation {
  const char* name;
  Place place;
  Dim block;
  int thread;
};

// 16 bytes of shared memory: which operations still write or read them.
struct Chunk {
  uint32_t writer = 0, reader = 0;  // the latest, as indices into Machine::operations
  uint16_t writes = 0, reads = 0;
};

// 4 bytes of shared memory: its last accesses, for fence_proxy_async and to find races. An access is ordered before a
// later one of another thread only if that thread has met somebody since: acquired_at. An asynchronous access is known
// to who waited for it, and to who met those since: async_known. Times of one clock stand for sets of accesses, so a
// right program is never blamed; most missing barriers are found whatever the schedule.
constexpr uint16_t ASYNC = 0xffff;  // in place of a thread: TMA and wgmma
constexpr uint16_t SEVERAL = 0xfffe;  // several threads that added to the word and have not met
struct Word {
  uint64_t written_at = 0, read_at = 0;
  uint16_t writer = 0, reader = 0;
  bool barrier = false;  // part of an mbarrier object
  bool added = false;    // the last write was red_add_shared's
};

// 16 bytes of global memory that a block has stored and not yet released to other blocks, by address / 16.
struct StoredLine {
  uint16_t valid = 0;  // one bit a byte
  char bytes[16];
};
using StoredLines = std::unordered_map<uintptr_t, StoredLine>;

struct Mbarrier {
  uint64_t initialised_at = 0, async_known = 0;
  int count = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;  // how many phases have completed
  uint64_t completed_at = 0;
  int initialiser = 0;
  bool published = false;  // fence_mbarrier_init has followed
  std::vector<Thread*> waiting;
};

// Threads that meet: a named barrier, or a warp at a warp instruction.
struct Meeting {
  int arrived = 0, expected = 0;
  uint64_t generation = 0, completed_at = 0, async_known = 0;
  const char* instruction = nullptr;
  Place place{};
  std::vector<Thread*> waiting;
};

struct Warp {
  Meeting meeting;
  const void* input[32];
  void* output[32];
};

struct Copy {  // one cp.async
  uint32_t offset;
  const char* source;
  int bytes, valid, group;
  uint32_t operation;
};

struct Store {  // one TMA or bulk store
  std::function<void()> read, write;
  std::vector<std::pair<uint32_t, uint32_t>> chunks;  // [first, last)
  int group;
  bool has_read = false;
};

struct Wgmma {
  WgmmaCall call;
  Place place;
  uint32_t operation;
  int posted = 0;
  bool executed = false, finished = false;
  void* d[128];
  uint32_t a[128][4];
};

struct Warpgroup {
  std::deque<Wgmma> queue;
  uint64_t first = 0;                 // number of queue.front()
  std::vector<uint64_t> group_end;    // number of the first wgmma after each committed group
  std::vector<Thread*> waiting;
  int registers = 0;                  // per thread, after setmaxnreg
  int setting = 0;
};

struct Thread : Coordinates {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Block* parent = nullptr;
  int linear = 0, lane = 0;
  bool done = false, polling = false;
  const char* instruction = "the start of the kernel";
  Place place{};
  const char* waits_for = nullptr;
  uint32_t waits_on = 0;              // an mbarrier's offset
  std::vector<Copy> copies;
  int copy_groups = 0;
  std::vector<Store> stores;
  int store_groups = 0;
  uint64_t fenced_at = 0;             // last fence_proxy_async
  uint64_t acquired_at = 0;           // last time it learnt of other threads' accesses: a barrier, an mbarrier's phase
  uint64_t async_known = 0;           // asynchronous accesses up to here are over, as far as it knows
  uint64_t cluster_met_at = 0;        // last cluster_wait
  uint64_t touch_clock = 1, wgmma_fence_clock = 0;
  uint64_t posted = 0, commits = 0, waited = 0;
  std::vector<std::pair<RegisterState*, uint64_t>> owned;  // registers of unfinished wgmmas, with their numbers
  bool cluster_arrived = false;
  uint64_t cluster_phase = 0;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int arrived = 0, live = 0;
  uint64_t phase = 0, completed_at = 0, async_known = 0;
  std::vector<Thread*> waiting;
  int running = 0;                    // blocks that have not ended
};

struct Block {
  Dim index;
  int rank = 0, live = 0;
  Cluster* cluster = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  Meeting barriers[16];
  std::unordered_map<uint32_t, Mbarrier> mbarriers;
  std::vector<uint8_t> shared;        // indexed by shared address
  std::vector<Chunk> chunks;
  std::vector<Word> words;
  int free_registers = 0, launch_registers = 0;
  std::vector<Thread*> waiting_registers;
  int incoming = 0;                   // TMA loads still to arrive here
  StoredLines stored;
  bool ended = false;
};

// A TMA load on its way to one block.
struct Arrival {
  std::function<void()> land;
  Block* block;
  uint32_t operation;
};

struct Buffer {
  char* start;
  size_t bytes;
};

enum Mode { LAZY = 1, SHUFFLED = 2 };

struct Machine {
  int mode = 0;
  uint64_t random = 1;
  void (*kernel)(void**) = nullptr;
  void** arguments = nullptr;
  Dim grid, block_dim;
  int cluster_blocks = 1, resident_clusters = 1, running_clusters = 0;
  uint64_t waiting_clusters = 0;
  uint32_t shared_bytes = 0;
  double deadline = 0;
  std::vector<Buffer> buffers;
  std::vector<Operation> operations;
  std::vector<Thread*> ready;
  size_t ready_head = 0;
  int idle_polls = 0;
  uint64_t steps = 0;
  uint32_t landing = 0;               // the copy that lands now, whoever runs
  uint64_t time = 1;                  // counts accesses to shared memory
  std::vector<Arrival> arrivals;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<StoredLines> late_stores;
  void* main_stack_pointer = nullptr;
  std::string error, error_kind;
  Place error_place{};
  Dim error_block{}, error_thread{};
  bool failed = false;

  uint32_t next_random() {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return static_cast<uint32_t>(random >> 16);
  }
  bool lazy() const { return mode & LAZY; }
  bool shuffled() const { return mode & SHUFFLED; }
};

extern Machine* machine;

inline Thread& self() { return *static_cast<Thread*>(current); }

// ---- fibers.cpp ----------------------------------------------------------------------------------------------

constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t PAGE = 4096;

// Save the callee-saved registers on the stack, store the stack pointer in *from, and continue at `to`.
extern "C" void qk_switch(void** from, void* to);
// A stack pointer at which qk_switch begins to run `entry`.
void* prepare_stack(char* top, void (*entry)());
char* take_stack();
void return_stack(char* stack);

// ---- machine.cpp ---------------------------------------------------------------------------------------------

// What `fail` throws before any thread runs; inside one it leaves by a switch, for nothing may be unwound there.
struct LaunchFailed {};
// Stop the launch with a message about the current thread's current instruction.
[[noreturn]] void fail(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));
// First thing in every instruction: remember where the thread is; in shuffled mode, perhaps let others run first.
// `polls`: it only looks whether something has happened.
Thread& enter(const char* instruction, Place place, bool polls = false);
// Sleep on a list until somebody wakes it.
void sleep_on(std::vector<Thread*>& waiting, const char* what);
void wake(std::vector<Thread*>& waiting);
// Let every other thread run: one turn of a busy wait.
void poll();
void make_ready(Thread* thread);
uint32_t record(const char* name, Place place);
std::string describe(uint32_t operation);
std::string describe(Place place);
std::string who_waits();
Thread* pick();

// All 32 lanes bring an input and an output; the last one runs `finish` for all.
void meet_warp(const void* input, void* output, const std::function<void(Warp&)>& finish);

// ---- run.cpp -------------------------------------------------------------------------------------------------

void run();

// ---- memory.cpp ----------------------------------------------------------------------------------------------

// The block and offset of a shared or cluster address, checked for range and alignment.
struct SharedAddress {
  Block* block;
  uint32_t offset;
};
SharedAddress resolve(uint32_t address, int bytes, int alignment);
void check_global(const void* pointer, size_t bytes, int alignment, const char* what);
// Reads by instructions (generic proxy) and by wgmma and TMA (async proxy) of bytes that must be there.
void check_read(Block& block, uint32_t offset, int bytes, bool async_proxy);
// Writes that no unfinished operation, and no unordered access of another thread, may meet.
void check_write(Block& block, uint32_t offset, int bytes, bool async_proxy);
// After a write or read through the generic proxy, by the current thread or the given one.
void note_write(Block& block, uint32_t offset, int bytes, int thread = -1);
void note_read(Block& block, uint32_t offset, int bytes, int thread = -1);
// The current thread has met others: what they did before `time`, and asynchronous accesses that they know to be over,
// are ordered before what it does next.
void acquire(uint64_t time, uint64_t async_known);
// What the current thread tells those it is about to meet.
void tell(uint64_t& async_known);
// What the block stored becomes visible to other blocks.
void release_stores(Block& block);
void write_stores(const StoredLines& stored);
void begin_write(Block& block, uint32_t offset, uint32_t bytes, uint32_t operation);
void end_write(Block& block, uint32_t offset, uint32_t bytes);
void finish_copies(Thread& thread, int groups);

// ---- barriers.cpp --------------------------------------------------------------------------------------------

Mbarrier& mbarrier_at(Block& block, uint32_t offset);
void complete_bytes(Block& block, uint32_t offset, int64_t bytes);
void thread_left(Thread& thread);

// ---- tma.cpp -------------------------------------------------------------------------------------------------

// Let one TMA load land; which one is the mode's choice.
void land_one();
void finish_stores(Thread& thread, int groups, bool read_only);

// ---- multiply.cpp, wgmma.cpp ----------------------------------------------------------------------------------

// d[m][n] (+)= a[m] . b[n] over rows of 32 bytes; d has a pitch of 256 words.
void multiply(int type, int rows, int columns, const uint8_t (*a)[32], const uint8_t (*b)[32], uint32_t (*d)[256],
              bool warpgroup);
// The same of codes times their blocks' scales, one row of scales a row of each operand.
void multiply_blocks(int type, int rows, int columns, const uint8_t (*a)[32], const uint8_t (*b)[32],
                     const uint8_t (*scales_a)[4], const uint8_t (*scales_b)[4], uint32_t (*d)[256]);
void check_wgmma_end(Thread& thread);

}  // namespace emulator
}  // namespace qk
