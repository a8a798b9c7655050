// Fibers: one stack per thread, and the switch between them.
//
// A switch is inlined at the places where threads wait, and ends in a jump rather than a return. A return would be
// mispredicted every time, since the processor's return-address stack does not know our stacks. Threads of a warp
// mostly wait at the same place, so the returns after the switch are predicted as well.
#include "runtime.h"
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator switches threads with x86-64 code for Linux; there is no other port"
#endif

namespace emu {

__thread Fiber* cur;
__thread Worker* worker;

void make_threads(Block& block, int threads) {
    while ((int)block.all.size() < threads) {
        auto t = std::make_unique<Thread>();
        t->block = &block;
        t->index = block.all.size();
        t->warp = t->index / WARP;
        t->lane = t->index % WARP;
        void* memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, STACK_GUARD, PROT_NONE)) {
            fprintf(stderr, "the emulator cannot map another thread's stack (vm.max_map_count?)\n");
            abort();
        }
        t->stack = (unsigned char*)memory;
        t->fresh = true;
        block.all.push_back(std::move(t));
    }
}

static void begin() {
    run_thread();
    abort();
}

static void prepare(Thread& t) {
    if (!t.fresh) return;
    t.fresh = false;
    auto* top = (uint64_t*)(t.stack + STACK_BYTES - t.index * 272 % STACK_COLOURS);
    *--top = 0;     // the place of a caller's return address, which aligns the stack as the ABI requires
    *--top = (uint64_t)&begin;
    t.saved = top;
}

// Compiled without a red zone, since what lies below the stack pointer is overwritten.
static inline __attribute__((always_inline)) void switch_stack(void** save, void* load) {
    asm volatile(
        "pushq %%rbp\n\t"
        "leaq 1f(%%rip), %%rax\n\t"
        "pushq %%rax\n\t"
        "movq %%rsp, (%0)\n\t"
        "movq %1, %%rsp\n\t"
        "popq %%rax\n\t"
        "jmpq *%%rax\n"
        "1:\n\t"
        "popq %%rbp\n\t"
        : "+D"(save), "+S"(load)
        :
        : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc", "xmm0",
          "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",
          "xmm14", "xmm15");
}

void enter(Thread* t) {
    prepare(*t);
    cur = t;
    switch_stack(&worker->saved, t->saved);
}

void leave() {
    Thread* t = self();
    cur = nullptr;
    switch_stack(&t->saved, worker->saved);
}

void switch_to(Thread* t) {
    Thread* from = self();
    if (t == from) return;
    worker->counters.switches++;
    prepare(*t);
    cur = t;
    switch_stack(&from->saved, t->saved);
}

}  // namespace emu
