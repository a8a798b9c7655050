// mma.sync: a warp's whole register tile at once, gathered from the lanes, multiplied as plain matrices, and scattered
// back.
#include "warp.h"

namespace emu {

static const char* MMA = "mma.sync";
constexpr int M_MOST = 8, N_MOST = 32;  // instructions of one call, in each dimension

struct MmaLane {
    float* d;
    const uint32_t *a, *b;
};

// The registers of m16n8k16 by lane: rows g and g + 8, columns 2t, 2t + 1 and those plus 8; g = lane / 4, t = lane % 4.
struct Tile {
    alignas(32) float a[M_MOST * 16][16];
    alignas(32) float b[16][N_MOST * 8];
    alignas(32) float d[M_MOST * 16][N_MOST * 8];
};
static thread_local Tile tile;

static void gather(const Meeting& m, int mt, int nt) {
    alignas(16) uint32_t a[M_MOST * 16][8];     // pairs of halves
    for (int lane = 0; lane < WARP; lane++) {
        const MmaLane& from = *(const MmaLane*)m.lanes[lane];
        int g = lane >> 2, t = lane & 3;
        for (int i = 0; i < mt; i++) {
            const uint32_t* x = from.a + i * 4;
            a[i * 16 + g][t] = x[0];
            a[i * 16 + g + 8][t] = x[1];
            a[i * 16 + g][t + 4] = x[2];
            a[i * 16 + g + 8][t + 4] = x[3];
        }
        for (int j = 0; j < nt; j++) {
            const uint32_t* x = from.b + j * 2;
            alignas(16) float pairs[4];
            _mm_store_ps(pairs, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)x)));
            int n = j * 8 + g;
            tile.b[2 * t][n] = pairs[0];
            tile.b[2 * t + 1][n] = pairs[1];
            tile.b[2 * t + 8][n] = pairs[2];
            tile.b[2 * t + 9][n] = pairs[3];
        }
        for (int i = 0; i < mt; i++)
            for (int j = 0; j < nt; j++) {
                const float* y = from.d + (i * nt + j) * 4;
                memcpy(&tile.d[i * 16 + g][j * 8 + 2 * t], y, 8);
                memcpy(&tile.d[i * 16 + g + 8][j * 8 + 2 * t], y + 2, 8);
            }
    }
    for (int row = 0; row < mt * 16; row++)
        for (int half = 0; half < 2; half++)
            _mm256_store_ps(&tile.a[row][half * 8], _mm256_cvtph_ps(_mm_load_si128((const __m128i*)&a[row][half * 4])));
}

// d += a b, with four rows by `Vectors` vectors of eight in registers; k in order, as everywhere in the emulator.
template <int Vectors> static inline void multiply(int row, int column) {
    __m256 d[4][Vectors];
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < Vectors; v++) d[r][v] = _mm256_load_ps(&tile.d[row + r][column + v * 8]);
#pragma GCC unroll 4
    for (int k = 0; k < 16; k++)
        for (int r = 0; r < 4; r++) {
            __m256 a = _mm256_broadcast_ss(&tile.a[row + r][k]);
            for (int v = 0; v < Vectors; v++)
                d[r][v] = _mm256_fmadd_ps(a, _mm256_load_ps(&tile.b[k][column + v * 8]), d[r][v]);
        }
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < Vectors; v++) _mm256_store_ps(&tile.d[row + r][column + v * 8], d[r][v]);
}

static void deal(const Meeting& m, int mt, int nt) {
    for (int lane = 0; lane < WARP; lane++) {
        float* d = ((MmaLane*)m.lanes[lane])->d;
        int g = lane >> 2, t = lane & 3;
        for (int i = 0; i < mt; i++)
            for (int j = 0; j < nt; j++) {
                float* y = d + (i * nt + j) * 4;
                memcpy(y, &tile.d[i * 16 + g][j * 8 + 2 * t], 8);
                memcpy(y + 2, &tile.d[i * 16 + g + 8][j * 8 + 2 * t], 8);
            }
    }
}

void mma16816(float* d, const uint32_t* a, const uint32_t* b, int mt, int nt, const char* f, int l) {
    MmaLane mine{d, a, b};
    Site site(f, l);
    if (mt > M_MOST || nt > N_MOST)
        fail_at(site, "mma.sync: a tile of %d x %d instructions; at most %d x %d", mt, nt, M_MOST, N_MOST);
    meet(MMA, ALL_LANES, true, &mine, site, [&](Meeting& m) {
        worker->counters.mma += mt * nt;
        gather(m, mt, nt);
        for (int row = 0; row < mt * 16; row += 4) {
            int j = 0;
            for (; j + 2 <= nt; j += 2) multiply<2>(row, j * 8);
            if (j < nt) multiply<1>(row, j * 8);
        }
        deal(m, mt, nt);
    });
}

}  // namespace emu
