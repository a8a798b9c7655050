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
    Tile { kernel: "conv_128x160", rows: 128, columns: 160, warps_down: 2, stages: 4, resident: 1, vector: true },
    Tile { kernel: "conv_128x128", rows: 128, columns: 128, warps_down: 2, stages: 4, resident: 1, vector: true },
    Tile { kernel: "conv_128x80", rows: 128, columns: 80, warps_down: 4, stages: 3, resident: 2, vector: true },
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

    /// Whether `splits` parts are long enough, none is empty, and their sums are few enough.
    fn may_split(&self, splits: usize) -> bool {
        let steps = self.steps().div_ceil(splits);
        steps >= MIN_STEPS && self.steps().div_ceil(steps) == splits && self.partial_bytes(splits) <= MAX_PARTIAL
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
    let two = Product { rows: 2 * one.rows, ..one };
    let pair = fastest(two, &mut (1..=MAX_SPLITS).filter(|&splits| splits == 1 || two.may_split(splits)));
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
pub(super) mod tests {
    use super::super::conv::plan;
    use super::*;
    use crate::graph::{Graph, Keep, Op};
    use crate::models::{ClipConfig, UNetConfig, VaeConfig, text_encoder, unet, unet_halves, vae_decoder, vae_encoder};
    use std::path::Path;

    const CLIP_L: &str = r#"{"architectures": ["CLIPTextModel"], "vocab_size": 49408, "hidden_size": 768,
      "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
      "hidden_act": "quick_gelu"}"#;
    const CLIP_G: &str = r#"{"architectures": ["CLIPTextModelWithProjection"], "vocab_size": 49408, "hidden_size": 1280,
      "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "max_position_embeddings": 77,
      "hidden_act": "gelu", "projection_dim": 1280}"#;
    const SD15: &str = r#"{"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768,
      "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
      "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
      "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"#;
    const SDXL: &str = r#"{"_class_name": "UNet2DConditionModel", "sample_size": 128, "cross_attention_dim": 2048,
      "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
      "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": true, "addition_embed_type": "text_time",
      "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
      "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
      "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}"#;
    const VAE: &str = r#"{"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512],
      "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
      "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
      "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]}"#;

    /// Name, graph, and the least share of the multiprocessors' time that goes into sums that are wanted, were all tiles
    /// equally fast per multiply-add.
    pub(in super::super) fn networks() -> Vec<(&'static str, Graph, f64)> {
        let path = Path::new("config.json");
        let clip = |text| text_encoder(&ClipConfig::parse(text, path).unwrap(), 2);
        let network = |text, size| unet(&UNetConfig::parse(text, path).unwrap(), 2, size, size, 77, 1);
        let vae = VaeConfig::parse(VAE, path).unwrap();
        vec![
            ("CLIP ViT-L", clip(CLIP_L), 0.55),
            ("CLIP ViT-bigG", clip(CLIP_G), 0.55),
            ("SD 1.5, a guided pair", network(SD15, 64), 0.8),
            ("SDXL, a guided pair", network(SDXL, 128), 0.85),
            ("VAE decoder, 512", vae_decoder(&vae, 1, 64, 64), 0.85),
            ("VAE encoder, 512", vae_encoder(&vae, 1, 512, 512), 0.85),
            ("VAE decoder, 1024", vae_decoder(&vae, 1, 128, 128), 0.85),
        ]
    }

    /// The network that training repeats: the way up from the bottleneck, and its gradient.
    pub(in super::super) fn trainings() -> Vec<(&'static str, Graph)> {
        let up = |text, size| {
            let config = UNetConfig::parse(text, Path::new("config.json")).unwrap();
            unet_halves(&config, 1, size, size, 77).1.with_gradient("sample", "mid", Keep::All)
        };
        vec![("SD 1.5, training", up(SD15, 64)), ("SDXL, training", up(SDXL, 128))]
    }

    /// Every layer has a tile that fits; few multiprocessors idle; the sums of split depths stay in L2.
    #[test]
    fn layers_of_real_networks() {
        for limits in [Limits::A100, Limits::H100] {
            for (name, graph, least) in networks() {
                let (mut wanted, mut spent, mut estimate, mut workspace) = (0.0, 0.0, 0.0, 0);
                let mut rows = std::collections::BTreeMap::<_, usize>::new();
                for node in graph.nodes() {
                    let Op::Conv(conv) = &node.op else { continue };
                    let shape = graph.shape(node.output);
                    let (one, choice) = plan(&graph, conv, node.output, limits);
                    let all = Product { rows: shape.rows(), ..one };
                    assert_eq!(choice.tile.rejected(&all, limits), None, "{}", node.name);
                    assert!(choice.splits * choice.steps * STEP >= all.depth, "{}", node.name);
                    let blocks = (choice.tile.count(&all) * choice.splits) as f64;
                    let multiprocessors = limits.multiprocessors as f64;
                    let rounds = (blocks / multiprocessors).ceil() * multiprocessors;
                    let tile = (choice.tile.rows * choice.tile.columns * choice.steps * STEP) as f64;
                    wanted += (all.rows * all.columns * all.depth) as f64;
                    spent += rounds * tile;
                    estimate += choice.tile.estimate(&all, choice.splits, limits);
                    workspace = workspace.max(all.partial_bytes(choice.splits));
                    let efficiency = (all.rows * all.columns * all.depth) as f64 / (rounds * tile);
                    let key = (
                        all.rows,
                        all.columns,
                        all.depth,
                        choice.tile.kernel,
                        choice.splits,
                        (efficiency * 100.0) as u32,
                    );
                    *rows.entry(key).or_default() += 1;
                }
                // Seen with `--nocapture`: how a change of the estimate changes the choices.
                for ((rows, columns, depth, kernel, splits, efficiency), count) in rows {
                    println!("  {count:3} of {rows} x {columns} x {depth}: {kernel}, {splits} splits, {efficiency} %");
                }
                println!(
                    "{name}, {} multiprocessors: {:.1} % wanted; {:.0} % of the tensor cores by estimate; {} KiB of sums",
                    limits.multiprocessors,
                    100.0 * wanted / spent,
                    100.0 * wanted / multiply_adds(limits) / limits.multiprocessors as f64 / estimate,
                    workspace >> 10
                );
                assert!(wanted >= least * spent, "{name}: {} of the time is wanted", wanted / spent);
                assert!(workspace <= MAX_PARTIAL, "{name}: {workspace} bytes of sums");
            }
        }
    }

    /// How a depth is split decides the order of its sums, so a batch must not.
    #[test]
    fn splits_do_not_depend_on_the_batch() {
        for (rows, columns, depth) in
            [(64, 1280, 11520), (256, 1280, 23040), (1, 1280, 1280), (77, 768, 3072), (4096, 320, 2880)]
        {
            let one = Product { rows, columns, depth, vector: true };
            let pair = choose(one, 2, Limits::H100);
            for images in 1..20 {
                let choice = choose(one, images, Limits::H100);
                assert_eq!((choice.splits, choice.steps), (pair.splits, pair.steps), "{one:?}, {images} images");
            }
        }
    }

    /// The tiles that Stable Diffusion's channels ask for.
    #[test]
    fn known_choices() {
        let tile = |rows, columns, depth, vector| {
            let choice = choose(Product { rows, columns, depth, vector }, 2, Limits::H100);
            (choice.tile.kernel, choice.splits)
        };
        assert_eq!(tile(4096, 320, 2880, true), ("conv_128x160", 1));
        assert_eq!(tile(4096, 320, 2880, false).0, "conv_64x64_odd");
        assert_eq!(tile(65536, 3, 1152, true).0, "conv_128x16");
        assert_eq!(tile(1, 1280, 1280, true).0, "conv_16x64");
        let (_, splits) = tile(64, 1280, 11520, true);
        assert!(splits > 1, "a guided pair's deepest convolution has too few tiles without splits");
    }

    #[test]
    fn rejections() {
        let product = Product { rows: 8192, columns: 320, depth: 2880, vector: true };
        let reason = |product: Product, shared: u32, kernel: &str| {
            let tile = TILES.iter().find(|tile| tile.kernel == kernel).unwrap();
            tile.rejected(&product, Limits { shared, ..Limits::A100 })
        };
        let shared = Limits::A100.shared;
        assert_eq!(reason(product, shared, "conv_128x160"), None);
        assert!(reason(product, 99 << 10, "conv_128x160").unwrap().contains("shared memory"));
        assert!(reason(product, shared, "conv_64x64_odd").unwrap().contains("number by number"));
        assert!(reason(Product { vector: false, ..product }, shared, "conv_64x64").unwrap().contains("16 bytes"));
        assert!(reason(Product { rows: 63, ..product }, shared, "conv_128x160").unwrap().contains("rows"));
        assert!(reason(Product { columns: 64, ..product }, shared, "conv_128x128").unwrap().contains("columns"));
        // The least that any supported GPU offers still leaves a tile for everything.
        for (rows, columns, vector) in [(1, 1, false), (1, 1, true), (1 << 20, 4096, true), (1 << 20, 4096, false)] {
            choose(Product { rows, columns, depth: 8, vector }, 1, Limits { shared: 99 << 10, ..Limits::A100 });
        }
    }
}
