// The C interface that quantkit.kernels.emulator calls: device buffers with guard pages, and launches.
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>

#include "machine.h"

using namespace qk::emulator;

extern "C" {

struct QkBuffer {
  char* start;
  uint64_t bytes;
};

// A copy of an argument: it ends (rounded up to 16 bytes) where an unreadable page begins, and begins after one.
// Returns null when there is no memory.
char* qk_allocate(uint64_t bytes) {
  const size_t used = (bytes + 15) / 16 * 16, pages = (used + PAGE - 1) / PAGE + (used == 0);
  void* memory = mmap(nullptr, (pages + 2) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  char* first = static_cast<char*>(memory) + PAGE;
  if (mprotect(first, pages * PAGE, PROT_READ | PROT_WRITE) != 0) return nullptr;
  memset(first, 0xa5, pages * PAGE);
  return first + pages * PAGE - used;
}

// True when the bytes around the buffer, up to its guard pages, are untouched.
int qk_is_intact(const char* start, uint64_t bytes) {
  const size_t used = (bytes + 15) / 16 * 16, pages = (used + PAGE - 1) / PAGE + (used == 0);
  const char *first = start + used - pages * PAGE, *end = start + used;
  for (const char* p = first; p < start; p++)
    if (*p != char(0xa5)) return 0;
  for (const char* p = start + bytes; p < end; p++)
    if (*p != char(0xa5)) return 0;
  return 1;
}

void qk_free(char* start, uint64_t bytes) {
  const size_t used = (bytes + 15) / 16 * 16, pages = (used + PAGE - 1) / PAGE + (used == 0);
  munmap(start + used - pages * PAGE - PAGE, (pages + 2) * PAGE);
}

struct QkLaunch {
  void (*entry)(void**);
  void** arguments;
  uint32_t grid[3], block[3], cluster, shared_bytes;
  int32_t mode, resident_clusters;
  uint64_t seed;
  double timeout_s;
  const QkBuffer* buffers;
  uint64_t buffer_count;
};

struct QkReport {
  int32_t failed;
  int32_t line;
  uint32_t block[3], thread[3];
  uint64_t switches;
  char kind[32], file[512], message[4096];
};

void qk_launch(const QkLaunch* launch, QkReport* report) {
  Machine m;
  machine = &m;
  m.kernel = launch->entry;
  m.arguments = launch->arguments;
  m.grid = {launch->grid[0], launch->grid[1], launch->grid[2]};
  m.block_dim = {launch->block[0], launch->block[1], launch->block[2]};
  m.cluster_blocks = launch->cluster;
  m.shared_bytes = launch->shared_bytes;
  m.mode = launch->mode;
  m.resident_clusters = launch->resident_clusters;
  m.random = launch->seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
  for (int i = 0; i < 8; i++) m.next_random();
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  m.deadline = t.tv_sec + t.tv_nsec * 1e-9 + launch->timeout_s;
  for (uint64_t i = 0; i < launch->buffer_count; i++)
    m.buffers.push_back({launch->buffers[i].start, launch->buffers[i].bytes});
  m.operations.push_back({});  // operation 0 is none
  run();
  memset(report, 0, sizeof *report);
  report->failed = m.failed;
  report->switches = m.steps;
  report->line = m.error_place.line;
  const Dim block = m.error_block, thread = m.error_thread;
  const uint32_t b[] = {block.x, block.y, block.z}, h[] = {thread.x, thread.y, thread.z};
  memcpy(report->block, b, sizeof b);
  memcpy(report->thread, h, sizeof h);
  snprintf(report->kind, sizeof report->kind, "%s", m.error_kind.c_str());
  snprintf(report->file, sizeof report->file, "%s", m.error_place.file ? m.error_place.file : "");
  snprintf(report->message, sizeof report->message, "%s", m.error.c_str());
  machine = nullptr;
}

}  // extern "C"
