// TMA: tiles between global and shared memory. Loads complete on an mbarrier, stores in bulk groups of the issuing
// thread.
#include "runtime.h"
#include "swizzle.h"

namespace emu {

// The contents of an encoded CUtensorMap.
struct TensorMap {
    uint64_t magic, start, size[5], stride[4];  // sizes in elements, strides in bytes, innermost first
    uint16_t box[5];
    uint8_t rank, element, swizzle;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "");
constexpr uint64_t MAGIC = 0x70616d54756d45ull;

static TensorMap decode(const CUtensorMap* map, int rank, const char* what, const Site& site) {
    TensorMap t;
    memcpy(&t, map, sizeof t);
    if (t.magic != MAGIC) fail_at(site, "%s: not an encoded tensor map", what);
    if (t.rank != rank) fail_at(site, "%s: %d coordinates for a tensor map of rank %d", what, rank, t.rank);
    return t;
}

static uint32_t tile_bytes(const TensorMap& t) {
    uint32_t bytes = t.element;
    for (int i = 0; i < t.rank; i++) bytes *= t.box[i];
    return bytes;
}

// Visits a tile in pieces of 16 bytes: `each(offset in shared memory, global address, first, end)`, where bytes
// first..end of the piece are inside the tensor.
template <class Each> static void each_piece(const TensorMap& t, const int* c, uint32_t tile, Each&& each) {
    uint32_t row_bytes = t.box[0] * t.element, rows = tile_bytes(t) / row_bytes;
    for (uint32_t row = 0; row < rows; row++) {
        bool inside = true;
        unsigned char* line = (unsigned char*)t.start;
        for (uint32_t d = 1, rest = row; d < t.rank; rest /= t.box[d++]) {
            int64_t at = (int64_t)c[d] + rest % t.box[d];
            inside = inside && at >= 0 && at < (int64_t)t.size[d];
            line += at * (int64_t)t.stride[d - 1];
        }
        int64_t at = (int64_t)c[0] * t.element, size = t.size[0] * t.element;
        for (uint32_t i = 0; i < row_bytes; i += 16, at += 16) {
            int64_t first = at < 0 ? -at : 0, end = size - at < 16 ? size - at : 16;
            if (!inside || end < first) first = end = 0;
            each(swizzled(tile + row * row_bytes + i, t.swizzle) - SHARED_START, line + at, (int)first, (int)end);
        }
    }
}

void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, int rank, const int* c, const char* f, int l) {
    Thread& me = *self();
    Block* b = me.block;
    Site site(f, l);
    TensorMap t = decode(map, rank, "TMA load", site);
    global_access((const void*)t.start, 1, false, site);
    uint32_t bytes = tile_bytes(t);
    unsigned char* to = shared_at(*b, dst, bytes, 128, "TMA load", site);
    MBarrier* m = get_mbarrier(bar, site);
    uint32_t clock = tma_write(me, *m, dst - SHARED_START, bytes, site);
    struct {
        int at[5];
    } corner;
    for (int i = 0; i < rank; i++) corner.at[i] = c[i];
    auto land = [=]() {
        each_piece(t, corner.at, dst, [&](uint32_t offset, const unsigned char* from, int first, int end) {
            if (end - first < 16) memset(b->shared + offset, 0, 16);
            memcpy(b->shared + offset + first, from + first, end - first);
        });
        worker->counters.tma_bytes += bytes;
        m->tx_bytes -= bytes;
        tma_written(*m, clock);
        mbarrier_progress(*b, *m);
    };
    if (!worker->later()) return land();
    memset(to, 0xff, bytes);
    worker->flights.push_back({b, land});
}

// ---- stores -----------------------------------------------------------------------------------

static void read_tile(Block& b, Store& s) {
    if (s.read) return;
    s.read = true;
    s.data.assign(b.shared + (s.src - SHARED_START), b.shared + (s.src - SHARED_START) + s.bytes);
}

static void write_tile(Block& b, Store& s) {
    read_tile(b, s);
    TensorMap t;
    memcpy(&t, &s.map, sizeof t);
    each_piece(t, s.coordinates, s.src, [&](uint32_t offset, unsigned char* to, int first, int end) {
        memcpy(to + first, &s.data[offset - (s.src - SHARED_START) + first], end - first);
    });
    worker->counters.tma_bytes += s.bytes;
}

void tma_store(const CUtensorMap* map, uint32_t src, int rank, const int* c, const char* f, int l) {
    Thread& me = *self();
    Site site(f, l);
    TensorMap t = decode(map, rank, "TMA store", site);
    global_access((const void*)t.start, 1, true, site);
    Store s{*map, src, tile_bytes(t), {}, me.store_group, false, {}, site, 0};
    for (int i = 0; i < rank; i++) {
        // An H100 behaves this way for every swizzle. Beyond the far end a store is clipped, and loads may begin
        // anywhere.
        if (c[i] < 0)
            fail_at(
                site,
                "TMA store: illegal instruction: the tile begins at coordinate %d along dimension %d; only loads may "
                "begin below 0",
                c[i], i);
        s.coordinates[i] = c[i];
    }
    shared_at(*me.block, src, s.bytes, 128, "TMA store", site);
    s.race_clock = tma_read(me, src - SHARED_START, s.bytes, site);
    if (!worker->later()) write_tile(*me.block, s);
    me.stores.push_back(std::move(s));
}

void bulk_commit() { self()->store_group++; }

void bulk_wait(int groups, bool read) {
    Thread& me = *self();
    size_t kept = 0;
    for (Store& s : me.stores) {
        bool covered = s.group < me.store_group - groups;
        if (covered && !s.read) read_tile(*me.block, s);
        if (covered) tma_read_waited(me, s.race_clock);
        if (covered && !read) {
            // An eager store has been written already; writing it again makes no difference unless someone wrote in
            // between.
            write_tile(*me.block, s);
            worker->counters.asynchronous++;
        } else {
            std::swap(me.stores[kept++], s);
        }
    }
    me.stores.resize(kept);
}

void stores_at_exit(Thread& t) {
    for (Store& s : t.stores) {
        if (!s.read || s.group == t.store_group)
            fail_at(s.site, "the thread exits with a TMA store in flight (no bulk wait_group covers its reads)");
        // The writes may be waited for by the end of the grid.
        write_tile(*t.block, s);
    }
    t.stores.clear();
}

}  // namespace emu

using namespace emu;

// Like cuTensorMapEncodeTiled, for elements of 1, 2 or 4 bytes; swizzle 0 is none, 1 32, 2 64, 3 128 bytes. Returns 0
// on success.
extern "C" int emu_tensor_map(CUtensorMap* out, uint32_t element, uint32_t rank, uint64_t start, const uint64_t* sizes,
                              const uint64_t* strides, const uint32_t* box, uint32_t swizzle) {
    TensorMap t{};
    if (rank < 1 || rank > 5 || swizzle > 3 || (element != 1 && element != 2 && element != 4) || (start & 15)) return 1;
    t.magic = MAGIC;
    t.start = start;
    t.rank = rank;
    t.element = element;
    t.swizzle = swizzle;
    for (uint32_t i = 0; i < rank; i++) {
        if (!sizes[i] || sizes[i] > 1ull << 32 || !box[i] || box[i] > 256) return 1;
        t.size[i] = sizes[i];
        t.box[i] = box[i];
        if (i == 0) continue;
        // The driver's documentation requires that each stride is a multiple of the one before, and that a dimension
        // spans all of the one before.
        uint64_t step = i == 1 ? element : strides[i - 2];
        if (strides[i - 1] & 15 || strides[i - 1] >= 1ull << 40) return 1;
        if (strides[i - 1] % step || strides[i - 1] < step * sizes[i - 1]) return 1;
        t.stride[i - 1] = strides[i - 1];
    }
    uint32_t inner = box[0] * element;
    if (inner & 15 || (swizzle && inner > 16u << swizzle)) return 1;
    memset(out, 0, sizeof *out);
    memcpy(out, &t, sizeof t);
    return 0;
}
