// Shared by the kernels of attention's gradient: the softmax statistics of a query, and how scores and dP become the
// factors P and dS of the next products. The formulas are in attention_gradient.cu.
//
// A lane holds its part of the scores (and of dP, called slopes) of 16 or 64 own rows by N others, as fragments of
// accumulators: four numbers for every eight others, two for row lane / 4 of its warp and two for the row 8 below, each
// at the others lane % 4 * 2 and the next.
#pragma once
#include "numeric.cuh"

// The power of two by which P is scaled in the kernels by key.
constexpr float P_SCALE = 256.0f;
// Below every score.
constexpr float NO_SCORE = -1e30f;

// A lane's statistics of a query: the greatest score (times the exponent), the sum of the weights relative to it, and
// the sum of weights times dP.
struct QueryStats {
    float top, sum, dot;
};

PTX_FN QueryStats merge(QueryStats a, QueryStats b) {
    const float top = fmaxf(a.top, b.top), x = exp2_approx(a.top - top), y = exp2_approx(b.top - top);
    return {top, a.sum * x + b.sum * y, a.dot * x + b.dot * y};
}

// Accumulates N more others into the statistics of a lane's two rows. The exponent is positive.
template <int N>
PTX_FN void update_statistics(QueryStats (&rows)[2], const float* scores, const float* slopes, float exponent) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        QueryStats now = {NO_SCORE, 0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < N / 4; j++) now.top = fmaxf(now.top, scores[j / 2 * 4 + h * 2 + j % 2]);
        now.top = fmaxf(now.top * exponent, rows[h].top);
#pragma unroll
        for (int j = 0; j < N / 4; j++) {
            const int i = j / 2 * 4 + h * 2 + j % 2;
            const float weight = exp2_approx(fmaf(scores[i], exponent, -now.top));
            now.sum += weight;
            now.dot = fmaf(weight, slopes[i], now.dot);
        }
        rows[h] = merge(rows[h], now);
    }
}

// Merges the statistics of a query's four lanes into the form of AttentionGradientParams::statistics.
PTX_FN float4 statistics_of(QueryStats stats) {
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {
        auto of_other = [&](float x) { return __shfl_xor_sync(0xffffffffu, x, other); };
        stats = merge(stats, {of_other(stats.top), of_other(stats.sum), of_other(stats.dot)});
    }
    const float inverse = 1.0f / stats.sum;
    return make_float4(stats.top, P_SCALE * inverse, stats.dot * inverse, 0.0f);
}

// Computes P and dS as fragments of A, each 16 others deep; statistics(h, column) returns those of a query.
template <int N, class Statistics>
PTX_FN void make_factors(uint32_t* p, uint32_t* ds, const float* scores, const float* slopes, float exponent,
                  Statistics statistics) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float weights[2], steps[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float4 s = statistics(h, j * 8 + threadIdx.x % 4 * 2 + i);
                weights[i] = exp2_approx(fmaf(scores[j * 4 + h * 2 + i], exponent, -s.x)) * s.y;
                steps[i] = weights[i] * (slopes[j * 4 + h * 2 + i] - s.z);
            }
            p[j * 2 + h] = bits_of(to_halves(weights[0], weights[1]));
            ds[j * 2 + h] = bits_of(to_halves(steps[0], steps[1]));
        }
    }
}
