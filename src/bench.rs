//! Measures the speed of the operations of a network on a device: every distinct one at its real shape, with random
//! weights.

use crate::backend::{Executor, Precision};
use crate::cuda::Element;
use crate::engine::{UNET_CONSTANTS, read_config};
use crate::graph::{
    Activation, Attention, ConvOptions, Extent, Graph, GraphBuilder, Keep, Node, Op, Shape, TensorId, WeightId,
    WeightKind,
};
use crate::models::{ClipConfig, UNetConfig, UNetInput, VaeConfig, text_encoder, unet, unet_halves, vae_decoder};
use crate::weights::{Source, Tensors};
use crate::{Device, Result};
use serde::Serialize;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// The configurations of Stable Diffusion 1.5, with random weights.
pub const SD15: Source = Source::Random("sd15", &[
    (
        "text_encoder/config.json",
        br#"{"architectures": ["CLIPTextModel"], "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu"}"#,
    ),
    (
        "unet/config.json",
        br#"{"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768,
        "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"#,
    ),
    ("vae/config.json", VAE),
    ("scheduler/scheduler_config.json", SCHEDULER),
]);

/// The configurations of SDXL base 1.0, with random weights.
pub const SDXL: Source = Source::Random("sdxl", &[
    (
        "text_encoder/config.json",
        br#"{"architectures": ["CLIPTextModel"], "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu"}"#,
    ),
    (
        "text_encoder_2/config.json",
        br#"{"architectures": ["CLIPTextModelWithProjection"], "vocab_size": 49408, "hidden_size": 1280,
        "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "max_position_embeddings": 77,
        "hidden_act": "gelu", "projection_dim": 1280}"#,
    ),
    (
        "unet/config.json",
        br#"{"_class_name": "UNet2DConditionModel", "sample_size": 128, "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": true,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}"#,
    ),
    ("vae/config.json", VAE),
    ("scheduler/scheduler_config.json", SCHEDULER),
]);

const VAE: &[u8] = br#"{"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2, "latent_channels": 4, "force_upcast": true,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]}"#;

const SCHEDULER: &[u8] = br#"{"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "clip_sample": false, "set_alpha_to_one": false, "steps_offset": 1}"#;

/// Used if configurations do not give them: CLIP's number of tokens, and the size of the latents of 512x512 pixels.
const DEFAULT_TOKENS: usize = 77;
const DEFAULT_LATENT: (usize, usize) = (64, 64);

/// A checkpoint's networks as a guided run of `batch` images uses them: the text encoders for both prompts, the UNet
/// for one call, and the VAE decoder for one image.
///
/// # Errors
/// Those of reading the configurations.
pub fn networks(source: &Source, batch: usize) -> Result<Vec<(&'static str, Graph)>> {
    let mut networks = Vec::new();
    let (mut tokens, (mut h, mut w)) = (DEFAULT_TOKENS, DEFAULT_LATENT);
    for encoder in ["text_encoder", "text_encoder_2"] {
        if source.has(&format!("{encoder}/config.json")) {
            let config = read_config(source, encoder, ClipConfig::parse)?;
            tokens = config.max_position_embeddings;
            networks.push((encoder, text_encoder(&config, 2)));
        }
    }
    if source.has("unet/config.json") {
        let config = read_config(source, "unet", UNetConfig::parse)?;
        (h, w) = config.sample_size.unwrap_or((h, w));
        networks.push(("unet", unet(&config, UNetInput { rows: 2 * batch, h, w, tokens, shifted: 0 })));
    }
    if source.has("vae/config.json") {
        let config = read_config(source, "vae", VaeConfig::parse)?;
        networks.push(("vae", vae_decoder(&config, 1, Extent { h, w })));
    }
    Ok(networks)
}

/// The network that a training runs for every loss, on `batch` images: the UNet's up half from the bottleneck, and the
/// gradient back to it.
///
/// # Errors
/// Those of reading the configuration, or that of a checkpoint without one.
pub fn training(source: &Source, batch: usize) -> Result<(&'static str, Graph)> {
    let config = read_config(source, "unet", UNetConfig::parse)?;
    let (h, w) = config.sample_size.unwrap_or(DEFAULT_LATENT);
    let (_, up) = unet_halves(&config, UNetInput { rows: batch, h, w, tokens: DEFAULT_TOKENS, shifted: 0 });
    Ok(("up half and gradient", up.with_gradient("sample", "mid", Keep::All)))
}

/// An operation at its shape. Cases are the same if they differ only in further operations that are fused into them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[allow(missing_docs)] // as in `graph`
pub enum Case {
    Conv {
        n: usize,
        h: usize,
        w: usize,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        stride: usize,
        gated: bool,
        resized: bool,
    },
    Attention {
        n: usize,
        heads: usize,
        queries: usize,
        keys: usize,
        head_dim: usize,
        causal: bool,
        /// Matrix products over queries and keys: 2 for attention itself, 3 for its gradient with respect to the
        /// queries, 5 if keys and values have gradients too.
        products: usize,
    },
    GroupNorm {
        n: usize,
        h: usize,
        w: usize,
        c: usize,
        groups: usize,
        silu: bool,
    },
    LayerNorm {
        rows: usize,
        c: usize,
    },
    Other {
        name: &'static str,
        n: usize,
        h: usize,
        w: usize,
        c: usize,
    },
}

impl Case {
    /// The case of a node.
    pub fn of(graph: &Graph, node: &Node) -> Self {
        let shape = |id: TensorId| graph.shape(id);
        let other = |name, Shape { n, h, w, c }| Case::Other { name, n, h, w, c };
        let attention = |a: &Attention, products| Case::Attention {
            n: shape(a.q.tensor).n,
            heads: a.heads,
            queries: shape(a.q.tensor).tokens(),
            keys: shape(a.k.tensor).tokens(),
            head_dim: a.head_dim,
            causal: a.causal,
            products,
        };
        match node.op {
            Op::Conv(ref conv) => {
                let Shape { n, h, w, .. } = shape(node.output);
                Case::Conv {
                    n,
                    h,
                    w,
                    inputs: conv.sources.iter().map(|x| shape(x).c).sum(),
                    outputs: match graph.weight(conv.weight).kind {
                        WeightKind::Mirrored { wanted, .. } => wanted,
                        _ => graph.weight(conv.weight).total_outputs(),
                    },
                    kernel: conv.kernel,
                    stride: conv.stride,
                    gated: conv.activation == Activation::Geglu,
                    resized: conv.resize.is_some(),
                }
            }
            Op::Attention(ref a) => attention(a, 2),
            Op::AttentionGradient { ref of, fused, .. } => attention(of, if fused { 5 } else { 3 }),
            Op::GroupNorm(ref norm) => {
                let Shape { n, h, w, c } = shape(node.output);
                Case::GroupNorm { n, h, w, c, groups: norm.groups, silu: norm.silu }
            }
            Op::GroupNormMoments { .. } => other("group norm moments", shape(node.output)),
            Op::LayerNorm { x, .. } => Case::LayerNorm { rows: shape(x).rows(), c: shape(x).c },
            Op::Activate { x, .. } => other("activate", shape(x)),
            Op::Add { a, .. } => other("add", shape(a)),
            Op::MeanOfHalves { x } => other("mean of halves", shape(x)),
            Op::Embed { .. } => other("embed", shape(node.output)),
            Op::Sinusoid { .. } => other("sinusoid", shape(node.output)),
            Op::Shift { x, .. } => other("shift", shape(x)),
            Op::ClassToken { .. } => other("class token", shape(node.output)),
            Op::SelectToken { .. } => other("select token", shape(node.output)),
            Op::GroupNormGradient { ref of, .. } if of.silu => other("group norm silu gradient", shape(node.output)),
            Op::GroupNormGradient { .. } => other("group norm gradient", shape(node.output)),
            Op::LayerNormGradient { .. } => other("layer norm gradient", shape(node.output)),
            Op::ActivateGradient { .. } => other("activate gradient", shape(node.output)),
            Op::ResizeGradient { .. } => other("resize gradient", shape(node.output)),
        }
    }

    /// The kind of operation, whatever its shape.
    pub fn family(&self) -> &'static str {
        match *self {
            Case::Conv { kernel: 1, .. } => "linear layers",
            Case::Conv { .. } => "convolutions",
            Case::Attention { products: 2, .. } => "attention",
            Case::Attention { .. } => "attention gradients",
            Case::GroupNorm { .. } => "group norms",
            Case::LayerNorm { .. } => "layer norms",
            Case::Other { .. } => "others",
        }
    }

    /// Floating-point operations of its matrix products.
    pub fn flops(&self) -> f64 {
        match *self {
            Case::Conv { n, h, w, inputs, outputs, kernel, .. } => {
                2.0 * (n * h * w) as f64 * (inputs * kernel * kernel) as f64 * outputs as f64
            }
            Case::Attention { n, heads, queries, keys, head_dim, causal, products } => {
                let all = 2.0 * (products * n * heads * head_dim) as f64 * queries as f64 * keys as f64;
                if causal { all / 2.0 } else { all }
            }
            _ => 0.0,
        }
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Case::Conv { n, h, w, inputs, outputs, kernel, stride, gated, resized } => {
                let name = if kernel == 1 { "linear" } else { "conv" };
                write!(f, "{name}{kernel}x{kernel} {n}x{h}x{w} {inputs}->{outputs}")?;
                f.write_str(if stride > 1 { " half" } else { "" })?;
                f.write_str(if resized { " double" } else { "" })?;
                f.write_str(if gated { " geglu" } else { "" })
            }
            Case::Attention { n, heads, queries, keys, head_dim, causal, products } => {
                let name = if products > 2 { "attention gradient" } else { "attention" };
                write!(f, "{name} {n}x{heads}x{head_dim} {queries}x{keys}{}", if causal { " causal" } else { "" })
            }
            Case::GroupNorm { n, h, w, c, silu, .. } => {
                write!(f, "group norm {n}x{h}x{w}x{c}{}", if silu { " silu" } else { "" })
            }
            Case::LayerNorm { rows, c } => write!(f, "layer norm {rows}x{c}"),
            Case::Other { name, n, h, w, c } => write!(f, "{name} {n}x{h}x{w}x{c}"),
        }
    }
}

/// Bytes that a node must at least read and write, each counted once.
fn bytes(device: &Device, graph: &Graph, node: &Node) -> f64 {
    let tensor = |id: TensorId| device.number_bytes(graph, id) * graph.shape(id).len();
    let weight = |id: WeightId| {
        let spec = graph.weight(id);
        let half = !device.is_cpu() && spec.kind != WeightKind::Vector;
        let len = match spec.kind {
            WeightKind::Mirrored { inputs, wanted, .. } => spec.len() / inputs * wanted,
            _ => spec.len(),
        };
        len * if half { 2 } else { 4 }
    };
    let out = tensor(node.output);
    // Keys and values are as wide as queries, whatever tensor they are views of.
    let keys =
        |a: &Attention, queries: usize| queries / graph.shape(a.q.tensor).tokens() * graph.shape(a.k.tensor).tokens();
    let total = match node.op {
        Op::Conv(ref conv) => {
            let read: usize = node.op.inputs().map(tensor).sum();
            out + read + weight(conv.weight) + conv.bias.map_or(0, weight)
        }
        Op::Attention(ref a) => 2 * out + 2 * keys(a, out),
        Op::AttentionGradient { ref of, fused, d } => {
            let queries = tensor(d);
            3 * queries + if fused { 4 } else { 2 } * keys(of, queries)
        }
        Op::Embed { ids, .. } => 3 * out + tensor(ids),
        _ => out + node.op.inputs().map(tensor).sum::<usize>(),
    };
    total as f64
}

/// The best rates of a device, as measured on these kernels.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Peaks {
    /// Floating-point operations per second, in large matrix products.
    pub flops: f64,
    /// Bytes read and written per second, in large copies.
    pub bytes: f64,
    /// Seconds per operation in a chain of operations on a few numbers, each of which waits for the one before: the
    /// least time that a launch takes in a step.
    pub launch: f64,
}

/// One distinct operation of a network.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The operation.
    pub case: Case,
    /// The operation's name in tables.
    pub label: String,
    /// The number of times that the network has it.
    pub count: usize,
    /// The kernels that were launched, with their grids.
    pub kernels: String,
    /// Median seconds of one call: on a GPU with a cold L2 cache, on a CPU with the caches as the operation before left
    /// them.
    pub seconds: f64,
    /// Least seconds of one call, likewise.
    pub least: f64,
    /// Seconds that nine of ten calls do not exceed, likewise.
    pub p90: f64,
    /// On a GPU, median seconds of a call that directly follows the same call.
    pub warm: Option<f64>,
    /// Floating-point operations of the matrix products of one call.
    pub flops: f64,
    /// Bytes that one call must move.
    pub bytes: f64,
}

impl Peaks {
    /// The same peaks, raised to the rates of operations in `table` that were faster than the measured products and
    /// copies, so that no operation exceeds the peaks.
    #[must_use]
    pub fn with(self, table: &Table) -> Self {
        let best = |rate: fn(&Row) -> f64, peak: f64| table.rows.iter().map(rate).fold(peak, f64::max);
        Peaks {
            flops: best(|row| row.flops / row.seconds, self.flops),
            bytes: best(|row| row.bytes / row.seconds, self.bytes),
            ..self
        }
    }
}

impl Row {
    /// The least time that the peak rates allow, for arithmetic or for memory, whichever is longer, as a fraction of
    /// the measured time on a cold cache.
    pub fn of_bound(&self, peaks: &Peaks) -> f64 {
        (self.flops / peaks.flops).max(self.bytes / peaks.bytes) / self.seconds
    }
}

/// A network's operations, in descending order of their total time.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// The component.
    pub network: String,
    /// Its operations.
    pub rows: Vec<Row>,
    /// Seconds of one whole step, as in the making of an image, and of its backward nodes if there are any: the mean of
    /// several steps in a row, until the last has run.
    pub step: f64,
}

impl Table {
    /// Seconds of all its operations, measured one by one, on a cold cache.
    pub fn total(&self) -> f64 {
        self.rows.iter().map(|row| row.seconds * row.count as f64).sum()
    }
}

/// Times the operations of a network for which `wanted` is true. The time of a case is the median over all its
/// operations in `runs` passes.
///
/// # Errors
/// [`crate::ErrorKind::DeviceLost`]: the driver's message, a lack of memory, or an operation without a kernel.
pub fn measure(
    device: &Device,
    network: &str,
    graph: Graph,
    precision: Precision,
    runs: usize,
    wanted: impl Fn(&Case) -> bool + Sync,
) -> Result<Table> {
    let plan = device.plan(graph, UNET_CONSTANTS);
    let weights = device.weights(plan.graph().weights(), &Tensors::random(), &[], precision)?;
    let graph = plan.graph().clone();
    let mut executor = device.executor(plan, &weights)?;
    for (name, id) in &graph.inputs {
        let len = graph.shape(*id).len();
        let values: Vec<f32> = match Element::of(&graph, *id) {
            // Ids, timesteps, sizes.
            Element::F32 => vec![1.0; len],
            Element::F16 => (0..len).map(|i| (i as f32 * 0.7).sin()).collect(),
        };
        executor.write(name, &values)?;
    }
    let mut rows: Vec<(Row, [Vec<Duration>; 2])> = Vec::new();
    let mut places: HashMap<Case, usize> = HashMap::new();
    let caches = executor.caches();
    for cache in (0..runs).flat_map(|_| caches) {
        let wanted = |node: &Node| wanted(&Case::of(&graph, node));
        executor.timed(*cache, &wanted, &mut |node, kernels, time| {
            let case = Case::of(&graph, node);
            let place = *places.entry(case.clone()).or_insert_with(|| {
                let (label, flops, bytes) = (case.to_string(), case.flops(), bytes(device, &graph, node));
                let row = Row {
                    case,
                    label,
                    count: 0,
                    kernels: kernels.to_string(),
                    seconds: 0.0,
                    least: 0.0,
                    p90: 0.0,
                    warm: None,
                    flops,
                    bytes,
                };
                rows.push((row, Default::default()));
                rows.len() - 1
            });
            rows[place].1[*cache as usize].push(time);
        })?;
    }
    let finish = |(mut row, [mut cold, mut warm]): (Row, [Vec<Duration>; 2])| {
        cold.sort();
        warm.sort();
        row.count = cold.len() / runs.max(1);
        let at = |share: f64| quantile(&cold, share).unwrap_or(0.0);
        (row.least, row.seconds, row.p90) = (at(0.0), at(0.5), at(0.9));
        row.warm = quantile(&warm, 0.5);
        row
    };
    let mut rows: Vec<Row> = rows.into_iter().map(finish).collect();
    rows.sort_by(|a, b| (b.seconds * b.count as f64).total_cmp(&(a.seconds * a.count as f64)));

    let reverse = executor.plan().backward().next().is_some();
    let step = |executor: &mut dyn Executor| match reverse {
        true => executor.step().and_then(|()| executor.backward()),
        false => executor.step(),
    };
    // The first one records the launches. All are only queued until `wait` returns.
    step(&mut *executor)?;
    executor.wait()?;
    let start = Instant::now();
    (0..runs).try_for_each(|_| step(&mut *executor))?;
    executor.wait()?;
    Ok(Table { network: network.into(), rows, step: start.elapsed().as_secs_f64() / runs.max(1) as f64 })
}

/// The quantile `share` of sorted times in seconds, such as 0.5 for the median, if there are any times.
fn quantile(times: &[Duration], share: f64) -> Option<f64> {
    let last = times.len().saturating_sub(1);
    times.get(((times.len() as f64 * share) as usize).min(last)).map(Duration::as_secs_f64)
}

/// Measures the best rates of the device: those of matrix products and copies of growing size, until one takes a while,
/// and many operations on a few numbers.
///
/// # Errors
/// As for [`measure`].
pub fn peaks(device: &Device) -> Result<Peaks> {
    let product = |side: usize| {
        let mut g = GraphBuilder::new();
        let x = g.input("x", Shape::new(1, 1, side, side));
        let y = g.linear("product", x, side, ConvOptions { bias: false, ..ConvOptions::default() });
        // Since another node reads it, it is stored as activations are.
        let y = g.activate("read", y, Activation::None);
        g.output("y", y);
        g.finish()
    };
    let copy = |rows: usize| {
        let mut g = GraphBuilder::new();
        let x = g.input("x", Shape::new(1, 1, rows, 1 << 10));
        let y = g.activate("copy", x, Activation::None);
        g.output("y", y);
        g.finish()
    };
    let best = |graph: &dyn Fn(usize) -> Graph, sizes: &[usize], work: fn(&Row) -> f64| {
        let mut best = 0.0f64;
        for &size in sizes {
            let table = measure(device, "peak", graph(size), Precision::Full, 5, |_| true)?;
            // The operation with the longest time. Of the product and the node that reads it, that is the product,
            // except at tiny sizes.
            let Some(row) = table.rows.first() else { break };
            best = best.max(work(row) / row.seconds);
            if row.seconds > 0.02 {
                break;
            }
        }
        Ok::<f64, crate::Error>(best)
    };
    Ok(Peaks {
        flops: best(&product, &[256, 512, 1024, 2048, 4096, 8192], |row| row.flops)?,
        bytes: best(&copy, &[1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18], |row| row.bytes)?,
        launch: measure(device, "launch", chain(), Precision::Full, 20, |_| false)?.step / LAUNCHES as f64,
    })
}

/// Operations of [`chain`], as many as a step of SD 1.5 has.
const LAUNCHES: usize = 512;

/// A network of small operations, each of which waits for the one before.
fn chain() -> Graph {
    let mut g = GraphBuilder::new();
    let x = g.input("x", Shape::new(1, 1, 1, 8));
    let y = (0..LAUNCHES).fold(x, |x, i| g.activate(&format!("copy.{i}"), x, Activation::None));
    g.output("y", y);
    g.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every operation of a network is timed, on the kernels with both states of the cache.
    #[test]
    fn operations_are_timed_cold_and_on_the_kernels_warm() {
        let devices = [
            (Device::cpu(), false),
            #[cfg(feature = "emulated")]
            (
                Device::kernels(crate::cuda::Emulated::new(crate::cuda::Limits::H100, crate::cuda::Emulated::QUICK)),
                true,
            ),
        ];
        for (device, warm) in devices {
            let table = measure(&device, "chain", chain(), Precision::Full, 2, |_| true).unwrap();
            let [row] = &table.rows[..] else { panic!("{:?}", table.rows) };
            assert_eq!((row.count, row.warm.is_some(), row.kernels.is_empty()), (LAUNCHES, warm, !warm));
            assert!(row.seconds > 0.0 && row.warm.is_none_or(|seconds| seconds > 0.0) && table.step > 0.0, "{table:?}");
        }
    }

    /// A convolution's gradient with respect to data costs exactly its share of the convolution. The gradient of
    /// attention needs one product more than attention for the queries alone, and three more for keys and values too.
    #[test]
    fn a_gradient_costs_what_its_products_do() {
        let (_, graph) = training(&SD15, 1).unwrap();
        let flops = |node: &Node| Case::of(&graph, node).flops();
        let mut counted = [0; 3];
        for node in graph.nodes() {
            let Some(name) = node.name.strip_suffix(".gradient") else { continue };
            let forward = graph.nodes().iter().find(|node| node.name == name).unwrap();
            // The gradient's cost times `cost` is the forward cost times `part`.
            let (which, cost, part) = match (&node.op, &forward.op) {
                (Op::Conv(_), Op::Conv(of)) => {
                    let channels = |id: TensorId| graph.shape(id).c;
                    (0, of.sources.iter().map(channels).sum(), channels(of.sources.x))
                }
                (Op::AttentionGradient { fused: false, .. }, _) => (1, 2, 3),
                (Op::AttentionGradient { fused: true, .. }, _) => (2, 2, 5),
                _ => continue,
            };
            counted[which] += 1;
            assert_eq!(flops(node) * cost as f64, flops(forward) * part as f64, "{name}");
        }
        // Nine transformers have self and cross attention.
        assert!(counted[0] > 50 && counted[1..] == [9, 9], "{counted:?}");
    }

    /// The numbers of parameters are those that diffusers and transformers print for the published models.
    #[test]
    fn networks_have_the_size_they_have_elsewhere() {
        let parameters = |source: &Source| -> Vec<(&str, usize)> {
            networks(source, 1).unwrap().into_iter().map(|(name, graph)| (name, graph.parameters())).collect()
        };
        let sd15 = parameters(&SD15);
        assert_eq!(sd15[0], ("text_encoder", 123_060_480));
        assert_eq!(sd15[1], ("unet", 859_520_964));
        let sdxl = parameters(&SDXL);
        assert_eq!(sdxl[1], ("text_encoder_2", 694_659_840));
        assert_eq!(sdxl[2], ("unet", 2_567_463_684));
    }
}
