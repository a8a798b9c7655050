// Convolutions of stride 1 and linear layers for sm_90a: the implicit matrix product of conv.cu, with tiles that TMA
// fetches and wgmma multiplies. Empty for other architectures, whose products are conv.cu's.
//
// A tile is a rectangle of pixels, 128 in all, by COLUMNS output channels. A block has three warpgroups: one thread of
// the last fetches, the first two multiply 64 pixels each, or all of every second tile (_pingpong), so that one stores
// while the other multiplies. The depth, taps by channels, passes through a ring of stages of 64. For each stage TMA
// brings the tile's pixels as they lie under the tap, the rectangle moved by it. What lies outside the image comes as
// zeros, so that padding costs nothing, and two sources are two tensor maps. Blocks are persistent: while a tile's
// results are stored, the next tile's first stages are fetched.
//
// A 3x3 convolution of a source that is doubled first is four of 2x2 on the source itself, one for each parity of the
// result's row and column, whose results lie two pixels apart: 4/9 of the work (src/cuda/weights.rs sums the taps).
//
//   COLUMNS  stages  shared memory (KiB)  cycles of a stage: tensor cores, and L2 at 60 bytes a cycle
//     80       6        180                 320  443
//    128       5        196                 512  546
//    160       5        225                 640  614
//    256       3        214                1024  819
//
// Bound: the tensor cores from 160 columns on (2048 multiply-adds a cycle and multiprocessor), L2 below. Measured on an
// H200: 600 to 730 TFLOP/s of 3x3 convolutions with 45 stages and more, 715 of 8192 x 8192 x 8192.
//
// What the epilogue needs of memory, the last warpgroup's other three warps bring to shared memory a tile or two ahead:
// two numbers for each column and each row. Where everything waits for memory at a tile's end, that takes as long as 20
// stages.
//
// The 1x1 convolution of a resnet's sources that is added to its second convolution is more of that one's depth, with
// two tensor maps and a weight of its own: its result is neither written nor read.
//
// Where one image has fewer tiles than the device has multiprocessors, the depth is split over blocks. Each leaves its
// sums in memory and counts itself. The last to come adds all of them, in the order of the depth and not in that of
// coming.
//
// Where group norms read the result, the epilogue leaves them its moments, from the staging memory: 40 loads of 4 bytes
// a thread for units of 10 channels, some 400 cycles a tile, instead of a kernel that reads the whole result again.
//
// Where a layer norm stands between two products of pixels by themselves, it has no kernel. Its scale and shift are in
// the second product's weights (weights.cu). The first product leaves moments of each row's units of 80 or 64 channels:
// twice ten loads of 16 bytes a thread. The second one multiplies the rows as they are; each row's mean and deviation
// come of these moments, at most 128 bytes. Then W' x becomes (W' x - mean S) / deviation + T, in fp32, so that the
// normalised row is never rounded.
//
// Each sum is one chain of products of 16 in the order of the depth: no bit depends on the tile. It is not the chain of
// conv.cu's mma.sync, whose instruction rounds elsewhere, so that the host chooses between the two by one image's shape
// alone.
#include "epilogue.cuh"
#include "splits.cuh"

struct ConvHopperParams {
    CUtensorMap sources[2];  // {channels, width, height, images}, in boxes of 64 channels by the rectangle
    // {depth, phases * columns}, in boxes of 64 by COLUMNS. Behind a gate, where rows are values and gates in turns, it
    // is {depth, value or gate, channels}, in boxes of 64 by 1 by COLUMNS / 2.
    CUtensorMap weight;
    CUtensorMap out[4];  // of each phase, as the sources, in boxes of one span of channels by half the rectangle
    CUtensorMap residual;  // likewise; not read if there is none
    // A 1x1 convolution whose result is added, of the same pixels: more depth. As the above.
    CUtensorMap added_sources[2], added_weight;
    Epilogue after;
    float4* partial;  // see splits.cuh
    uint32_t* counters;  // likewise
    // For group norms that read the result: mean and squared deviations of `unit_channels` channels in 64 pixels,
    // [images][units of channels][phases][pixel_units]. May be missing.
    // For layer norms, which have units of one pixel, [pixels of all images][units of channels].
    float2* moments;
    const float* added_bias;  // may be missing
    // What such a product left of the first source's rows, if this one normalises them; else null.
    const float2* source_moments;
    int32_t height, width, images;
    int32_t log_width, log_height;  // of the rectangle: log2; what is left of 128 are images
    int32_t across_image, down_image;  // rectangles that cover an image
    // Tiles of the product: rectangles of all images, and groups of columns of all phases.
    int32_t tiles_down, tiles_across;
    int32_t columns, tiles_of_columns;  // of one phase
    int32_t blocks[2];  // stages of one tap, by source
    int32_t added_blocks[2];
    int32_t kernel;
    int32_t splits, steps;  // of the depth, and stages of each split
    int32_t unit_pixels, unit_channels, pixel_units;  // of `moments`
    int32_t source_units;  // of a row, in `source_moments`
    float source_eps;  // what the layer norm adds to the variance
    int32_t padding[7];
};
LAYOUT(ConvHopperParams, sources, weight, out, residual, added_sources, added_weight, after, partial, counters, moments,
       added_bias, source_moments, height, width, images, log_width, log_height, across_image, down_image, tiles_down,
       tiles_across, columns, tiles_of_columns, blocks, added_blocks, kernel, splits, steps, unit_pixels, unit_channels,
       pixel_units, source_units, source_eps, padding)

namespace conv_hopper {

constexpr int ROWS = 128;
constexpr int CONSUMERS = SUMMERS;  // threads that multiply
constexpr int THREADS = CONSUMERS + 128;
constexpr int HELPERS = 96;  // threads of the last warpgroup behind the fetching warp
constexpr int STEP = 64;  // depth of a stage: one span of 128 bytes
constexpr int BAND = 8;  // rectangles that are made together, for the weights' sake

template <int COLUMNS_, int STAGES_, bool GATED_, bool PINGPONG_> struct Tile {
    static constexpr int COLUMNS = COLUMNS_, STAGES = STAGES_;
    static constexpr bool GATED = GATED_, PINGPONG = PINGPONG_;
    // Of a warpgroup: 64 pixels of a tile each, and warps that share a tile.
    static constexpr int HALVES = PINGPONG ? 2 : 1, WARPS = PINGPONG ? 4 : 8;
    static constexpr int A = ROWS * STEP * 2, B = COLUMNS * STEP * 2, STAGE = A + B;
    // Of the result: columns of a tile, and how many eights of them, channels of a box, bytes of a span, boxes, bytes
    // of the 64 pixels of a warpgroup.
    static constexpr int OUT = GATED ? COLUMNS / 2 : COLUMNS, CHUNKS = OUT / 8;
    static constexpr int BOX = OUT % 64 == 0 ? 64 : OUT % 32 == 0 ? 32 : 16, SPAN = BOX * 2, BOXES = OUT / BOX;
    static constexpr int PIECE = 64 * OUT * 2;
    // Offsets in shared memory. Operands are for two tiles: those of columns, then those of rows.
    static constexpr int STAGING = STAGES * STAGE, BARRIERS = STAGING + 2 * PIECE;
    static constexpr int FULL = BARRIERS, EMPTY = FULL + 8 * STAGES, ARRIVED = EMPTY + 8 * STAGES;
    static constexpr int OPERANDS_FULL = ARRIVED + 16, OPERANDS_EMPTY = OPERANDS_FULL + 16, TICKET = OPERANDS_EMPTY + 16;
    static constexpr int OPERANDS = BARRIERS + 256, OPERANDS_BYTES = (COLUMNS + ROWS) * 8;
};

// Where a tile lies: its rectangle among the source's pixels, its first column, and 2 * row parity + column parity of
// its results where the source is doubled.
struct Place {
    int x, y, image, column, phase;
};

// Tiles in bands of BAND rectangles by all columns, down each band first: blocks that run together share weights and
// pixels.
template <class T> PTX_FN Place place_of(const ConvHopperParams& p, int tile) {
    int band = tile / (BAND * p.tiles_across), in_band = tile % (BAND * p.tiles_across);
    int rows = min(BAND, p.tiles_down - band * BAND);
    int rectangle = band * BAND + in_band % rows, rest = rectangle / p.across_image;
    int images = ROWS >> (p.log_width + p.log_height), group = in_band / rows;
    return {rectangle % p.across_image << p.log_width, rest % p.down_image << p.log_height,
            rest / p.down_image * images, group % p.tiles_of_columns * T::COLUMNS, group / p.tiles_of_columns};
}

template <int COLUMNS> PTX_FN void multiply(float (&d)[COLUMNS / 2], uint64_t a, uint64_t b, int add) {
    if constexpr (COLUMNS == 80) wgmma_m64n80k16<0>(d, a, b, add);
    if constexpr (COLUMNS == 128) wgmma_m64n128k16<0>(d, a, b, add);
    if constexpr (COLUMNS == 160) wgmma_m64n160k16<0>(d, a, b, add);
    if constexpr (COLUMNS == 256) wgmma_m64n256k16<0>(d, a, b, add);
}

// The fetching thread: all stages of all of the block's tiles, as fast as the ring has room. The weights of the first
// stages, which fill the ring once, are on their way before the launches before this one are over.
template <class T> PTX_FN void produce(const ConvHopperParams& p, uint32_t shared) {
    int units = p.tiles_down * p.tiles_across * p.splits, blocks = p.blocks[0] + p.blocks[1];
    int stages = blocks * p.kernel * p.kernel, all = stages + p.added_blocks[0] + p.added_blocks[1];
    auto fetch_weights = [&](const Place& at, int step, int slot) {
        uint32_t full = shared + T::FULL + 8 * slot, to = shared + slot * T::STAGE + T::A;
        mbar_expect_tx(full, T::STAGE);
        if (T::GATED) {
            // A tile's values, then their gates.
            tma_load_3d(to, &p.weight, full, step * STEP, 0, at.column / 2);
            tma_load_3d(to + T::B / 2, &p.weight, full, step * STEP, 1, at.column / 2);
        } else if (step < stages) {
            tma_load_2d(to, &p.weight, full, step * STEP, at.phase * p.columns + at.column);
        } else {
            tma_load_2d(to, &p.added_weight, full, (step - stages) * STEP, at.column);
        }
    };
    int start = blockIdx.x % p.splits * p.steps;
    int early = min(T::STAGES, min(p.steps, all - start));
    for (int i = 0; i < early; i++) fetch_weights(place_of<T>(p, blockIdx.x / p.splits), start + i, i);
    griddep_wait();
    int slot = 0, parity = 1;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
        Place at = place_of<T>(p, unit / p.splits);
        int first = unit % p.splits * p.steps, last = min(first + p.steps, all);
        int tap = first / blocks, block = first % blocks, ky = tap / p.kernel, kx = tap % p.kernel;
        // Odd rows of a doubled source see its own row and the next, even ones that before.
        int pad_x = p.kernel / 2 - at.phase % 2, pad_y = p.kernel / 2 - at.phase / 2;
        for (int step = first; step < last; step++) {
            if (early > 0) {
                early--;
            } else {
                mbar_wait(shared + T::EMPTY + 8 * slot, parity);
                fetch_weights(at, step, slot);
            }
            uint32_t full = shared + T::FULL + 8 * slot, to = shared + slot * T::STAGE;
            if (step < stages) {
                bool second = block >= p.blocks[0];
                int channel = (second ? block - p.blocks[0] : block) * STEP;
                tma_load_4d(to, &p.sources[second], full, channel, at.x + kx - pad_x, at.y + ky - pad_y, at.image);
                if (++block == blocks) {
                    block = 0;
                    if (++kx == p.kernel) kx = 0, ky++;
                }
            } else {
                int added = step - stages;
                bool second = added >= p.added_blocks[0];
                int channel = (second ? added - p.added_blocks[0] : added) * STEP;
                tma_load_4d(to, &p.added_sources[second], full, channel, at.x, at.y, at.image);
            }
            if (++slot == T::STAGES) slot = 0, parity ^= 1;
        }
    }
}

// What the epilogue subtracts of a column for each unit of a row's mean, and what it adds: S of a folded layer norm and
// its T with the bias.
template <class T> PTX_FN float2 column_operands(const ConvHopperParams& p, const Place& at, int column) {
    const Epilogue& e = p.after;
    int part = column / T::OUT, channel = at.column / (T::GATED ? 2 : 1) + column % T::OUT;
    if (channel >= e.channels) return {};
    // Behind a gate S and T of a value and of its gate are neighbours, whereas the gates' bias lies behind the values'.
    float2 folded = e.folded ? e.folded[T::GATED ? 2 * channel + part : channel] : float2{};
    float bias = e.bias ? e.bias[part * e.channels + channel] : 0.0f;
    if (p.added_bias) bias += p.added_bias[channel];
    return {folded.x, fmaf(e.gain, folded.y, e.bias_gain * bias)};
}

// The mean that a folded layer norm takes from a row, and what it multiplies by: the inverse deviation and the gain.
// They come of the moments of the row's units, in one pass over them, eight loads at a time: about the first unit's
// mean, which is one of those summed, as in norm.cu.
PTX_FN float2 row_operands(const ConvHopperParams& p, int row) {
    constexpr int TOGETHER = 8;
    if (!p.source_moments || row >= p.width) return {0.0f, p.after.gain};
    const float2* units = p.source_moments + int64_t(row) * p.source_units;
    float pivot = 0.0f, sum = 0.0f, between = 0.0f, within = 0.0f;
    for (int first = 0; first < p.source_units; first += TOGETHER) {
        float2 unit[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) unit[i] = first + i < p.source_units ? units[first + i] : float2{};
        if (first == 0) pivot = unit[0].x;
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            float off = first + i < p.source_units ? unit[i].x - pivot : 0.0f;
            sum += off, between = fmaf(off, off, between), within += unit[i].y;
        }
    }
    float count = float(p.source_units), mean = sum / count;
    // `within` is of all of a unit's channels, as many as make the row.
    float variance = within / float(p.blocks[0] * STEP) + fmaxf(between / count - mean * mean, 0.0f);
    return {pivot + mean, p.after.gain * rsqrtf(variance + p.source_eps)};
}

// The helping threads: they fetch what the epilogues of the block's tiles need of memory, a tile or two ahead.
template <class T> PTX_FN void prepare_operands(const ConvHopperParams& p, uint32_t shared) {
    int thread = threadIdx.x - (THREADS - HELPERS), units = p.tiles_down * p.tiles_across * p.splits;
    if (thread == 0) {
        tma_prefetch(&p.sources[0]);
        if (p.blocks[1] > 0) tma_prefetch(&p.sources[1]);
        if (p.after.residual) tma_prefetch(&p.residual);
        for (int phase = 0; phase < p.tiles_across / p.tiles_of_columns; phase++) tma_prefetch(&p.out[phase]);
    }
    griddep_wait();
    int slot = 0, parity = 1;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
        Place at = place_of<T>(p, unit / p.splits);
        float2* columns = reinterpret_cast<float2*>(dyn_smem() + T::OPERANDS + slot * T::OPERANDS_BYTES);
        mbar_wait(shared + T::OPERANDS_EMPTY + 8 * slot, parity);
        for (int i = thread; i < T::COLUMNS; i += HELPERS) columns[i] = column_operands<T>(p, at, i);
        for (int i = thread; i < ROWS; i += HELPERS) columns[T::COLUMNS + i] = row_operands(p, at.x + i);
        mbar_arrive(shared + T::OPERANDS_FULL + 8 * slot);
        slot ^= 1;
        if (slot == 0) parity ^= 1;
    }
}

// Bias and folded layer norm: sums become (sum - mean S) gain / deviation + T and bias.
template <class T>
PTX_FN void add_operands(float (&d)[T::COLUMNS / 2], const float2* columns, const float2 (&rows)[2]) {
#pragma unroll
    for (int chunk = 0; chunk < T::COLUMNS / 8; chunk++) {
        float4 pair = *reinterpret_cast<const float4*>(columns + chunk * 8 + threadIdx.x % 4 * 2);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float* sums = d + chunk * 4 + h * 2;
            sums[0] = fmaf(fmaf(-rows[h].x, pair.x, sums[0]), rows[h].y, pair.y);
            sums[1] = fmaf(fmaf(-rows[h].x, pair.z, sums[1]), rows[h].y, pair.w);
        }
    }
}

// The pixel among all images' that is a row of a tile; -1 outside.
PTX_FN int pixel_of(const ConvHopperParams& p, const Place& at, int row) {
    int x = at.x + (row & ((1 << p.log_width) - 1)), y = at.y + (row >> p.log_width & ((1 << p.log_height) - 1));
    int image = at.image + (row >> (p.log_width + p.log_height));
    return x < p.width && y < p.height && image < p.images ? (image * p.height + y) * p.width + x : -1;
}

// Adds the rows of the images that a thread's two pixels, eight rows of the tile apart, are of.
template <class T>
PTX_FN void add_per_image(const ConvHopperParams& p, float (&d)[T::COLUMNS / 2], const Place& at, int row, int first) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        // Where pixels are read by themselves, all images are one to TMA.
        int image = max(pixel_of(p, at, row + 8 * h), 0) / p.after.pixels;
        const __half* from = p.after.per_image + int64_t(image) * p.after.per_image_width + first;
#pragma unroll
        for (int chunk = 0; chunk < T::CHUNKS; chunk++) {
            float2 more = {};
            if (first + chunk * 8 < p.after.channels)
                more = __half22float2(*reinterpret_cast<const __half2*>(from + chunk * 8));
            d[chunk * 4 + h * 2] += more.x, d[chunk * 4 + h * 2 + 1] += more.y;
        }
    }
}

// Applies an activation to all of a thread's sums.
template <int SUMS, class F> PTX_FN void apply(float (&d)[SUMS], F activation) {
#pragma unroll
    for (int i = 0; i < SUMS; i++) d[i] = activation(d[i]);
}

template <int SUMS> PTX_FN void activate(float (&d)[SUMS], int activation) {
    if (activation == SILU || activation == QUICK_GELU) {
        float slope = activation == SILU ? 1.0f : 1.702f;
        apply(d, [=](float x) { return x * sigmoid(slope * x); });
    } else if (activation == GELU) {
        apply(d, [](float x) { return gelu(x); });
    }
}

// A half of a tile's rectangle, 64 of the 128 pixels.
PTX_FN Place piece_of(const ConvHopperParams& p, const Place& at, int half) {
    int row = half * 64;
    return {at.x + (row & ((1 << p.log_width) - 1)), at.y + (row >> p.log_width & ((1 << p.log_height) - 1)),
            at.image + (row >> (p.log_width + p.log_height)), at.column, at.phase};
}

// By the thread that stores: waits until its last store has read the staging memory, and fetches the residual there.
template <class T> PTX_FN void prepare_staging(const ConvHopperParams& p, const Place& at, uint32_t shared, int half) {
    tma_store_wait<0>();
    if (!p.after.residual) return;
    int group = threadIdx.x / 128;
    uint32_t staging = shared + T::STAGING + group * T::PIECE, arrived = shared + T::ARRIVED + 8 * group;
    Place corner = piece_of(p, at, half);
    mbar_expect_tx(arrived, T::PIECE);
#pragma unroll
    for (int box = 0; box < T::BOXES; box++)
        tma_load_4d(staging + box * 64 * T::SPAN, &p.residual, arrived, corner.column + box * T::BOX, corner.x,
                    corner.y, corner.image);
}

// The second result, RespoDiff's, which is seldom wanted.
template <class T>
PTX_FN void store_shifted(const ConvHopperParams& p, const float (&d)[T::COLUMNS / 2], const Place& at, int row,
                          int first) {
    const Epilogue& e = p.after;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int pixel = pixel_of(p, at, row + 8 * h), unshifted = e.first_shifted * e.pixels;
        if (pixel < 0) continue;
        __half* to = e.shifted + int64_t(pixel) * e.channels + first;
        const __half* shift = e.shift + int64_t(pixel - unshifted) * e.channels + first;
#pragma unroll
        for (int chunk = 0; chunk < T::CHUNKS; chunk++) {
            if (first + chunk * 8 >= e.channels) break;
            float2 x = make_float2(d[chunk * 4 + h * 2], d[chunk * 4 + h * 2 + 1]);
            if (pixel >= unshifted) {
                float2 more = __half22float2(*reinterpret_cast<const __half2*>(shift + chunk * 8));
                x.x += more.x, x.y += more.y;
            }
            *reinterpret_cast<__half2*>(to + chunk * 8) = to_halves(x.x, x.y);
        }
    }
}

PTX_FN float sum_of(const float (&x)[8]) {
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// How a row's 16-byte chunks change places in the staging memory.
template <class T> PTX_FN int twist_of(int row) {
    return T::SPAN == 128 ? row % 8 : T::SPAN == 64 ? row / 2 % 4 : row / 4 % 2;
}

// Moments of the warpgroup's results as they are stored, from the staging memory. Eight lanes share a unit of channels,
// and take every eighth of the 64 pixels. Squares are taken about the unit's first number, as in norm.cu.
template <class T> PTX_FN void store_moments(const ConvHopperParams& p, const Place& at, int half) {
    Place corner = piece_of(p, at, half);
    if (corner.x >= p.width || corner.y >= p.height || corner.image >= p.images) return;
    // The warpgroup's 64 pixels are a rectangle of one image, whose number among all of them this is.
    int log_width = min(p.log_width, 6), log_height = 6 - log_width;
    int piece = ((corner.image * p.height + corner.y) >> log_height) * (p.width >> log_width);
    piece += corner.x >> log_width;
    int image = piece / p.pixel_units, lane = threadIdx.x % 8;
    uint32_t lanes = 0xffu << threadIdx.x % 32 / 8 * 8;
    const unsigned char* staging = dyn_smem() + T::STAGING + threadIdx.x / 128 * T::PIECE;
    auto pair_at = [&](int row, int channel) {
        int chunk = channel / 8, in_box = chunk % (T::BOX / 8) ^ twist_of<T>(row);
        int place = chunk / (T::BOX / 8) * 64 * T::SPAN + row * T::SPAN + in_box * 16 + channel % 8 * 2;
        return __half22float2(*reinterpret_cast<const __half2*>(staging + place));
    };
    for (int unit = threadIdx.x % 128 / 8; unit < T::OUT / p.unit_channels; unit += 16) {
        int first = unit * p.unit_channels;
        if (at.column + first >= p.after.channels) break;
        float pivot = pair_at(0, first).x, sum = 0.0f, squares = 0.0f;
        for (int channel = first; channel < first + p.unit_channels; channel += 2) {
#pragma unroll
            for (int row = 0; row < 64; row += 8) {
                float2 x = pair_at(row + lane, channel);
                x.x -= pivot, x.y -= pivot;
                sum += x.x + x.y;
                squares = fmaf(x.x, x.x, fmaf(x.y, x.y, squares));
            }
        }
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) {
            sum += __shfl_xor_sync(lanes, sum, offset);
            squares += __shfl_xor_sync(lanes, squares, offset);
        }
        float mean = sum / (64 * p.unit_channels);
        int64_t place = int64_t(image) * (p.after.channels / p.unit_channels) + (at.column + first) / p.unit_channels;
        place = place * (p.tiles_across / p.tiles_of_columns) + at.phase;
        place = place * p.pixel_units + piece % p.pixel_units;
        if (lane == 0) p.moments[place] = make_float2(pivot + mean, fmaxf(squares - sum * mean, 0.0f));
    }
}

// Moments of each row's units of channels, likewise: a thread has a row and every second unit. Rows are 16 bytes at
// a time, of which eight sums are made side by side.
template <class T> PTX_FN void store_row_moments(const ConvHopperParams& p, const Place& at, int half) {
    constexpr int UNIT = T::COLUMNS % 80 == 0 ? 80 : 64, CHUNKS = UNIT / 8;
    int row = threadIdx.x % 64, pixel = at.x + half * 64 + row;
    if (pixel >= p.width) return;
    const unsigned char* of_row = dyn_smem() + T::STAGING + threadIdx.x / 128 * T::PIECE + row * T::SPAN;
    float2* moments = p.moments + int64_t(pixel) * (p.after.channels / UNIT);
    for (int unit = threadIdx.x % 128 / 64; unit < T::OUT / UNIT; unit += 2) {
        if (at.column + unit * UNIT >= p.after.channels) break;
        float sums[8] = {}, squares[8] = {}, x[8];
        auto read = [&](int i) {
            int chunk = unit * CHUNKS + i, in_box = chunk % (T::BOX / 8) ^ twist_of<T>(row);
            unpack(*reinterpret_cast<const Half8*>(of_row + chunk / (T::BOX / 8) * 64 * T::SPAN + in_box * 16), x);
        };
        // Read twice: held in registers, they would be beyond what a tile of two halves leaves.
#pragma unroll 2
        for (int i = 0; i < CHUNKS; i++) {
            read(i);
#pragma unroll
            for (int j = 0; j < 8; j++) sums[j] += x[j];
        }
        float mean = sum_of(sums) / UNIT;
#pragma unroll 2
        for (int i = 0; i < CHUNKS; i++) {
            read(i);
#pragma unroll
            for (int j = 0; j < 8; j++) squares[j] = fmaf(x[j] - mean, x[j] - mean, squares[j]);
        }
        moments[at.column / UNIT + unit] = make_float2(mean, sum_of(squares));
    }
}

// A warpgroup's results, of a half of a tile: from fragments, through its staging memory, into the result. One short
// loop over the sums for each thing that may follow the product: most products skip most of them, and what they run is
// 5 to 15 KB of code. Together in one loop they were 200 KB of branches, and fetching these instructions took ten times
// their execution.
template <class T> PTX_FN void store_tile(const ConvHopperParams& p, float (&d)[T::COLUMNS / 2], const Place& at, int half,
                                          const float2* operands, uint32_t shared, int parity) {
    const Epilogue& e = p.after;
    int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    uint32_t staging = shared + T::STAGING + group * T::PIECE;
    // The thread's first channel of the result; it has two neighbours of every eight.
    int first = at.column / (T::GATED ? 2 : 1) + lane % 4 * 2;
    // Rows lane / 4 and 8 below it of the warp's 16.
    int upper = half * 64 + warp * 16 + lane / 4;
    const float2 rows[2] = {operands[T::COLUMNS + upper], operands[T::COLUMNS + upper + 8]};
    add_operands<T>(d, operands, rows);
    if (!T::GATED && e.per_image) add_per_image<T>(p, d, at, upper, first);
    if constexpr (T::GATED) {
#pragma unroll
        for (int i = 0; i < T::COLUMNS / 4; i++) d[i] *= gelu(d[i + T::COLUMNS / 4]);
    } else if constexpr (!T::PINGPONG) {
        activate(d, e.activation);
    }

    // The staging memory is free: the thread that stored has waited, and has fetched the residual there if there is
    // one.
    if (e.residual)
        mbar_wait(shared + T::ARRIVED + 8 * group, parity);
    else
        named_bar_sync(1 + group, 128);
    // ldmatrix and stmatrix: this lane names a row of 8 channels of the upper or lower 8 rows, of the left or right
    // half of 16. Each word is of the left and the right 8 channels, the upper and the lower row: two neighbouring
    // channels.
    int row = warp * 16 + lane % 16;
    auto place_of_chunk = [&](int j) {
        int chunk = 2 * j + lane / 16, in_box = chunk % (T::BOX / 8);
        return staging + chunk / (T::BOX / 8) * 64 * T::SPAN + row * T::SPAN + ((in_box ^ twist_of<T>(row)) << 4);
    };
    if (!T::GATED && e.residual) {
#pragma unroll
        for (int j = 0; j < T::OUT / 16; j++) {
            uint32_t residual[4];
            ldmatrix_x4(residual, place_of_chunk(j));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 added = __half22float2(pair_of(residual[i]));
                d[8 * j + 2 * i] += added.x, d[8 * j + 2 * i + 1] += added.y;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < T::OUT / 2; i++) d[i] *= e.scale;
    if (!T::GATED && !T::PINGPONG && e.shifted) store_shifted<T>(p, d, at, upper, first);
#pragma unroll
    for (int j = 0; j < T::OUT / 16; j++) {
        uint32_t results[4];
#pragma unroll
        for (int i = 0; i < 4; i++) results[i] = bits_of(to_halves(d[8 * j + 2 * i], d[8 * j + 2 * i + 1]));
        stmatrix_x4(place_of_chunk(j), results);
    }
    fence_proxy_async();
    named_bar_sync(1 + group, 128);
    if (threadIdx.x % 128 == 0) {
        Place corner = piece_of(p, at, half);
#pragma unroll
        for (int box = 0; box < T::BOXES; box++)
            tma_store_4d(&p.out[at.phase], staging + box * 64 * T::SPAN,
                         corner.column / (T::GATED ? 2 : 1) + box * T::BOX, corner.x, corner.y, corner.image);
        tma_store_commit();
    }
    if (!T::GATED && p.moments) {
        // The thread that stored keeps to its warp, and the staging memory is read until all have arrived.
        __syncwarp();
        if (p.unit_pixels == 1) store_row_moments<T>(p, at, half);
        else store_moments<T>(p, at, half);
        named_bar_sync(1 + group, 128);
    }
}

template <class T> PTX_FN void consume(const ConvHopperParams& p, uint32_t shared) {
    int units = p.tiles_down * p.tiles_across * p.splits;
    int stages = (p.blocks[0] + p.blocks[1]) * p.kernel * p.kernel + p.added_blocks[0] + p.added_blocks[1];
    int group = threadIdx.x / 128, lane = threadIdx.x % 32;
    bool stores = threadIdx.x % 128 == 0;
    int slot = 0, parity = 0, arrived = 0;
    // The slots of the ring that another warpgroup's tile passes through.
    auto skip = [&] {
        slot += stages;
        parity ^= slot / T::STAGES & 1, slot %= T::STAGES;
    };
    int operands_slot = 0, operands_parity = 0;
    // Turns at multiplying: a warpgroup waits at barrier 4 and its own number until the tile before has had its stages,
    // for the parity of a slot further ahead would be another round's.
    if (T::PINGPONG && group == 1) {
        skip(), operands_slot = 1;
        named_bar_arrive(4, CONSUMERS);
    }
    float d[T::HALVES][T::COLUMNS / 2];
    int unit = blockIdx.x + (T::PINGPONG ? group * gridDim.x : 0);
    for (; unit < units; unit += gridDim.x * T::HALVES) {
        int tile = unit / p.splits, split = unit % p.splits;
        Place at = place_of<T>(p, tile);
        int count = min(p.steps, stages - split * p.steps), previous = 0;
        if (T::PINGPONG) named_bar_sync(4 + group, CONSUMERS);
        for (int step = 0; step < count; step++) {
            mbar_wait(shared + T::FULL + 8 * slot, parity);
            uint64_t a = wg_desc_sw128(shared + slot * T::STAGE + (T::PINGPONG ? 0 : group * 64 * 128), 16, 1024);
            uint64_t b = wg_desc_sw128(shared + slot * T::STAGE + T::A, 16, 1024);
#pragma unroll
            for (int half = 0; half < T::HALVES; half++) wgmma_hold(d[half]);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < STEP / 16; k++)
#pragma unroll
                for (int half = 0; half < T::HALVES; half++)
                    multiply<T::COLUMNS>(d[half], a + half * (64 * 128 >> 4) + 2 * k, b + 2 * k, step > 0 || k > 0);
            wgmma_commit();
            // While products are under way the last store has read the staging memory, and the residual comes there.
            // With splits only the last block stores, and fetches the residual when it knows that it is.
            if (step == min(1, count - 1) && p.splits == 1) {
                if (stores) prepare_staging<T>(p, at, shared, T::PINGPONG ? 0 : group);
                // wgmma is for whole warps: the thread that stored, and fetched, catches up.
                __syncwarp();
            }
            if (step > 0) {
                // The products of the stage before are done, and its slot may be filled again.
                wgmma_wait<1>();
                if (lane == 0) mbar_arrive(shared + T::EMPTY + 8 * previous);
            }
            previous = slot;
            if (++slot == T::STAGES) slot = 0, parity ^= 1;
        }
        if (T::PINGPONG && unit + gridDim.x < units) named_bar_arrive(5 - group, CONSUMERS);
        wgmma_wait<0>();
#pragma unroll
        for (int half = 0; half < T::HALVES; half++) wgmma_hold(d[half]);
        if (lane == 0) mbar_arrive(shared + T::EMPTY + 8 * previous);
        bool last = true;
        if constexpr (!T::PINGPONG) {
            if (p.splits > 1) {
                last = add_splits<T::COLUMNS / 8>(d[0], p.partial, p.counters, tile, p.splits, split,
                                                  dyn_smem() + T::TICKET);
                if (last && stores) prepare_staging<T>(p, at, shared, group);
            }
        }
        mbar_wait(shared + T::OPERANDS_FULL + 8 * operands_slot, operands_parity);
        auto operands = reinterpret_cast<const float2*>(dyn_smem() + T::OPERANDS + operands_slot * T::OPERANDS_BYTES);
        if (last) {
#pragma unroll
            for (int half = 0; half < T::HALVES; half++) {
                if (half == 1 && stores) prepare_staging<T>(p, at, shared, half);
                store_tile<T>(p, d[half], at, T::PINGPONG ? half : group, operands, shared, arrived);
                arrived ^= 1;
            }
        }
        // All lanes have seen the operands, and the one that stored catches up.
        __syncwarp();
        if (lane == 0) mbar_arrive(shared + T::OPERANDS_EMPTY + 8 * operands_slot);
        if (T::PINGPONG) {
            skip();
            operands_parity ^= 1;
        } else {
            operands_slot ^= 1;
            if (operands_slot == 0) operands_parity ^= 1;
        }
    }
    if (stores) tma_store_wait<0>();
}

template <class T> PTX_FN void conv(const ConvHopperParams& p) {
    griddep_launch_dependents();
    uint32_t shared = smem_u32(dyn_smem());
    if (threadIdx.x == 0) {
        for (int i = 0; i < T::STAGES; i++) {
            mbar_init(shared + T::FULL + 8 * i, 1);
            mbar_init(shared + T::EMPTY + 8 * i, T::WARPS);
        }
        for (int i = 0; i < 2; i++) {
            mbar_init(shared + T::ARRIVED + 8 * i, 1);
            mbar_init(shared + T::OPERANDS_FULL + 8 * i, HELPERS);
            mbar_init(shared + T::OPERANDS_EMPTY + 8 * i, T::WARPS);
        }
        fence_mbar_init();
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        reg_dec<56>();
        if (threadIdx.x == CONSUMERS) produce<T>(p, shared);
        else if (threadIdx.x >= THREADS - HELPERS) prepare_operands<T>(p, shared);
        griddep_wait();
    } else {
        reg_inc<224>();
        griddep_wait();
        consume<T>(p, shared);
    }
}

}  // namespace conv_hopper

#ifdef PTX_HOPPER
#define CONV_HOPPER_BODY(...) conv_hopper::conv<conv_hopper::Tile<__VA_ARGS__>>(p);
#else
#define CONV_HOPPER_BODY(...)
#endif
// Columns, stages, whether columns are values and gates, whether warpgroups have tiles of their own.
#define CONV_HOPPER(name, ...)                        \
    KERNEL __launch_bounds__(conv_hopper::THREADS, 1) \
        name(const __grid_constant__ ConvHopperParams p){CONV_HOPPER_BODY(__VA_ARGS__)} EXPORT(name)
CONV_HOPPER(conv_hopper_80, 80, 6, false, false)
CONV_HOPPER(conv_hopper_128, 128, 5, false, false)
CONV_HOPPER(conv_hopper_160, 160, 5, false, false)
CONV_HOPPER(conv_hopper_256, 256, 3, false, false)
CONV_HOPPER(conv_hopper_160_gated, 160, 5, true, false)
CONV_HOPPER(conv_hopper_256_gated, 256, 3, true, false)
CONV_HOPPER(conv_hopper_128_pingpong, 128, 5, false, true)
CONV_HOPPER(conv_hopper_160_pingpong, 160, 5, false, true)
CONV_HOPPER(conv_hopper_160_gated_pingpong, 160, 5, true, true)
