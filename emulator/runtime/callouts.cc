// The compiler's call-outs at each load and store of a kernel (-fsanitize=thread), backed by a runtime of our own.
#include "runtime.h"

namespace emu {

static inline __attribute__((always_inline)) void called_out(const void* p, size_t bytes, bool aligned, bool write,
                                                             const void* pc) {
    if (!cur) return;   // an initialiser of the program, not a kernel
    Thread& t = *self();
    if (__builtin_expect(aligned && (uintptr_t)p & (bytes - 1), 0))
        fail_at(Site(pc), "misaligned %zu-byte access at %p", bytes, p);
    if (on_stack(t, p)) return;
    size_t offset = (const unsigned char*)p - t.shared;
    if (offset < t.shared_bytes) {
        if (__builtin_expect(bytes > t.shared_bytes - offset, 0))
            fail_at(Site(pc), "out of bounds: %zu bytes at smem+0x%zx of the block's %u bytes", bytes, offset,
                    t.shared_bytes);
        if (racing()) shared_access(t, offset, bytes, write, Site(pc));
        return;
    }
    size_t of_params = (const unsigned char*)p - t.params;
    if (!write && of_params < t.params_bytes && bytes <= t.params_bytes - of_params) return;
    global_access(p, bytes, write, Site(pc));
}

void check_access(const void* p, size_t bytes, bool write) {
    called_out(p, bytes, true, write, __builtin_return_address(0));
}

void* copy_checked(void* to, const void* from, size_t bytes) {
    const void* pc = __builtin_return_address(0);
    if (bytes) called_out(from, bytes, false, false, pc);
    if (bytes) called_out(to, bytes, false, true, pc);
    return memmove(to, from, bytes);
}

void* set_checked(void* to, int byte, size_t bytes) {
    if (bytes) called_out(to, bytes, false, true, __builtin_return_address(0));
    return memset(to, byte, bytes);
}

}  // namespace emu

using emu::called_out;
#define PC __builtin_return_address(0)

extern "C" {

#define SIZE(n)                                                                             \
    void __tsan_read##n(void* p) { called_out(p, n, true, false, PC); }                     \
    void __tsan_write##n(void* p) { called_out(p, n, true, true, PC); }                     \
    void __tsan_unaligned_read##n(void* p) { called_out(p, n, false, false, PC); }          \
    void __tsan_unaligned_write##n(void* p) { called_out(p, n, false, true, PC); }          \
    void __tsan_volatile_read##n(void* p) { called_out(p, n, true, false, PC); }            \
    void __tsan_volatile_write##n(void* p) { called_out(p, n, true, true, PC); }
SIZE(1) SIZE(2) SIZE(4) SIZE(8) SIZE(16)

// Structures, odd sizes, and accesses that are less aligned than their size.
void __tsan_read_range(void* p, size_t bytes) { called_out(p, bytes, false, false, PC); }
void __tsan_write_range(void* p, size_t bytes) { called_out(p, bytes, false, true, PC); }

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// -fsanitize=alignment: a 16-byte load of which the compiler keeps only one number is still a 16-byte load on the
// device.
struct Misaligned {
    const char* file;
    uint32_t line, column;
    const void* type;
    uint8_t log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(Misaligned* what, void* p) {
    emu::fail_at({what->file, (int)what->line}, "misaligned access at %p, which needs %d bytes", p,
                 1 << what->log_alignment);
}

// clang calls these where gcc calls libc.
void* __tsan_memcpy(void* to, const void* from, size_t bytes) { return emu::copy_checked(to, from, bytes); }
void* __tsan_memmove(void* to, const void* from, size_t bytes) { return emu::copy_checked(to, from, bytes); }
void* __tsan_memset(void* to, int byte, size_t bytes) { return emu::set_checked(to, byte, bytes); }

}
