//! The choice of a tile for a matrix product, and of the number of parts that its depth is split into: a pure function
//! of its shape and of the device's limits. Every candidate is either rejected with a reason or estimated; the fastest
//! is taken.

use super::device::Limits;

/// Depth of a stage.
pub(super) const STEP: usize = 64;
/// Threads of a block of `kernels/conv.cu`.
const THREADS: usize = 256;
/// Threads of a block of `kernels/conv_hopper.cu`: two consumer warpgroups, and one for the producer thread.
const WGMMA_THREADS: usize = 384;
/// The most parts that a depth is split into.
const MAX_SPLITS: usize = 16;
/// The fewest stages of a part: filling the pipeline takes as long as two.
const MIN_STEPS: usize = 4;
/// The most bytes of partial sums for a guided pair's images: they should stay in L2.
const MAX_PARTIAL: usize = 16 << 20;

/// The instruction that multiplies. The two round at different places, so one image's shape alone must choose between
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Instruction {
    /// By warps, on every GPU: `kernels/conv.cu`.
    MmaSync,
    /// By warpgroups, on 9.0 alone: `kernels/conv_hopper.cu`.
    Wgmma,
}

/// A kernel that computes tiles of `rows` by `columns`.
#[derive(Debug, PartialEq)]
pub(super) struct GemmTile {
    pub kernel: &'static str,
    pub instruction: Instruction,
    pub rows: usize,
    pub columns: usize,
    /// True if columns alternate between values and gates, false if not; `None` for mma.sync's kernels, which do both.
    pub gated: Option<bool>,
    /// The number of warps along the rows, of eight in all. The two warpgroups of a wgmma tile are stacked along the
    /// rows.
    pub warps_down: usize,
    /// Stages in shared memory.
    pub stages: usize,
    /// Blocks for which a multiprocessor has registers.
    pub resident: usize,
    /// True if it reads 16 bytes at a time, so that a pixel of each source must be a whole number of them.
    pub vector: bool,
    /// True if the two warpgroups of a wgmma kernel have tiles of their own in turn, so that one stores while the other
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
) -> GemmTile {
    let (instruction, gated, pingpong) = (Instruction::MmaSync, None, false);
    GemmTile { kernel, instruction, rows, columns, gated, warps_down, stages, resident, vector, pingpong }
}

const fn wgmma(kernel: &'static str, columns: usize, stages: usize, gated: bool, pingpong: bool) -> GemmTile {
    let (instruction, gated) = (Instruction::Wgmma, Some(gated));
    GemmTile {
        kernel,
        instruction,
        rows: 128,
        columns,
        gated,
        warps_down: 8,
        stages,
        resident: 1,
        vector: true,
        pingpong,
    }
}

/// The candidates. Channels are multiples of 160 in Stable Diffusion's UNets and of 128 in its VAEs.
pub(super) const TILES: [GemmTile; 22] = [
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

/// A matrix product, or `phases` of them of the same shape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    /// Four for an upsampled source: the results of even and odd rows and columns. Otherwise one.
    pub phases: usize,
    pub rows: usize,
    pub columns: usize,
    /// Taps times channels, which are padded to whole chunks.
    pub depth: usize,
    /// Channels of another product of the same rows and columns that is added to this one, a multiple of [`STEP`]; only
    /// wgmma's kernels support it.
    pub added: usize,
    /// True if a pixel of each source is a whole number of 16 bytes.
    pub vector: bool,
    /// True if the columns are values and gates.
    pub gated: bool,
    /// Adjacent columns that no tile of wgmma's may separate, because moments are taken over them.
    pub unit: usize,
    /// True if an activation other than the gate's follows, or RespoDiff's shift.
    pub followed: bool,
    /// True if a layer norm before or after the product has no launch, which requires wgmma's kernels.
    pub normalised: bool,
    /// The area from which TMA would fetch the rows, if wgmma's kernels support this product.
    pub area: Option<Area>,
}

/// The images from which TMA fetches tiles: their size, and how pixels are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub height: usize,
    pub width: usize,
    pub pixels: Pixels,
}

/// The way in which pixels are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pixels {
    /// Each pixel by itself: the pixels of all images are one row.
    Apart,
    /// With their neighbours.
    Near,
}

/// A rectangle of 128 pixels, in powers of two of width, height and images.
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

    /// The number of rectangles that cover so many images: across one image, down one image, and over images.
    pub fn count(self, area: Area, images: usize) -> [usize; 3] {
        let [width, height, deep] = self.size();
        [area.width.div_ceil(width), area.height.div_ceil(height), images.div_ceil(deep)]
    }
}

impl Area {
    /// The area and the number of images as TMA sees `images` images.
    pub fn seen(self, images: usize) -> (Area, usize) {
        match self.pixels {
            Pixels::Apart => (Area { height: 1, width: self.height * self.width * images, ..self }, 1),
            Pixels::Near => (self, images),
        }
    }

    /// The rectangle that covers a guided pair of images with the fewest copies; the widest of several.
    pub fn rectangle(self) -> Rectangle {
        if self.pixels == Pixels::Apart {
            return Rectangle { log_width: 7, log_height: 0 };
        }
        let logs = (3..=7).rev().flat_map(|log_width| (0..=7 - log_width).rev().map(move |h| (log_width, h)));
        let all = logs.map(|(log_width, log_height)| Rectangle { log_width, log_height });
        all.min_by_key(|rectangle| rectangle.count(self, 2).iter().product::<usize>()).expect("there are some")
    }

    /// True if each warpgroup's half of a rectangle lies within one image.
    pub fn halves_have_one_image(self) -> bool {
        let Rectangle { log_width, log_height } = self.rectangle();
        self.pixels == Pixels::Near && log_width + log_height >= 6
    }

    /// True if each warpgroup's half of a rectangle with pixels of an image has 64 pixels of that image.
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

    /// The number of rectangles that cover `rows` rows of a product.
    fn rectangles(self, rows: usize) -> usize {
        let (seen, images) = self.seen(rows / (self.height * self.width));
        self.rectangle().count(seen, images).iter().product()
    }
}

impl Product {
    /// Stages of the whole depth.
    pub fn steps(&self) -> usize {
        self.depth.div_ceil(STEP) + self.added / STEP
    }

    /// True if the parts of `splits` are long enough, none is empty, and their partial sums fit into [`MAX_PARTIAL`].
    fn may_split(&self, splits: usize) -> bool {
        let steps = self.steps().div_ceil(splits);
        let bytes = splits * self.phases * self.rows * self.columns * size_of::<f32>();
        steps >= MIN_STEPS && self.steps().div_ceil(steps) == splits && bytes <= MAX_PARTIAL
    }
}

/// The way in which a product is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Choice {
    pub tile: &'static GemmTile,
    /// The number of parts of the depth.
    pub splits: usize,
    /// Stages in each part.
    pub steps: usize,
}

/// The fastest way to compute a product of `images` times the rows of `one`. The number of splits and the instruction
/// decide how sums are rounded, so these are chosen for a guided pair, whatever the number of images.
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
        // The 16x64 tiles are rejected only for the other kind of source.
        best.expect("a tile for every product").1
    };
    let two = Product { rows: 2 * one.rows, ..one };
    let pair = fastest(two, &|splits, _| splits == 1 || two.may_split(splits));
    let as_pair = |splits, by| (splits, by) == (pair.splits, pair.tile.instruction);
    fastest(Product { rows: images * one.rows, ..one }, &as_pair)
}

impl GemmTile {
    /// Threads of a block.
    pub fn threads(&self) -> usize {
        match self.instruction {
            Instruction::MmaSync => THREADS,
            Instruction::Wgmma => WGMMA_THREADS,
        }
    }

    /// Bytes of shared memory: the stages. wgmma's kernels add the results, 256 bytes of barriers, and the epilogue's
    /// operands of two tiles, eight bytes for each column and row.
    pub fn shared(&self) -> usize {
        let stages = self.stages * (self.rows + self.columns) * STEP * 2;
        let results = if self.gated == Some(true) { self.columns / 2 } else { self.columns };
        let behind = self.rows * results * 2 + 256 + 2 * (self.rows + self.columns) * 8;
        stages + if self.instruction == Instruction::Wgmma { behind } else { 0 }
    }

    /// The number of tiles that cover a product, in all phases.
    pub fn count(&self, product: &Product) -> usize {
        let down = match (self.instruction, product.area) {
            (Instruction::Wgmma, Some(area)) => area.rectangles(product.rows),
            _ => product.rows.div_ceil(self.rows),
        };
        product.phases * down * product.columns.div_ceil(self.columns)
    }

    /// Bytes of the partial sums of `splits` parts; the kernels know their order.
    pub fn partial_bytes(&self, product: &Product, splits: usize) -> usize {
        if splits == 1 { 0 } else { splits * self.count(product) * self.rows * self.columns * size_of::<f32>() }
    }

    /// The reason why a product cannot, or should not, be cut into tiles of this kind.
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

    /// Estimated cycles for a product whose depth is split into `splits` parts.
    fn estimate(&self, product: &Product, splits: usize, limits: Limits) -> f64 {
        match self.instruction {
            Instruction::MmaSync => self.estimate_mma(product, splits, limits),
            Instruction::Wgmma => self.estimate_wgmma(product, splits, limits),
        }
    }

    /// A multiprocessor is bound by its tensor cores, by shared memory (128 bytes per cycle) or by the bandwidth from
    /// L2; a lone block is bound by the latency of a stage. Filling the pipeline, storing the tile and adding splits
    /// come on top.
    fn estimate_mma(&self, product: &Product, splits: usize, limits: Limits) -> f64 {
        /// Cycles from a request to its data under load.
        const LATENCY: f64 = 1000.0;
        /// Bytes per cycle from L2 for each multiprocessor.
        const L2: f64 = 40.0;
        let (rows, columns, warps) = (self.rows as f64, self.columns as f64, (THREADS / 32) as f64);
        let multiply = rows * columns * STEP as f64 / multiply_adds(limits);
        let bytes = 2.0 * STEP as f64 * (rows + columns);
        let warp = rows / self.warps_down as f64 + columns * self.warps_down as f64 / warps;
        let shared = (bytes + 2.0 * STEP as f64 * warps * warp) / 128.0;
        let busy = multiply.max(shared).max(bytes / L2);
        let alone = LATENCY / (self.stages - 1) as f64;
        // Reading what the epilogue adds, and storing: of a product of 8192 x 320 x 320 by 128x160 tiles, which took an
        // H200 21 us, the depth is 3 us.
        let store = 2.0 * LATENCY + rows * columns / 8.0;

        let multiprocessors = limits.multiprocessors as usize;
        let steps = product.steps().div_ceil(splits) as f64;
        let blocks = (self.count(product) * splits).div_ceil(multiprocessors);
        // The driver takes a kilobyte of each block's shared memory.
        let resident = ((limits.shared as usize + 1024) / (self.shared() + 1024)).min(self.resident).max(1);
        let rounds = blocks.div_ceil(resident) as f64;
        (blocks as f64 * steps * busy).max(rounds * steps * alone) + rounds * store + self.adding(splits, L2)
    }

    /// Cycles that the last block of a tile takes to read the other blocks' partial sums, at `l2` bytes per cycle.
    fn adding(&self, splits: usize, l2: f64) -> f64 {
        /// Writing the partial sums and incrementing the counter.
        const MEETING: f64 = 1500.0;
        let bytes = splits * self.rows * self.columns * size_of::<f32>();
        if splits == 1 { 0.0 } else { MEETING + bytes as f64 / l2 }
    }

    /// Blocks are persistent, one on each multiprocessor, and bound by the tensor cores or by the bandwidth from L2. On
    /// an H100 a prototype spent 75 to 94 % of a 128x160 step on the tensor cores, 60 to 70 % of a 128x128 step, and 44
    /// % of a 128x80 one. Storing a tile is not hidden.
    fn estimate_wgmma(&self, product: &Product, splits: usize, limits: Limits) -> f64 {
        /// Multiply-adds per cycle, and bytes per cycle from L2 where neighbouring blocks read the same data.
        const MULTIPLY_ADDS: f64 = 2048.0;
        const L2: f64 = 58.0;
        /// Cycles for filling the ring and storing a tile.
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

/// fp16 multiply-adds with fp32 accumulation that a multiprocessor executes per cycle with mma.sync. GeForce cards have
/// a quarter of an A100's rate (71, 165 and 210 TFLOP/s on an RTX 3090, 4090 and 5090, by NVIDIA's architecture
/// papers); the fraction of wgmma's rate that an H100 reaches was measured.
fn multiply_adds(limits: Limits) -> f64 {
    match limits.capability {
        86 | 89 | 120.. => 256.0,
        90 => 1280.0,
        _ => 1024.0,
    }
}

#[cfg(test)]
pub(super) mod tests;
