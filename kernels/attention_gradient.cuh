// What the kernels of attention's gradient share: what is seen of a query's keys, and how scores and slopes become
// factors of the next products. Their formulas are in attention_gradient.cu.
//
// Scores, and slopes (dP), are a lane's part of 16 or 64 own rows by N others: four numbers for each eight others, of
// which two are of the row lane / 4 of its warp's and two of the row 8 below, both of the others lane % 4 * 2 and the
// next.
#pragma once
#include "numeric.cuh"

// What P is carried times, by key.
constexpr float LIFT = 256.0f;
// Below every score.
constexpr float NO_SCORE = -1e30f;

// What a lane has seen of a query: the greatest score, the sum of weights relative to it, and of weights times dP.
struct Seen {
    float top, sum, dot;
};

PTX_FN Seen merge(Seen a, Seen b) {
    const float top = fmaxf(a.top, b.top), x = exp2_approx(a.top - top), y = exp2_approx(b.top - top);
    return {top, a.sum * x + b.sum * y, a.dot * x + b.dot * y};
}

// Of N others, to what has been seen of a lane's two rows. The exponent is positive.
template <int N> PTX_FN void look(Seen (&rows)[2], const float* scores, const float* slopes, float exponent) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        Seen now = {NO_SCORE, 0.0f, 0.0f};
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

// What a query's four lanes have seen together, as AttentionGradientParams says of statistics.
PTX_FN float4 statistics_of(Seen seen) {
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {
        auto of_other = [&](float x) { return __shfl_xor_sync(0xffffffffu, x, other); };
        seen = merge(seen, {of_other(seen.top), of_other(seen.sum), of_other(seen.dot)});
    }
    const float inverse = 1.0f / seen.sum;
    return make_float4(seen.top, LIFT * inverse, seen.dot * inverse, 0.0f);
}

// P and dS as fragments of A, 16 others of depth each; statistics(h, column) are those of a query.
template <int N, class Statistics>
PTX_FN void weigh(uint32_t* p, uint32_t* ds, const float* scores, const float* slopes, float exponent,
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
