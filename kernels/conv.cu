// Convolutions and linear layers as one implicit GEMM: rows are output pixels, columns are output channels, and the
// depth is taps x channels. Sources are read in place: stride, padding, nearest-neighbour resize and the concatenation
// of two sources are part of the load, and everything that follows the product is part of the epilogue.
//
// A block of eight warps computes one tile. Its depth passes through shared memory in stages of 64 (16-byte chunks,
// XOR-swizzled, free of bank conflicts), three or four of them in flight by cp.async. Each warp holds its part of the
// tile as accumulators in registers and feeds mma.m16n8k16 by ldmatrix. The copies of a later stage are issued between
// the products of the current one, from pointers that advance by one stage: when all copies were issued first, an H100
// had no eligible warp in 68 % of cycles. Finally the accumulators pass through shared memory, so that residuals are
// read and results are written 16 bytes at a time.
//
// For every 64 of depth a block reads 128 (rows + columns) bytes, mostly from L2, for 64 * rows * columns
// multiply-adds. The cycles of one such stage are:
//
//   tile (of a warp)          tensor cores of an A100, an H100   shared memory (copies and ldmatrix)
//   128x256, 256x128 (64x64)       2048  1638                        1408
//   128x160 (64x40)                1280  1024                        1120
//   128x128 (64x32)                1024   819                        1024
//   128x80 (32x40)                  640   512                         784
//   64x160 (32x40)                  640   512                         800
//   64x80 (16x40)                   320   256                         592
//   64x64 (32x16)                   256   205                         512
//
// Bound: the greater of the two. GeForce cards, with a quarter of an A100's tensor-core rate, are bound by the tensor
// cores for all tiles; their 99 KiB of shared memory have no room for the tiles of the first three lines. On other
// cards tiles of 64 rows and less are bound by L2, and those of 16 rows (time embeddings) by the bandwidth at which
// weights come from memory.
//
// A 3x3 convolution of a source that is first upsampled by two equals four 2x2 convolutions of the source itself, one
// for each parity of the result's row and column. These are the phases of the product: 4/9 of the work
// (src/cuda/weights.rs sums the taps).
//
// Where one image has fewer tiles than the device has multiprocessors, the depth is split over several blocks, and the
// last of them to finish adds up the partial sums (split-K). Each part's sum is one chain of multiply-adds in the order
// of the depth, in steps of 16, so no bit of it depends on the tile.
#include "epilogue.cuh"
#include "splits.cuh"

struct ConvParams {
    const __half* sources[2];
    const __half* weight;  // [phases][columns][kernel * kernel][depth]
    Epilogue after;
    float4* partial;     // for split-K, see splits.cuh
    uint32_t* counters;  // likewise
    // Stored size over the size that the convolution sees, times 2^32, rounded up: exact for sides below 2^16.
    uint64_t resize_y, resize_x;
    int32_t source_channels[2];
    int32_t depth;  // channels of both sources, padded to a multiple of 8
    int32_t height, width;
    int32_t seen_height, seen_width;
    int32_t out_height, out_width;  // of one phase
    int32_t kernel, stride, pad;
    int32_t phases;         // 4 for an upsampled source, else 1
    int32_t rows;           // of all images, in one phase
    int32_t columns;        // of one phase's product; with GEGLU, twice the result's
    int32_t splits, steps;  // split-K parts, and stages in each part
    int32_t padding;
};
LAYOUT(ConvParams, sources, weight, after, partial, counters, resize_y, resize_x, source_channels, depth, height, width,
       seen_height, seen_width, out_height, out_width, kernel, stride, pad, phases, rows, columns, splits, steps,
       padding)

namespace {

constexpr int THREADS = 256;
constexpr int STEP = 64;                         // depth of a stage
constexpr int SLICES = STEP / 16;                // of a stage: the depth of one mma
constexpr int CHUNKS = STEP / 8;                 // 16-byte chunks in a row of a stage
constexpr int ROWS_PER_PASS = THREADS / CHUNKS;  // rows that all threads fetch in one pass, one chunk per thread
constexpr int ROW_BYTES = STEP * 2;
constexpr int BAND = 8;                          // row tiles that are computed together so that they share weights

__device__ __forceinline__ int swizzled(int row, int chunk) { return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4); }

// Reads eight adjacent sums, or eight pairs of a value and its gate, which alternate.
__device__ __forceinline__ void read_sums(const float* from, bool gated, float (&x)[8], float (&gate)[8]) {
    float low[8], high[8];
    read8(from, 8, true, low);
    if (gated) {
        read8(from + 8, 8, true, high);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[i] = low[2 * i], gate[i] = low[2 * i + 1];
            x[i + 4] = high[2 * i], gate[i + 4] = high[2 * i + 1];
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = low[i];
    }
}

// Position of a block's tile: its first row and column in the product of one phase.
struct Place {
    int row, column, phase;
};

// Tiles are ordered in bands of BAND row tiles by all column tiles, and within a band down the rows first: blocks that
// run at the same time share weights and pixels.
template <int ROWS, int COLUMNS> __device__ __forceinline__ Place place_of(const ConvParams& p, int tile) {
    const int tiles_down = (p.rows + ROWS - 1) / ROWS, tiles_of_columns = (p.columns + COLUMNS - 1) / COLUMNS;
    const int tiles_across = p.phases * tiles_of_columns;
    const int band = tile / (BAND * tiles_across), in_band = tile % (BAND * tiles_across);
    const int band_rows = min(BAND, tiles_down - band * BAND), group = in_band / band_rows;
    return {(band * BAND + in_band % band_rows) * ROWS, group % tiles_of_columns * COLUMNS, group / tiles_of_columns};
}

// Maps a row of a phase's product to its row of the result.
__device__ __forceinline__ int result_row(const ConvParams& p, int row, int phase) {
    if (p.phases == 1) return row;
    const int line = row / p.out_width, x = row % p.out_width;
    // Each line of pixels becomes two lines of the result, and each pixel two pixels in each of them.
    return (2 * line + phase / 2) * 2 * p.out_width + 2 * x + phase % 2;
}

// The part of the source that a thread fetches: one chunk of the depth, which advances by one stage at a time, and the
// pixels under it for each of the thread's rows of the tile.
template <int ROWS> struct Pixels {
    static constexpr int COUNT = (ROWS + ROWS_PER_PASS - 1) / ROWS_PER_PASS;
    int image[COUNT];   // first pixel of the row's image
    int corner[COUNT];  // position of the first tap: y in the upper half, x in the lower
    int pixel[COUNT];   // under the current tap; -1 in the padding and beyond the last row
    int ky, kx, channel;
    const unsigned char* from;  // the current channel in the first pixel of its source
    // Bytes per pixel of that source, and the first channel that belongs to the other source.
    int width, end;

    __device__ __forceinline__ void begin(const ConvParams& p, const Place& place, int first_chunk) {
        const int pad_y = p.pad - place.phase / 2, pad_x = p.pad - place.phase % 2;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int row = place.row + threadIdx.x / CHUNKS + i * ROWS_PER_PASS;
            const int size = p.out_height * p.out_width, at = row % size;
            image[i] = row / size * p.height * p.width;
            const int y = row < p.rows ? at / p.out_width * p.stride - pad_y : -p.kernel;
            corner[i] = y * 65536 + ((at % p.out_width * p.stride - pad_x) & 0xffff);
        }
        const int chunk = first_chunk + threadIdx.x % CHUNKS, chunks = p.depth / 8, tap = chunk / chunks;
        channel = chunk % chunks * 8, ky = tap / p.kernel, kx = tap % p.kernel;
        locate(p);
        choose_source(p);
    }

    // False beyond the end of the depth, since the last stage may be partly filled.
    __device__ __forceinline__ bool in_depth(const ConvParams& p) const { return ky < p.kernel; }

    // Advances to the next stage or, if not `more`, to the end of the depth, beyond which everything is zero. This
    // seldom takes more than two additions, since taps and sources span several stages.
    __device__ __forceinline__ void advance(const ConvParams& p, bool more) {
        channel += STEP, from += ROW_BYTES;
        if (channel < end && more) return;
        if (!more) ky = p.kernel;
        while (channel >= p.depth) {
            channel -= p.depth;
            if (++kx == p.kernel) kx = 0, ky++;
        }
        locate(p);
        choose_source(p);
    }

    __device__ __forceinline__ void locate(const ConvParams& p) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int y = (corner[i] >> 16) + ky, x = int16_t(corner[i] & 0xffff) + kx;
            const bool in = in_depth(p) && y >= 0 && y < p.seen_height && x >= 0 && x < p.seen_width;
            const int stored_y = uint32_t(y) * p.resize_y >> 32, stored_x = uint32_t(x) * p.resize_x >> 32;
            pixel[i] = in ? image[i] + stored_y * p.width + stored_x : -1;
        }
    }

    __device__ __forceinline__ void choose_source(const ConvParams& p) {
        const int c0 = p.source_channels[0];
        const bool first = channel < c0;
        from = reinterpret_cast<const unsigned char*>(first ? p.sources[0] + channel : p.sources[1] + (channel - c0));
        width = p.source_channels[!first] * 2, end = first ? c0 : p.depth;
    }

    // Fetches the thread's chunk of its row i to offset `to` in shared memory: 16 bytes at once, or, where the channels
    // of a pixel are not a whole number of chunks, four numbers at a time (latents have four channels) or one.
    template <bool VECTOR> __device__ __forceinline__ void fetch(const ConvParams& p, int i, int to) const {
        if constexpr (VECTOR) {
            cp_async16(smem_u32(dyn_smem()) + to, from + int64_t(pixel[i]) * width, pixel[i] >= 0);
        } else {
            const int c0 = p.source_channels[0], c1 = p.source_channels[1];
            Half8 numbers;
            auto number = [&](int c) {
                return c < c0 ? p.sources[0] + int64_t(pixel[i]) * c0 + c
                              : p.sources[1] + int64_t(pixel[i]) * c1 + c - c0;
            };
            if (c0 % 4 == 0 && c1 % 4 == 0) {
                uint2* quads = reinterpret_cast<uint2*>(&numbers.word);
                for (int j = 0; j < 2; j++) {
                    const int c = channel + 4 * j;
                    quads[j] = uint2{};
                    if (pixel[i] >= 0 && c < c0 + c1) quads[j] = *reinterpret_cast<const uint2*>(number(c));
                }
            } else {
                __half* x = &numbers.pairs[0].x;
                for (int j = 0; j < 8; j++) {
                    const int c = channel + j;
                    x[j] = pixel[i] >= 0 && c < c0 + c1 ? *number(c) : to_half(0.0f);
                }
            }
            *reinterpret_cast<Half8*>(dyn_smem() + to) = numbers;
        }
    }
};

// The parameters are explained at the kernels below.
template <int ROWS_, int COLUMNS_, int WARPS_DOWN_, int STAGES_, bool VECTOR_> struct Tile {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, WARPS_DOWN = WARPS_DOWN_, STAGES = STAGES_;
    static constexpr bool VECTOR = VECTOR_;
    // Bytes of a stage, pixels before weights, and of all shared memory.
    static constexpr int STAGE = (ROWS + COLUMNS) * ROW_BYTES, SHARED = STAGES * STAGE;
    static constexpr int THREADS = ::THREADS;
};

template <class T> __device__ __forceinline__ void conv(const ConvParams& p) {
    constexpr int ROWS = T::ROWS, COLUMNS = T::COLUMNS, WARPS_DOWN = T::WARPS_DOWN, STAGES = T::STAGES;
    constexpr bool VECTOR = T::VECTOR;
    constexpr int WARPS_ACROSS = THREADS / 32 / WARPS_DOWN;
    constexpr int WARP_ROWS = ROWS / WARPS_DOWN, WARP_COLUMNS = COLUMNS / WARPS_ACROSS;
    constexpr int MT = WARP_ROWS / 16, NT = WARP_COLUMNS / 8;
    // Row pitch of the accumulators in shared memory; eight more than COLUMNS keep a fragment's rows in different
    // banks.
    constexpr int PITCH = COLUMNS + 8;
    // Chunks of a stage that a thread fetches: OF_PIXELS of pixels, then those of weights.
    constexpr int OF_PIXELS = Pixels<ROWS>::COUNT, PARTS = OF_PIXELS + (COLUMNS + ROWS_PER_PASS - 1) / ROWS_PER_PASS;
    static_assert(MT * WARPS_DOWN * 16 == ROWS && NT * WARPS_ACROSS * 8 == COLUMNS, "warps do not cover the tile");
    static_assert(ROWS * PITCH * 4 <= T::SHARED, "the sums do not fit");

    griddep_launch_dependents();
    const Place place = place_of<ROWS, COLUMNS>(p, blockIdx.x);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int warp_row = warp / WARPS_ACROSS * WARP_ROWS, warp_column = warp % WARPS_ACROSS * WARP_COLUMNS;
    const uint32_t shared = smem_u32(dyn_smem());

    const int first_chunk = blockIdx.y * p.steps * CHUNKS;
    Pixels<ROWS> pixels;
    pixels.begin(p, place, first_chunk);
    const int depth = p.kernel * p.kernel * p.depth;
    // The thread's first chunk of weights, and the number of columns from there on.
    const int column = place.column + thread / CHUNKS, columns_left = p.columns - column;
    const __half* weight =
        p.weight + int64_t(place.phase * p.columns + column) * depth + (first_chunk + thread % CHUNKS) * 8;

    // Fetches part `part` of the PARTS of a stage: first the pixels, then the weights.
    const int place_in_stage = swizzled(thread / CHUNKS, thread % CHUNKS);
    auto fetch = [&](int part, int slot) {
        const bool of_pixels = part < OF_PIXELS;
        const int i = of_pixels ? part : part - OF_PIXELS, size = of_pixels ? ROWS : COLUMNS;
        if ((i + 1) * ROWS_PER_PASS > size && thread / CHUNKS + i * ROWS_PER_PASS >= size) return;
        const int to = slot * T::STAGE + place_in_stage + ((of_pixels ? 0 : ROWS) + i * ROWS_PER_PASS) * ROW_BYTES;
        if (of_pixels) {
            pixels.template fetch<VECTOR>(p, i, to);
        } else {
            const bool in = pixels.in_depth(p) && i * ROWS_PER_PASS < columns_left;
            cp_async16(shared + to, weight + int64_t(ROWS_PER_PASS * depth) * i, in);
        }
    };
    auto advance = [&](bool more) {
        weight += STEP;
        pixels.advance(p, more);
    };

    griddep_wait();
    float sums[MT][NT][4] = {};
#pragma unroll 1
    for (int slot = 0; slot < STAGES - 1; slot++) {
        if (slot < p.steps) {
#pragma unroll
            for (int part = 0; part < PARTS; part++) fetch(part, slot);
            advance(slot + 1 < p.steps);
        }
        cp_async_commit();
    }
    // The addresses that this lane supplies to ldmatrix for the first slice of a stage. Each further slice is two
    // chunks further on; because of the swizzle that offset is applied by exclusive or instead of addition.
    const int rows_at = swizzled(warp_row + lane % 16, lane / 16);
    const int columns_at = ROWS * ROW_BYTES + swizzled(warp_column + lane % 8, lane / 8);
    int slot = 0;
    for (int step = 0; step < p.steps; step++) {
        cp_async_wait<STAGES - 2>();
        // The stage has landed for all threads, and all are done with the stage before it, whose slot is filled next.
        __syncthreads();
        const int next = slot == 0 ? STAGES - 1 : slot - 1;
        const uint32_t rows = shared + slot * T::STAGE + rows_at, columns = shared + slot * T::STAGE + columns_at;
        uint32_t b[NT][4];
#pragma unroll
        for (int k = 0; k < SLICES; k++) {
            // One ldmatrix per tile of eight columns loads a depth of 32, enough for two mmas.
#pragma unroll
            for (int j = 0; j < NT && k % 2 == 0; j++)
                ldmatrix_x4(b[j], (columns ^ k * 32) + j * 8 * ROW_BYTES);
            uint32_t a[MT][4], of_k[NT][2];
#pragma unroll
            for (int i = 0; i < MT; i++)
                ldmatrix_x4(a[i], (rows ^ k * 32) + i * 16 * ROW_BYTES);
#pragma unroll
            for (int j = 0; j < NT; j++) of_k[j][0] = b[j][k % 2 * 2], of_k[j][1] = b[j][k % 2 * 2 + 1];
            mma_tile<MT, NT>(sums, a, of_k);
            // Issue copies of a later stage while the tensor cores are busy.
#pragma unroll
            for (int part = PARTS * k / SLICES; part < PARTS * (k + 1) / SLICES; part++)
                fetch(part, next);
        }
        advance(step + STAGES < p.steps);
        cp_async_commit();
        slot = slot == STAGES - 1 ? 0 : slot + 1;
    }
    // Only the zeros beyond the end of the depth can still be in flight.
    cp_async_wait<0>();

    if (p.splits > 1) {
        float(&flat)[MT * NT * 4] = reinterpret_cast<float(&)[MT * NT * 4]>(sums);
        if (!add_splits<MT * NT>(flat, p.partial, p.counters, blockIdx.x, p.splits, blockIdx.y, dyn_smem())) return;
    }
    // Transpose the accumulators through shared memory: from fragments to eight adjacent columns per thread.
    __syncthreads();
    float* tile = reinterpret_cast<float*>(dyn_smem());
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++) {
            float* at = tile + (warp_row + i * 16 + lane / 4) * PITCH + warp_column + j * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(at) = make_float2(sums[i][j][0], sums[i][j][1]);
            *reinterpret_cast<float2*>(at + 8 * PITCH) = make_float2(sums[i][j][2], sums[i][j][3]);
        }
    __syncthreads();
    const bool gated = p.after.activation == GEGLU;
    const int group = gated ? 16 : 8, groups = COLUMNS / group;
    for (int i = thread; i < ROWS * groups; i += THREADS) {
        const int row = place.row + i / groups, column = place.column + i % groups * group;
        if (row >= p.rows || column >= p.columns) continue;
        float x[8], gate[8] = {};
        read_sums(tile + i / groups * PITCH + i % groups * group, gated, x, gate);
        finish(p.after, x, gate, result_row(p, row, place.phase), gated ? column / 2 : column);
    }
}

}  // namespace

// The name; the number of blocks that must fit on a multiprocessor (`resident`); then rows, columns, warps along the
// rows, stages, and whether pixels are whole numbers of chunks (VECTOR).
#define CONV(name, resident, ...)                                                            \
    KERNEL __launch_bounds__(THREADS, resident) name(const __grid_constant__ ConvParams p) { \
        conv<Tile<__VA_ARGS__>>(p);                                                          \
    }                                                                                        \
    EXPORT_TILE(name, resident, Tile<__VA_ARGS__>)
CONV(conv_128x256, 1, 128, 256, 2, 3, true)
CONV(conv_256x128, 1, 256, 128, 4, 3, true)
CONV(conv_128x160, 1, 128, 160, 2, 4, true)
CONV(conv_128x128, 1, 128, 128, 2, 4, true)
CONV(conv_128x80, 2, 128, 80, 4, 3, true)
CONV(conv_64x160, 2, 64, 160, 2, 3, true)
CONV(conv_64x80, 2, 64, 80, 4, 4, true)
CONV(conv_64x64, 2, 64, 64, 2, 4, true)
CONV(conv_32x64, 3, 32, 64, 2, 4, true)
CONV(conv_16x64, 4, 16, 64, 1, 4, true)
CONV(conv_128x16, 3, 128, 16, 8, 3, true)
CONV(conv_64x64_odd, 2, 64, 64, 2, 4, false)
CONV(conv_16x64_odd, 3, 16, 64, 1, 4, false)
