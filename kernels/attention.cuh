// Shared by attention and its gradient: moving rows of heads into shared memory, from there into fragments, and back.
//
// A tile type T describes rows in shared memory: CHUNKS chunks of 16 bytes per row, STRIDE chunks from one row to the
// next (odd, which keeps ldmatrix free of bank conflicts). It describes a warp's accumulators: PIECES pieces of 16
// rows, and COLUMNS of 8 channels each, in GROUPS of AT_ONCE. It also has the THREADS of a block, and VECTOR: true if
// they copy 16 bytes at a time, false if number by number.
#pragma once
#include "numeric.cuh"

constexpr uint32_t ALL_LANES = 0xffffffffu;

// A warp's accumulators, as fragments: of each piece a lane holds the rows `lane / 4` and 8 below it.
template <class T> using Sums = float[T::GROUPS][T::PIECES][T::AT_ONCE][4];

// Copies the channels of `count` of ROWS tokens to shared memory and pads with zeros, below and to the right.
template <class T, int ROWS> PTX_FN void load(uint32_t offset, const __half* from, int width, int count, int head_dim) {
    constexpr int PASS = T::THREADS / T::CHUNKS;
    int first = threadIdx.x / T::CHUNKS, chunk = threadIdx.x % T::CHUNKS;
    if (first >= PASS) return;
    const __half* source = from + (first * width + chunk * 8);
    if constexpr (T::VECTOR) {
        uint32_t to = smem_u32(dyn_smem()) + offset + (first * T::STRIDE + chunk) * 16;
        int rows = chunk * 8 < head_dim ? count - first : 0;
#pragma unroll
        for (int row = 0; row < ROWS; row += PASS) {
            if (row + PASS <= ROWS || first + row < ROWS) cp_async16(to + row * T::STRIDE * 16, source, row < rows);
            source += PASS * width;
        }
    } else {
        __half* to = reinterpret_cast<__half*>(dyn_smem() + offset) + (first * T::STRIDE + chunk) * 8;
        for (int row = first; row < ROWS; row += PASS, to += PASS * T::STRIDE * 8, source += PASS * width) {
            for (int i = 0; i < 8; i++) to[i] = row < count && chunk * 8 + i < head_dim ? source[i] : to_half(0.0f);
        }
    }
}

// Loads a 16 x 16 fragment of A, K-major, from chunk `chunk` on; `lane_at` is the address of the lane's row. Channels
// beyond the end of the row are zero.
template <int CHUNKS> PTX_FN void load_a(uint32_t (&a)[4], uint32_t lane_at, int chunk) {
    bool whole = chunk + 1 < CHUNKS;
    ldmatrix_x4(a, lane_at + (chunk + (whole ? threadIdx.x / 16 % 2 : 0)) * 16);
    if (!whole) a[2] = a[3] = 0;
}

// Loads ROWS rows, from the address `rows` on, as the columns of B, 16 deep: the two chunks number `step` of each row.
// Where the row ends after the first of them, the second repeats other numbers of the row; there A is zero.
template <class T, int ROWS> PTX_FN void load_b(uint32_t (&b)[ROWS / 8][2], uint32_t rows, int step) {
    int lane = threadIdx.x % 32;
    int chunk = step * 2 + (step * 2 + 1 < T::CHUNKS ? lane / 8 % 2 : 0);
    uint32_t at = rows + ((lane % 8 + lane / 16 * 8) * T::STRIDE + chunk) * 16;
#pragma unroll
    for (int j = 0; j < ROWS / 8; j += 2) {
        uint32_t r[4];
        ldmatrix_x4(r, at + j * 8 * T::STRIDE * 16);
        b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
}

// sums += a * (the warp's columns of 16 rows from the address `rows` on).
template <class T> PTX_FN void add_product(Sums<T>& sums, const uint32_t (&a)[T::PIECES][4], uint32_t rows) {
    int lane = threadIdx.x % 32;
    rows += lane % 16 * T::STRIDE * 16;
#pragma unroll
    for (int group = 0; group < T::GROUPS; group++) {
        uint32_t b[T::AT_ONCE][2];
#pragma unroll
        for (int j = 0; j < T::AT_ONCE; j += 2) {
            // An odd last column is loaded twice.
            bool pair = j + 1 < T::AT_ONCE;
            uint32_t r[4];
            ldmatrix_x4_trans(r, rows + (group * T::AT_ONCE + j + (pair ? lane / 16 : 0)) * 16);
            b[j][0] = r[0], b[j][1] = r[1];
            if (pair) b[j + 1][0] = r[2], b[j + 1][1] = r[3];
        }
        mma_tile<T::PIECES, T::AT_ONCE>(sums[group], a, b);
    }
}

// Writes a warp's accumulators times its rows' factors, for those rows that are among the block's first `rows`. They
// pass through shared memory at `offset`, where no other warp may still read this warp's rows. Several warps may share
// the rows, each with a part of the columns; `part` is this warp's.
template <class T>
PTX_FN void store_rows(const Sums<T>& sums, const float (&factors)[T::PIECES][2], int offset, int row, int part,
                       __half* out, int width, int rows, int head_dim) {
    int lane = threadIdx.x % 32;
    // All lanes have finished reading what this overwrites.
    __syncwarp();
    __half* tile = reinterpret_cast<__half*>(dyn_smem() + offset) + row * T::STRIDE * 8;
#pragma unroll
    for (int i = 0; i < T::PIECES; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float factor = factors[i][h];
#pragma unroll
            for (int j = 0; j < T::COLUMNS; j++) {
                const float* x = &sums[j / T::AT_ONCE][i][j % T::AT_ONCE][h * 2];
                int column = (part * T::COLUMNS + j) * 8 + lane % 4 * 2;
                __half2* to = reinterpret_cast<__half2*>(tile + (i * 16 + h * 8 + lane / 4) * T::STRIDE * 8 + column);
                *to = to_halves(x[0] * factor, x[1] * factor);
            }
        }
    }
    __syncwarp();
    for (int i = lane; i < T::PIECES * 16 * T::COLUMNS; i += 32) {
        int own = i / T::COLUMNS, column = (part * T::COLUMNS + i % T::COLUMNS) * 8;
        if (row + own >= rows || column >= head_dim) continue;
        const __half* from = tile + own * T::STRIDE * 8 + column;
        __half* to = out + int64_t(row + own) * width + column;
        if constexpr (T::VECTOR) {
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else {
            for (int j = 0; j < 8 && column + j < head_dim; j++) to[j] = from[j];
        }
    }
}
