// Sampling: the UNet's input, guidance and the scheduler's step in one kernel, noise, and the VAE's input and output.
// One number per thread (four of a picture). Arrays are 64 KB to 1 MB, so that launches and latencies are all they
// cost: 2 to 3 us each.
//
// Images are independent of each other: each has a slot with its own steps and its own index of the next one, so that
// images may begin and end at any step of the others. `places` tells which slot a row of the UNet's batch serves. All
// that differs from step to step is read from device memory, so one recorded graph serves all of them. `prepare` reads
// `next` and writes `current`; `rescale` reads `current` and writes `factor`; `guide_and_step` reads both and writes
// `next`. A thread reads nothing that another thread of the same launch writes, and the order of the stream does the
// rest.
#include "numeric.cuh"

// diffusion::scheduler::Step; its documentation has the formulas.
struct DeviceStep {
    float timestep, churn, input_scale, guidance;
    float convert_x, convert_out, clip;
    float base_x, base_saved, base_m, base_history[3];
    float next_base, next_out, next_m, next_history[3], next_noise;
    float kept_signal, kept_noise;  // the noise level that the step leads to
    uint32_t draw;  // index of this step's noise among the draws from the first step on
    int32_t save, push;
};
LAYOUT(DeviceStep, timestep, churn, input_scale, guidance, convert_x, convert_out, clip, base_x, base_saved, base_m,
       base_history, next_base, next_out, next_m, next_history, next_noise, kept_signal, kept_noise, draw, save, push)

// An image between its first and its last step.
struct Slot {
    uint64_t seed;
    float guidance;  // the scale
    float rescale;  // share by which the prediction's standard deviation is brought to the conditional one's
    float first, last;  // timesteps between which there is guidance
    float factor;  // what `rescale` made of this step
    uint32_t drawn;  // draws of the seed before the first step
    int32_t philox;  // 1 if noise is drawn here rather than read
    int32_t steps;
    int32_t next, current;
    uint32_t fault;  // the first step that gave latents that are not finite; 2^32 - 1 if none did
    uint32_t picture_faults;  // number of warps that found pixels that are not finite
    int32_t keeps;  // 1 if a part of the image stays as it is
    int32_t padding;
};
LAYOUT(Slot, seed, guidance, rescale, first, last, factor, drawn, philox, steps, next, current, fault, picture_faults,
       keeps, padding)

// One image's latents, [pixels, channels].
struct LatentSize {
    int32_t channels, pixels;
};
LAYOUT(LatentSize, channels, pixels)

__device__ __forceinline__ int index() { return blockIdx.x * 256 + threadIdx.x; }

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }

// Philox4x32-10 (Salmon et al., 2011): the first two of four words.
__device__ __forceinline__ uint2 philox(uint32_t draw, uint32_t element, uint64_t seed) {
    uint32_t c0 = draw, c1 = 0, c2 = element, c3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t first = uint64_t(c0) * 0xd2511f53u;
        uint64_t second = uint64_t(c2) * 0xcd9e8d57u;
        c0 = uint32_t(second >> 32) ^ c1 ^ k0;
        c1 = uint32_t(second);
        c2 = uint32_t(first >> 32) ^ c3 ^ k1;
        c3 = uint32_t(first);
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return make_uint2(c0, c1);
}

// Draws number i of an image's latents as Rng::TorchCuda does, in NCHW order. Computed in f64 as there: equal except
// for the last place of libm's functions, which the rounding to f32 hides nearly always.
__device__ __forceinline__ float normal(uint64_t seed, uint32_t draw, int i, const LatentSize& size) {
    int pixel = i / size.channels, channel = i % size.channels;
    uint2 word = philox(draw, channel * size.pixels + pixel, seed);
    constexpr double TAU = 6.283185307179586477;
    double radius = sqrt(-2.0 * log((word.x + 0.5) / 4294967296.0));
    return float(radius * sin(TAU * ((word.y + 0.5) / 4294967296.0)));
}

struct NoiseParams {
    float* out;
    const Slot* slot;
    LatentSize size;
    float scale;
    int32_t padding;
};
LAYOUT(NoiseParams, out, slot, size, scale, padding)

// out = scale * normally distributed numbers, the last draw of an image's seed before the first step.
KERNEL __launch_bounds__(256) noise(const __grid_constant__ NoiseParams p) {
    griddep_launch_dependents();
    griddep_wait();
    int i = index();
    if (i < p.size.channels * p.size.pixels) p.out[i] = normal(p.slot->seed, p.slot->drawn - 1, i, p.size) * p.scale;
}
EXPORT(noise)

// sum + coefficient * x with two roundings, as the CPU computes it. Written with operators, the compiler would fuse the
// two, which shows where large terms cancel, as the noise does in the last steps of LCM.
__device__ __forceinline__ float plus(float sum, float coefficient, float x) {
    return __fadd_rn(sum, __fmul_rn(coefficient, x));
}

// Number i of the noise of an image's step: drawn here, or read.
__device__ __forceinline__ float step_noise(const Slot& slot, const DeviceStep& step, int i, const LatentSize& size,
                                            const float* noise) {
    return slot.philox ? normal(slot.seed, slot.drawn + step.draw, i, size) : noise[i];
}

struct PrepareParams {
    Slot* slots;
    const int32_t* places;  // one per row: its slot, or -1 for none
    const DeviceStep* steps;  // `capacity` for each slot
    const float* noise;  // of all slots, read where noise is not drawn here
    float* latents;  // of all slots
    __half* sample;  // the rows once, or twice one after the other
    float* timestep;  // one per row of `sample`
    LatentSize size;
    int32_t rows;
    int32_t copies;
    int32_t capacity;
    int32_t padding;
};
LAYOUT(PrepareParams, slots, places, steps, noise, latents, sample, timestep, size, rows, copies, capacity, padding)

// The UNet's inputs: each row's latents, with the noise that goes before the step, scaled, for each half of a guided
// batch, and its timestep. The inputs of a row without an image are zeros; those of an image after its last step stay.
KERNEL __launch_bounds__(256) prepare(const __grid_constant__ PrepareParams p) {
    griddep_launch_dependents();
    griddep_wait();
    int one = p.size.channels * p.size.pixels, i = index(), row = i / one;
    if (row >= p.rows) return;
    int place = p.places[row], within = i % one;
    float x = 0.0f, timestep = 0.0f;
    if (place >= 0) {
        Slot& slot = p.slots[place];
        int next = slot.next;
        if (within == 0) slot.current = next;
        if (next >= slot.steps) return;
        const DeviceStep& step = p.steps[int64_t(place) * p.capacity + next];
        int64_t first = int64_t(place) * one;
        x = p.latents[first + within];
        if (step.churn != 0.0f) {
            x = plus(x, step.churn, step_noise(slot, step, within, p.size, p.noise + first));
            p.latents[first + within] = x;
        }
        x *= step.input_scale;
        timestep = step.timestep;
    }
    for (int copy = 0; copy < p.copies; copy++) {
        p.sample[copy * p.rows * one + i] = to_half(x);
        if (within == 0) p.timestep[copy * p.rows + row] = timestep;
    }
}
EXPORT(prepare)

// Classifier-free guidance (arXiv 2207.12598) of a scale. At 1 the prediction is exactly that of a batch without
// guidance.
__device__ __forceinline__ float guide(float scale, float without, float with) {
    return scale == 1.0f ? with : plus(without, scale, __fsub_rn(with, without));
}

// The scale in a step; 1 outside the interval of timesteps (arXiv 2404.07724).
__device__ __forceinline__ float scale_at(const Slot& slot, const DeviceStep& step) {
    return step.timestep <= slot.first && step.timestep >= slot.last ? __fmul_rn(slot.guidance, step.guidance) : 1.0f;
}

struct RescaleParams {
    Slot* slots;
    const int32_t* places;
    const DeviceStep* steps;
    const float* out;  // the UNet's output: unconditional rows come first
    int32_t one;  // numbers per image
    int32_t rows;
    int32_t capacity;
    int32_t padding;
};
LAYOUT(RescaleParams, slots, places, steps, out, one, rows, capacity, padding)

// Computes the factor that brings the standard deviation of a row's prediction over the image nearer to that of the
// conditional prediction (section 3.4 of arXiv 2305.08891). One block per row; the order of the sums is that of the
// CPU's `rescaling`. Products of two floats are exact in f64, so it does not matter where they are fused.
KERNEL __launch_bounds__(256) rescale(const __grid_constant__ RescaleParams p) {
    griddep_launch_dependents();
    griddep_wait();
    int row = blockIdx.x, place = p.places[row], thread = threadIdx.x;
    if (place < 0) return;
    Slot& slot = p.slots[place];
    if (slot.current >= slot.steps || slot.rescale == 0.0f) return;
    float scale = scale_at(slot, p.steps[int64_t(place) * p.capacity + slot.current]);
    const float* without = p.out + int64_t(row) * p.one;
    const float* with = without + int64_t(p.rows) * p.one;
    double sums[4] = {0.0, 0.0, 0.0, 0.0};
    for (int i = thread; i < p.one; i += 256) {
        double conditional = with[i], guided = guide(scale, without[i], with[i]);
        sums[0] += conditional;
        sums[1] += conditional * conditional;
        sums[2] += guided;
        sums[3] += guided * guided;
    }
    double* shared = reinterpret_cast<double*>(dyn_smem());
#pragma unroll
    for (int k = 0; k < 4; k++) shared[k * 256 + thread] = sums[k];
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) {
#pragma unroll
            for (int k = 0; k < 4; k++) shared[k * 256 + thread] += shared[k * 256 + thread + half];
        }
    }
    if (thread == 0) {
        double conditional = shared[256] - shared[0] * shared[0] / p.one;
        double guided = shared[768] - shared[512] * shared[512] / p.one;
        slot.factor = float(fma(double(slot.rescale), sqrt(conditional / guided) - 1.0, 1.0));
    }
}
EXPORT(rescale)

struct GuideAndStepParams {
    Slot* slots;
    const int32_t* places;
    const DeviceStep* steps;
    const float* out;  // the UNet's output; if guided, unconditional rows come first
    const float* noise;  // of all slots, read where noise is not drawn here
    float* latents;  // of all slots, as the following
    float* saved;
    float* history;  // three arrays, the latest first
    const float* kept;  // the parts that stay as they are, without noise, and then the noise of all slots
    const uint8_t* repaint;  // one per pixel, 0 where it stays as it is
    LatentSize size;
    int32_t rows;
    int32_t guided;
    int32_t capacity;
    int32_t stride;  // numbers of all slots
};
LAYOUT(GuideAndStepParams, slots, places, steps, out, noise, latents, saved, history, kept, repaint, size, rows, guided,
       capacity, stride)

// The same for x[i], unless the coefficient is zero: memory that no step has written yet may hold anything.
__device__ __forceinline__ float plus_kept(float sum, float coefficient, const float* x, int i) {
    return coefficient == 0.0f ? sum : plus(sum, coefficient, x[i]);
}

__device__ __forceinline__ float dot(const float (&coefficients)[3], const float* history, int i, int length) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < 3; k++) sum = plus_kept(sum, coefficients[k], history + k * length, i);
    return sum;
}

// Guidance and the sampler's step, latents in place. The arithmetic is that of the CPU's `guide` and of
// SamplerState::step in the same order, so the numbers are equal to the last bit.
KERNEL __launch_bounds__(256) guide_and_step(const __grid_constant__ GuideAndStepParams p) {
    griddep_launch_dependents();
    griddep_wait();
    int one = p.size.channels * p.size.pixels, i = index(), row = i / one, within = i % one;
    if (row >= p.rows || p.places[row] < 0) return;
    int place = p.places[row];
    Slot& slot = p.slots[place];
    int current = slot.current;
    if (current >= slot.steps) return;
    const DeviceStep& step = p.steps[int64_t(place) * p.capacity + current];
    int at = place * one + within;
    float x = p.latents[at], out = p.out[i];
    if (p.guided) {
        float scale = scale_at(slot, step);
        out = guide(scale, out, p.out[p.rows * one + i]);
        if (slot.rescale != 0.0f && scale != 1.0f) out = __fmul_rn(out, slot.factor);
    }
    float m = plus(__fmul_rn(step.convert_x, x), step.convert_out, out);
    // Comparisons, so that NaN stays NaN.
    m = m > step.clip ? step.clip : m < -step.clip ? -step.clip : m;
    float base = plus_kept(__fmul_rn(step.base_x, x), step.base_saved, p.saved, at);
    base = __fadd_rn(plus(base, step.base_m, m), dot(step.base_history, p.history, at, p.stride));
    float next = plus(__fmul_rn(step.next_base, base), step.next_out, out);
    next = __fadd_rn(plus(next, step.next_m, m), dot(step.next_history, p.history, at, p.stride));
    if (step.next_noise != 0.0f) {
        next = plus(next, step.next_noise, step_noise(slot, step, within, p.size, p.noise + place * one));
    }
    if (slot.keeps && !p.repaint[place * p.size.pixels + within / p.size.channels])
        next = plus(__fmul_rn(step.kept_signal, p.kept[at]), step.kept_noise, p.kept[p.stride + at]);
    p.latents[at] = next;
    if (step.save) p.saved[at] = base;
    if (step.push) {
        p.history[2 * p.stride + at] = p.history[p.stride + at];
        p.history[p.stride + at] = p.history[at];
        p.history[at] = m;
    }
    if (!is_finite(next)) atomicMin(&slot.fault, uint32_t(current));
    if (within == 0) slot.next = current + 1;
}
EXPORT(guide_and_step)

struct LatentsForVaeParams {
    const float* latents;
    __half* out;
    int32_t length;
    float scaling_factor;
};
LAYOUT(LatentsForVaeParams, latents, out, length, scaling_factor)

KERNEL __launch_bounds__(256) latents_for_vae(const __grid_constant__ LatentsForVaeParams p) {
    griddep_launch_dependents();
    griddep_wait();
    int i = index();
    if (i < p.length) p.out[i] = to_half(p.latents[i] / p.scaling_factor);
}
EXPORT(latents_for_vae)

struct ToRgb8Params {
    Slot* slot;
    const float* x;
    uint8_t* out;
    int64_t length;
};
LAYOUT(ToRgb8Params, slot, x, out, length)

// Maps -1..1 to bytes, rounded as in Picture::from_hwc; numbers that are not finite become 0 and are counted.
__device__ __forceinline__ uint32_t to_byte(float x) {
    return uint32_t(rintf(fminf(fmaxf(x * 0.5f + 0.5f, 0.0f), 1.0f) * 255.0f));
}

KERNEL __launch_bounds__(256) to_rgb8(const __grid_constant__ ToRgb8Params p) {
    griddep_launch_dependents();
    griddep_wait();
    int64_t i = (int64_t(blockIdx.x) * 256 + threadIdx.x) * 4;
    bool finite = true;
    if (i + 4 <= p.length) {
        float4 x = *reinterpret_cast<const float4*>(p.x + i);
        finite = is_finite(x.x) && is_finite(x.y) && is_finite(x.z) && is_finite(x.w);
        uint32_t bytes = to_byte(x.x) | to_byte(x.y) << 8 | to_byte(x.z) << 16 | to_byte(x.w) << 24;
        *reinterpret_cast<uint32_t*>(p.out + i) = bytes;
    } else {
        for (; i < p.length; i++) {
            finite = finite && is_finite(p.x[i]);
            p.out[i] = to_byte(p.x[i]);
        }
    }
    if (__any_sync(0xffffffffu, !finite) && threadIdx.x % 32 == 0) atomicAdd(&p.slot->picture_faults, 1u);
}
EXPORT(to_rgb8)
