// Convolutions and linear layers for sm_90a: the implicit GEMM of conv.cu, with tiles that are loaded by
// TMA and multiplied by wgmma. The kernels are empty for other architectures, which use conv.cu.
//
// A tile is a rectangle of pixels, 128 in all, by COLUMNS output channels. A block has three warpgroups. One thread of
// the last is the producer; the first two multiply 64 pixels each, or, in the _pingpong kernels, all 128 pixels of
// every second tile, so that one warpgroup stores while the other multiplies. The depth, taps x channels, passes
// through a ring of stages of 64. For each stage TMA loads the tile's pixels under the current tap, which is the
// rectangle moved by the tap's offset. Pixels outside the image arrive as zeros, so padding costs nothing; two
// concatenated sources are two tensor maps. Blocks are persistent: while the results of a tile are stored, the first
// stages of the next tile are loaded.
//
// A 3x3 convolution of a source that is first upsampled by two equals four 2x2 convolutions of the source itself, one
// for each parity of the result's row and column; the results of each lie two pixels apart. That is 4/9 of the work
// (src/cuda/weights.rs sums the taps).
//
//   COLUMNS  stages  shared memory (KiB)  cycles of a stage: tensor cores, and L2 at 60 bytes per cycle
//     80       6        180                 320  443
//    128       5        196                 512  546
//    160       5        225                 640  614
//    256       3        214                1024  819
//
// Bound: the tensor cores from 160 columns on (2048 multiply-adds per cycle and multiprocessor), L2 below. Measured on
// an H200: 600 to 730 TFLOP/s for 3x3 convolutions with 45 stages and more, 715 TFLOP/s for 8192 x 8192 x 8192.
//
// A convolution of stride 2 reads, for each tap, the pixels of one parity of row and column: four tensor maps, whose
// pixels are two apart in the source.
//
// A resnet's 1x1 shortcut convolution, whose result is added to that of the second convolution, is computed as more
// depth of that second convolution, with two tensor maps and a weight of its own: its result is neither written nor
// read.
//
// Where one image has fewer tiles than the device has multiprocessors, the depth is split over several blocks
// (split-K). Each writes its partial sums to memory and increments the tile's counter. The last to arrive adds them
// all, in the order of the depth rather than of arrival.
//
// The epilogue, with the moments for norms and the folded layer norm, is in epilogue_hopper.cuh.
//
// Each sum is one chain of products of 16 in the order of the depth, so no bit depends on the tile. It is not the chain
// of conv.cu's mma.sync, since that instruction rounds at other places; the host therefore chooses between the two by
// one image's shape alone.
#include "epilogue_hopper.cuh"

namespace conv_hopper {

template <int COLUMNS> PTX_FN void multiply(float (&d)[COLUMNS / 2], uint64_t a, uint64_t b, int add) {
    if constexpr (COLUMNS == 80) wgmma_m64n80k16<0>(d, a, b, add);
    if constexpr (COLUMNS == 128) wgmma_m64n128k16<0>(d, a, b, add);
    if constexpr (COLUMNS == 160) wgmma_m64n160k16<0>(d, a, b, add);
    if constexpr (COLUMNS == 256) wgmma_m64n256k16<0>(d, a, b, add);
}

// The producer thread: loads all stages of all of the block's tiles, as fast as slots of the ring become free. The
// weights of the first stages, which fill the ring once, are loaded before the launches before this one have ended.
template <class T> PTX_FN void produce(const ConvHopperParams& p, uint32_t shared) {
    int units = p.tiles_down * p.tiles_across * p.splits, blocks = p.blocks[0] + p.blocks[1];
    int stages = blocks * p.kernel * p.kernel, all = stages + p.added_blocks[0] + p.added_blocks[1];
    auto fetch_weights = [&](const Place& at, int step, int slot) {
        uint32_t full = shared + T::FULL + 8 * slot, to = shared + slot * T::STAGE + T::A;
        mbar_expect_tx(full, T::STAGE);
        if (T::GATED) {
            // A tile's values, then its gates.
            tma_load_3d(to, &p.weight, full, step * STEP, 0, at.column / 2);
            tma_load_3d(to + T::B / 2, &p.weight, full, step * STEP, 1, at.column / 2);
        } else if (step < stages) {
            tma_load_2d(to, &p.weight, full, step * STEP, at.phase * p.columns + at.column);
        } else {
            tma_load_2d(to, &p.added_weight, full, (step - stages) * STEP, at.column);
        }
    };
    int start = blockIdx.x % p.splits * p.steps;
    int early = min(T::STAGES, min(p.steps, all - start));
    for (int i = 0; i < early; i++) fetch_weights(place_of<T>(p, blockIdx.x / p.splits), start + i, i);
    griddep_wait();
    int slot = 0, parity = 1;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
        Place at = place_of<T>(p, unit / p.splits);
        int first = unit % p.splits * p.steps, last = min(first + p.steps, all);
        int tap = first / blocks, block = first % blocks, ky = tap / p.kernel, kx = tap % p.kernel;
        // Odd rows of an upsampled source see their own source row and the next one, even rows that before and their
        // own.
        int pad_x = p.kernel / 2 - at.phase % 2, pad_y = p.kernel / 2 - at.phase / 2;
        for (int step = first; step < last; step++) {
            if (early > 0) {
                early--;
            } else {
                mbar_wait(shared + T::EMPTY + 8 * slot, parity);
                fetch_weights(at, step, slot);
            }
            uint32_t full = shared + T::FULL + 8 * slot, to = shared + slot * T::STAGE;
            if (step < stages) {
                bool second = block >= p.blocks[0];
                int source = second, channel = (second ? block - p.blocks[0] : block) * STEP;
                int x = kx - pad_x, y = ky - pad_y;
                // Where the result has half the size, the rows of a tap are every second one of the source, and so are
                // the columns: each parity of them is a map of its own.
                if (p.halved) source = (y & 1) * 2 + (x & 1), x >>= 1, y >>= 1;
                tma_load_4d(to, &p.sources[source], full, channel, at.x + x, at.y + y, at.image);
                if (++block == blocks) {
                    block = 0;
                    if (++kx == p.kernel) kx = 0, ky++;
                }
            } else {
                int added = step - stages;
                bool second = added >= p.added_blocks[0];
                int channel = (second ? added - p.added_blocks[0] : added) * STEP;
                tma_load_4d(to, &p.added_sources[second], full, channel, at.x, at.y, at.image);
            }
            if (++slot == T::STAGES) slot = 0, parity ^= 1;
        }
    }
}

// A consumer warpgroup: multiplies all stages of its tiles, and stores their results.
template <class T> PTX_FN void consume(const ConvHopperParams& p, uint32_t shared) {
    // The depth of ping-pong tiles is never split.
    int splits = T::PINGPONG ? 1 : p.splits, units = p.tiles_down * p.tiles_across * splits;
    int stages = (p.blocks[0] + p.blocks[1]) * p.kernel * p.kernel + p.added_blocks[0] + p.added_blocks[1];
    int group = threadIdx.x / 128, lane = threadIdx.x % 32;
    bool stores = threadIdx.x % 128 == 0;
    int slot = 0, parity = 0, residual_parity = 0;
    // Skips the slots of the ring that the other warpgroup's tile passes through.
    auto skip_other_tile = [&] {
        slot += stages;
        parity ^= slot / T::STAGES & 1, slot %= T::STAGES;
    };
    int operands_slot = 0, operands_parity = 0;
    // The warpgroups take turns at multiplying: each waits at barrier 4 + its own number until the tile before has
    // consumed its stages, because the parity of a slot further ahead would be that of another round.
    if (T::PINGPONG && group == 1) {
        skip_other_tile(), operands_slot = 1;
        named_bar_arrive(4, CONSUMERS);
    }
    float d[T::HALVES][T::COLUMNS / 2];
    int unit = blockIdx.x + (T::PINGPONG ? group * gridDim.x : 0);
    for (; unit < units; unit += gridDim.x * T::HALVES) {
        int tile = unit / splits, split = unit % splits;
        Place at = place_of<T>(p, tile);
        int count = T::PINGPONG ? stages : min(p.steps, stages - split * p.steps), previous = 0;
        if (T::PINGPONG) named_bar_sync(4 + group, CONSUMERS);
        for (int step = 0; step < count; step++) {
            mbar_wait(shared + T::FULL + 8 * slot, parity);
            uint64_t a = wg_desc_sw128(shared + slot * T::STAGE + (T::PINGPONG ? 0 : group * 64 * 128), 16, 1024);
            uint64_t b = wg_desc_sw128(shared + slot * T::STAGE + T::A, 16, 1024);
#pragma unroll
            for (int half = 0; half < T::HALVES; half++) wgmma_hold(d[half]);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < STEP / 16; k++)
#pragma unroll
                for (int half = 0; half < T::HALVES; half++)
                    multiply<T::COLUMNS>(d[half], a + half * (64 * 128 >> 4) + 2 * k, b + 2 * k, step > 0 || k > 0);
            wgmma_commit();
            // While these products are in flight, wait until the last store has read the staging buffer and fetch the
            // residual into it. With split-K only the last block stores, and it fetches the residual once it knows that
            // it is the last.
            if (step == min(1, count - 1) && splits == 1) {
                if (stores) prepare_staging<T>(p, at, shared, T::PINGPONG ? 0 : group);
                // wgmma needs converged warps: wait for the thread that stored and fetched.
                __syncwarp();
            }
            if (step > 0) {
                // The products of the previous stage are done, and its slot may be refilled.
                wgmma_wait<1>();
                if (lane == 0) mbar_arrive(shared + T::EMPTY + 8 * previous);
            }
            previous = slot;
            if (++slot == T::STAGES) slot = 0, parity ^= 1;
        }
        if (T::PINGPONG && unit + gridDim.x < units) named_bar_arrive(5 - group, CONSUMERS);
        wgmma_wait<0>();
#pragma unroll
        for (int half = 0; half < T::HALVES; half++) wgmma_hold(d[half]);
        if (lane == 0) mbar_arrive(shared + T::EMPTY + 8 * previous);
        bool last = true;
        if constexpr (!T::PINGPONG) {
            if (splits > 1) {
                last = add_splits<T::COLUMNS / 8>(d[0], p.partial, p.counters, tile, splits, split,
                                                  dyn_smem() + T::TICKET);
                if (last && stores) prepare_staging<T>(p, at, shared, group);
            }
        }
        mbar_wait(shared + T::OPERANDS_FULL + 8 * operands_slot, operands_parity);
        auto operands = reinterpret_cast<const float2*>(dyn_smem() + T::OPERANDS + operands_slot * T::OPERANDS_BYTES);
        if (last) {
            // Not unrolled, since the code of each iteration takes longer to fetch than to execute.
#pragma unroll 1
            for (int half = 0; half < T::HALVES; half++) {
                if (half == 1) {
                    if (stores) prepare_staging<T>(p, at, shared, half);
#pragma unroll
                    for (int i = 0; i < T::COLUMNS / 2; i++) d[0][i] = d[T::HALVES - 1][i];
                }
                store_tile<T>(p, d[0], at, T::PINGPONG ? half : group, operands, shared, residual_parity);
                residual_parity ^= 1;
            }
        }
        // All lanes have read the operands, and the thread that stored has rejoined its warp.
        __syncwarp();
        if (lane == 0) mbar_arrive(shared + T::OPERANDS_EMPTY + 8 * operands_slot);
        if (T::PINGPONG) {
            skip_other_tile();
            operands_parity ^= 1;
        } else {
            operands_slot ^= 1;
            if (operands_slot == 0) operands_parity ^= 1;
        }
    }
    if (stores) tma_store_wait<0>();
}

template <class T> PTX_FN void conv(const ConvHopperParams& p) {
    griddep_launch_dependents();
    uint32_t shared = smem_u32(dyn_smem());
    if (threadIdx.x == 0) {
        for (int i = 0; i < T::STAGES; i++) {
            mbar_init(shared + T::FULL + 8 * i, 1);
            mbar_init(shared + T::EMPTY + 8 * i, T::WARPS);
        }
        for (int i = 0; i < 2; i++) {
            mbar_init(shared + T::RESIDUAL_FULL + 8 * i, 1);
            mbar_init(shared + T::OPERANDS_FULL + 8 * i, HELPERS);
            mbar_init(shared + T::OPERANDS_EMPTY + 8 * i, T::WARPS);
        }
        fence_mbar_init();
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        reg_dec<56>();
        if (threadIdx.x == CONSUMERS) produce<T>(p, shared);
        else if (threadIdx.x >= THREADS - HELPERS) prepare_operands<T>(p, shared);
        griddep_wait();
    } else {
        reg_inc<224>();
        griddep_wait();
        consume<T>(p, shared);
    }
}

}  // namespace conv_hopper

#ifdef PTX_HOPPER
#define CONV_HOPPER_BODY(...) conv_hopper::conv<conv_hopper::Tile<__VA_ARGS__>>(p);
#else
#define CONV_HOPPER_BODY(...)
#endif
// Columns, stages, whether columns alternate between values and gates, whether each warpgroup has tiles of its own.
#define CONV_HOPPER(name, ...)                         \
    KERNEL __launch_bounds__(conv_hopper::THREADS, 1)  \
    name(const __grid_constant__ ConvHopperParams p) { \
        CONV_HOPPER_BODY(__VA_ARGS__)                  \
    }                                                  \
    EXPORT_TILE(name, 1, conv_hopper::Tile<__VA_ARGS__>)
CONV_HOPPER(conv_hopper_80, 80, 6, false, false)
CONV_HOPPER(conv_hopper_128, 128, 5, false, false)
CONV_HOPPER(conv_hopper_160, 160, 5, false, false)
CONV_HOPPER(conv_hopper_256, 256, 3, false, false)
CONV_HOPPER(conv_hopper_160_gated, 160, 5, true, false)
CONV_HOPPER(conv_hopper_256_gated, 256, 3, true, false)
CONV_HOPPER(conv_hopper_128_pingpong, 128, 5, false, true)
CONV_HOPPER(conv_hopper_160_pingpong, 160, 5, false, true)
CONV_HOPPER(conv_hopper_160_gated_pingpong, 160, 5, true, true)
