// Shared by the parts of conv_hopper.cu: the parameters of its kernels, their tile types, and the positions of tiles.
#pragma once
#include "epilogue.cuh"
#include "splits.cuh"

struct ConvHopperParams {
    // {channels, width, height, images}, in boxes of 64 channels by the rectangle: the source and the one concatenated
    // to it, or, for a result of half the size, the source's pixels by 2 * row parity + column parity.
    CUtensorMap sources[4];
    // {depth, phases * columns}, in boxes of 64 by COLUMNS. With GEGLU, where rows alternate between values and gates,
    // it is {depth, value or gate, channels}, in boxes of 64 by 1 by COLUMNS / 2.
    CUtensorMap weight;
    // One per phase; like `sources`, in boxes of one span of channels by half the rectangle.
    CUtensorMap out[4];
    CUtensorMap residual;  // like `out`; not read if there is no residual
    // A 1x1 convolution of the same pixels whose result is added: it is computed as more depth. Maps as above.
    CUtensorMap added_sources[2], added_weight;
    Epilogue after;
    float4* partial;  // for split-K, see splits.cuh
    uint32_t* counters;  // likewise
    // For group norms that read the result: mean and sum of squared deviations of every unit of `unit_channels`
    // channels in 64 pixels, [images][units of channels][phases][pixel_units]. Null if nothing reads them. For layer
    // norms, whose units have one pixel: [pixels of all images][units of channels].
    float2* moments;
    const float* added_bias;  // null if there is none
    // The moments of the first source's rows, left by the product that made it, if this product normalises them; else
    // null.
    const float2* source_moments;
    int32_t height, width, images;
    // Of the rectangle, log2; its third dimension, the rest of the 128 pixels, is images.
    int32_t log_width, log_height;
    int32_t across_image, down_image;  // rectangles that cover an image
    // Tiles of the product: rectangles of all images, by groups of columns of all phases.
    int32_t tiles_down, tiles_across;
    int32_t columns, tiles_of_columns;  // of one phase
    int32_t blocks[2];  // stages per tap, for each source
    int32_t added_blocks[2];
    int32_t kernel;
    int32_t splits, steps;  // split-K parts, and stages in each part
    int32_t unit_pixels, unit_channels, pixel_units;  // of `moments`
    int32_t source_units;  // per row, in `source_moments`
    float source_eps;  // epsilon of the folded layer norm
    int32_t halved;  // 1 if the result has half the source's height and width, else 0
    int32_t padding[6];
};
LAYOUT(ConvHopperParams, sources, weight, out, residual, added_sources, added_weight, after, partial, counters, moments,
       added_bias, source_moments, height, width, images, log_width, log_height, across_image, down_image, tiles_down,
       tiles_across, columns, tiles_of_columns, blocks, added_blocks, kernel, splits, steps, unit_pixels, unit_channels,
       pixel_units, source_units, source_eps, halved, padding)

namespace conv_hopper {

constexpr int ROWS = 128;
constexpr int CONSUMERS = SUM_THREADS;  // threads that multiply
constexpr int THREADS = CONSUMERS + 128;
// Threads of the last warpgroup after the producer's warp; they prefetch operands of the epilogue.
constexpr int HELPERS = 96;
constexpr int STEP = 64;  // depth of a stage: one span of 128 bytes
constexpr int BAND = 8;  // rectangles that are computed together so that they share weights

template <int COLUMNS_, int STAGES_, bool GATED_, bool PINGPONG_> struct Tile {
    static constexpr int COLUMNS = COLUMNS_, STAGES = STAGES_;
    static constexpr bool GATED = GATED_, PINGPONG = PINGPONG_;
    // Per warpgroup: the 64-pixel halves of a tile that it computes. And the warps that share a tile.
    static constexpr int HALVES = PINGPONG ? 2 : 1, WARPS = PINGPONG ? 4 : 8;
    static constexpr int A = ROWS * STEP * 2, B = COLUMNS * STEP * 2, STAGE = A + B;
    // Of the result: columns of a tile and chunks of eight of them, channels of a TMA box, bytes of its span, boxes of
    // a tile, and bytes of a half tile of 64 pixels.
    static constexpr int OUT = GATED ? COLUMNS / 2 : COLUMNS, CHUNKS = OUT / 8;
    static constexpr int BOX = OUT % 64 == 0 ? 64 : OUT % 32 == 0 ? 32 : 16, SPAN = BOX * 2, BOXES = OUT / BOX;
    static constexpr int HALF_BYTES = 64 * OUT * 2;
    // Offsets in shared memory. Operands are kept for two tiles, each with those of the columns, then those of the
    // rows: two numbers for each.
    static constexpr int STAGING = STAGES * STAGE, BARRIERS = STAGING + 2 * HALF_BYTES;
    static constexpr int FULL = BARRIERS, EMPTY = FULL + 8 * STAGES, RESIDUAL_FULL = EMPTY + 8 * STAGES;
    static constexpr int OPERANDS_FULL = RESIDUAL_FULL + 16, OPERANDS_EMPTY = OPERANDS_FULL + 16;
    static constexpr int TICKET = OPERANDS_EMPTY + 16;
    static constexpr int OPERANDS = BARRIERS + 256, OPERANDS_BYTES = (COLUMNS + ROWS) * 8;
    static constexpr int THREADS = conv_hopper::THREADS, SHARED = OPERANDS + 2 * OPERANDS_BYTES;
};

// Position of a tile: its rectangle in the source, its first column, and its phase (2 * row parity + column parity of
// its results where the source is upsampled by two).
struct Place {
    int x, y, image, column, phase;
};

// Tiles are ordered in bands of BAND rectangles by all groups of columns, and within a band down the rectangles first:
// blocks that run at the same time share weights and pixels.
template <class T> PTX_FN Place place_of(const ConvHopperParams& p, int tile) {
    int band = tile / (BAND * p.tiles_across), in_band = tile % (BAND * p.tiles_across);
    int rows = min(BAND, p.tiles_down - band * BAND);
    int rectangle = band * BAND + in_band % rows, rest = rectangle / p.across_image;
    int images = ROWS >> (p.log_width + p.log_height), group = in_band / rows;
    return {rectangle % p.across_image << p.log_width, rest % p.down_image << p.log_height,
            rest / p.down_image * images, group % p.tiles_of_columns * T::COLUMNS, group / p.tiles_of_columns};
}

// The index among all images' pixels of a row of a tile; -1 if it is outside the image.
PTX_FN int pixel_of(const ConvHopperParams& p, const Place& at, int row) {
    int x = at.x + (row & ((1 << p.log_width) - 1)), y = at.y + (row >> p.log_width & ((1 << p.log_height) - 1));
    int image = at.image + (row >> (p.log_width + p.log_height));
    return x < p.width && y < p.height && image < p.images ? (image * p.height + y) * p.width + x : -1;
}

// The position of a half of a tile's rectangle, 64 of its 128 pixels.
PTX_FN Place half_of(const ConvHopperParams& p, const Place& at, int half) {
    int row = half * 64;
    return {at.x + (row & ((1 << p.log_width) - 1)), at.y + (row >> p.log_width & ((1 << p.log_height) - 1)),
            at.image + (row >> (p.log_width + p.log_height)), at.column, at.phase};
}

}  // namespace conv_hopper
