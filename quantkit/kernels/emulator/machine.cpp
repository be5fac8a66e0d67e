// The scheduler: which thread runs next, what a thread does while it waits, and what is said when a run fails.
#include "machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <map>

namespace qk {
namespace emulator {

Coordinates* current = nullptr;
Machine* machine = nullptr;

namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

}  // namespace

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
    const std::string who = machine->landing ? describe(machine->landing) : t.instruction;
    machine->error = who + ": " + machine->error;
  }
  if (!current) throw LaunchFailed();  // no thread is to blame
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

}  // namespace

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

static Thread* first_waiting() {
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

static void switch_to_next() {
  Thread& me = self();
  if ((++machine->steps & 0xffff) == 0 && now() > machine->deadline)
    fail("timeout", "the launch ran out of its time limit: %s", who_waits().c_str());
  Thread* next = pick();
  if (next == &me) return;
  current = next;
  qk_switch(&me.stack_pointer, next->stack_pointer);
}

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

}  // namespace emulator
}  // namespace qk
