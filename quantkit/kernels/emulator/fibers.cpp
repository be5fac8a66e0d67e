// Fibers: a thread's stack, and the switch from one to another.
#include <sys/mman.h>

#include "machine.h"

namespace qk {
namespace emulator {

// ---- the context switch --------------------------------------------------------------------------------------
// Saves the callee-saved registers on the stack, stores the stack pointer in *from, and continues at `to`.

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
void* prepare_stack(char* top, void (*entry)()) {
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

void* prepare_stack(char* top, void (*entry)()) {
  char* sp = top - 64 - 160;
  memset(sp, 0, 160);
  *reinterpret_cast<void**>(sp + 88) = reinterpret_cast<void*>(entry);  // x30
  return sp;
}
#else
#error "the emulator's context switch is written for x86-64 and aarch64"
#endif

// ---- stacks --------------------------------------------------------------------------------------------------

namespace {

// Stacks live in one reservation, each above a guard page; they are kept from launch to launch.
std::vector<char*>& stack_pool() {
  static std::vector<char*> pool;
  return pool;
}

}  // namespace

char* take_stack() {
  auto& pool = stack_pool();
  if (pool.empty()) {
    const size_t count = 128, stride = STACK_BYTES + PAGE;
    void* memory = mmap(nullptr, count * stride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                        -1, 0);
    if (memory == MAP_FAILED) fail("resources", "no memory for the stacks of 128 more threads");
    // Every guard page costs two of the 65530 mappings that Linux gives a process; later stacks go without.
    static size_t guarded = 0;
    for (size_t i = 0; i < count; i++) {
      char* base = static_cast<char*>(memory) + i * stride;
      if (guarded < 16384 && mprotect(base, PAGE, PROT_NONE) == 0) guarded++;
      pool.push_back(base + PAGE);
    }
  }
  char* stack = pool.back();
  pool.pop_back();
  return stack;
}

void return_stack(char* stack) { stack_pool().push_back(stack); }

}  // namespace emulator
}  // namespace qk
