use super::*;
use crate::cuda::conv::plan;
use crate::graph::{Extent, Graph, Keep, Op};
use crate::models::{
    ClipConfig, UNetConfig, UNetInput, VaeConfig, divisible_decoder, text_encoder, unet, unet_halves, vae_decoder,
    vae_encoder,
};
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
const TAESD: &str = r#"{"_class_name": "AutoencoderTiny"}"#;

/// The name, the graph, and the least share of the multiprocessors' time that is spent on wanted sums, if all tiles
/// were equally fast per multiply-add.
pub(in crate::cuda) fn networks() -> Vec<(&'static str, Graph, f64)> {
    let path = Path::new("config.json");
    let clip = |text| text_encoder(&ClipConfig::parse(text, path).unwrap(), 2);
    let network = |text, size| {
        let input = UNetInput { rows: 2, h: size, w: size, tokens: 77, shifted: 1 };
        unet(&UNetConfig::parse(text, path).unwrap(), input)
    };
    let [vae, taesd] = [VAE, TAESD].map(|text| VaeConfig::parse(text, path).unwrap());
    let divisible = divisible_decoder(&vae, 128);
    let decoder = (divisible.graph)(30);
    let strip = decoder.part(divisible.cut.map(|cut| ("x", cut)), ("image", decoder.output("image")), false).strip();
    vec![
        ("CLIP ViT-L", clip(CLIP_L), 0.55),
        ("CLIP ViT-bigG", clip(CLIP_G), 0.5),
        ("SD 1.5, a guided pair", network(SD15, 64), 0.8),
        ("SDXL, a guided pair", network(SDXL, 128), 0.85),
        ("VAE decoder, 512", vae_decoder(&vae, 1, Extent::square(64)), 0.85),
        ("VAE encoder, 512", vae_encoder(&vae, 1, Extent::square(512)), 0.85),
        ("VAE decoder, 1024", vae_decoder(&vae, 1, Extent::square(128)), 0.85),
        ("VAE decoder, 1024, a strip", strip, 0.85),
        ("TAESD decoder, 512", vae_decoder(&taesd, 1, Extent::square(64)), 0.5),
        ("TAESD encoder, 512", vae_encoder(&taesd, 1, Extent::square(512)), 0.5),
    ]
}

/// The network that training repeats: the decoder half, from the bottleneck on, and its gradient.
pub(in crate::cuda) fn trainings() -> Vec<(&'static str, Graph)> {
    let up = |text, size| {
        let config = UNetConfig::parse(text, Path::new("config.json")).unwrap();
        let input = UNetInput { rows: 1, h: size, w: size, tokens: 77, shifted: 0 };
        unet_halves(&config, input).1.with_gradient("sample", "mid", Keep::All)
    };
    vec![("SD 1.5, training", up(SD15, 64)), ("SDXL, training", up(SDXL, 128))]
}

/// Every layer has a tile that fits, few multiprocessors idle, and the partial sums of split depths stay in L2.
#[test]
fn layers_of_real_networks() {
    for limits in [Limits::A100, Limits::H100] {
        for (name, graph, least) in networks() {
            let (mut wanted, mut spent, mut estimate, mut workspace) = (0.0, 0.0, 0.0, 0);
            let mut rows = std::collections::BTreeMap::<_, usize>::new();
            for node in graph.nodes() {
                let Op::Conv(conv) = &node.op else { continue };
                let (all, choice) = plan(&graph, conv, node.output, limits);
                assert_eq!(choice.tile.rejected(&all, limits), None, "{}", node.name);
                assert!(choice.splits * choice.steps >= all.steps(), "{}", node.name);
                if all.normalised && all.rows < 256 {
                    // Small tiles cannot compute the layer norm beside a text's tokens; folding it saves a launch
                    // instead.
                    continue;
                }
                let blocks = (choice.tile.count(&all) * choice.splits) as f64;
                let multiprocessors = limits.multiprocessors as f64;
                let rounds = (blocks / multiprocessors).ceil() * multiprocessors;
                let tile = (choice.tile.rows * choice.tile.columns * choice.steps * STEP) as f64;
                wanted += (all.phases * all.rows * all.columns * all.depth) as f64;
                spent += rounds * tile;
                estimate += choice.tile.estimate(&all, choice.splits, limits);
                workspace = workspace.max(choice.tile.partial_bytes(&all, choice.splits));
                let efficiency = (all.phases * all.rows * all.columns * all.depth) as f64 / (rounds * tile);
                let key =
                    (all.rows, all.columns, all.depth, choice.tile.kernel, choice.splits, (efficiency * 100.0) as u32);
                *rows.entry(key).or_default() += 1;
            }
            // Visible with `--nocapture`: how a change of the estimate changes the choices.
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

/// The split of a depth decides the order of summation, so the batch must not decide the split.
#[test]
fn splits_do_not_depend_on_the_batch() {
    for (rows, columns, depth) in
        [(64, 1280, 11520), (256, 1280, 23040), (1, 1280, 1280), (77, 768, 3072), (4096, 320, 2880)]
    {
        let one = Product {
            rows,
            columns,
            depth,
            vector: true,
            gated: false,
            phases: 1,
            added: 0,
            unit: 1,
            followed: false,
            normalised: false,
            area: None,
        };
        let pair = choose(one, 2, Limits::H100);
        for images in 1..20 {
            let choice = choose(one, images, Limits::H100);
            assert_eq!((choice.splits, choice.steps), (pair.splits, pair.steps), "{one:?}, {images} images");
        }
    }
}

/// The tiles that Stable Diffusion's channels call for.
#[test]
fn known_choices() {
    let tile = |rows, columns, depth, vector| {
        let choice = choose(
            Product {
                rows,
                columns,
                depth,
                vector,
                gated: false,
                phases: 1,
                added: 0,
                unit: 1,
                followed: false,
                normalised: false,
                area: None,
            },
            2,
            Limits::H100,
        );
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
    let product = Product {
        rows: 8192,
        columns: 320,
        depth: 2880,
        vector: true,
        gated: false,
        phases: 1,
        added: 0,
        unit: 1,
        followed: false,
        normalised: false,
        area: None,
    };
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
    // With the least shared memory of any supported GPU there is still a tile for everything.
    for (rows, columns, vector) in [(1, 1, false), (1, 1, true), (1 << 20, 4096, true), (1 << 20, 4096, false)] {
        choose(
            Product {
                rows,
                columns,
                depth: 8,
                vector,
                gated: false,
                phases: 1,
                added: 0,
                unit: 1,
                followed: false,
                normalised: false,
                area: None,
            },
            1,
            Limits { shared: 99 << 10, ..Limits::A100 },
        );
    }
}
