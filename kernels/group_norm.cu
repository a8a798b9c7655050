// Group normalisation and its gradient. Memory bound.
//
// A block has a slab of channels (whole groups and, where vectors of eight are possible, whole 32-byte sectors: 160
// bytes of a pixel for most layers) and a stretch of one image's pixels. A thread has a column of W channels and visits
// every `thread_rows`-th pixel of it, with four loads of 16 bytes in flight. Most images are small, so that a kernel
// takes as long as its chain of dependent loads. Therefore weights are loaded before the preceding launches have ended,
// and the first pixels before their moments are merged.
//
// * group_norm_statistics: one read of the input; writes mean and sum of squared deviations of each group in the
//   stretch, 8 bytes per group.
// * group_norm_apply: merges the moments of its groups (at most 256 x 8 bytes per group and unit), one read and one
//   write.
// * group_norm: both in one kernel, for images that are a single stretch; the second read hits the cache.
//
// That is 3 x 2 bytes per element; it should reach 85 % of the memory bandwidth where the input exceeds the L2 cache.
// Where the products that computed the sources left moments of them (epilogue_hopper.cuh), statistics are not computed,
// and 2 x 2 bytes per element remain. Large images have many such moments: group_norm_merge first merges them into
// stretches, reading 8 bytes per unit of 64 pixels, which is 1/16 to 1/128 of what the statistics would read.
//
// Squares are summed about the column's first pixel. That is one of the n numbers summed, so the sum is at most n + 1
// times the sum of squared deviations about the mean, and the subtraction costs log2(n + 1) bits at worst, whatever the
// mean: negligible in fp32, since n is a few hundred. Everything after that is merged in two passes over these few
// numbers, the mean and then the squared deviations about it, in an order that one image's shape alone decides.
//
// Gradients are by the input, and recompute all statistics. With d the gradient by the result, x^ the normalised input
// and u = d times what the norm (and SiLU) multiplies x by, the gradient is u - mean(u) - x^ mean(u x^), with means
// over a group.
//
// * group_norm_gradient_sums: runs after group_norm_statistics; reads x and d; writes the sums of u and u x^ of each
//   group in the stretch.
// * group_norm_gradient_apply: merges them, reads x and d again, and writes the channels of the first source.
// * group_norm_gradient: all in one kernel, for images that are a single stretch.
//
// 6 x 2 bytes per element in stretches.
#include "numeric.cuh"

struct GroupNormParams {
    const __half* x;
    const __half* skip;  // channels that follow those of x, or null
    // [images][2][channels], images `scale_shift_width` apart, or null.
    const __half* scale_shift;
    const float* weight;
    const float* bias;
    __half* out;
    // [n][groups][gridDim.x]: mean and sum of squared deviations, written by statistics and merge.
    float2* partials;
    // Read by merge and apply, likewise pairs: [n][units of channels][units of pixels], of the first channels and of
    // the rest.
    const float2* moments[2];
    int64_t scale_shift_width;
    int32_t x_channels;
    int32_t channels;
    int32_t per_group;
    int32_t slab;  // channels of a block
    int32_t pixels;
    int32_t stretch;  // pixels of a block
    float eps;
    int32_t silu;
    int32_t first_moments;  // channels covered by moments[0]
    int32_t unit_channels[2];
    int32_t unit_pixels;  // the last unit of an image may have fewer
    int32_t pixel_units;  // per image
    int32_t padding;
};
LAYOUT(GroupNormParams, x, skip, scale_shift, weight, bias, out, partials, moments, scale_shift_width, x_channels,
       channels, per_group, slab, pixels, stretch, eps, silu, first_moments, unit_channels, unit_pixels, pixel_units,
       padding)

constexpr int THREADS = 256;
constexpr int AHEAD = 4;

// Number, mean and sum of squared deviations of some values.
struct Moments {
    float count, mean, squares;
};

// The moments of `count` values whose parts are distributed over the lanes of a warp: `each` calls its argument with
// the count, mean and squared deviations of every part of this lane. The mean comes first, then the squared deviations
// about it, both as plain sums.
template <class Each> __device__ __forceinline__ Moments warp_moments(float count, Each each) {
    float mean = 0.0f, squares = 0.0f;
    each([&](float n, float m, float) { mean += n * m; });
    mean = warp_sum(mean) / count;
    each([&](float n, float m, float s) { squares += s + n * (m - mean) * (m - mean); });
    return {count, mean, warp_sum(squares)};
}

// A thread's channels in the first pixel of an image, and the distance to those of the next pixel.
struct Column {
    const __half* first;
    int stride;
};

// The block's slab and stretch, and the thread's part of it. The threads of a block are `thread_rows` rows of one
// thread per column; each row visits its own pixels.
template <int W> struct Place {
    int first, channels, columns, thread_rows, thread_row;
    int begin, end;
    // Pixels of every thread row, and the number of rows that have one more.
    int whole, longer;
    int64_t image;

    __device__ __forceinline__ explicit Place(const GroupNormParams& p) {
        first = blockIdx.y * p.slab;
        channels = min(p.slab, p.channels - first);
        columns = channels / W;
        // There are more columns than threads only where groups are wider than in any known network.
        thread_rows = max(THREADS / columns, 1);
        thread_row = threadIdx.x / columns;
        begin = blockIdx.x * p.stretch;
        end = min(begin + p.stretch, p.pixels);
        whole = (end - begin) / thread_rows;
        longer = (end - begin) % thread_rows;
        image = blockIdx.z;
    }

    // This thread's first column, as its first channel in the slab. The next ones are THREADS * W channels further on.
    __device__ __forceinline__ int first_column() const {
        return thread_row < thread_rows ? threadIdx.x % columns * W : channels;
    }

    // The column of the source that begins at a channel of the slab.
    __device__ __forceinline__ Column column_at(const GroupNormParams& p, int in_slab) const {
        int channel = first + in_slab;
        bool skip = channel >= p.x_channels;
        int stride = skip ? p.channels - p.x_channels : p.x_channels;
        const __half* source = (skip ? p.skip : p.x) + image * p.pixels * stride;
        return {source + (skip ? channel - p.x_channels : channel), stride};
    }

    // Calls f(channel in the slab, column of the source) for each column of this thread.
    template <class F> __device__ __forceinline__ void each_column(const GroupNormParams& p, F f) const {
        for (int channel = first_column(); channel < channels; channel += THREADS * W)
            f(channel, column_at(p, channel));
    }

    // The channels of the given columns in the thread's next pixels.
    template <int N> struct Pixels {
        Halves<W> numbers[AHEAD / N][N];
    };

    // Loads those from `pixel` on.
    template <int N> __device__ __forceinline__ Pixels<N> fetch(const Column (&from)[N], int pixel) const {
        Pixels<N> pixels;
#pragma unroll
        for (int i = 0; i < AHEAD / N * N; i++) {
            const Column& column = from[i % N];
            if (pixel + i / N * thread_rows < end)
                pixels.numbers[i / N][i % N] =
                    load_halves<W>(column.first + int64_t(pixel + i / N * thread_rows) * column.stride);
        }
        return pixels;
    }

    // Calls f(pixel, channels of each of the given columns) for each pixel of this thread, of which the first ones have
    // been fetched.
    template <int N, class F>
    __device__ __forceinline__ void each_pixel(const Column (&from)[N], Pixels<N> fetched, F f) const {
        constexpr int STEP = AHEAD / N;
        for (int pixel = begin + thread_row; pixel < end;) {
#pragma unroll
            for (int i = 0; i < STEP; i++) {
                if (pixel + i * thread_rows >= end) break;
                float x[N][W];
#pragma unroll
                for (int j = 0; j < N; j++) unpack(fetched.numbers[i][j], x[j]);
                f(pixel + i * thread_rows, x);
            }
            pixel += STEP * thread_rows;
            fetched = fetch(from, pixel);
        }
    }

    template <int N, class F> __device__ __forceinline__ void each_pixel(const Column (&from)[N], F f) const {
        each_pixel(from, fetch(from, begin + thread_row), f);
    }

    // The number of pixels of a thread row.
    __device__ __forceinline__ int count(int row) const { return whole + (row < longer); }

    // `pairs` holds a pair of numbers for each thread row and channel. Calls f(thread row, pair) for this lane's share
    // of the pairs of a group.
    template <class F>
    __device__ __forceinline__ void each_pair(const float2* pairs, int group, int per_group, F f) const {
        int channel = threadIdx.x % 32, row = channel / per_group;
        channel -= row * per_group;
        while (row < thread_rows) {
            f(row, pairs[row * channels + group * per_group + channel]);
            channel += 32;
            for (; channel >= per_group; channel -= per_group) row++;
        }
    }
};

// Computes every group's moments in the block's stretch. One thread per group calls f(group in the slab, moments).
template <int W, class F>
__device__ __forceinline__ void stretch_moments(const GroupNormParams& p, const Place<W>& place, float2* sums, F f) {
    place.each_column(p, [&](int channel, Column from) {
        float pivot[W] = {}, sum[W] = {}, squares[W] = {};
        int count = place.count(place.thread_row);
        if (count > 0)
            unpack(load_halves<W>(from.first + int64_t(place.begin + place.thread_row) * from.stride), pivot);
        place.each_pixel({from}, [&](int, const float(&x)[1][W]) {
#pragma unroll
            for (int j = 0; j < W; j++) {
                float d = x[0][j] - pivot[j];
                sum[j] += d;
                squares[j] += d * d;
            }
        });
        float inverse = count > 0 ? 1.0f / count : 0.0f;
#pragma unroll
        for (int j = 0; j < W; j++) {
            float mean = sum[j] * inverse;
            sums[place.thread_row * place.channels + channel + j] =
                make_float2(pivot[j] + mean, fmaxf(squares[j] - sum[j] * mean, 0.0f));
        }
    });
    __syncthreads();
    for (int group = threadIdx.x / 32; group < place.channels / p.per_group; group += THREADS / 32) {
        Moments total = warp_moments(float(place.end - place.begin) * p.per_group, [&](auto part) {
            place.each_pair(sums, group, p.per_group, [&](int row, float2 s) { part(place.count(row), s.x, s.y); });
        });
        if (threadIdx.x % 32 == 0) f(group, total);
    }
}

__device__ __forceinline__ float2 mean_and_inverse(Moments m, float eps) {
    return make_float2(m.mean, rsqrtf(m.squares / m.count + eps));
}

// The norm of W channels as x * scale + shift.
template <int W> struct Affine {
    float scale[W], shift[W];
};

// Weight and bias of the slab's channels from `channel` on.
template <int W>
__device__ __forceinline__ Affine<W> load_affine(const GroupNormParams& p, const Place<W>& place, int channel) {
    Affine<W> a = {};
    if (channel < place.channels) {
        load_floats(p.weight + place.first + channel, a.scale);
        load_floats(p.bias + place.first + channel, a.shift);
    }
    return a;
}

// Turns weight and bias into the scale and shift of the whole norm, given mean and inverse deviation of the groups.
template <int W>
__device__ __forceinline__ void normalise(const GroupNormParams& p, const Place<W>& place, const float2* groups,
                                          int channel, Affine<W>& a) {
    float(&scale)[W] = a.scale, (&shift)[W] = a.shift;
#pragma unroll
    for (int j = 0; j < W; j++) {
        float2 group = groups[(channel + j) / p.per_group];
        int c = place.first + channel + j;
        scale[j] *= group.y;
        shift[j] -= group.x * scale[j];
        if (p.scale_shift) {
            const __half* modulation = p.scale_shift + place.image * p.scale_shift_width + c;
            float factor = 1.0f + __half2float(modulation[0]);
            scale[j] *= factor;
            shift[j] = shift[j] * factor + __half2float(modulation[p.channels]);
        }
    }
}

// A thread's early loads for a column: weight and bias, before it waits for other launches, and then the first pixels.
template <int W> struct Loaded {
    Affine<W> affine;
    typename Place<W>::template Pixels<1> pixels;

    __device__ __forceinline__ void weights(const GroupNormParams& p, const Place<W>& place, int channel) {
        affine = load_affine(p, place, channel);
    }
    __device__ __forceinline__ void first_pixels(const GroupNormParams& p, const Place<W>& place, int channel) {
        if (channel < place.channels)
            pixels = place.fetch({place.column_at(p, channel)}, place.begin + place.thread_row);
    }
};

// Normalises the block's stretch and writes it. `loaded` belongs to the thread's first column.
template <int W>
__device__ __forceinline__ void apply(const GroupNormParams& p, const Place<W>& place, const float2* groups,
                                      Loaded<W>& loaded) {
    for (int channel = place.first_column(); channel < place.channels;) {
        normalise(p, place, groups, channel, loaded.affine);
        __half* out = p.out + place.image * p.pixels * p.channels + place.first + channel;
        place.each_pixel({place.column_at(p, channel)}, loaded.pixels, [&](int pixel, const float(&x)[1][W]) {
            float y[W];
#pragma unroll
            for (int j = 0; j < W; j++) {
                y[j] = x[0][j] * loaded.affine.scale[j] + loaded.affine.shift[j];
                if (p.silu) y[j] = silu(y[j]);
            }
            store_halves(out + int64_t(pixel) * p.channels, y);
        });
        channel += THREADS * W;
        loaded.weights(p, place, channel);
        loaded.first_pixels(p, place, channel);
    }
}

template <int W> __device__ __forceinline__ void statistics_kernel(const GroupNormParams& p) {
    griddep_launch_dependents();
    griddep_wait();
    Place<W> place(p);
    int groups = p.channels / p.per_group;
    int64_t first = place.image * groups + place.first / p.per_group;
    stretch_moments(p, place, reinterpret_cast<float2*>(dyn_smem()), [&](int group, Moments m) {
        p.partials[(first + group) * gridDim.x + blockIdx.x] = make_float2(m.mean, m.squares);
    });
}

// The moments of the `count` numbers of a group in units of pixels first..last, merged by LANES lanes. One pass, since
// each lane's loads are then independent: squares are taken about the mean of the first unit, as above.
template <int LANES>
__device__ __forceinline__ Moments merge_units(const GroupNormParams& p, int64_t image, int group, int first, int last,
                                               float count) {
    int across = last - first;
    // A unit's pixels are as many as those of all others, except for the last one of an image.
    bool even = p.pixels % p.unit_pixels == 0;
    float pivot = 0.0f, sum = 0.0f, between = 0.0f, within = 0.0f;
    bool any = false;
#pragma unroll
    for (int s = 0; s < 2; s++) {
        // The channels that these moments cover, and those of them that belong to the group.
        int base = s == 0 ? 0 : p.first_moments, width = s == 0 ? p.first_moments : p.channels - p.first_moments;
        int begin = max(group * p.per_group, base), end = min((group + 1) * p.per_group, base + width);
        if (begin >= end) continue;
        const float2* units = p.moments[s] + (image * width + begin - base) / p.unit_channels[s] * p.pixel_units;
        int all = (end - begin) / p.unit_channels[s] * across;
        if (!any) pivot = units[first].x, any = true;
#pragma unroll 4
        for (int i = threadIdx.x % LANES; i < all; i += LANES) {
            // Between two lines of units are those of other pixels, if there are any.
            float2 unit = units[first + i + i / across * (p.pixel_units - across)];
            float n = p.unit_pixels * p.unit_channels[s];
            if (!even) n = min(p.unit_pixels, p.pixels - (first + i % across) * p.unit_pixels) * p.unit_channels[s];
            float off = unit.x - pivot;
            sum = fmaf(n, off, sum), between = fmaf(n * off, off, between), within += unit.y;
        }
    }
    sum = lanes_sum<LANES>(sum), between = lanes_sum<LANES>(between), within = lanes_sum<LANES>(within);
    float mean = sum / count;
    return {count, pivot + mean, within + fmaxf(between - sum * mean, 0.0f)};
}

// One warp per group: merges the moments of an image into `gridDim.x` parts.
KERNEL __launch_bounds__(THREADS) group_norm_merge(const __grid_constant__ GroupNormParams p) {
    griddep_launch_dependents();
    griddep_wait();
    int groups = p.channels / p.per_group, group = blockIdx.y * (THREADS / 32) + threadIdx.x / 32;
    if (group >= groups) return;
    int each = (p.pixel_units + gridDim.x - 1) / gridDim.x, first = blockIdx.x * each;
    int last = min(first + each, p.pixel_units);
    int pixels = min(last * p.unit_pixels, p.pixels) - first * p.unit_pixels;
    Moments total = merge_units<32>(p, blockIdx.z, group, first, last, float(pixels) * p.per_group);
    if (threadIdx.x % 32 == 0)
        p.partials[(int64_t(blockIdx.z) * groups + group) * gridDim.x + blockIdx.x] =
            make_float2(total.mean, total.squares);
}
EXPORT(group_norm_merge)

// Computes mean and inverse deviation of the slab's groups from moments. Half a warp has a group, so that most slabs'
// groups, 16 of them, take one pass.
template <int W>
__device__ __forceinline__ void merge_moments(const GroupNormParams& p, const Place<W>& place, float2* groups) {
    constexpr int LANES = 16;
    int all = place.channels / p.per_group;
    for (int first = 0; first < all; first += THREADS / LANES) {
        int group = first + threadIdx.x / LANES;
        // Lanes without a group take part in the sums of their warp.
        Moments total = merge_units<LANES>(p, place.image, place.first / p.per_group + min(group, all - 1), 0,
                                           p.pixel_units, float(p.pixels) * p.per_group);
        if (group < all && threadIdx.x % LANES == 0) groups[group] = mean_and_inverse(total, p.eps);
    }
    __syncthreads();
}

template <int W> __device__ __forceinline__ void apply_kernel(const GroupNormParams& p) {
    griddep_launch_dependents();
    Place<W> place(p);
    Loaded<W> loaded;
    loaded.weights(p, place, place.first_column());
    griddep_wait();
    loaded.first_pixels(p, place, place.first_column());
    float2* groups = reinterpret_cast<float2*>(dyn_smem());
    merge_moments(p, place, groups);
    apply(p, place, groups, loaded);
}

template <int W> __device__ __forceinline__ void whole_kernel(const GroupNormParams& p) {
    griddep_launch_dependents();
    Place<W> place(p);
    Loaded<W> loaded;
    loaded.weights(p, place, place.first_column());
    griddep_wait();
    float2* groups = reinterpret_cast<float2*>(dyn_smem());
    float2* sums = groups + p.slab / p.per_group;
    stretch_moments(p, place, sums, [&](int group, Moments m) { groups[group] = mean_and_inverse(m, p.eps); });
    __syncthreads();
    loaded.first_pixels(p, place, place.first_column());
    apply(p, place, groups, loaded);
}

// Three blocks per multiprocessor keep 48 KB of loads in flight there, and so do two if each loads its next pixels
// while it computes. Images that are a single stretch do not fill it.
#define GROUP_NORM(name, body, W, BLOCKS) \
    KERNEL __launch_bounds__(THREADS, BLOCKS) name##_##W(const __grid_constant__ GroupNormParams p) { body<W>(p); } \
    EXPORT(name##_##W)
GROUP_NORM(group_norm_statistics, statistics_kernel, 8, 3)
GROUP_NORM(group_norm_statistics, statistics_kernel, 1, 3)
GROUP_NORM(group_norm_apply, apply_kernel, 8, 2)
GROUP_NORM(group_norm_apply, apply_kernel, 1, 3)
GROUP_NORM(group_norm, whole_kernel, 8, 1)
GROUP_NORM(group_norm, whole_kernel, 1, 1)

struct GroupNormGradientParams {
    GroupNormParams norm;  // `out` is the gradient by the first source
    const __half* d;       // [n][pixels][channels]
    float2* sums;          // [n][groups][stretches]: sums of u and u x^
};
LAYOUT(GroupNormGradientParams, norm, d, sums)

// The column of d that belongs to a column of the slab.
template <int W>
__device__ __forceinline__ Column column_of_d(const GroupNormGradientParams& p, const Place<W>& place, int channel) {
    return {p.d + place.image * p.norm.pixels * p.norm.channels + place.first + channel, p.norm.channels};
}

// Computes u for W channels of a pixel.
template <int W>
__device__ __forceinline__ void gradient_by_normal(const GroupNormParams& p, const float (&xd)[2][W],
                                                   const Affine<W>& a, float (&u)[W]) {
#pragma unroll
    for (int j = 0; j < W; j++) {
        u[j] = xd[1][j] * a.scale[j];
        if (p.silu) u[j] *= slope_of(xd[0][j] * a.scale[j] + a.shift[j], SILU);
    }
}

// Computes every group's sums of u and u x^ in the block's stretch. One thread per group calls f(group in the slab,
// sums).
template <int W, class F>
__device__ __forceinline__ void stretch_sums(const GroupNormGradientParams& p, const Place<W>& place,
                                             const float2* groups, float2* sums, F f) {
    place.each_column(p.norm, [&](int channel, Column from) {
        float sum[W] = {}, product[W] = {};
        Affine<W> affine = load_affine(p.norm, place, channel);
        normalise(p.norm, place, groups, channel, affine);
        place.each_pixel({from, column_of_d(p, place, channel)}, [&](int, const float(&xd)[2][W]) {
            float u[W];
            gradient_by_normal(p.norm, xd, affine, u);
#pragma unroll
            for (int j = 0; j < W; j++) {
                float2 group = groups[(channel + j) / p.norm.per_group];
                sum[j] += u[j];
                product[j] += u[j] * (xd[0][j] - group.x) * group.y;
            }
        });
#pragma unroll
        for (int j = 0; j < W; j++)
            sums[place.thread_row * place.channels + channel + j] = make_float2(sum[j], product[j]);
    });
    __syncthreads();
    int per_group = p.norm.per_group;
    for (int group = threadIdx.x / 32; group < place.channels / per_group; group += THREADS / 32) {
        float2 total = {0.0f, 0.0f};
        place.each_pair(sums, group, per_group, [&](int, float2 s) { total.x += s.x, total.y += s.y; });
        total = make_float2(warp_sum(total.x), warp_sum(total.y));
        if (threadIdx.x % 32 == 0) f(group, total);
    }
}

// Writes the gradient of the block's stretch, given the sums of the slab's groups over the whole image.
template <int W>
__device__ __forceinline__ void apply_gradient(const GroupNormGradientParams& p, const Place<W>& place,
                                               const float2* groups, const float2* totals) {
    float share = 1.0f / (float(p.norm.pixels) * p.norm.per_group);
    place.each_column(p.norm, [&](int channel, Column from) {
        if (place.first + channel >= p.norm.x_channels) return;
        Affine<W> affine = load_affine(p.norm, place, channel);
        normalise(p.norm, place, groups, channel, affine);
        __half* out = p.norm.out + place.image * p.norm.pixels * p.norm.x_channels + place.first + channel;
        place.each_pixel({from, column_of_d(p, place, channel)}, [&](int pixel, const float(&xd)[2][W]) {
            float u[W];
            gradient_by_normal(p.norm, xd, affine, u);
#pragma unroll
            for (int j = 0; j < W; j++) {
                int index = (channel + j) / p.norm.per_group;
                float2 group = groups[index], total = totals[index];
                u[j] -= share * (total.x + (xd[0][j] - group.x) * group.y * total.y);
            }
            store_halves(out + int64_t(pixel) * p.norm.x_channels, u);
        });
    });
}

// Shared memory: moments of the slab's groups, their sums over the image, then the sums of columns.
template <int W> __device__ __forceinline__ void gradient_sums_kernel(const GroupNormGradientParams& p) {
    griddep_launch_dependents();
    griddep_wait();
    Place<W> place(p.norm);
    int slab_groups = p.norm.slab / p.norm.per_group;
    float2* groups = reinterpret_cast<float2*>(dyn_smem());
    merge_moments(p.norm, place, groups);
    int64_t first = place.image * (p.norm.channels / p.norm.per_group) + place.first / p.norm.per_group;
    stretch_sums(p, place, groups, groups + 2 * slab_groups, [&](int group, float2 total) {
        p.sums[(first + group) * gridDim.x + blockIdx.x] = total;
    });
}

template <int W> __device__ __forceinline__ void gradient_apply_kernel(const GroupNormGradientParams& p) {
    griddep_launch_dependents();
    griddep_wait();
    Place<W> place(p.norm);
    float2* groups = reinterpret_cast<float2*>(dyn_smem());
    float2* totals = groups + p.norm.slab / p.norm.per_group;
    int64_t first = place.image * (p.norm.channels / p.norm.per_group) + place.first / p.norm.per_group;
    for (int group = threadIdx.x / 32; group < place.channels / p.norm.per_group; group += THREADS / 32) {
        float2 total = {0.0f, 0.0f};
        for (int i = threadIdx.x % 32; i < gridDim.x; i += 32) {
            float2 s = p.sums[(first + group) * gridDim.x + i];
            total.x += s.x, total.y += s.y;
        }
        total = make_float2(warp_sum(total.x), warp_sum(total.y));
        if (threadIdx.x % 32 == 0) totals[group] = total;
    }
    merge_moments(p.norm, place, groups);
    apply_gradient(p, place, groups, totals);
}

template <int W> __device__ __forceinline__ void gradient_kernel(const GroupNormGradientParams& p) {
    griddep_launch_dependents();
    griddep_wait();
    Place<W> place(p.norm);
    int slab_groups = p.norm.slab / p.norm.per_group;
    float2* groups = reinterpret_cast<float2*>(dyn_smem());
    float2 *totals = groups + slab_groups, *sums = totals + slab_groups;
    stretch_moments(p.norm, place, sums,
                    [&](int group, Moments m) { groups[group] = mean_and_inverse(m, p.norm.eps); });
    __syncthreads();
    stretch_sums(p, place, groups, sums, [&](int group, float2 total) { totals[group] = total; });
    __syncthreads();
    apply_gradient(p, place, groups, totals);
}

#define GROUP_NORM_GRADIENT(name, body, W)                                                                             \
    KERNEL __launch_bounds__(THREADS, 2) name##_##W(const __grid_constant__ GroupNormGradientParams p) { body<W>(p); } \
    EXPORT(name##_##W)
GROUP_NORM_GRADIENT(group_norm_gradient_sums, gradient_sums_kernel, 8)
GROUP_NORM_GRADIENT(group_norm_gradient_sums, gradient_sums_kernel, 1)
GROUP_NORM_GRADIENT(group_norm_gradient_apply, gradient_apply_kernel, 8)
GROUP_NORM_GRADIENT(group_norm_gradient_apply, gradient_apply_kernel, 1)
GROUP_NORM_GRADIENT(group_norm_gradient, gradient_kernel, 8)
GROUP_NORM_GRADIENT(group_norm_gradient, gradient_kernel, 1)
