//! Every network against what transformers and diffusers recorded (`tests/golden`), from the same fp16 weights: on the CPU in
//! fp32, and on the emulated kernels in fp16.

mod support;

use respodiff::Device;
use respodiff::graph::Graph;
use respodiff::models::{ClipConfig, UNetConfig, VaeConfig, text_encoder, unet, vae_decoder, vae_encoder};
use respodiff::weights::Source;
use std::collections::HashMap;
use support::{Case, cases, nchw_to_nhwc, nhwc_to_nchw, relative_l2, run};

/// Of the CPU. Measured below 3e-6; the weakest single parameter of the golden checkpoints moves an output by 2e-4.
const TOLERANCE: f64 = 2e-5;
/// Of the kernels, and not more than twice PyTorch's own error in fp16; where PyTorch itself leaves this, PyTorch's error.
#[cfg(feature = "emulated")]
const HALF_TOLERANCE: f64 = 1e-2;

/// Where a network is run, and how far a result may be off: what `tests/golden/half.py` recorded decides on fp16.
#[derive(Clone)]
struct Place {
    name: &'static str,
    device: Device,
    tolerance: fn(&Case, &str) -> f64,
}

fn places() -> Vec<Place> {
    let cpu = Place { name: "cpu", device: Device::Cpu, tolerance: |_, _| TOLERANCE };
    #[cfg(feature = "emulated")]
    let kernels = Place {
        name: "kernels",
        device: support::kernels(),
        tolerance: |case, output| {
            let theirs = half_error(case, output);
            HALF_TOLERANCE.max(theirs).min(2.0 * theirs)
        },
    };
    #[cfg(feature = "emulated")]
    return vec![cpu, kernels];
    #[cfg(not(feature = "emulated"))]
    vec![cpu]
}

/// PyTorch's error in fp16.
#[cfg(feature = "emulated")]
fn half_error(case: &Case, output: &str) -> f64 {
    let text = std::fs::read_to_string(support::golden().join("cases/half.json")).expect("half.json");
    let errors: serde_json::Value = serde_json::from_str(&text).expect("half.json");
    errors[&case.name][output].as_f64().unwrap_or_else(|| panic!("half.json has no {} {output}", case.name))
}

/// Every case at every place.
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

fn check(place: &Place, case: &Case, output: &str, ours: &[f32]) {
    let error = relative_l2(ours, &case.floats(&format!("out.{output}")));
    let limit = (place.tolerance)(case, output);
    println!("{:9} {:28} {output:26} {error:.1e} of {limit:.1e}", place.name, case.name);
    assert!(error <= limit, "{}, {}: {output} is off by {error:.2e}, allowed {limit:.2e}", place.name, case.name);
}

#[test]
fn text_encoders() {
    for (place, case) in &runs("text_", 5) {
        let source = source(&case.name);
        let component = if case.name.ends_with("_2") { "text_encoder_2" } else { "text_encoder" };
        let (text, path) = config(&source, component);
        let config = ClipConfig::parse(&text, &path).expect("config");
        let ids = case.integers("input_ids");
        let n = case.shape("input_ids")[0];
        let pooled = ids.chunks(ids.len() / n).map(|row| config.pooled_index(row) as f32).collect();
        let inputs = HashMap::from([("input_ids", ids.iter().map(|&i| i as f32).collect()), ("pooled_index", pooled)]);
        let outputs = compute(place, &source, component, text_encoder(&config, n), &inputs);
        check(place, case, "last_hidden_state", &outputs["last_hidden_state"]);
        check(place, case, "penultimate_hidden_state", &outputs["penultimate_hidden_state"]);
        if case.has("out.text_embeds") {
            check(place, case, "text_embeds", &outputs["text_embeds"]);
        }
    }
}

#[test]
fn unets() {
    for (place, case) in &runs("unet_", 20) {
        let source = source(&case.name);
        let (text, path) = config(&source, "unet");
        let config = UNetConfig::parse(&text, &path).expect("config");
        let [n, c, h, w] = case.shape("sample")[..] else { panic!("sample is NCHW") };
        let graph = unet(&config, n, h, w, case.shape("encoder_hidden_states")[1], 0);
        let mid_channels = graph.shape(graph.output("mid")).c;
        let timestep = case.floats("timestep");
        let mut inputs = HashMap::from([
            ("sample", nchw_to_nhwc(&case.floats("sample"), n, c)),
            ("timestep", (0..n).map(|i| timestep[i % timestep.len()]).collect()),
            ("encoder_hidden_states", case.floats("encoder_hidden_states")),
        ]);
        for name in ["text_embeds", "time_ids"] {
            if case.has(name) {
                inputs.insert(name, case.floats(name));
            }
        }
        let outputs = compute(place, &source, "unet", graph, &inputs);
        check(place, case, "mid", &nhwc_to_nchw(&outputs["mid"], n, mid_channels));
        check(place, case, "sample", &nhwc_to_nchw(&outputs["sample"], n, c));
    }
}

#[test]
fn vaes() {
    for (place, case) in &runs("vae_", 9) {
        let source = source(&case.name);
        let (text, path) = config(&source, "vae");
        let config = VaeConfig::parse(&text, &path).expect("config");
        let [n, c, h, w] = case.shape("latents")[..] else { panic!("latents are NCHW") };
        let inputs = HashMap::from([("latents", nchw_to_nhwc(&case.floats("latents"), n, c))]);
        let outputs = compute(place, &source, "vae", vae_decoder(&config, n, h, w), &inputs);
        check(place, case, "image", &nhwc_to_nchw(&outputs["image"], n, 3));

        let [n, _, h, w] = case.shape("image")[..] else { panic!("images are NCHW") };
        let inputs = HashMap::from([("image", nchw_to_nhwc(&case.floats("image"), n, 3))]);
        let moments =
            nhwc_to_nchw(&compute(place, &source, "vae", vae_encoder(&config, n, h, w), &inputs)["moments"], n, 2 * c);
        let image = moments.len() / n;
        let half =
            |offset: usize| moments.chunks(image).flat_map(|m| m[offset..][..image / 2].to_vec()).collect::<Vec<_>>();
        check(place, case, "mean", &half(0));
        check(place, case, "logvar", &half(image / 2).iter().map(|x| x.clamp(-30.0, 20.0)).collect::<Vec<_>>());
    }
}
