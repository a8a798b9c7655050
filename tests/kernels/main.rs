//! Tests every kernel, through the launches that the engine makes of a graph, against plain f64 loops: on the emulator
//! under hostile schedules, or with RESPODIFF_TEST_DEVICE=cuda on a GPU.
//!
//! Tolerances follow a rule: twice the error of the same loops with every intermediate result rounded to fp16, and
//! floors.

#[path = "../support/mod.rs"]
mod support;

mod attention;
mod attention_gradient;
mod conformance;
mod conv;
mod elementwise;
mod group_norm;
mod layer_norm;
mod layouts;
mod sampler;
mod sources;

use half::f16;
use respodiff::backend::Executor;
use respodiff::cuda::{CudaDevice, CudaExecutor, CudaWeights, Element, Emulated, Limits};
use respodiff::graph::{Graph, GraphBuilder, Keep, Shape, TensorId, WeightKind};
use respodiff::plan::Plan;
use respodiff::weights::Source;
use respodiff_emulated_kernels::Schedule;
use std::collections::HashMap;
use std::sync::Arc;

/// An activation or a weight in float64.
pub type Numbers = Vec<f64>;

/// The treatment of intermediate results in a plain loop: none, or rounding to fp16.
pub type Round = fn(f64) -> f64;

/// The nearest fp16 number, saturating.
pub fn to_half(x: f64) -> f64 {
    f16::from_f64(x.clamp(-65504.0, 65504.0)).to_f64()
}

/// Seeded fp16 numbers in -1..1.
pub fn random(len: usize, seed: u64) -> Numbers {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        to_half((state >> 40) as f64 / (1u64 << 23) as f64 - 1.0)
    };
    (0..len).map(|_| next()).collect()
}

/// The devices on which a kernel is tested; emulated ones have the given limits.
pub fn devices(limits: Limits) -> Vec<(String, Arc<dyn CudaDevice>)> {
    if let Some(gpu) = support::gpu() {
        return vec![(gpu.name(), gpu)];
    }
    let emulated = |schedule: Schedule| (format!("{schedule:?}"), Emulated::new(limits, schedule));
    Schedule::hostile(7).map(emulated).into()
}

/// A graph's weights: fp16 numbers, scaled to keep sums near 1.
fn weights(graph: &Graph) -> (tempfile::TempDir, HashMap<String, Numbers>) {
    let folder = tempfile::tempdir().unwrap();
    let mut by_name = HashMap::new();
    let mut tensors = Vec::new();
    for spec in graph.weights() {
        for (name, &outputs) in spec.names.iter().zip(&spec.outputs) {
            let scale = 1.0 / (spec.width as f64).sqrt();
            let seed = 77 + name.len() as u64 * 13 + outputs as u64;
            let numbers: Numbers = random(outputs * spec.width, seed).iter().map(|x| to_half(x * scale)).collect();
            let shape = match spec.kind {
                WeightKind::Matrix { kernel, inputs, .. } | WeightKind::Mirrored { kernel, inputs, .. } => {
                    vec![outputs, inputs, kernel, kernel]
                }
                WeightKind::Table => vec![outputs, spec.width],
                WeightKind::Vector => vec![outputs],
            };
            let bytes: Vec<u8> = numbers.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect();
            // A gradient reads its layer's weight a second time.
            if by_name.insert(name.clone(), numbers).is_none() {
                tensors.push((name.clone(), shape, bytes));
            }
        }
    }
    let view =
        |shape: &Vec<usize>, bytes| safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
    let views = tensors.iter().map(|(name, shape, bytes)| (name, view(shape, bytes).unwrap()));
    std::fs::create_dir(folder.path().join("unet")).unwrap();
    std::fs::write(folder.path().join("unet/config.json"), "{}").unwrap();
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.path().join("unet/diffusion_pytorch_model.safetensors"), bytes).unwrap();
    (folder, by_name)
}

/// The result of a plain loop.
pub struct Truth {
    /// The right numbers.
    pub numbers: Numbers,
    /// The allowed error of the kernels' f32, however small the numbers are: where all of a result cancels, the
    /// roundings of the cancelled terms remain.
    pub floor: f64,
}

impl From<Numbers> for Truth {
    fn from(numbers: Numbers) -> Self {
        Truth { numbers, floor: 0.0 }
    }
}

/// The operands of a plain loop: the inputs in the order of their shapes, and the weights by name.
pub struct Given {
    /// In the order of their shapes.
    pub inputs: Vec<Numbers>,
    /// By their names in the graph.
    pub weights: HashMap<String, Numbers>,
}

/// Builds a graph whose inputs have `shapes` and random contents, runs it on every device, and compares its output with
/// `plain`. All devices must agree bit for bit.
pub fn check(
    label: &str,
    shapes: &[Shape],
    build: impl FnOnce(&mut GraphBuilder, &[TensorId]) -> TensorId,
    plain: impl Fn(&Given, Round) -> Numbers,
) {
    let inputs = shapes.iter().enumerate().map(|(i, shape)| random(shape.len(), 5 + i as u64)).collect();
    check_with(Limits::A100, label, shapes, inputs, build, plain);
}

/// The same on devices of given limits, with given inputs that fp16 can represent. Returns the output.
pub fn check_with(
    limits: Limits,
    label: &str,
    shapes: &[Shape],
    inputs: Vec<Numbers>,
    build: impl FnOnce(&mut GraphBuilder, &[TensorId]) -> TensorId,
    plain: impl Fn(&Given, Round) -> Numbers,
) -> Vec<f32> {
    compare(limits, label, &graph_of(shapes, build), inputs, false, plain)
}

/// The same for the gradient with respect to the first input, on devices of given limits; the last of `inputs` is the
/// seed, the gradient with respect to the output.
pub fn check_gradient<T: Into<Truth>>(
    limits: Limits,
    label: &str,
    shapes: &[Shape],
    inputs: Vec<Numbers>,
    build: impl FnOnce(&mut GraphBuilder, &[TensorId]) -> TensorId,
    plain: impl Fn(&Given, Round) -> T,
) -> Vec<f32> {
    let graph = graph_of(shapes, build).with_gradient("out", "input0", Keep::All);
    compare(limits, &format!("gradient of {label}"), &graph, inputs, true, plain)
}

fn graph_of(shapes: &[Shape], build: impl FnOnce(&mut GraphBuilder, &[TensorId]) -> TensorId) -> Graph {
    let mut g = GraphBuilder::new();
    let ids: Vec<TensorId> = shapes.iter().enumerate().map(|(i, &s)| g.input(&format!("input{i}"), s)).collect();
    let out = build(&mut g, &ids);
    g.output("out", out);
    g.finish()
}

fn compare<T: Into<Truth>>(
    limits: Limits,
    label: &str,
    graph: &Graph,
    inputs: Vec<Numbers>,
    gradient: bool,
    plain: impl Fn(&Given, Round) -> T,
) -> Vec<f32> {
    let names =
        (0..inputs.len()).map(|i| if gradient && i + 1 == inputs.len() { "d.out".into() } else { format!("input{i}") });
    let names: Vec<String> = names.collect();
    let (folder, by_name) = weights(graph);
    let tensors = Source::folder(folder.path()).unwrap().tensors("unet").unwrap();
    let mut given = Given { inputs, weights: by_name };
    let result = |label: &str, device: &Arc<dyn CudaDevice>, given: &Given| {
        let plan = Arc::new(Plan::new(graph.clone(), &[], &device.limits()));
        let weights = CudaWeights::load(device, graph.weights(), &tensors).unwrap();
        let mut executor = CudaExecutor::new(device, plan, weights).unwrap();
        for (name, values) in names.iter().zip(&given.inputs) {
            let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
            executor.write(name, &values).unwrap();
        }
        let run = executor.prologue().and_then(|()| executor.step());
        let run = run.and_then(|()| if gradient { executor.backward() } else { Ok(()) });
        run.unwrap_or_else(|fault| panic!("{label}: {fault}"));
        executor.read(if gradient { "d.input0" } else { "out" }).unwrap()
    };
    let [truth, naive]: [Truth; 2] = [plain(&given, |x| x).into(), plain(&given, to_half).into()];
    let devices = devices(limits);
    let mut first: Option<Vec<f32>> = None;
    for (device_label, device) in &devices {
        let label = format!("{label}, {device_label}");
        let ours = result(&label, device, &given);
        within(&label, &ours, &truth, &naive.numbers);
        let same = first.get_or_insert_with(|| ours.clone());
        assert!(
            same.iter().zip(&ours).all(|(a, b)| a.to_bits() == b.to_bits()),
            "{label}: bits depend on the schedule"
        );
    }
    // One NaN must reach everything that is computed from it, and no other image. Within its own image it may reach
    // further: attention multiplies the values that a query does not see by 0.
    let images = graph.shape(graph.output("out")).n;
    for (i, name) in names.iter().enumerate().filter(|(_, name)| Element::of(graph, graph.input(name)) == Element::F16)
    {
        let place = given.inputs[i].len() * 2 / 3;
        let number = std::mem::replace(&mut given.inputs[i][place], f64::NAN);
        let [mut truth, naive]: [Truth; 2] = [plain(&given, |x| x).into(), plain(&given, to_half).into()];
        let label = format!("{label}, NaN in {name}");
        let ours = result(&label, &devices[0].1, &given);
        given.inputs[i][place] = number;
        let one = ours.len() / images;
        for (truth, ours) in truth.numbers.chunks_exact_mut(one).zip(ours.chunks_exact(one)) {
            if truth.iter().any(|x| x.is_nan()) {
                truth.iter_mut().zip(ours).filter(|(_, x)| x.is_nan()).for_each(|(truth, _)| *truth = f64::NAN);
            }
        }
        within(&label, &ours, &truth, &naive.numbers);
    }
    first.expect("a device")
}

/// Checks that every number is within twice the worst error of the naive fp16 loop plus one rounding of the greatest
/// result, or within the truth's floor; and that numbers are NaN exactly where the truth is.
pub fn within(label: &str, ours: &[f32], truth: &Truth, naive: &[f64]) {
    let Truth { numbers: truth, floor } = truth;
    assert_eq!(ours.len(), truth.len(), "{label}");
    let scale = truth.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let worst_naive = naive.iter().zip(truth).fold(0.0f64, |m, (n, t)| m.max((n - t).abs()));
    let limit = (2.0 * worst_naive + scale * 2f64.powi(-11)).max(*floor);
    // NaN counts as the greatest error.
    let error = |i: usize| match (ours[i].is_nan(), truth[i].is_nan()) {
        (true, true) => 0.0,
        (false, true) => f64::INFINITY,
        _ => (ours[i] as f64 - truth[i]).abs(),
    };
    let worst = (0..ours.len()).max_by(|&a, &b| error(a).total_cmp(&error(b))).unwrap();
    assert!(
        error(worst) <= limit,
        "{label}: element {worst} is {} where {} is right; off by {:.2e}, allowed {limit:.2e}",
        ours[worst],
        truth[worst],
        error(worst)
    );
}

/// The function of an [`Activation`], except GEGLU.
pub fn activated(x: f64, activation: respodiff::graph::Activation) -> f64 {
    use respodiff::graph::Activation::*;
    match activation {
        None | Geglu => x,
        Silu => x / (1.0 + (-x).exp()),
        QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Relu if x < 0.0 => 0.0,
        Relu => x,
        SoftClamp => 3.0 * (x / 3.0).tanh(),
        ToUnit => (x + 1.0) / 2.0,
        FromUnit => 2.0 * x - 1.0,
        Gelu => {
            // erf by its Taylor series: exact in f64 for arguments of a few units.
            let z = x / 2f64.sqrt();
            let (mut term, mut sum) = (z, z);
            for n in 1..100 {
                term *= -z * z / n as f64;
                sum += term / (2 * n + 1) as f64;
            }
            0.5 * x * (1.0 + sum * 2.0 / std::f64::consts::PI.sqrt())
        }
    }
}

/// The derivative of [`activated`].
pub fn slope(x: f64, activation: respodiff::graph::Activation) -> f64 {
    use respodiff::graph::Activation::*;
    let gated = |a: f64| {
        let s = 1.0 / (1.0 + (-a * x).exp());
        s + a * x * s * (1.0 - s)
    };
    match activation {
        None | Geglu => 1.0,
        Silu => gated(1.0),
        QuickGelu => gated(1.702),
        Relu if x.is_nan() => x,
        Relu => f64::from(x > 0.0),
        SoftClamp => (x / 3.0).cosh().powi(-2),
        ToUnit => 0.5,
        FromUnit => 2.0,
        // Phi(x) and x times the normal density.
        Gelu if x == 0.0 => 0.5,
        Gelu => activated(x, Gelu) / x + x * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt(),
    }
}
