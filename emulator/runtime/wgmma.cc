// wgmma: issuing only records the product and never blocks. A warpgroup's accumulators are taken away and poisoned at
// the first product into them, and given back when a group completes: when the last thread issues, or when the first
// thread waits.
#include "runtime.h"
#include "swizzle.h"

namespace emu {

static const uint64_t POISON = 0x7fc0dead7fc0deadull;   // a pair of NaNs of our own

static Warpgroup& mine() { return self()->block->warpgroups[self()->warp / 4]; }

// Accumulators 2j and 2j + 1 of a thread.
static float* pair_at(Accumulators& d, int thread, int j) {
    int row = thread / 32 * 16 + (thread & 31) / 4 + (j & 1) * 8;
    return &d.values[row * d.n + j / 2 * 8 + (thread & 3) * 2];
}

// ---- operands ---------------------------------------------------------------------------------

// The 16 bytes that hold element (mn, k) of an operand and the elements after it: along k if K is the major
// (contiguous) dimension, else along mn. See the PTX ISA, "Matrix-descriptor", and the canonical layouts of CUTLASS's
// mma_sm90_desc.hpp.
static const unsigned char* chunk(Block& b, Warpgroup& w, Product& p, uint64_t desc, bool mn_major, int mn, int k) {
    uint32_t start = (desc & 0x3fff) << 4, leading = (desc >> 16 & 0x3fff) << 4, stride = (desc >> 32 & 0x3fff) << 4;
    if (desc >> 49 & 7) fail_at(p.site, "wgmma descriptor: a base offset is not modelled");
    static const int MODES[] = {0, 3, 2, 1};
    int mode = MODES[desc >> 62], width = 16 << mode, along = width / 2;
    uint32_t offset;
    if (mn_major && mode) offset = mn % along * 2 + mn / along * leading + k % 8 * width + k / 8 * stride;
    else if (mn_major) offset = mn % 8 * 2 + mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
    else offset = mn / 8 * stride + mn % 8 * width + (mode ? k / 8 * 16 : k / 8 * leading);
    uint32_t at = swizzled(start + offset, mode) - SHARED_START;
    if (at > b.shared_bytes - 16) fail_at(p.site, "wgmma descriptor: out of bounds: it reads smem+0x%x", at);
    product_reads(b, w, p, at, 16);
    return b.shared + at;
}

struct Operands {
    alignas(32) float a[64][16], b[16][256];
};
static thread_local Operands operands;

static __m256 halves(const unsigned char* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }

static void load_a(Block& b, Warpgroup& w, Product& p) {
    auto& a = operands.a;
    alignas(32) float eight[8];
    if (p.a[0]) {
        for (int thread = 0; thread < 128; thread++)
            for (int i = 0; i < 8; i++) {
                int row = thread / 32 * 16 + (thread & 31) / 4 + (i >> 1 & 1) * 8;
                a[row][(thread & 3) * 2 + (i & 1) + (i >> 2) * 8] = _cvtsh_ss(p.a[thread][i / 2] >> 16 * (i & 1));
            }
    } else if (p.trans_a) {
        for (int k = 0; k < 16; k++)
            for (int m = 0; m < 64; m += 8) {
                _mm256_store_ps(eight, halves(chunk(b, w, p, p.da, true, m, k)));
                for (int e = 0; e < 8; e++) a[m + e][k] = eight[e];
            }
    } else {
        for (int m = 0; m < 64; m++)
            for (int k = 0; k < 16; k += 8) _mm256_store_ps(&a[m][k], halves(chunk(b, w, p, p.da, false, m, k)));
    }
}

static void load_b(Block& block, Warpgroup& w, Product& p) {
    auto& b = operands.b;
    alignas(32) float eight[8];
    if (p.trans_b) {
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < p.n; n += 8) _mm256_store_ps(&b[k][n], halves(chunk(block, w, p, p.db, true, n, k)));
    } else {
        for (int n = 0; n < p.n; n++)
            for (int k = 0; k < 16; k += 8) {
                _mm256_store_ps(eight, halves(chunk(block, w, p, p.db, false, n, k)));
                for (int e = 0; e < 8; e++) b[k + e][n] = eight[e];
            }
    }
}

// Multiplies four rows by `Vectors` vectors of eight columns in registers.
template <int Vectors> static inline void multiply(float* d, int stride, int row, int column) {
    __m256 sum[4][Vectors];
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < Vectors; v++) sum[r][v] = _mm256_loadu_ps(d + (row + r) * stride + column + v * 8);
    for (int k = 0; k < 16; k++)
        for (int r = 0; r < 4; r++) {
            __m256 a = _mm256_broadcast_ss(&operands.a[row + r][k]);
            for (int v = 0; v < Vectors; v++)
                sum[r][v] = _mm256_fmadd_ps(a, _mm256_load_ps(&operands.b[k][column + v * 8]), sum[r][v]);
        }
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < Vectors; v++) _mm256_storeu_ps(d + (row + r) * stride + column + v * 8, sum[r][v]);
}

static void carry_out(Block& b, Warpgroup& w, Product& p) {
    load_a(b, w, p);
    load_b(b, w, p);
    float* d = p.d->values.data();
    if (!p.scale_d) memset(d, 0, 64 * p.n * sizeof(float));
    for (int row = 0; row < 64; row += 4) {
        int column = 0;
        for (; column + 16 <= p.n; column += 16) multiply<2>(d, p.n, row, column);
        if (column < p.n) multiply<1>(d, p.n, row, column);
    }
    worker->counters.wgmma++;
}

// ---- products in flight -----------------------------------------------------------------------

static void give_back(Accumulators& d) {
    for (int thread = 0; thread < 128; thread++)
        for (int j = 0; j < d.n / 4; j++) {
            float* to = d.registers[thread] + 2 * j;
            uint64_t there;
            memcpy(&there, to, 8);
            if (there != POISON)
                fail_at(
                    d.site,
                    "accumulator register %d of thread %d of the warpgroup was touched while the wgmma was in flight",
                    2 * j + ((uint32_t)there == (uint32_t)POISON), thread);
            memcpy(to, pair_at(d, thread, j), 8);
        }
}

static void complete(Block& b, Warpgroup& w, uint32_t upto) {
    for (; w.done < upto; w.done++) {
        carry_out(b, w, *w.products.front());
        w.products.pop_front();
    }
    for (size_t i = 0; i < w.in_flight.size();) {
        if (w.in_flight[i]->last >= w.done) {
            i++;
            continue;
        }
        give_back(*w.in_flight[i]);
        w.in_flight.erase(w.in_flight.begin() + i);
    }
}

// The accumulators to which product `number` adds: those of a product in flight, or new ones.
static std::shared_ptr<Accumulators> accumulators(Warpgroup& w, float* registers, int thread, int n, uint32_t number,
                                                  const Site& site) {
    for (auto& d : w.in_flight)
        if (d->registers[thread] == registers) {
            if (d->n != n)
                fail_at(site, "wgmma of n = %d into accumulators of one of n = %d that is in flight", n, d->n);
            d->last = number;
            return d;
        }
    auto d = std::make_shared<Accumulators>();
    d->n = n;
    d->site = site;
    d->values.resize(64 * n);
    d->first = d->last = number;
    w.in_flight.push_back(d);
    return d;
}

void wgmma(float* d, const uint32_t* a, uint64_t da, uint64_t db, int n, int scale_d, int trans_a, int trans_b,
           const char* f, int l) {
    Thread& me = *self();
    Block& b = *me.block;
    Warpgroup& w = mine();
    Site site(f, l);
    int thread = me.index % 128;
    if (n < 8 || n > 256 || n % 8) fail_at(site, "wgmma: n = %d is no multiple of 8 up to 256", n);
    if (b.threads < (me.warp / 4 + 1) * 128) fail_at(site, "wgmma: the warpgroup has fewer than 128 threads");
    if (!me.wgmma_fenced)
        fail_at(site, "wgmma.mma_async without a wgmma.fence since the registers were last accessible");
    uint32_t number = me.products++;
    if (number - w.done == w.products.size()) {
        auto p = std::make_unique<Product>();
        p->da = da, p->db = db, p->n = n, p->scale_d = scale_d, p->trans_a = trans_a, p->trans_b = trans_b;
        p->site = site;
        p->d = accumulators(w, d, thread, n, number, site);
        w.products.push_back(std::move(p));
    }
    Product& p = *w.products[number - w.done];
    if (p.da != da || p.db != db || p.n != n || p.scale_d != scale_d || !(p.site == site))
        fail_at(site,
                "the threads of the warpgroup issue different wgmma (descriptors, shape or scale differ; first at %s)",
                p.site.text().c_str());
    if (p.d->first == number) {
        p.d->registers[thread] = d;
        for (int j = 0; j < n / 4; j++) {
            memcpy(pair_at(*p.d, thread, j), d + 2 * j, 8);
            memcpy(d + 2 * j, &POISON, 8);
        }
    } else if (p.d->registers[thread] != d) {
        fail_at(site, "the threads of the warpgroup chain different accumulators");
    }
    p.a[thread] = a;
    product_issued(me, p);
    if (++p.arrived < 128) return;
    if (!worker->later()) complete(b, w, number + 1);
    wake(b, w.waiting);
}

void wgmma_fence(const char*, int) { self()->wgmma_fenced = true; }

void wgmma_commit(const char* f, int l) {
    Thread& me = *self();
    Warpgroup& w = mine();
    uint32_t group = me.product_groups++;
    if (group == w.groups.size()) w.groups.push_back(me.products);
    else if (w.groups[group] != me.products)
        fail_at({f, l}, "the threads of the warpgroup commit different wgmma groups");
}

void wgmma_wait(int groups, const char* f, int l) {
    Thread& me = *self();
    Warpgroup& w = mine();
    me.wgmma_fenced = false;
    if ((int)me.product_groups <= groups) return;
    uint32_t upto = w.groups[me.product_groups - 1 - groups];
    auto all_issued = [&] {
        for (uint32_t i = w.done; i < upto; i++)
            if (w.products[i - w.done]->arrived < 128) return false;
        return true;
    };
    while (w.done < upto && !all_issued()) wait_in(w.waiting, {Wait::Wgmma, {f, l}});
    if (w.done < upto) complete(*me.block, w, upto);
    if (upto) products_waited(me, w, upto);
}

std::string wgmma_at_exit(Block& b) {
    for (Warpgroup& w : b.warpgroups) {
        if (!w.products.empty())
            return w.products[0]->site.text() +
                   ": the block exits with wgmma operations in flight (no wait_group covers them)";
        if (w.done > (w.groups.empty() ? 0 : w.groups.back()))
            return "the block exits with wgmma operations that no commit_group covers";
    }
    return "";
}

}  // namespace emu
