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
/// Most bytes of sums that the parts of a guided pair's depth leave behind: they should stay in L2.
const MAX_PARTIAL: usize = 16 << 20;

/// The instruction that multiplies. The two round at different places, so that one image's shape alone must choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Instruction {
    /// Of warps, on every GPU: `kernels/conv.cu`.
    MmaSync,
    /// Of warpgroups, on 9.0 alone: `kernels/conv_hopper.cu`.
    Wgmma,
}

/// A kernel that makes tiles of `rows` by `columns`.
#[derive(Debug, PartialEq)]
pub(super) struct Tile {
    pub kernel: &'static str,
    pub instruction: Instruction,
    pub rows: usize,
    pub columns: usize,
    /// True if columns are values and gates in turns, and false if not; mma.sync's kernels do both.
    pub gated: Option<bool>,
    /// Warps one below the other; eight in all. A wgmma tile has two warpgroups one below the other.
    pub warps_down: usize,
    /// Stages in shared memory.
    pub stages: usize,
    /// Blocks for whose registers a multiprocessor has room.
    pub resident: usize,
    /// Whether it reads 16 bytes at a time, so that a pixel of each source has to be a whole number of them.
    pub vector: bool,
    /// Whether the two warpgroups of a wgmma tile have tiles of their own in turns, so that one stores while the other
    /// multiplies.
    pub pingpong: bool,
}

const fn mma(
    kernel: &'static str,
    [rows, columns]: [usize; 2],
    warps_down: usize,
    stages: usize,
    resident: usize,
    vector: bool,
) -> Tile {
    let (instruction, gated, pingpong) = (Instruction::MmaSync, None, false);
    Tile { kernel, instruction, rows, columns, gated, warps_down, stages, resident, vector, pingpong }
}

const fn wgmma(kernel: &'static str, columns: usize, stages: usize, gated: bool, pingpong: bool) -> Tile {
    let (instruction, gated) = (Instruction::Wgmma, Some(gated));
    Tile { kernel, instruction, rows: 128, columns, gated, warps_down: 8, stages, resident: 1, vector: true, pingpong }
}

/// The candidates. Channels are multiples of 160 in Stable Diffusion's UNets and of 128 in its VAEs.
pub(super) const TILES: [Tile; 22] = [
    mma("conv_128x256", [128, 256], 2, 3, 1, true),
    mma("conv_256x128", [256, 128], 4, 3, 1, true),
    mma("conv_128x160", [128, 160], 2, 4, 1, true),
    mma("conv_128x128", [128, 128], 2, 4, 1, true),
    mma("conv_128x80", [128, 80], 4, 3, 2, true),
    mma("conv_64x160", [64, 160], 2, 3, 2, true),
    mma("conv_64x80", [64, 80], 4, 4, 2, true),
    mma("conv_64x64", [64, 64], 2, 4, 2, true),
    mma("conv_32x64", [32, 64], 2, 4, 3, true),
    mma("conv_16x64", [16, 64], 1, 4, 4, true),
    mma("conv_128x16", [128, 16], 8, 3, 3, true),
    mma("conv_64x64_odd", [64, 64], 2, 4, 2, false),
    mma("conv_16x64_odd", [16, 64], 1, 4, 3, false),
    wgmma("conv_hopper_80", 80, 6, false, false),
    wgmma("conv_hopper_128", 128, 5, false, false),
    wgmma("conv_hopper_160", 160, 5, false, false),
    wgmma("conv_hopper_256", 256, 3, false, false),
    wgmma("conv_hopper_160_gated", 160, 5, true, false),
    wgmma("conv_hopper_256_gated", 256, 3, true, false),
    wgmma("conv_hopper_128_pingpong", 128, 5, false, true),
    wgmma("conv_hopper_160_pingpong", 160, 5, false, true),
    wgmma("conv_hopper_160_gated_pingpong", 160, 5, true, true),
];

/// A matrix product, or as many of the same shape as there are phases.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    /// Four for a doubled source: the results of even and odd rows and columns. Else one.
    pub phases: usize,
    pub rows: usize,
    pub columns: usize,
    /// Taps by channels, these filled up to whole chunks.
    pub depth: usize,
    /// Channels of a product of the same rows and columns that is added to it, multiples of [`STEP`]; wgmma's kernels can.
    pub added: usize,
    /// Whether a pixel of each source is a whole number of 16 bytes.
    pub vector: bool,
    /// True if the columns are values and gates.
    pub gated: bool,
    /// Columns that no tile of wgmma's may part, because moments are taken of them together.
    pub unit: usize,
    /// Whether an activation other than the gate's follows, or RespoDiff's shift.
    pub followed: bool,
    /// Whether a layer norm before it or behind it has no launch, which only wgmma's kernels can do without.
    pub normalised: bool,
    /// How TMA would fetch the rows, if wgmma's kernels can do this product.
    pub area: Option<Area>,
}

/// The images that TMA fetches tiles of: their size, and how pixels are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub height: usize,
    pub width: usize,
    pub pixels: Pixels,
}

/// How pixels are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pixels {
    /// Each by itself: all images' are one row.
    Apart,
    /// With their neighbours.
    Near,
}

/// A rectangle of 128 pixels: powers of two, of width, height and images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rectangle {
    pub log_width: u32,
    pub log_height: u32,
}

impl Rectangle {
    pub const PIXELS: usize = 128;

    pub fn size(self) -> [usize; 3] {
        let (width, height) = (1 << self.log_width, 1 << self.log_height);
        [width, height, Self::PIXELS / width / height]
    }

    /// How many cover so many images: across and down one, and images.
    pub fn count(self, area: Area, images: usize) -> [usize; 3] {
        let [width, height, deep] = self.size();
        [area.width.div_ceil(width), area.height.div_ceil(height), images.div_ceil(deep)]
    }
}

impl Area {
    /// Width, height and images as TMA sees so many images.
    pub fn seen(self, images: usize) -> (Area, usize) {
        match self.pixels {
            Pixels::Apart => (Area { height: 1, width: self.height * self.width * images, ..self }, 1),
            Pixels::Near => (self, images),
        }
    }

    /// The rectangle of which the fewest cover a guided pair of images; the widest of several.
    pub fn rectangle(self) -> Rectangle {
        if self.pixels == Pixels::Apart {
            return Rectangle { log_width: 7, log_height: 0 };
        }
        let logs = (3..=7).rev().flat_map(|log_width| (0..=7 - log_width).rev().map(move |h| (log_width, h)));
        let all = logs.map(|(log_width, log_height)| Rectangle { log_width, log_height });
        all.min_by_key(|rectangle| rectangle.count(self, 2).iter().product::<usize>()).expect("there are some")
    }

    /// True if every warpgroup's half of a rectangle that has pixels of an image has 64 of the same image.
    pub fn is_whole_units(self) -> bool {
        let Rectangle { log_width, log_height } = self.rectangle();
        match self.pixels {
            Pixels::Apart => (self.height * self.width).is_multiple_of(Rectangle::PIXELS / 2),
            Pixels::Near => {
                let width = log_width.min(6);
                let half = |size: usize, log: u32| size.is_multiple_of(1 << log);
                log_width + log_height >= 6 && half(self.width, width) && half(self.height, 6 - width)
            }
        }
    }

    /// Rectangles that cover so many rows of a product.
    fn rectangles(self, rows: usize) -> usize {
        let (seen, images) = self.seen(rows / (self.height * self.width));
        self.rectangle().count(seen, images).iter().product()
    }
}

impl Product {
    /// Stages of the depth.
    pub fn steps(&self) -> usize {
        self.depth.div_ceil(STEP) + self.added / STEP
    }

    /// Whether `splits` parts are long enough, none is empty, and their sums are few enough.
    fn may_split(&self, splits: usize) -> bool {
        let steps = self.steps().div_ceil(splits);
        let bytes = splits * self.phases * self.rows * self.columns * size_of::<f32>();
        steps >= MIN_STEPS && self.steps().div_ceil(steps) == splits && bytes <= MAX_PARTIAL
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

/// The best way to compute a product of `images` times `one`'s rows. The number of splits and the instruction decide how sums
/// are rounded, so they are a guided pair's, however many images there are.
pub(super) fn choose(one: Product, images: usize, limits: Limits) -> Choice {
    let fastest = |product: Product, may: &dyn Fn(usize, Instruction) -> bool| {
        let mut best = None;
        for tile in TILES.iter().filter(|tile| tile.rejected(&product, limits).is_none()) {
            let most = if tile.pingpong { 1 } else { MAX_SPLITS };
            for splits in (1..=most).filter(|&splits| may(splits, tile.instruction)) {
                let time = tile.estimate(&product, splits, limits);
                if best.is_none_or(|(least, _)| time < least) {
                    let steps = product.steps().div_ceil(splits);
                    best = Some((time, Choice { tile, splits, steps }));
                }
            }
        }
        // The 16x64 tiles are never rejected but for the other kind of sources.
        best.expect("a tile for every product").1
    };
    let two = Product { rows: 2 * one.rows, ..one };
    let pair = fastest(two, &|splits, _| splits == 1 || two.may_split(splits));
    let as_pair = |splits, by| (splits, by) == (pair.splits, pair.tile.instruction);
    fastest(Product { rows: images * one.rows, ..one }, &as_pair)
}

impl Tile {
    /// Bytes of shared memory: the stages, and for wgmma's kernels behind them the results, 256 bytes of barriers, and
    /// two tiles' operands of the epilogue, eight bytes for each column and row.
    pub fn shared(&self) -> usize {
        let stages = self.stages * (self.rows + self.columns) * STEP * 2;
        let results = if self.gated == Some(true) { self.columns / 2 } else { self.columns };
        let behind = self.rows * results * 2 + 256 + 2 * (self.rows + self.columns) * 8;
        stages + if self.instruction == Instruction::Wgmma { behind } else { 0 }
    }

    /// Tiles that cover a product, of all phases.
    pub fn count(&self, product: &Product) -> usize {
        let down = match (self.instruction, product.area) {
            (Instruction::Wgmma, Some(area)) => area.rectangles(product.rows),
            _ => product.rows.div_ceil(self.rows),
        };
        product.phases * down * product.columns.div_ceil(self.columns)
    }

    /// Bytes of the sums that `splits` parts leave behind; the kernels know their order.
    pub fn partial_bytes(&self, product: &Product, splits: usize) -> usize {
        if splits == 1 { 0 } else { splits * self.count(product) * self.rows * self.columns * size_of::<f32>() }
    }

    /// Why a product cannot, or should not, be cut into tiles like this.
    fn rejected(&self, product: &Product, limits: Limits) -> Option<&'static str> {
        let smallest = self.rows == 16;
        if self.instruction == Instruction::Wgmma && limits.capability != 90 {
            Some("its instructions are another architecture's")
        } else if self.instruction == Instruction::Wgmma && product.area.is_none() {
            Some("TMA cannot fetch the sources")
        } else if self.instruction == Instruction::Wgmma && !self.columns.is_multiple_of(product.unit) {
            Some("it would part channels that a norm's moments are taken of")
        } else if self.gated.is_some_and(|gated| gated != product.gated) {
            Some("it is for products with or without a gate, and this is the other")
        } else if self.pingpong && product.followed {
            Some("it leaves no registers for what follows the product")
        } else if self.shared() > limits.shared as usize {
            Some("its stages do not fit into the shared memory of a block")
        } else if product.normalised {
            (self.instruction != Instruction::Wgmma).then_some("it cannot compute the layer norm beside it")
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
    fn estimate(&self, product: &Product, splits: usize, limits: Limits) -> f64 {
        match self.instruction {
            Instruction::MmaSync => self.estimate_mma(product, splits, limits),
            Instruction::Wgmma => self.estimate_wgmma(product, splits, limits),
        }
    }

    /// A multiprocessor is bound by its tensor cores, by shared memory (128 bytes a cycle) or by what reaches it from L2; and a
    /// lone block by how long a stage takes to come. To this come filling the pipeline and storing the tile, and what splits
    /// take.
    fn estimate_mma(&self, product: &Product, splits: usize, limits: Limits) -> f64 {
        /// Cycles from a request to its data under load.
        const LATENCY: f64 = 1000.0;
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
        (blocks as f64 * steps * busy).max(rounds * steps * alone) + rounds * store + self.adding(splits, L2)
    }

    /// Cycles that the last block of a tile takes to read what the others left, at so many bytes a cycle.
    fn adding(&self, splits: usize, l2: f64) -> f64 {
        /// Leaving the sums and counting.
        const MEETING: f64 = 1500.0;
        let bytes = splits * self.rows * self.columns * size_of::<f32>();
        if splits == 1 { 0.0 } else { MEETING + bytes as f64 / l2 }
    }

    /// Blocks are persistent, one on each multiprocessor, bound by the tensor cores or by what reaches them from L2: of a step
    /// of 128x160 a prototype took 75 to 94 % for the tensor cores, of 128x128 60 to 70, of 128x80 44 on an H100. Storing a
    /// tile is not hidden.
    fn estimate_wgmma(&self, product: &Product, splits: usize, limits: Limits) -> f64 {
        /// Multiply-adds a cycle, and bytes a cycle from L2 where neighbours read the same.
        const MULTIPLY_ADDS: f64 = 2048.0;
        const L2: f64 = 58.0;
        /// Cycles of filling the ring and of storing a tile.
        const FILL: f64 = 2500.0;
        let (rows, columns) = (self.rows as f64, self.columns as f64);
        let multiply = rows * columns * STEP as f64 / MULTIPLY_ADDS / 0.94;
        let step = multiply.max(2.0 * STEP as f64 * (rows + columns) / L2);
        let multiply = product.steps().div_ceil(splits) as f64 * step;
        let rounds = (self.count(product) * splits).div_ceil(limits.multiprocessors as usize) as f64;
        let store = 1500.0 + rows * columns / 16.0;
        let time = match self.pingpong {
            // One warpgroup stores the whole tile, which takes it twice as long.
            true => rounds * multiply.max((multiply + 2.0 * store) / 2.0) + 2.0 * store,
            false => rounds * (multiply + store),
        };
        FILL + time + self.adding(splits, L2)
    }
}

/// fp16 multiply-adds with fp32 sums that mma.sync gets out of a multiprocessor in a cycle. GeForce cards have a
/// quarter of an A100's (71, 165 and 210 TFLOP/s on an RTX 3090, 4090 and 5090, by NVIDIA's architecture papers); an
/// H100's share of what wgmma gets was measured.
fn multiply_adds(limits: Limits) -> f64 {
    match limits.capability {
        86 | 89 | 120.. => 256.0,
        90 => 1280.0,
        _ => 1024.0,
    }
}

#[cfg(test)]
pub(super) mod tests;
