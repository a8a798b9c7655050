// Convolutions and linear layers as one implicit matrix product: rows are output pixels, columns output channels, the depth
// is taps by channels. Sources are read where they lie: stride, padding, nearest resize and the concatenation of two sources
// are part of the load, everything that follows the product is part of the store.
//
// A block of eight warps makes one tile of sums. Its depth passes through shared memory in stages of 64 (16-byte chunks,
// XOR-swizzled, free of bank conflicts), three or four of them in flight by cp.async; each warp holds its part of the tile in
// registers and feeds mma.m16n8k16 by ldmatrix. For every 64 of depth a block reads 128 (rows + columns) bytes, mostly from
// L2, for rows * columns * 64 multiply-adds. 128x160 is bound by the tensor cores of an A100 (1280 cycles for each
// stage, and 1120 for what passes through shared memory) and by the shared memory of an H100 (1024 and 1120); GeForce
// cards, with a quarter of the tensor cores, are bound by these in all tiles. Tiles of 64 rows and less are bound by L2
// elsewhere, those of 16 rows (time embeddings) by the weights' way from memory. The sums go through shared memory once
// more, so that residuals are read and results written 16 bytes at a time.
//
// Where one image has fewer tiles than the device has multiprocessors, the depth is split over blocks, which leave fp32 sums for
// `conv_finish` to add in order. Each sum is one chain of multiply-adds in the order of the depth, in steps of 16: no bit of it
// depends on the tile.
#include "epilogue.cuh"

struct ConvParams {
    const __half* sources[2];
    const __half* weight;  // [columns][kernel * kernel][depth]
    Epilogue after;
    float* partial;  // [splits][rows][pitch]
    uint64_t resize_y, resize_x;  // stored over seen size, times 2^32, rounded up: exact for sides below 2^16
    int32_t source_channels[2];
    int32_t depth;  // channels of both sources, filled up to a multiple of 8
    int32_t height, width;
    int32_t seen_height, seen_width;
    int32_t out_height, out_width;
    int32_t kernel, stride, pad;
    int32_t rows;           // of all images
    int32_t columns;        // of the product: twice the result's behind a gate
    int32_t splits, steps;  // stages of each split
};
LAYOUT(ConvParams, sources, weight, after, partial, resize_y, resize_x, source_channels, depth, height, width, seen_height,
       seen_width, out_height, out_width, kernel, stride, pad, rows, columns, splits, steps)

namespace {

constexpr int THREADS = 256;
constexpr int STEP = 64;                    // depth of a stage
constexpr int CHUNKS = STEP / 8;            // of 16 bytes in a row of it
constexpr int LANES = THREADS / CHUNKS;     // rows that all threads fetch at once, a chunk each
constexpr int ROW_BYTES = STEP * 2;
constexpr int BAND = 8;                     // tiles of rows that are made together, for the weights' sake

__device__ __forceinline__ int swizzled(int row, int chunk) { return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4); }

__device__ __forceinline__ int pitch_of(const ConvParams& p) { return (p.columns + 15) / 16 * 16; }

// Adds eight sums, or eight pairs of values and gates, which take turns.
__device__ __forceinline__ void add_sums(const float* from, bool gated, float (&x)[8], float (&gate)[8]) {
    float more[8];
    read8(from, 8, true, more);
    if (gated) {
        float last[8];
        read8(from + 8, 8, true, last);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[i] += more[2 * i], gate[i] += more[2 * i + 1];
            x[i + 4] += last[2 * i], gate[i + 4] += last[2 * i + 1];
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] += more[i];
    }
}

// A thread's chunk of the depth, which moves on by a stage at a time, and the pixels it is read from for each of the thread's
// rows of the tile.
template <int ROWS> struct Pixels {
    static constexpr int COUNT = (ROWS + LANES - 1) / LANES;
    int image[COUNT];   // first pixel of a row's image
    int corner[COUNT];  // where its first tap lies: y in the upper half, x in the lower
    int pixel[COUNT];   // under the tap; -1 in the padding and beyond the last row
    int ky, kx, channel;

    __device__ __forceinline__ void begin(const ConvParams& p, int first_row, int first_chunk) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int row = first_row + threadIdx.x / CHUNKS + i * LANES;
            const int size = p.out_height * p.out_width, at = row % size;
            image[i] = row / size * p.height * p.width;
            const int y = row < p.rows ? at / p.out_width * p.stride - p.pad : -p.kernel;
            corner[i] = y * 65536 + ((at % p.out_width * p.stride - p.pad) & 0xffff);
        }
        const int chunk = first_chunk + threadIdx.x % CHUNKS, chunks = p.depth / 8, tap = chunk / chunks;
        channel = chunk % chunks * 8, ky = tap / p.kernel, kx = tap % p.kernel;
        locate(p);
    }

    // Whether the depth goes this far: the last stage may not be full.
    __device__ __forceinline__ bool inside(const ConvParams& p) const { return ky < p.kernel; }

    __device__ __forceinline__ void advance(const ConvParams& p) {
        channel += STEP;
        if (channel < p.depth) return;
        do {
            channel -= p.depth;
            if (++kx == p.kernel) kx = 0, ky++;
        } while (channel >= p.depth);
        locate(p);
    }

    __device__ __forceinline__ void locate(const ConvParams& p) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int y = (corner[i] >> 16) + ky, x = int16_t(corner[i] & 0xffff) + kx;
            const bool in = inside(p) && y >= 0 && y < p.seen_height && x >= 0 && x < p.seen_width;
            const int stored_y = uint32_t(y) * p.resize_y >> 32, stored_x = uint32_t(x) * p.resize_x >> 32;
            pixel[i] = in ? image[i] + stored_y * p.width + stored_x : -1;
        }
    }

    // Fetches the thread's chunks of a stage: by 16 bytes at once, or number by number where a pixel is no whole number of chunks.
    template <bool VECTOR> __device__ __forceinline__ void fetch(const ConvParams& p, int stage) const {
        const int lane = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        const int c0 = p.source_channels[0], c1 = p.source_channels[1];
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int row = lane + i * LANES;
            if (ROWS % LANES != 0 && row >= ROWS) continue;
            if (VECTOR) {
                const bool first = channel < c0;
                const __half* source = first ? p.sources[0] : p.sources[1];
                const int64_t at = int64_t(pixel[i]) * (first ? c0 : c1) + (first ? channel : channel - c0);
                cp_async16(smem_u32(dyn_smem()) + stage + swizzled(row, chunk), pixel[i] < 0 ? source : source + at, pixel[i] >= 0);
            } else {
                Half8 numbers;
                __half* x = &numbers.pairs[0].x;
                for (int j = 0; j < 8; j++) {
                    const int c = channel + j;
                    x[j] = pixel[i] < 0 || c >= c0 + c1 ? to_half(0.0f)
                           : c < c0                     ? p.sources[0][int64_t(pixel[i]) * c0 + c]
                                                        : p.sources[1][int64_t(pixel[i]) * c1 + c - c0];
                }
                *reinterpret_cast<Half8*>(dyn_smem() + stage + swizzled(row, chunk)) = numbers;
            }
        }
    }
};

template <int ROWS, int COLUMNS, int WARPS_DOWN, int STAGES, bool VECTOR>
__device__ __forceinline__ void conv(const ConvParams& p) {
    constexpr int WARPS_ACROSS = THREADS / 32 / WARPS_DOWN;
    constexpr int WARP_ROWS = ROWS / WARPS_DOWN, WARP_COLUMNS = COLUMNS / WARPS_ACROSS;
    constexpr int MT = WARP_ROWS / 16, NT = WARP_COLUMNS / 8;
    constexpr int STAGE = (ROWS + COLUMNS) * ROW_BYTES;
    constexpr int PITCH = COLUMNS + 8;  // of the sums; eight more keep the rows of a fragment in different banks
    static_assert(MT * WARPS_DOWN * 16 == ROWS && NT * WARPS_ACROSS * 8 == COLUMNS, "warps do not cover the tile");
    static_assert(ROWS * PITCH * 4 <= STAGES * STAGE, "the sums do not fit");

    griddep_launch_dependents();
    // Tiles in bands of BAND by all columns, down each band first: blocks that run together share weights and pixels.
    const int tiles_down = (p.rows + ROWS - 1) / ROWS, tiles_across = (p.columns + COLUMNS - 1) / COLUMNS;
    const int band = blockIdx.x / (BAND * tiles_across), in_band = blockIdx.x % (BAND * tiles_across);
    const int band_rows = min(BAND, tiles_down - band * BAND);
    const int first_row = (band * BAND + in_band % band_rows) * ROWS, first_column = in_band / band_rows * COLUMNS;

    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int warp_row = warp / WARPS_ACROSS * WARP_ROWS, warp_column = warp % WARPS_ACROSS * WARP_COLUMNS;
    const uint32_t shared = smem_u32(dyn_smem());

    const int first_chunk = blockIdx.y * p.steps * CHUNKS;
    Pixels<ROWS> pixels;
    pixels.begin(p, first_row, first_chunk);
    const int depth = p.kernel * p.kernel * p.depth;
    int weight = (first_column + thread / CHUNKS) * depth + (first_chunk + thread % CHUNKS) * 8;

    auto fetch = [&](int slot) {
        pixels.template fetch<VECTOR>(p, slot * STAGE);
#pragma unroll
        for (int i = 0; i < (COLUMNS + LANES - 1) / LANES; i++) {
            const int column = thread / CHUNKS + i * LANES;
            if (COLUMNS % LANES != 0 && column >= COLUMNS) continue;
            const bool in = pixels.inside(p) && first_column + column < p.columns;
            const uint32_t to = shared + slot * STAGE + ROWS * ROW_BYTES + swizzled(column, thread % CHUNKS);
            cp_async16(to, p.weight + (in ? weight + i * LANES * depth : 0), in);
        }
        weight += STEP;
        pixels.advance(p);
    };

    griddep_wait();
    float sums[MT][NT][4] = {};
#pragma unroll 1
    for (int slot = 0; slot < STAGES - 1; slot++) {
        if (slot < p.steps) fetch(slot);
        cp_async_commit();
    }
    int slot = 0;
    for (int step = 0; step < p.steps; step++) {
        cp_async_wait<STAGES - 2>();
        // The stage has landed for all, and all are done with the one before it, into whose place the next goes.
        __syncthreads();
        if (step + STAGES - 1 < p.steps) fetch(slot == 0 ? STAGES - 1 : slot - 1);
        cp_async_commit();
        const uint32_t rows = shared + slot * STAGE, columns = rows + ROWS * ROW_BYTES;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // One ldmatrix a tile of eight columns: 32 of depth, two products' worth.
            uint32_t b[NT][4];
#pragma unroll
            for (int j = 0; j < NT; j++)
                ldmatrix_x4(b[j], columns + swizzled(warp_column + j * 8 + lane % 8, half * 4 + lane / 8));
#pragma unroll
            for (int k = 0; k < 2; k++) {
                uint32_t a[MT][4], part[NT][2];
#pragma unroll
                for (int i = 0; i < MT; i++)
                    ldmatrix_x4(a[i], rows + swizzled(warp_row + i * 16 + lane % 16, half * 4 + k * 2 + lane / 16));
#pragma unroll
                for (int j = 0; j < NT; j++) part[j][0] = b[j][2 * k], part[j][1] = b[j][2 * k + 1];
                mma_tile<MT, NT>(sums, a, part);
            }
        }
        slot = slot == STAGES - 1 ? 0 : slot + 1;
    }

    // The sums change hands: from fragments to eight neighbouring columns a thread. No copy is in flight any more.
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
    const bool whole = p.splits == 1, gated = p.after.activation == GEGLU;
    const int group = whole && gated ? 16 : 8, groups = COLUMNS / group;
    for (int i = thread; i < ROWS * groups; i += THREADS) {
        const int row = first_row + i / groups, column = first_column + i % groups * group;
        if (row >= p.rows || column >= p.columns) continue;
        const float* at = tile + (row - first_row) * PITCH + column - first_column;
        float x[8] = {}, gate[8] = {};
        add_sums(at, whole && gated, x, gate);
        if (whole) {
            finish(p.after, x, gate, row, gated ? column / 2 : column);
        } else {
            write8(p.partial + (size_t(blockIdx.y) * p.rows + row) * pitch_of(p) + column, 8, true, x);
        }
    }
}

}  // namespace

// Rows, columns, warps down the rows, stages, whether pixels are whole chunks; `resident` blocks a multiprocessor.
#define CONV(name, resident, ...)                                                                                        \
    KERNEL __launch_bounds__(THREADS, resident) name(const __grid_constant__ ConvParams p) { conv<__VA_ARGS__>(p); } \
    EXPORT(name)
CONV(conv_128x160, 1, 128, 160, 2, 4, true)
CONV(conv_128x128, 1, 128, 128, 2, 4, true)
CONV(conv_128x80, 2, 128, 80, 4, 3, true)
CONV(conv_64x160, 2, 64, 160, 2, 3, true)
CONV(conv_64x80, 2, 64, 80, 4, 4, true)
CONV(conv_64x64, 2, 64, 64, 2, 4, true)
CONV(conv_32x64, 2, 32, 64, 2, 4, true)
CONV(conv_16x64, 2, 16, 64, 1, 4, true)
CONV(conv_128x16, 2, 128, 16, 8, 3, true)
CONV(conv_64x64_odd, 2, 64, 64, 2, 4, false)
CONV(conv_16x64_odd, 2, 16, 64, 1, 4, false)

// Adds the splits' sums in order and does what follows a product: eight channels of a row a thread, memory bound.
KERNEL __launch_bounds__(256) conv_finish(const __grid_constant__ ConvParams p) {
    griddep_launch_dependents();
    griddep_wait();
    const int groups = (p.after.channels + 7) / 8;
    const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (i >= int64_t(p.rows) * groups) return;
    const int row = i / groups, channel = i % groups * 8, pitch = pitch_of(p);
    const bool gated = p.after.activation == GEGLU;
    const float* sums = p.partial + size_t(row) * pitch + (gated ? 2 * channel : channel);
    float x[8] = {}, gate[8] = {};
    for (int split = 0; split < p.splits; split++, sums += size_t(p.rows) * pitch) add_sums(sums, gated, x, gate);
    finish(p.after, x, gate, row, channel);
}
EXPORT(conv_finish)
