// Sampling: the UNet's input, guidance and the scheduler's step in one kernel, noise, and the VAE's input and output.
// One number per thread (four of a picture). Arrays are 64 KB to 1 MB, so that launches and latencies are all they
// cost: 2 to 3 us each.
//
// All that differs from step to step is read from a table by an index in device memory, so one recorded graph serves
// all steps. `prepare` reads `next` and writes `current`; `guide_and_step` reads `current` and writes `next`. No kernel
// reads what it writes itself, and the order of the stream does the rest.
#include "numeric.cuh"

// diffusion::scheduler::Step; its documentation has the formulas.
struct DeviceStep {
    float timestep, input_scale;
    float convert_x, convert_out, clip;
    float base_x, base_saved, base_m, base_history[3];
    float next_base, next_out, next_m, next_history[3], next_noise;
    uint32_t draw;  // index of this step's noise among the draws from the first step on
    int32_t save, push;
    uint32_t faults;  // number of warps that found latents that are not finite
};
LAYOUT(DeviceStep, timestep, input_scale, convert_x, convert_out, clip, base_x, base_saved, base_m, base_history,
       next_base, next_out, next_m, next_history, next_noise, draw, save, push, faults)

// The state of a request.
struct Run {
    int32_t philox;  // 1 if noise is drawn here rather than read
    int32_t steps;
    int32_t next, current;
    uint32_t picture_faults;  // number of warps that found pixels that are not finite
};
LAYOUT(Run, philox, steps, next, current, picture_faults)

// The numbers of a request that one image has for itself.
struct SampledImage {
    uint64_t seed;
    float guidance;
    uint32_t drawn;  // draws of the seed before the first step
};
LAYOUT(SampledImage, seed, guidance, drawn)

// [batch, pixels, channels]
struct LatentSize {
    int32_t length, channels, pixels;
};
LAYOUT(LatentSize, length, channels, pixels)

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

// Draws number i of the latents as Rng::TorchCuda does; every image has a seed of its own and draws in NCHW order.
// Computed in f64 as there: equal except for the last place of libm's functions, which the rounding to f32 hides nearly
// always.
__device__ __forceinline__ float normal(uint64_t seed, uint32_t draw, int i, const LatentSize& size) {
    int one = size.channels * size.pixels;
    int pixel = i % one / size.channels, channel = i % size.channels;
    uint2 word = philox(draw, channel * size.pixels + pixel, seed);
    constexpr double TAU = 6.283185307179586477;
    double radius = sqrt(-2.0 * log((word.x + 0.5) / 4294967296.0));
    return float(radius * sin(TAU * ((word.y + 0.5) / 4294967296.0)));
}

// The image that number i of the latents belongs to.
__device__ __forceinline__ const SampledImage& image_of(const SampledImage* images, int i, const LatentSize& size) {
    return images[i / (size.channels * size.pixels)];
}

struct NoiseParams {
    float* out;
    const SampledImage* images;
    LatentSize size;
    float scale;
};
LAYOUT(NoiseParams, out, images, size, scale)

// out = scale * normally distributed numbers, each image's from the first draw of its seed.
KERNEL __launch_bounds__(256) noise(const __grid_constant__ NoiseParams p) {
    griddep_launch_dependents();
    griddep_wait();
    int i = index();
    if (i < p.size.length) p.out[i] = normal(image_of(p.images, i, p.size).seed, 0, i, p.size) * p.scale;
}
EXPORT(noise)

struct PrepareParams {
    Run* run;
    const DeviceStep* steps;
    const float* latents;
    __half* sample;  // the latents once, or twice in a row
    float* timestep;  // one per image
    int32_t length;
    int32_t copies;
    int32_t rows;
    int32_t padding;
};
LAYOUT(PrepareParams, run, steps, latents, sample, timestep, length, copies, rows, padding)

// The UNet's inputs: the scaled latents for each half of a guided batch, and the timestep. Beyond the last step it does
// nothing.
KERNEL __launch_bounds__(256) prepare(const __grid_constant__ PrepareParams p) {
    griddep_launch_dependents();
    griddep_wait();
    int i = index(), step = p.run->next;
    if (i == 0) p.run->current = step;
    if (step >= p.run->steps) return;
    if (i < p.length) {
        __half x = to_half(p.latents[i] * p.steps[step].input_scale);
        for (int copy = 0; copy < p.copies; copy++) p.sample[copy * p.length + i] = x;
    }
    if (i < p.rows) p.timestep[i] = p.steps[step].timestep;
}
EXPORT(prepare)

struct GuideAndStepParams {
    Run* run;
    const SampledImage* images;
    DeviceStep* steps;
    const float* out;  // the UNet's output; if guided, unconditional rows come first
    const float* noise;  // read where noise is not drawn here
    float* latents;
    float* saved;
    float* history;  // three arrays, the latest first
    LatentSize size;
    int32_t guided;
};
LAYOUT(GuideAndStepParams, run, images, steps, out, noise, latents, saved, history, size, guided)

// sum + coefficient * x with two roundings, as the CPU computes it. Written with operators, the compiler would fuse the
// two, which shows where large terms cancel, as the noise does in the last steps of LCM.
__device__ __forceinline__ float plus(float sum, float coefficient, float x) {
    return __fadd_rn(sum, __fmul_rn(coefficient, x));
}

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

// Classifier-free guidance (arXiv 2207.12598) and the sampler's step, latents in place. The arithmetic is that of
// SamplerState::step in the same order, so the numbers are equal to the last bit.
KERNEL __launch_bounds__(256) guide_and_step(const __grid_constant__ GuideAndStepParams p) {
    griddep_launch_dependents();
    griddep_wait();
    int i = index(), current = p.run->current, length = p.size.length;
    if (current >= p.run->steps) return;
    DeviceStep& step = p.steps[current];
    bool finite = true;
    if (i < length) {
        const SampledImage& image = image_of(p.images, i, p.size);
        float x = p.latents[i], out = p.out[i];
        if (p.guided) {
            float conditional = p.out[length + i];
            // At 1 the prediction is exactly that of a batch without guidance.
            out = image.guidance == 1.0f ? conditional : plus(out, image.guidance, __fsub_rn(conditional, out));
        }
        float m = plus(__fmul_rn(step.convert_x, x), step.convert_out, out);
        // Comparisons, so that NaN stays NaN.
        m = m > step.clip ? step.clip : m < -step.clip ? -step.clip : m;
        float base = plus_kept(__fmul_rn(step.base_x, x), step.base_saved, p.saved, i);
        base = __fadd_rn(plus(base, step.base_m, m), dot(step.base_history, p.history, i, length));
        float next = plus(__fmul_rn(step.next_base, base), step.next_out, out);
        next = __fadd_rn(plus(next, step.next_m, m), dot(step.next_history, p.history, i, length));
        if (step.next_noise != 0.0f) {
            float noise = p.run->philox ? normal(image.seed, image.drawn + step.draw, i, p.size) : p.noise[i];
            next = plus(next, step.next_noise, noise);
        }
        p.latents[i] = next;
        if (step.save) p.saved[i] = base;
        if (step.push) {
            p.history[2 * length + i] = p.history[length + i];
            p.history[length + i] = p.history[i];
            p.history[i] = m;
        }
        finite = is_finite(next);
    }
    if (__any_sync(0xffffffffu, !finite) && threadIdx.x % 32 == 0) atomicAdd(&step.faults, 1u);
    if (i == 0) p.run->next = current + 1;
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
    Run* run;
    const float* x;
    uint8_t* out;
    int64_t length;
};
LAYOUT(ToRgb8Params, run, x, out, length)

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
    if (__any_sync(0xffffffffu, !finite) && threadIdx.x % 32 == 0) atomicAdd(&p.run->picture_faults, 1u);
}
EXPORT(to_rgb8)
