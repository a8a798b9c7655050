//! Every network compared with recorded outputs of transformers and diffusers (`tests/golden`), from the same fp16
//! weights: on the CPU in fp32, and on the emulated kernels in fp16.

mod support;

use rayon::prelude::*;
use respodiff::Device;
use respodiff::graph::{Extent, Graph};
use respodiff::models::{
    ClipConfig, MASK_AND_IMAGE, UNetConfig, UNetInput, VaeConfig, text_encoder, unet, vae_decoder, vae_encoder,
};
use respodiff::weights::Source;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use std::collections::HashMap;
use support::{Case, cases, nchw_to_nhwc, nhwc_to_nchw, relative_l2, run, run_all};

/// The largest relative error on the CPU. Measured errors are below 3e-6; the weakest single parameter of the golden
/// checkpoints changes an output by 2e-4.
const TOLERANCE: f64 = 2e-5;
/// The largest relative error of the kernels on one call, which also may not exceed twice PyTorch's worst error in
/// fp16.
const HALF_TOLERANCE: f64 = 1e-2;
/// The largest geometric mean of the ratios of the kernels' errors to PyTorch's in fp16, over all calls of a kind. The
/// error of one call of a tiny network is a matter of luck in fp16, the mean over forty is not.
const HALF_MEAN: f64 = 1.25;

/// A device on which networks run.
#[derive(Clone)]
struct Place {
    name: &'static str,
    device: Device,
}

fn places() -> Vec<Place> {
    vec![
        Place { name: "cpu", device: Device::cpu() },
        #[cfg(feature = "emulated")]
        Place { name: "kernels", device: support::kernels() },
    ]
}

impl Place {
    fn is_half(&self) -> bool {
        !self.device.is_cpu()
    }
}

/// Compares every error with its limit, and at the end the mean ratio of the kernels' errors to PyTorch's with its
/// limit.
#[derive(Default)]
struct Verdict {
    logarithms: Vec<f64>,
}

impl Verdict {
    fn check(&mut self, place: &Place, case: &Case, output: &str, ours: &[f32]) {
        self.check_error(place, case, output, relative_l2(ours, &case.floats(&format!("out.{output}"))));
    }

    fn check_error(&mut self, place: &Place, case: &Case, output: &str, error: f64) {
        let limit = if place.is_half() {
            let (median, worst) = support::half_errors(case, output);
            self.logarithms.push((error / median).ln());
            HALF_TOLERANCE.min(2.0 * worst)
        } else {
            TOLERANCE
        };
        println!("{:9} {:28} {output:26} {error:.1e} of {limit:.1e}", place.name, case.name);
        assert!(error <= limit, "{}, {}: {output} is off by {error:.2e}, allowed {limit:.2e}", place.name, case.name);
    }

    fn end(self) {
        let mean = (self.logarithms.iter().sum::<f64>() / self.logarithms.len().max(1) as f64).exp();
        println!("kernels: {mean:.2} of PyTorch's errors in fp16, over {} outputs", self.logarithms.len());
        assert!(mean <= HALF_MEAN, "the kernels' errors are {mean:.2} of PyTorch's in fp16, allowed {HALF_MEAN}");
    }
}

/// Every case on every device.
fn runs(prefix: &str, least: usize) -> Vec<(Place, Case)> {
    let all =
        places().into_iter().flat_map(|place| cases(prefix, least).into_iter().map(move |case| (place.clone(), case)));
    all.collect()
}

fn source(case: &str) -> Source {
    let name = case.split('_').nth(1).expect("kind_checkpoint_...");
    Source::folder(support::golden().join("checkpoints").join(name)).expect("golden checkpoint")
}

fn config(source: &Source, component: &str) -> (String, std::path::PathBuf) {
    let file = format!("{component}/config.json");
    (source.read_text(&file).expect("config"), source.path(&file))
}

fn compute(
    place: &Place,
    source: &Source,
    component: &str,
    graph: Graph,
    inputs: &HashMap<&str, Vec<f32>>,
) -> HashMap<String, Vec<f32>> {
    run(&place.device, graph, &source.tensors(component).expect("weights"), inputs)
}

#[test]
fn text_encoders() {
    let mut verdict = Verdict::default();
    for (place, case) in &runs("text_", 7) {
        let source = source(&case.name);
        let component = if case.name.ends_with("_2") { "text_encoder_2" } else { "text_encoder" };
        let (text, path) = config(&source, component);
        let config = ClipConfig::parse(&text, &path).expect("config");
        let ids = case.integers("input_ids");
        let n = case.shape("input_ids")[0];
        let pooled = ids.chunks(ids.len() / n).map(|row| config.pooled_index(row) as f32).collect();
        let inputs = HashMap::from([("input_ids", ids.iter().map(|&i| i as f32).collect()), ("pooled_index", pooled)]);
        let outputs = compute(place, &source, component, text_encoder(&config, n), &inputs);
        verdict.check(place, case, "last_hidden_state", &outputs["last_hidden_state"]);
        verdict.check(place, case, "penultimate_hidden_state", &outputs["penultimate_hidden_state"]);
        if case.has("out.text_embeds") {
            verdict.check(place, case, "text_embeds", &outputs["text_embeds"]);
        }
    }
    verdict.end();
}

/// Text encoders as transformers saves them from version 5 on, without the prefix `text_model.`: in one file, as an
/// fp16 variant and in shards.
#[test]
fn text_encoders_without_a_prefix() {
    for (checkpoint, component, file, shards) in [
        ("sd1", "text_encoder", "model.safetensors", false),
        ("sd1", "text_encoder", "model.safetensors", true),
        ("sd2", "text_encoder", "model.fp16.safetensors", false),
        ("sdxl", "text_encoder", "model.safetensors", false),
        ("sdxl", "text_encoder_2", "model.safetensors", true),
    ] {
        let original = source(&format!("text_{checkpoint}"));
        let (folder, flat) = (support::copy(checkpoint), |name: &str| name.replace("text_model.", ""));
        let path = folder.path().join(component).join(file);
        let bytes = std::fs::read(&path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let renamed: Vec<_> = tensors.iter().map(|(name, view)| (flat(name), view)).collect();
        std::fs::remove_file(&path).unwrap();
        let write = |path, tensors: &[(String, TensorView)]| {
            std::fs::write(path, safetensors::serialize(tensors.iter().cloned(), None).unwrap()).unwrap();
        };
        if shards {
            let halves = renamed.split_at(renamed.len() / 2);
            let mut map = serde_json::Map::new();
            for (half, name) in [(halves.0, "a.safetensors"), (halves.1, "b.safetensors")] {
                write(path.with_file_name(name), half);
                map.extend(half.iter().map(|(tensor, _)| (tensor.clone(), name.into())));
            }
            let index = serde_json::json!({"weight_map": map}).to_string();
            std::fs::write(path.with_file_name("model.safetensors.index.json"), index).unwrap();
        } else {
            write(path.clone(), &renamed);
        }
        let renamed = Source::folder(folder.path()).unwrap();
        let (text, path) = config(&original, component);
        let graph = text_encoder(&ClipConfig::parse(&text, &path).expect("config"), 1);
        for spec in graph.weights() {
            let read = |source: &Source| source.tensors(component).and_then(|tensors| tensors.read_weight(spec));
            assert_eq!(read(&renamed).expect("weights"), read(&original).expect("weights"), "{:?}", spec.names);
        }
    }
}

#[test]
fn unets() {
    let runs = runs("unet_", 31);
    // The cases run in parallel, since most launches of these small networks are too small to be shared among
    // processors.
    let errors: Vec<_> = runs.par_iter().map(|(place, case)| unet_errors(place, case)).collect();
    let mut verdict = Verdict::default();
    for ((place, case), errors) in runs.iter().zip(errors) {
        for (output, error) in errors {
            verdict.check_error(place, case, output, error);
        }
    }
    verdict.end();
}

/// The names of a UNet's outputs and their errors.
fn unet_errors(place: &Place, case: &Case) -> [(&'static str, f64); 2] {
    let source = source(&case.name);
    let (text, path) = config(&source, "unet");
    let config = UNetConfig::parse(&text, &path).expect("config");
    let [n, c, h, w] = case.shape("sample")[..] else { panic!("sample is NCHW") };
    let tokens = case.shape("encoder_hidden_states")[1];
    let graph = unet(&config, UNetInput { rows: n, h, w, tokens, shifted: 0 });
    let channels = [("mid", graph.shape(graph.output("mid")).c), ("sample", case.shape("out.sample")[1])];
    let timestep = case.floats("timestep");
    // Models for inpainting read the mask and the masked picture behind the latents.
    let pixels = nchw_to_nhwc(&case.floats("sample"), n, c);
    let (latents, more): (Vec<&[f32]>, Vec<&[f32]>) =
        pixels.chunks_exact(c).map(|pixel| pixel.split_at(config.out_channels)).unzip();
    let mut inputs = HashMap::from([
        ("sample", latents.concat()),
        (MASK_AND_IMAGE, more.concat()),
        ("timestep", (0..n).map(|i| timestep[i % timestep.len()]).collect()),
        ("encoder_hidden_states", case.floats("encoder_hidden_states")),
    ]);
    for name in ["text_embeds", "time_ids", "timestep_cond"] {
        if case.has(name) {
            inputs.insert(name, case.floats(name));
        }
    }
    // A single rounding can change the error of a tiny network tenfold. So in fp16, the error is the median over nearby
    // calls, as it is for PyTorch.
    let nearby = if place.is_half() { 8 } else { 0 };
    let nearby: Vec<_> = (0..nearby).map(|seed| moved(&inputs, seed)).collect();
    let calls: Vec<_> = std::iter::once(inputs).chain(nearby).collect();
    let tensors = source.tensors("unet").expect("weights");
    let ours = run_all(&place.device, graph.clone(), &tensors, &calls);
    let truth = run_all(&Device::cpu(), graph, &tensors, &calls[1..]);
    channels.map(|(name, c)| {
        let recorded = relative_l2(&nhwc_to_nchw(&ours[0][name], n, c), &case.floats(&format!("out.{name}")));
        let nearby = ours[1..].iter().zip(&truth).map(|(ours, truth)| relative_l2(&ours[name], &truth[name]));
        let mut errors: Vec<f64> = std::iter::once(recorded).chain(nearby).collect();
        errors.sort_by(f64::total_cmp);
        (name, errors[errors.len() / 2])
    })
}

/// The same call with its activations changed by up to a thousandth.
fn moved<'a>(inputs: &HashMap<&'a str, Vec<f32>>, seed: u32) -> HashMap<&'a str, Vec<f32>> {
    let shift = |i: usize| {
        let mixed = (i as u32 + 1).wrapping_mul(2_654_435_761).wrapping_add(seed).wrapping_mul(2_246_822_519);
        1e-3 * ((mixed >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    let mut inputs = inputs.clone();
    for name in ["sample", "encoder_hidden_states", "text_embeds"] {
        if let Some(numbers) = inputs.get_mut(name) {
            numbers.iter_mut().enumerate().for_each(|(i, x)| *x += shift(i));
        }
    }
    inputs
}

#[test]
fn vaes() {
    let mut verdict = Verdict::default();
    for (place, case) in &runs("vae_", 12) {
        let source = source(&case.name);
        let (text, path) = config(&source, "vae");
        let config = VaeConfig::parse(&text, &path).expect("config");
        let [n, c, h, w] = case.shape("latents")[..] else { panic!("latents are NCHW") };
        let inputs = HashMap::from([("latents", nchw_to_nhwc(&case.floats("latents"), n, c))]);
        let outputs = compute(place, &source, "vae", vae_decoder(&config, n, Extent { h, w }), &inputs);
        verdict.check(place, case, "image", &nhwc_to_nchw(&outputs["image"], n, 3));

        let [n, _, h, w] = case.shape("image")[..] else { panic!("images are NCHW") };
        let inputs = HashMap::from([("image", nchw_to_nhwc(&case.floats("image"), n, 3))]);
        let outputs = compute(place, &source, "vae", vae_encoder(&config, n, Extent { h, w }), &inputs);
        if case.has("out.latents") {
            verdict.check(place, case, "latents", &nhwc_to_nchw(&outputs["moments"], n, c));
            continue;
        }
        let moments = nhwc_to_nchw(&outputs["moments"], n, 2 * c);
        let image = moments.len() / n;
        let half =
            |offset: usize| moments.chunks(image).flat_map(|m| m[offset..][..image / 2].to_vec()).collect::<Vec<_>>();
        verdict.check(place, case, "mean", &half(0));
        verdict.check(place, case, "logvar", &half(image / 2).iter().map(|x| x.clamp(-30.0, 20.0)).collect::<Vec<_>>());
    }
    verdict.end();
}
