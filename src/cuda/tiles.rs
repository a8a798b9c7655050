//! Which tile a matrix product is cut into, and into how many parts its depth: a pure function of its shape and of the
//! device's limits. Every candidate is either rejected with a reason or estimated; the fastest is taken.

use super::device::Limits;

/// Depth of a stage.
pub(super) const STEP: usize = 64;
/// Threads of a block.
pub(super) const THREADS: usize = 256;
/// Most parts of a depth.
const MAX_SPLITS: usize = 16;
/// Fewest stages of a part: filling the pipeline takes as long as two.
const MIN_STEPS: usize = 4;

/// A kernel of `kernels/conv.cu` that makes tiles of `rows` by `columns`.
#[derive(Debug, PartialEq)]
pub(super) struct Tile {
    pub kernel: &'static str,
    pub rows: usize,
    pub columns: usize,
    /// Warps one below the other; eight in all.
    pub warps_down: usize,
    /// Stages in shared memory.
    pub stages: usize,
    /// Blocks for whose registers a multiprocessor has room.
    pub resident: usize,
    /// Whether it reads 16 bytes at a time, so that a pixel of each source has to be a whole number of them.
    pub vector: bool,
}

/// The candidates. Channels are multiples of 160 in Stable Diffusion's UNets and of 128 in its VAEs.
#[rustfmt::skip]
pub(super) const TILES: [Tile; 11] = [
    Tile { kernel: "conv_128x160", rows: 128, columns: 160, warps_down: 2, stages: 3, resident: 1, vector: true },
    Tile { kernel: "conv_128x128", rows: 128, columns: 128, warps_down: 2, stages: 3, resident: 1, vector: true },
    Tile { kernel: "conv_128x80", rows: 128, columns: 80, warps_down: 4, stages: 3, resident: 1, vector: true },
    Tile { kernel: "conv_64x160", rows: 64, columns: 160, warps_down: 2, stages: 3, resident: 2, vector: true },
    Tile { kernel: "conv_64x80", rows: 64, columns: 80, warps_down: 4, stages: 4, resident: 2, vector: true },
    Tile { kernel: "conv_64x64", rows: 64, columns: 64, warps_down: 2, stages: 4, resident: 2, vector: true },
    Tile { kernel: "conv_32x64", rows: 32, columns: 64, warps_down: 2, stages: 4, resident: 2, vector: true },
    Tile { kernel: "conv_16x64", rows: 16, columns: 64, warps_down: 1, stages: 4, resident: 2, vector: true },
    Tile { kernel: "conv_128x16", rows: 128, columns: 16, warps_down: 8, stages: 3, resident: 2, vector: true },
    Tile { kernel: "conv_64x64_odd", rows: 64, columns: 64, warps_down: 2, stages: 4, resident: 2, vector: false },
    Tile { kernel: "conv_16x64_odd", rows: 16, columns: 64, warps_down: 1, stages: 4, resident: 2, vector: false },
];

/// A matrix product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub rows: usize,
    pub columns: usize,
    /// Taps by channels, these filled up to whole chunks.
    pub depth: usize,
    /// Whether a pixel of each source is a whole number of 16 bytes.
    pub vector: bool,
}

impl Product {
    fn steps(&self) -> usize {
        self.depth.div_ceil(STEP)
    }

    /// Bytes of the sums that `splits` parts leave behind; the kernels know the pitch.
    pub fn partial_bytes(&self, splits: usize) -> usize {
        if splits == 1 { 0 } else { splits * self.rows * self.columns.next_multiple_of(16) * size_of::<f32>() }
    }
}

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Choice {
    pub tile: &'static Tile,
    /// Parts of the depth.
    pub splits: usize,
    /// Stages of each.
    pub steps: usize,
}

/// The best way to compute a product of `images` times `one`'s rows. The number of splits decides the order of sums, so it
/// is a guided pair's, however many images there are.
pub(super) fn choose(one: Product, images: usize, limits: Limits) -> Choice {
    let fastest = |product: Product, splits: &mut dyn Iterator<Item = usize>| {
        let mut best = None;
        for splits in splits {
            let steps = product.steps().div_ceil(splits);
            if splits > 1 && (steps < MIN_STEPS || product.steps().div_ceil(steps) != splits) {
                continue;
            }
            for tile in TILES.iter().filter(|tile| tile.rejected(&product, limits).is_none()) {
                let time = tile.estimate(&product, splits, limits);
                if best.is_none_or(|(least, _)| time < least) {
                    best = Some((time, Choice { tile, splits, steps }));
                }
            }
        }
        // The 16x64 tiles are never rejected but for the other kind of sources.
        best.expect("a tile for every product").1
    };
    let pair = fastest(Product { rows: 2 * one.rows, ..one }, &mut (1..=MAX_SPLITS));
    fastest(Product { rows: images * one.rows, ..one }, &mut std::iter::once(pair.splits))
}

impl Tile {
    /// Bytes of shared memory.
    pub fn shared(&self) -> usize {
        self.stages * (self.rows + self.columns) * STEP * 2
    }

    /// Tiles that cover a product.
    pub fn count(&self, product: &Product) -> usize {
        product.rows.div_ceil(self.rows) * product.columns.div_ceil(self.columns)
    }

    /// Why a product cannot, or should not, be cut into tiles like this.
    fn rejected(&self, product: &Product, limits: Limits) -> Option<&'static str> {
        let smallest = self.rows == 16;
        if self.shared() > limits.shared as usize {
            Some("its stages do not fit into the shared memory of a block")
        } else if self.vector && !product.vector {
            Some("it reads 16 bytes at a time and the sources' pixels are no multiple of that")
        } else if !self.vector && product.vector {
            Some("it reads number by number and the sources allow 16 bytes at a time")
        } else if !smallest && product.rows < self.rows / 2 {
            Some("more than half of its rows would be empty")
        } else if !smallest && self.columns > 64 && product.columns <= self.columns / 2 {
            Some("half of its columns or more would be empty")
        } else {
            None
        }
    }

    /// Cycles for a product whose depth is in `splits` parts.
    ///
    /// A multiprocessor is bound by its tensor cores, by shared memory (128 bytes a cycle) or by what reaches it from L2; and a
    /// lone block by how long a stage takes to come. To this come filling the pipeline and storing the tile, and, with splits,
    /// another launch and the sums' way to L2 and back.
    fn estimate(&self, product: &Product, splits: usize, limits: Limits) -> f64 {
        /// Cycles from a request to its data under load, and of a launch.
        const LATENCY: f64 = 1000.0;
        const LAUNCH: f64 = 2000.0;
        /// Bytes a cycle from L2 for each multiprocessor.
        const L2: f64 = 40.0;
        let (rows, columns, warps) = (self.rows as f64, self.columns as f64, (THREADS / 32) as f64);
        let multiply = rows * columns * STEP as f64 / multiply_adds(limits);
        let bytes = 2.0 * STEP as f64 * (rows + columns);
        let warp = rows / self.warps_down as f64 + columns * self.warps_down as f64 / warps;
        let shared = (bytes + 2.0 * STEP as f64 * warps * warp) / 128.0;
        let busy = multiply.max(shared).max(bytes / L2);
        let alone = LATENCY / (self.stages - 1) as f64;
        let store = LATENCY + rows * columns / 16.0;

        let multiprocessors = limits.multiprocessors as usize;
        let steps = product.steps().div_ceil(splits) as f64;
        let blocks = (self.count(product) * splits).div_ceil(multiprocessors);
        // A kilobyte of each block's shared memory is the driver's.
        let resident = ((limits.shared as usize + 1024) / (self.shared() + 1024)).min(self.resident).max(1);
        let rounds = blocks.div_ceil(resident) as f64;
        let product_time = (blocks as f64 * steps * busy).max(rounds * steps * alone) + rounds * store;
        if splits == 1 {
            return product_time;
        }
        product_time + LAUNCH + 2.0 * product.partial_bytes(splits) as f64 / (L2 * multiprocessors as f64)
    }
}

/// fp16 multiply-adds a cycle of a multiprocessor: an A100's tensor cores, or what mma.sync gets out of an H100's.
fn multiply_adds(limits: Limits) -> f64 {
    if limits.capability >= 90 { 1280.0 } else { 1024.0 }
}
