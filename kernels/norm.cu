// Group and layer normalisation. Memory bound.
//
// Group norm. A block has a slab of channels (whole groups and, where vectors of eight allow, whole 32-byte sectors: 160
// bytes of a pixel for most layers) and a stretch of one image's pixels. A thread has a column of W channels, of which it
// takes every `lanes`-th pixel, four loads of 16 bytes in flight.
//   group_norm_statistics: one read of the input; mean and squared deviations of each group in the stretch, 8 bytes each.
//   group_norm_apply: merges the stretches of its groups (at most 256 x 8 bytes a group), one read and one write.
//   group_norm: both in one for images that are one stretch; the second read hits the cache.
// 3 x 2 bytes an element; should reach 85 % of the memory's bandwidth where the input exceeds the L2 cache.
//
// Sums of squares are taken about the column's first pixel. That is one of the n numbers summed, so they are at most n + 1
// times the squared deviations about the mean, and the subtraction costs log2(n + 1) bits at worst, whatever the mean:
// nothing to fp32, n being a few hundred. All that comes after is merged by Chan, Golub and LeVeque's rule (1983), in an
// order that one image's shape decides.
//
// Layer norm. A row stays in the registers of one warp (of several beyond 1280 channels): one read, one write.
#include "numeric.cuh"

struct GroupNormParams {
    const __half* x;
    const __half* skip;  // channels after those of x, or null
    const __half* scale_shift;  // [n][2][channels] or null
    const float* weight;
    const float* bias;
    __half* out;
    float2* partials;  // [n][groups][stretches]: mean, squared deviations
    int32_t x_channels;
    int32_t channels;
    int32_t per_group;
    int32_t slab;  // channels of a block
    int32_t pixels;
    int32_t stretch;  // pixels of a block
    float eps;
    int32_t silu;
};

constexpr int THREADS = 256;
constexpr int AHEAD = 4;

struct Moments {
    float count, mean, squares;
};

__device__ __forceinline__ Moments merge(Moments a, Moments b) {
    float count = a.count + b.count;
    float share = count > 0.0f ? b.count / count : 0.0f;
    float delta = b.mean - a.mean;
    return {count, a.mean + delta * share, a.squares + b.squares + delta * delta * a.count * share};
}

// Right in lane 0.
__device__ __forceinline__ Moments warp_merge(Moments a) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        Moments b;
        b.count = __shfl_down_sync(0xffffffffu, a.count, offset);
        b.mean = __shfl_down_sync(0xffffffffu, a.mean, offset);
        b.squares = __shfl_down_sync(0xffffffffu, a.squares, offset);
        a = merge(a, b);
    }
    return a;
}

// The block's slab and stretch, and the thread's part of it.
template <int W> struct Place {
    int first, channels, columns, lanes, lane;
    int begin, end;
    int64_t image;

    __device__ __forceinline__ explicit Place(const GroupNormParams& p) {
        first = blockIdx.y * p.slab;
        channels = min(p.slab, p.channels - first);
        columns = channels / W;
        lanes = max(THREADS / columns, 1);
        lane = threadIdx.x / columns;
        begin = blockIdx.x * p.stretch;
        end = min(begin + p.stretch, p.pixels);
        image = blockIdx.z;
    }

    // f(channel in the slab, the source's channels of the image's first pixel, channels of a pixel there) for the columns
    // of this thread: one, or several where there are more than threads.
    template <class F> __device__ __forceinline__ void each_column(const GroupNormParams& p, F f) const {
        if (lane >= lanes) return;
        for (int column = threadIdx.x % columns; column < columns; column += THREADS) {
            int channel = first + column * W;
            bool skip = channel >= p.x_channels;
            int stride = skip ? p.channels - p.x_channels : p.x_channels;
            const __half* source = (skip ? p.skip : p.x) + image * p.pixels * stride;
            f(column * W, source + (skip ? channel - p.x_channels : channel), stride);
        }
    }

    // f(pixel, its channels) for the pixels of this thread.
    template <class F> __device__ __forceinline__ void each_pixel(const __half* source, int stride, F f) const {
        for (int pixel = begin + lane; pixel < end; pixel += AHEAD * lanes) {
            float x[AHEAD][W];
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (pixel + i * lanes < end) load_halves(source + int64_t(pixel + i * lanes) * stride, x[i]);
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (pixel + i * lanes < end) f(pixel + i * lanes, x[i]);
        }
    }

    // How many pixels a lane has.
    __device__ __forceinline__ int count(int lane) const { return max(end - begin - lane + lanes - 1, 0) / lanes; }
};

// Hands every group's moments in the block's stretch to f(group in the slab, moments), in one thread.
template <int W, class F>
__device__ __forceinline__ void stretch_moments(const GroupNormParams& p, const Place<W>& place, float2* sums, F f) {
    place.each_column(p, [&](int channel, const __half* source, int stride) {
        float pivot[W] = {}, sum[W] = {}, squares[W] = {};
        int count = place.count(place.lane);
        if (count > 0) load_halves(source + int64_t(place.begin + place.lane) * stride, pivot);
        place.each_pixel(source, stride, [&](int, const float(&x)[W]) {
#pragma unroll
            for (int j = 0; j < W; j++) {
                float d = x[j] - pivot[j];
                sum[j] += d;
                squares[j] += d * d;
            }
        });
        float inverse = count > 0 ? 1.0f / count : 0.0f;
#pragma unroll
        for (int j = 0; j < W; j++) {
            float mean = sum[j] * inverse;
            sums[place.lane * place.channels + channel + j] =
                make_float2(pivot[j] + mean, fmaxf(squares[j] - sum[j] * mean, 0.0f));
        }
    });
    __syncthreads();
    for (int group = threadIdx.x / 32; group < place.channels / p.per_group; group += THREADS / 32) {
        Moments total = {};
        for (int i = threadIdx.x % 32; i < place.lanes * p.per_group; i += 32) {
            int lane = i / p.per_group;
            float2 s = sums[lane * place.channels + group * p.per_group + i % p.per_group];
            total = merge(total, {float(place.count(lane)), s.x, s.y});
        }
        total = warp_merge(total);
        if (threadIdx.x % 32 == 0) f(group, total);
    }
}

__device__ __forceinline__ float2 mean_and_inverse(Moments m, float eps) {
    return make_float2(m.mean, rsqrtf(m.squares / m.count + eps));
}

// Writes the block's stretch, given mean and inverse deviation of the slab's groups.
template <int W>
__device__ __forceinline__ void apply(const GroupNormParams& p, const Place<W>& place, const float2* groups) {
    place.each_column(p, [&](int channel, const __half* source, int stride) {
        float scale[W], shift[W];
#pragma unroll
        for (int j = 0; j < W; j++) {
            float2 group = groups[(channel + j) / p.per_group];
            int c = place.first + channel + j;
            scale[j] = p.weight[c] * group.y;
            shift[j] = p.bias[c] - group.x * scale[j];
            if (p.scale_shift) {
                const __half* modulation = p.scale_shift + place.image * 2 * p.channels + c;
                float factor = 1.0f + __half2float(modulation[0]);
                scale[j] *= factor;
                shift[j] = shift[j] * factor + __half2float(modulation[p.channels]);
            }
        }
        __half* out = p.out + place.image * p.pixels * p.channels + place.first + channel;
        place.each_pixel(source, stride, [&](int pixel, const float(&x)[W]) {
            float y[W];
#pragma unroll
            for (int j = 0; j < W; j++) {
                y[j] = x[j] * scale[j] + shift[j];
                if (p.silu) y[j] = silu(y[j]);
            }
            store_halves(out + int64_t(pixel) * p.channels, y);
        });
    });
}

template <int W> __device__ __forceinline__ void statistics_kernel(const GroupNormParams& p) {
    Place<W> place(p);
    int groups = p.channels / p.per_group;
    int64_t first = place.image * groups + place.first / p.per_group;
    stretch_moments(p, place, reinterpret_cast<float2*>(dyn_smem()), [&](int group, Moments m) {
        p.partials[(first + group) * gridDim.x + blockIdx.x] = make_float2(m.mean, m.squares);
    });
}

template <int W> __device__ __forceinline__ void apply_kernel(const GroupNormParams& p) {
    Place<W> place(p);
    float2* groups = reinterpret_cast<float2*>(dyn_smem());
    int64_t first = place.image * (p.channels / p.per_group) + place.first / p.per_group;
    for (int group = threadIdx.x / 32; group < place.channels / p.per_group; group += THREADS / 32) {
        const float2* partials = p.partials + (first + group) * gridDim.x;
        Moments total = {};
        for (int i = threadIdx.x % 32; i < gridDim.x; i += 32) {
            float count = float(min(p.stretch, p.pixels - i * p.stretch)) * p.per_group;
            total = merge(total, {count, partials[i].x, partials[i].y});
        }
        total = warp_merge(total);
        if (threadIdx.x % 32 == 0) groups[group] = mean_and_inverse(total, p.eps);
    }
    __syncthreads();
    apply(p, place, groups);
}

template <int W> __device__ __forceinline__ void whole_kernel(const GroupNormParams& p) {
    Place<W> place(p);
    float2* groups = reinterpret_cast<float2*>(dyn_smem());
    float2* sums = groups + p.slab / p.per_group;
    stretch_moments(p, place, sums, [&](int group, Moments m) { groups[group] = mean_and_inverse(m, p.eps); });
    __syncthreads();
    apply(p, place, groups);
}

#define GROUP_NORM(name, body, W) \
    KERNEL __launch_bounds__(THREADS) name##_##W(const __grid_constant__ GroupNormParams p) { body<W>(p); } \
    EXPORT(name##_##W)
GROUP_NORM(group_norm_statistics, statistics_kernel, 8)
GROUP_NORM(group_norm_statistics, statistics_kernel, 1)
GROUP_NORM(group_norm_apply, apply_kernel, 8)
GROUP_NORM(group_norm_apply, apply_kernel, 1)
GROUP_NORM(group_norm, whole_kernel, 8)
GROUP_NORM(group_norm, whole_kernel, 1)

struct LayerNormParams {
    const __half* x;
    const float* weight;
    const float* bias;
    __half* out;
    int64_t rows;
    int32_t channels;
    int32_t warps;  // of a row
    float eps;
    int32_t unused;
};

// Columns of a row that one thread keeps.
constexpr int SLOTS = 5;

// Sums x over the warps of the thread's row.
__device__ __forceinline__ float row_sum(float x, int warps) {
    x = warp_sum(x);
    if (warps == 1) return x;
    float* by_warp = reinterpret_cast<float*>(dyn_smem());
    if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < warps; warp++) sum += by_warp[threadIdx.x / (32 * warps) * warps + warp];
    __syncthreads();
    return sum;
}

template <int W> __device__ __forceinline__ void layer_norm_kernel(const LayerNormParams& p) {
    int threads = 32 * p.warps;
    int64_t row = int64_t(blockIdx.x) * (blockDim.x / threads) + threadIdx.x / threads;
    // Threads past the last row stay for the barriers.
    int columns = row < p.rows ? p.channels / W : 0;
    int column = threadIdx.x % threads;
    const __half* from = p.x + row * p.channels;
    float x[SLOTS][W];
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < SLOTS; i++)
        if (column + i * threads < columns) load_halves(from + (column + i * threads) * W, x[i]);
#pragma unroll
    for (int i = 0; i < SLOTS; i++)
#pragma unroll
        for (int j = 0; j < W; j++)
            if (column + i * threads < columns) sum += x[i][j];
    float mean = row_sum(sum, p.warps) / p.channels;
#pragma unroll
    for (int i = 0; i < SLOTS; i++)
#pragma unroll
        for (int j = 0; j < W; j++)
            if (column + i * threads < columns) squares += (x[i][j] - mean) * (x[i][j] - mean);
    float inverse = rsqrtf(row_sum(squares, p.warps) / p.channels + p.eps);
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
        int channel = (column + i * threads) * W;
        if (column + i * threads >= columns) break;
#pragma unroll
        for (int j = 0; j < W; j++)
            x[i][j] = (x[i][j] - mean) * inverse * p.weight[channel + j] + p.bias[channel + j];
        store_halves(p.out + row * p.channels + channel, x[i]);
    }
}

// A block is four rows of one warp, or one row of up to 32.
#define LAYER_NORM(W) \
    KERNEL __launch_bounds__(1024) layer_norm_##W(const __grid_constant__ LayerNormParams p) { layer_norm_kernel<W>(p); } \
    EXPORT(layer_norm_##W)
LAYER_NORM(8)
LAYER_NORM(1)
