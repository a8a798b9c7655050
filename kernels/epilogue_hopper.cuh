// The epilogue of conv_hopper.cu: from the accumulators of wgmma to the stored result, and the moments that norms read.
//
// Three warps of the last warpgroup prefetch the epilogue's operands to shared memory, one or two tiles ahead: two
// numbers per column and two per row. Without that, everything would wait for memory at the end of a tile, which takes
// as long as 20 stages.
//
// Accumulators are registers, so loops over them must be unrolled. Each warp executes that code once per tile, and
// waits longer for its instructions to be fetched (some five cycles each, estimated from an H200's times) than it
// computes. The number of instructions per accumulator therefore decides how long an epilogue takes.
//
// Where group norms read the result, the epilogue computes its moments from the staging buffer: 40 loads of 4 bytes per
// thread for units of 10 channels, some 400 cycles per tile, in place of a kernel that reads the whole result again.
//
// Where a layer norm stands between two pointwise products, it has no kernel. Its scale and shift are in the second
// product's weights (weights.cu). The first product leaves moments of each row's units of 80 or 64 channels: twice ten
// loads of 16 bytes per thread. The second product multiplies the rows as they are; each row's mean and deviation come
// from these moments, at most 128 bytes. Then W' x becomes (W' x - mean S) / deviation + T, in fp32, so that the
// normalised row is never rounded.
#pragma once
#include "conv_hopper.cuh"

namespace conv_hopper {

// The epilogue's operands for a column. If the product normalises its rows: S, by which the row's mean is multiplied
// and subtracted, and T plus bias, which is added. Otherwise: the numbers that are added in either half of the tile,
// which differ if they are of different images.
template <class T> PTX_FN float2 column_operands(const ConvHopperParams& p, const Place& at, int column) {
    const Epilogue& e = p.after;
    // Columns beyond the last channel repeat it; TMA does not store them.
    int part = column / T::OUT, channel = min(at.column / (T::GATED ? 2 : 1) + column % T::OUT, e.channels - 1);
    float bias = e.bias ? e.bias[part * e.channels + channel] : 0.0f;
    if (p.added_bias) bias += p.added_bias[channel];
    // With GEGLU, the S and T of a value and of its gate are adjacent, whereas the biases of all gates follow those of
    // all values.
    float2 folded = e.folded ? e.folded[T::GATED ? 2 * channel + part : channel] : float2{};
    float added = fmaf(e.gain, folded.y, e.bias_gain * bias);
    if (p.source_moments) return {folded.x, added};
    if (!e.per_image) return {added, added};
    auto of_image = [&](int half) {
        int image = min(half_of(p, at, half).image, p.images - 1);
        return __half2float(e.per_image[int64_t(image) * e.per_image_width + channel]);
    };
    return {added + of_image(0), added + of_image(1)};
}

// The epilogue's operands for rows that the product normalises: the mean, which is subtracted, and the factor, gain
// over deviation. They are merged from the moments of the rows' units in one pass, with eight loads in flight. Squares
// are taken about the mean of the first unit, which is one of those summed, as in group_norm.cu.
template <int N> PTX_FN void row_operands(const ConvHopperParams& p, const int (&rows)[N], float2 (&operands)[N]) {
    constexpr int IN_FLIGHT = 8 / N;
    float pivot[N] = {}, sum[N] = {}, between[N] = {}, within[N] = {};
    for (int first = 0; first < p.source_units; first += IN_FLIGHT) {
        float2 unit[N][IN_FLIGHT];
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; i++)
                unit[n][i] = first + i < p.source_units
                                 ? p.source_moments[int64_t(rows[n]) * p.source_units + first + i]
                                 : float2{};
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (first == 0) pivot[n] = unit[n][0].x;
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; i++) {
                float off = first + i < p.source_units ? unit[n][i].x - pivot[n] : 0.0f;
                sum[n] += off, between[n] = fmaf(off, off, between[n]), within[n] += unit[n][i].y;
            }
        }
    }
    float count = float(p.source_units);
#pragma unroll
    for (int n = 0; n < N; n++) {
        float mean = sum[n] / count;
        // `within` sums over all channels of all units, which make up the row.
        float variance = within[n] / float(p.blocks[0] * STEP) + fmaxf(between[n] / count - mean * mean, 0.0f);
        operands[n] = {pivot[n] + mean, p.after.gain * rsqrtf(variance + p.source_eps)};
    }
}

// The helper threads: they prefetch what the epilogues of the block's tiles need from memory, one or two tiles ahead.
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
        // All numbers of the columns are loaded before the first is used, and so are those of a thread's rows.
        constexpr int OF_COLUMNS = (T::COLUMNS + HELPERS - 1) / HELPERS, OF_ROWS = (ROWS + HELPERS - 1) / HELPERS;
        float2 of_columns[OF_COLUMNS], of_rows[OF_ROWS];
#pragma unroll
        for (int i = 0; i < OF_COLUMNS; i++)
            of_columns[i] = column_operands<T>(p, at, min(thread + i * HELPERS, T::COLUMNS - 1));
        if (p.source_moments) {
            int rows[OF_ROWS];
#pragma unroll
            for (int i = 0; i < OF_ROWS; i++) rows[i] = min(at.x + min(thread + i * HELPERS, ROWS - 1), p.width - 1);
            row_operands(p, rows, of_rows);
        }
        float2* operands = reinterpret_cast<float2*>(dyn_smem() + T::OPERANDS + slot * T::OPERANDS_BYTES);
        mbar_wait(shared + T::OPERANDS_EMPTY + 8 * slot, parity);
#pragma unroll
        for (int i = 0; i < OF_COLUMNS; i++) {
            int column = thread + i * HELPERS;
            if (column >= T::COLUMNS) break;
            if (p.source_moments) {
                operands[column] = of_columns[i];
            } else {
                float* added = reinterpret_cast<float*>(operands);
                added[column] = of_columns[i].x, added[T::COLUMNS + column] = of_columns[i].y;
            }
        }
#pragma unroll
        for (int i = 0; i < OF_ROWS; i++)
            if (p.source_moments && thread + i * HELPERS < ROWS)
                operands[T::COLUMNS + thread + i * HELPERS] = of_rows[i];
        mbar_arrive(shared + T::OPERANDS_FULL + 8 * slot);
        slot ^= 1;
        if (slot == 0) parity ^= 1;
    }
}

// Gain, bias and per-image rows: sums become gain * sum + what is added to the columns of the tile's half. If the
// product normalises its rows, they become (sum - mean S) gain / deviation + T + bias. `upper` is the thread's upper
// row.
template <class T>
PTX_FN void add_operands(const ConvHopperParams& p, float (&d)[T::COLUMNS / 2], const float2* operands, int half,
                         int upper) {
    int first = threadIdx.x % 4 * 2;
    if (p.source_moments) {
        const float2 rows[2] = {operands[T::COLUMNS + upper], operands[T::COLUMNS + upper + 8]};
#pragma unroll
        for (int chunk = 0; chunk < T::COLUMNS / 8; chunk++) {
            float4 pair = *reinterpret_cast<const float4*>(operands + chunk * 8 + first);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float* sums = d + chunk * 4 + h * 2;
                sums[0] = fmaf(fmaf(-rows[h].x, pair.x, sums[0]), rows[h].y, pair.y);
                sums[1] = fmaf(fmaf(-rows[h].x, pair.z, sums[1]), rows[h].y, pair.w);
            }
        }
    } else {
        const float* added = reinterpret_cast<const float*>(operands) + half * T::COLUMNS + first;
        float gain = p.after.gain;
#pragma unroll
        for (int chunk = 0; chunk < T::COLUMNS / 8; chunk++) {
            float2 pair = *reinterpret_cast<const float2*>(added + chunk * 8);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float* sums = d + chunk * 4 + h * 2;
                sums[0] = fmaf(sums[0], gain, pair.x), sums[1] = fmaf(sums[1], gain, pair.y);
            }
        }
    }
}

// Applies an activation to all of a thread's accumulators.
template <int SUMS, class F> PTX_FN void apply(float (&d)[SUMS], F activation) {
#pragma unroll
    for (int i = 0; i < SUMS; i++) d[i] = activation(d[i]);
}

// RELU follows the residual, so it is not applied here; the functions of images have no kernel of this kind.
template <int SUMS> PTX_FN void activate(float (&d)[SUMS], int activation) {
    if (activation == SILU || activation == QUICK_GELU) {
        float slope = activation == SILU ? 1.0f : 1.702f;
        apply(d, [=](float x) { return x * sigmoid(slope * x); });
    } else if (activation == GELU) {
        apply(d, [](float x) { return gelu(x); });
    }
}

// Called by the thread that issues TMA stores: waits until its last store has read the staging buffer, then fetches the
// residual into it.
template <class T> PTX_FN void prepare_staging(const ConvHopperParams& p, const Place& at, uint32_t shared, int half) {
    tma_store_wait<0>();
    if (T::GATED || !p.after.residual) return;
    int group = threadIdx.x / 128;
    uint32_t staging = shared + T::STAGING + group * T::HALF_BYTES, full = shared + T::RESIDUAL_FULL + 8 * group;
    Place corner = half_of(p, at, half);
    mbar_expect_tx(full, T::HALF_BYTES);
#pragma unroll
    for (int box = 0; box < T::BOXES; box++)
        tma_load_4d(staging + box * 64 * T::SPAN, &p.residual, full, corner.column + box * T::BOX, corner.x, corner.y,
                    corner.image);
}

// Stores the second result, with RespoDiff's shift added; it is seldom wanted.
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

// The swizzle of a row's 16-byte chunks in the staging buffer: chunk c is at c ^ swizzle.
template <class T> PTX_FN int swizzle_of(int row) {
    return T::SPAN == 128 ? row % 8 : T::SPAN == 64 ? row / 2 % 4 : row / 4 % 2;
}

// Computes moments of the warpgroup's results as they are stored, from the staging buffer. Eight lanes share a unit of
// channels, and each takes every eighth of the 64 pixels. Squares are taken about the unit's first number, as in
// group_norm.cu.
template <class T> PTX_FN void store_moments(const ConvHopperParams& p, const Place& at, int half) {
    Place corner = half_of(p, at, half);
    if (corner.x >= p.width || corner.y >= p.height || corner.image >= p.images) return;
    // The warpgroup's 64 pixels are a rectangle within one image; this is its index among all such rectangles.
    int log_width = min(p.log_width, 6), log_height = 6 - log_width;
    int piece = ((corner.image * p.height + corner.y) >> log_height) * (p.width >> log_width);
    piece += corner.x >> log_width;
    int image = piece / p.pixel_units, lane = threadIdx.x % 8;
    uint32_t lanes = 0xffu << threadIdx.x % 32 / 8 * 8;
    const unsigned char* staging = dyn_smem() + T::STAGING + threadIdx.x / 128 * T::HALF_BYTES;
    auto pair_at = [&](int row, int channel) {
        int chunk = channel / 8, in_box = chunk % (T::BOX / 8) ^ swizzle_of<T>(row);
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

// Computes moments of each row's units of channels likewise: a thread has one row and every second unit. A row is read
// 16 bytes at a time, accumulated in eight independent sums.
template <class T> PTX_FN void store_row_moments(const ConvHopperParams& p, const Place& at, int half) {
    constexpr int UNIT = T::COLUMNS % 80 == 0 ? 80 : 64, CHUNKS = UNIT / 8;
    int row = threadIdx.x % 64, pixel = at.x + half * 64 + row;
    if (pixel >= p.width) return;
    const unsigned char* of_row = dyn_smem() + T::STAGING + threadIdx.x / 128 * T::HALF_BYTES + row * T::SPAN;
    float2* moments = p.moments + int64_t(pixel) * (p.after.channels / UNIT);
    for (int unit = threadIdx.x % 128 / 64; unit < T::OUT / UNIT; unit += 2) {
        if (at.column + unit * UNIT >= p.after.channels) break;
        float sums[8] = {}, squares[8] = {}, x[8];
        auto read = [&](int i) {
            int chunk = unit * CHUNKS + i, in_box = chunk % (T::BOX / 8) ^ swizzle_of<T>(row);
            unpack(*reinterpret_cast<const Half8*>(of_row + chunk / (T::BOX / 8) * 64 * T::SPAN + in_box * 16), x);
        };
        // The row is read twice: to hold it would take more registers than a tile of two halves leaves.
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

// Stores a warpgroup's half tile: from fragments through its staging buffer to the result. There is one short loop over
// the accumulators for each thing that may follow the product: most products skip most of the loops. All in one loop,
// they were 200 KB of branches, and fetching these instructions took ten times as long as executing them.
template <class T>
PTX_FN void store_tile(const ConvHopperParams& p, float (&d)[T::COLUMNS / 2], const Place& at, int half,
                       const float2* operands, uint32_t shared, int residual_parity) {
    const Epilogue& e = p.after;
    int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    uint32_t staging = shared + T::STAGING + group * T::HALF_BYTES;
    // The thread's first channel of the result; it holds two adjacent channels of every eight.
    int first = at.column / (T::GATED ? 2 : 1) + lane % 4 * 2;
    // The thread's rows are lane / 4 of the warp's 16 rows, and 8 below it.
    int upper = half * 64 + warp * 16 + lane / 4;
    add_operands<T>(p, d, operands, half, upper);
    if constexpr (T::GATED) {
#pragma unroll
        for (int i = 0; i < T::COLUMNS / 4; i++) d[i] *= gelu(d[i + T::COLUMNS / 4]);
    } else if constexpr (!T::PINGPONG) {
        activate(d, e.activation);
    }

    // Wait until the staging buffer is free: the storing thread has waited for its last store and, if there is a
    // residual, has fetched it into the buffer.
    if (!T::GATED && e.residual)
        mbar_wait(shared + T::RESIDUAL_FULL + 8 * group, residual_parity);
    else
        named_bar_sync(1 + group, 128);
    // Addresses for ldmatrix and stmatrix: each lane supplies a row of 8 channels, of the upper or lower 8 rows and of
    // the left or right half of 16 channels. Each register then holds two adjacent channels, of the left or right 8
    // channels and of the upper or lower row.
    int row = warp * 16 + lane % 16;
    auto place_of_chunk = [&](int j) {
        int chunk = 2 * j + lane / 16, in_box = chunk % (T::BOX / 8);
        return staging + chunk / (T::BOX / 8) * 64 * T::SPAN + row * T::SPAN + ((in_box ^ swizzle_of<T>(row)) << 4);
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
    if (!T::GATED && !T::PINGPONG && e.activation == RELU) apply(d, [](float x) { return relu(x); });
    if (e.scale != 1.0f) {
#pragma unroll
        for (int i = 0; i < T::OUT / 2; i++) d[i] *= e.scale;
    }
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
        Place corner = half_of(p, at, half);
#pragma unroll
        for (int box = 0; box < T::BOXES; box++)
            tma_store_4d(&p.out[at.phase], staging + box * 64 * T::SPAN,
                         corner.column / (T::GATED ? 2 : 1) + box * T::BOX, corner.x, corner.y, corner.image);
        tma_store_commit();
    }
    if (!T::GATED && p.moments) {
        // Reconverge the warp of the storing thread. The staging buffer may be reused only after all threads have read
        // it.
        __syncwarp();
        if (p.unit_pixels == 1) store_row_moments<T>(p, at, half);
        else store_moments<T>(p, at, half);
        named_bar_sync(1 + group, 128);
    }
}

}  // namespace conv_hopper
