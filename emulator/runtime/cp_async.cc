// cp.async: the destination is poisoned when the copy is issued; the data land at once, or at the wait that covers it.
#include "runtime.h"

namespace emu {

static void carry_out(Block& b, const Copy& c) {
    unsigned char* to = b.shared + (c.dst - SHARED_START);
    if (c.src_bytes) memcpy(to, c.src, c.src_bytes);
    if (c.src_bytes < c.bytes) memset(to + c.src_bytes, 0, c.bytes - c.src_bytes);
}

void cp_async(uint32_t dst, const void* src, int bytes, int src_bytes, const char* f, int l) {
    Thread& me = *self();
    Site site(f, l);
    if ((bytes != 4 && bytes != 8 && bytes != 16) || src_bytes < 0 || src_bytes > bytes)
        fail_at(site, "cp.async of %d bytes from %d: 4, 8 or 16 from at most as many", bytes, src_bytes);
    unsigned char* to = shared_at(*me.block, dst, bytes, bytes, "cp.async", site);
    if ((uintptr_t)src & (bytes - 1))
        fail_at(site, "cp.async: misaligned: global address %p is not %d-byte aligned", src, bytes);
    if (src_bytes) global_access(src, src_bytes, false, site);
    if (racing()) shared_access(me, dst - SHARED_START, bytes, true, site);
    Copy copy{dst, src, bytes, src_bytes, me.copy_group, site};
    if (worker->later()) {
        memset(to, 0xff, bytes);
        me.copies.push_back(copy);
    } else {
        carry_out(*me.block, copy);
    }
}

void cp_async_commit() { self()->copy_group++; }

void cp_async_wait(int groups) {
    Thread& me = *self();
    size_t landed = 0;
    for (; landed < me.copies.size() && me.copies[landed].group < me.copy_group - groups; landed++) {
        const Copy& c = me.copies[landed];
        // Record the write again: until now no other thread may have touched the destination.
        if (racing()) shared_access(me, c.dst - SHARED_START, c.bytes, true, c.site);
        carry_out(*me.block, c);
        worker->counters.asynchronous++;
    }
    me.copies.erase(me.copies.begin(), me.copies.begin() + landed);
}

void copies_at_exit(Thread& t) {
    if (t.copies.empty()) return;
    Site site = t.copies[0].site;
    fail_at(site, "the thread exits with cp.async operations in flight (no wait_group covers them)");
}

}  // namespace emu
