//! Adapters in every format against PEFT, LyCORIS and the formulas in float64 (`tests/golden/adapters.py`), and what
//! must hold when they are exchanged.

mod support;

use half::f16;
use respodiff::engine::Adapted;
use respodiff::graph::Graph;
use respodiff::models::{ClipConfig, UNetConfig, UNetInput, text_encoder, unet};
use respodiff::weights::Adapter;
use respodiff::{Device, Engine, Error, ErrorKind, Image, Request, Session, Source};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::{Case, cases, nchw_to_nhwc, nhwc_to_nchw, relative_l2, run};

/// The largest relative error of a network in fp32. As in `models.rs`, it is a few times what is measured, and far
/// below what any single difference changes.
const TOLERANCE: f64 = 2e-5;

fn file(name: &str) -> PathBuf {
    support::golden().join(format!("adapters/{name}.safetensors"))
}

fn adapter(name: &str) -> Arc<Adapter> {
    Arc::new(Adapter::load(file(name)).unwrap())
}

fn checkpoint(name: &str) -> Source {
    Source::folder(support::golden().join("checkpoints").join(name)).unwrap()
}

/// A golden checkpoint with its weights in fp32.
fn widened(name: &str) -> (tempfile::TempDir, Source) {
    fn widen(folder: &Path) {
        for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                widen(&entry);
            } else if entry.extension().is_some_and(|end| end == "safetensors") {
                let bytes = std::fs::read(&entry).unwrap();
                let tensors = SafeTensors::deserialize(&bytes).unwrap();
                let wide = tensors.iter().map(|(name, view)| {
                    let halves = view.data().chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32());
                    let numbers = match view.dtype() {
                        Dtype::F16 => halves.flat_map(f32::to_le_bytes).collect(),
                        _ => view.data().to_vec(),
                    };
                    let dtype = if view.dtype() == Dtype::F16 { Dtype::F32 } else { view.dtype() };
                    (name.to_string(), dtype, view.shape().to_vec(), numbers)
                });
                write(&entry, &wide.collect::<Vec<_>>());
            }
        }
    }
    let folder = support::copy(name);
    widen(folder.path());
    let source = Source::folder(folder.path()).unwrap();
    (folder, source)
}

type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

fn write(path: &Path, tensors: &[Tensor]) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn read(path: &Path) -> Vec<Tensor> {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let each = tensors.iter().map(|(name, t)| (name.to_string(), t.dtype(), t.shape().to_vec(), t.data().to_vec()));
    each.collect()
}

/// A component's name, its graph and its inputs.
type Network = (&'static str, Graph, HashMap<&'static str, Vec<f32>>);

/// The networks of a checkpoint that adapters change, for the inputs of a case.
fn networks(source: &Source, case: &Case) -> Vec<Network> {
    let config = |component: &str| {
        let file = format!("{component}/config.json");
        (source.read_text(&file).unwrap(), source.path(&file))
    };
    let (text, path) = config("unet");
    let config_of_unet = UNetConfig::parse(&text, &path).unwrap();
    let own = cases(&format!("unet_{}_0", case.metadata()["checkpoint"]), 1).remove(0);
    let [n, c, h, w] = own.shape("sample")[..] else { panic!("sample is NCHW") };
    let tokens = own.shape("encoder_hidden_states")[1];
    let mut inputs = HashMap::from([
        ("sample", nchw_to_nhwc(&own.floats("sample"), n, c)),
        ("timestep", own.floats("timestep")),
        ("encoder_hidden_states", own.floats("encoder_hidden_states")),
    ]);
    for name in ["text_embeds", "time_ids"] {
        if own.has(name) {
            inputs.insert(name, own.floats(name));
        }
    }
    let graph = unet(&config_of_unet, UNetInput { rows: n, h, w, tokens, shifted: 0 });
    let mut all = vec![("unet", graph, inputs)];
    for component in ["text_encoder", "text_encoder_2"] {
        if case.has(&format!("out.{component}")) {
            let (text, path) = config(component);
            let config = ClipConfig::parse(&text, &path).unwrap();
            let ids = case.integers(&format!("input_ids.{component}"));
            let inputs = HashMap::from([
                ("input_ids", ids.iter().map(|&id| id as f32).collect()),
                ("pooled_index", vec![config.pooled_index(&ids) as f32]),
            ]);
            all.push((component, text_encoder(&config, 1), inputs));
        }
    }
    all
}

/// The errors of all networks with the adapter of a case.
fn errors(device: &Device, source: &Source, case: &Case) -> Vec<(&'static str, f64)> {
    let weight = case.metadata()["weight"].parse().unwrap();
    let name = case.name.strip_prefix("adapter_").unwrap();
    let adapters = [(adapter(name), weight)];
    let adapted = Adapted::new(source, &adapters).unwrap();
    let error = |(component, graph, inputs): (&'static str, Graph, HashMap<&'static str, Vec<f32>>)| {
        let outputs = run(device, graph, &adapted.tensors(component).unwrap(), &inputs);
        let recorded = case.floats(&format!("out.{component}"));
        let ours = match component {
            "unet" => nhwc_to_nchw(&outputs["sample"], 1, 4),
            _ => outputs["penultimate_hidden_state"][..recorded.len()].to_vec(),
        };
        (component, relative_l2(&ours, &recorded))
    };
    networks(source, case).into_iter().map(error).collect()
}

#[test]
fn every_format_as_its_own_library_computes_it() {
    let checkpoints = ["sd1", "sdxl"].map(|name| (name, widened(name)));
    for case in cases("adapter_", 10) {
        let name = &case.metadata()["checkpoint"];
        let (_, (_, source)) = checkpoints.iter().find(|(known, _)| known == name).unwrap();
        for (component, error) in errors(&Device::cpu(), source, &case) {
            println!("{:28} {component:16} {error:.1e}", case.name);
            assert!(error <= TOLERANCE, "{}: {component} is off by {error:.2e}", case.name);
        }
    }
}

/// The kernels round weights to fp16, and compute in it: they may be as far off as without an adapter (`models.rs`).
#[cfg(feature = "emulated")]
#[test]
fn kernels_with_adapters() {
    for name in ["adapter_sd1_kohya", "adapter_sdxl_lokr"] {
        let case = cases(name, 1).remove(0);
        for (component, error) in errors(&support::kernels(), &checkpoint(&case.metadata()["checkpoint"]), &case) {
            println!("{name:28} {component:16} {error:.1e}");
            assert!(error <= 1e-2, "{name}: {component} is off by {error:.2e}");
        }
    }
}

/// Merged weights of a checkpoint in fp16 are those of the checkpoint in fp32, rounded to fp16, bit for bit; whether a
/// number is changed does not depend on how many are asked for at once.
#[test]
fn weights_are_merged_in_fp32_and_rounded_once() {
    for name in ["sd1_kohya", "sdxl_lokr", "sdxl_dora_inputs"] {
        let case = cases(&format!("adapter_{name}"), 1).remove(0);
        let halves = checkpoint(&case.metadata()["checkpoint"]);
        let (_folder, wide) = widened(&case.metadata()["checkpoint"]);
        let adapters = [(adapter(name), 0.37)];
        let [halves, wide] = [&halves, &wide].map(|source| Adapted::new(source, &adapters).unwrap());
        let plain = checkpoint(&case.metadata()["checkpoint"]);
        for (component, graph, _) in networks(&plain, &case) {
            let [halves, wide] = [&halves, &wide].map(|adapted| adapted.tensors(component).unwrap());
            let mut changed = 0;
            for spec in graph.weights() {
                let [rounded, exact] = [&halves, &wide].map(|tensors| tensors.read_weight(spec).unwrap());
                let expected: Vec<f32> = exact.iter().map(|&x| f16::from_f32(x).to_f32()).collect();
                assert_eq!(rounded, expected, "{name}: {:?}", spec.names);
                changed += usize::from(!wide.edition(spec).is_empty());
                for part in wide.stored(spec).unwrap() {
                    let (len, mut odd) = (part.len(), vec![0.0f32; part.len()]);
                    for start in (0..len).step_by(37) {
                        part.numbers(start, &mut odd[start..len.min(start + 37)]);
                    }
                    assert_eq!(odd, part.read().unwrap(), "{name}: {}", part.name);
                }
            }
            assert!((3..=13).contains(&changed), "{name}: {changed} weights of {component} are changed");
        }
    }
}

fn picture(session: &mut Session, prompt: &str) -> Vec<u8> {
    let request = Request::from(Image::new(prompt).seed(3)).steps(2);
    let output = session.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap();
    output.pictures[0].rgb.clone()
}

fn engine(source: &Source, device: &Device, adapters: &[(Arc<Adapter>, f32)]) -> Engine {
    let options = respodiff::EngineOptions::new(device.clone()).adapters(adapters.to_vec());
    Engine::open(source, options).unwrap()
}

/// Adapters that a session goes over to give the picture of an engine that was opened with them, and without them
/// the first picture comes back, all to the last bit.
fn exchange(device: &Device) {
    let options = |engine: &Engine| engine.options().size(respodiff::Size::new(64, 40));
    let source = checkpoint("sd1");
    let plain = engine(&source, device, &[]);
    let mut session = plain.session(options(&plain)).unwrap();
    let first = picture(&mut session, "a cat");
    let sets: [&[(Arc<Adapter>, f32)]; 5] = [
        &[(adapter("sd1_kohya"), 0.8)],
        // Of attention layers of the UNet, and of the text encoder.
        &[(adapter("sd1_processors"), -0.5), (adapter("sd1_dora_outputs"), 0.4)],
        &[],
        &[(adapter("sd1_loha"), 0.3), (adapter("sd1_loha"), 0.3)],
        &[(adapter("sd1_whole"), 0.0)],
    ];
    let bytes = plain.memory(options(&plain)).unwrap().weights;
    for set in sets {
        let other = plain.with_adapters(set).unwrap();
        session.switch(&other).unwrap();
        let switched = picture(&mut session, "a cat");
        let opened = engine(&source, device, set);
        assert_eq!(switched, picture(&mut opened.session(options(&opened)).unwrap(), "a cat"));
        let has_effect = set.iter().any(|(_, weight)| *weight != 0.0);
        assert_eq!(switched != first, has_effect);
        // Weights that do not change are held once, and merged ones in place of others if that is how they were opened.
        assert_eq!(opened.memory(options(&plain)).unwrap().weights, bytes);
        let more = other.memory(options(&plain)).unwrap().weights - bytes;
        assert!((more > 0) == has_effect && more < bytes / 2, "{more} of {bytes}");
    }
    session.switch(&plain).unwrap();
    assert_eq!(picture(&mut session, "a cat"), first);
    // An engine that was opened with an adapter can leave it, and take another.
    let opened = engine(&source, device, sets[0]);
    let mut session = opened.session(options(&opened)).unwrap();
    session.switch(&opened.with_adapters(&[]).unwrap()).unwrap();
    assert_eq!(picture(&mut session, "a cat"), first);
    session.switch(&opened.with_adapters(sets[1]).unwrap()).unwrap();
    let other = engine(&source, device, sets[1]);
    let expected = picture(&mut other.session(options(&other)).unwrap(), "a cat");
    assert_eq!(picture(&mut session, "a cat"), expected);
    // Not an engine of its own.
    assert_eq!(session.switch(&other).unwrap_err().kind(), ErrorKind::Mismatch);
}

#[test]
fn adapters_are_exchanged_in_a_session() {
    exchange(&Device::cpu());
}

#[cfg(feature = "emulated")]
#[test]
fn adapters_are_exchanged_in_a_session_on_the_kernels() {
    exchange(&support::kernels());
}

/// Prompts are encoded anew where an adapter changes the text encoder, and only there.
#[test]
fn encodings_belong_to_the_text_encoder() {
    let plain = engine(&checkpoint("sd1"), &Device::cpu(), &[]);
    let encoded = plain.encode("a cat").unwrap();
    let generate = |engine: &Engine| {
        let mut session = engine.session(engine.options())?;
        let request = Request::from(Image::new(&encoded)).steps(1);
        session.generate(&request, &mut |_| ControlFlow::Continue(())).map(drop)
    };
    let folder = tempfile::tempdir().unwrap();
    let unet_alone = folder.path().join("unet.safetensors");
    let kept: Vec<Tensor> =
        read(&file("sd1_kohya")).into_iter().filter(|(name, ..)| name.starts_with("lora_unet")).collect();
    write(&unet_alone, &kept);
    let unet_alone = Arc::new(Adapter::load(&unet_alone).unwrap());
    generate(&plain.with_adapters(&[(unet_alone, 1.0)]).unwrap()).unwrap();
    let both = plain.with_adapters(&[(adapter("sd1_kohya"), 1.0)]).unwrap();
    assert_eq!(generate(&both).unwrap_err().kind(), ErrorKind::Mismatch);
}

/// A running batch goes over to other adapters while no image is in work.
#[test]
fn a_running_batch_waits_for_its_images() {
    let plain = engine(&checkpoint("sd1"), &Device::cpu(), &[]);
    let other = plain.with_adapters(&[(adapter("sd1_kohya"), 1.0)]).unwrap();
    let mut batch = plain.running_batch(plain.options().batch(2)).unwrap();
    let request = Request::from(Image::new("a cat")).steps(1);
    let id = batch.join(&request).unwrap();
    assert_eq!(batch.switch(&other).unwrap_err().kind(), ErrorKind::Invalid);
    batch.cancel(id);
    batch.switch(&other).unwrap();
    batch.join(&request).unwrap();
    let events = batch.step().unwrap();
    let [(_, respodiff::Event::Finished(got))] = &events[..] else { panic!("{events:?}") };
    let mut session = other.session(other.options()).unwrap();
    let expected = session.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(got.rgb, expected.pictures[0].rgb);
}

/// Checks the kind and the words of an error.
#[track_caller]
fn refused(result: Result<impl Sized, Error>, kind: ErrorKind, words: &[&str]) {
    let error = result.err().expect("an error");
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    words.iter().for_each(|word| assert!(text.contains(word), "no `{word}` in: {text}"));
}

/// Writes a golden adapter with some of its tensors changed or left out, and loads it.
fn damaged(name: &str, change: impl Fn(&mut Tensor) -> bool) -> Result<Adapter, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.safetensors");
    let tensors: Vec<Tensor> =
        read(&file(name)).into_iter().filter_map(|mut tensor| change(&mut tensor).then_some(tensor)).collect();
    write(&path, &tensors);
    Adapter::load(&path)
}

#[test]
fn damaged_files_are_errors_that_say_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    refused(Adapter::load(&path), ErrorKind::NotFound, &["a.safetensors"]);
    std::fs::write(&path, b"").unwrap();
    refused(Adapter::load(&path), ErrorKind::Damaged, &["not a whole safetensors file"]);
    let whole = std::fs::read(file("sd1_kohya")).unwrap();
    for length in (0..whole.len()).step_by(whole.len() / 23) {
        std::fs::write(&path, &whole[..length]).unwrap();
        refused(Adapter::load(&path), ErrorKind::Damaged, &["not a whole safetensors file"]);
    }
    let other = support::golden().join("checkpoints/sd1/unet/diffusion_pytorch_model.safetensors");
    refused(Adapter::load(other), ErrorKind::Unsupported, &["not a LoRA", "one component"]);
    write(&path, &[("model.diffusion_model.input_blocks.0.0.weight".into(), Dtype::F16, vec![1], vec![0; 2])]);
    refused(Adapter::load(&path), ErrorKind::Unsupported, &["not a LoRA", "whole checkpoint"]);

    let is = |name: &str, end: &str| name.contains("down_blocks_0_downsamplers") && name.ends_with(end);
    let refuse = |words: &[&str], change: &dyn Fn(&mut Tensor) -> bool| {
        refused(damaged("sd1_kohya", change), ErrorKind::Damaged, words);
    };
    refuse(&["`lora_unet_down_blocks_0_downsamplers_0_conv` has no lora_up"], &|t| !is(&t.0, "lora_up.weight"));
    refuse(&["has no lora_down, only alpha, lora_mid, lora_up"], &|t| !is(&t.0, "lora_down.weight"));
    refuse(&["do not fit each other", "lora_mid ["], &|t| {
        if is(&t.0, "lora_mid.weight") {
            (t.2[0], t.3) = (t.2[0] + 1, vec![0; t.3.len() / t.2[0] * (t.2[0] + 1)]);
        }
        true
    });
    refuse(&["holds NaN at position 2", "lora_up"], &|t| {
        if is(&t.0, "lora_up.weight") {
            t.3[4..6].copy_from_slice(&f16::NAN.to_le_bytes());
        }
        true
    });
    refuse(&["alpha", "inf"], &|t| {
        if is(&t.0, "alpha") {
            t.3.copy_from_slice(&f32::INFINITY.to_le_bytes());
        }
        true
    });
    refuse(&["has rank 0"], &|t| {
        if is(&t.0, "_down.weight") || is(&t.0, "_up.weight") || is(&t.0, "_mid.weight") {
            let inner = usize::from(is(&t.0, "_up.weight"));
            t.2[inner] = 0;
            if is(&t.0, "_mid.weight") {
                t.2[1] = 0;
            }
            t.3.clear();
        }
        true
    });
    refuse(&["has hada_w1_a"], &|t| {
        if is(&t.0, "alpha") {
            t.0 = t.0.replace("alpha", "hada_w1_a");
        }
        true
    });
    let unknown = damaged("sd1_kohya", |t| {
        if t.0.ends_with("lora_up.weight") {
            t.0 = t.0.replace("lora_up.weight", "oft_blocks");
        }
        true
    });
    refused(unknown, ErrorKind::Unsupported, &["of no kind of adapter", "oft_blocks", "more"]);
    refused(damaged("sdxl_lokr", |t| !t.0.contains("lokr_w2")), ErrorKind::Damaged, &["has no lokr_w2"]);
    refused(damaged("sd1_loha", |t| !t.0.contains("hada_t1")), ErrorKind::Damaged, &["has no hada_t1"]);
}

#[test]
fn adapters_of_other_models_are_refused() {
    let sd1 = engine(&checkpoint("sd1"), &Device::cpu(), &[]);
    let with = |name: &str, weight: f32| sd1.with_adapters(&[(adapter(name), weight)]);
    refused(with("sdxl_lokr", 1.0), ErrorKind::Mismatch, &["made for a UNet that reads text of width", "this model's"]);
    for weight in [f32::NAN, f32::INFINITY] {
        refused(with("sd1_kohya", weight), ErrorKind::Invalid, &["is no weight", "sd1_kohya"]);
    }
    refused(with("sd1_kohya", 1e30), ErrorKind::Invalid, &["with them, tensor", "smaller weights"]);
    // Modules that the model does not have, with the first of them and their number.
    let strange = damaged("sd1_kohya", |t| {
        t.0 =
            t.0.replace("unet_down_blocks_0", "unet_down_blocks_7").replace("unet_down_blocks_1", "unet_down_blocks_8");
        true
    });
    let strange = sd1.with_adapters(&[(Arc::new(strange.unwrap()), 1.0)]);
    let words = ["5 of its 15 modules are no part of this model", "down_blocks_7_attentions_0", "and 1 more"];
    refused(strange, ErrorKind::Mismatch, &words);
    // The same layer by two names.
    let twice = read(&file("sd1_kohya")).into_iter().filter(|t| t.0.contains("conv_out"));
    let twice =
        twice.flat_map(|t| [(t.0.replace("lora_unet_conv_out", "unet.conv_out"), t.1, t.2.clone(), t.3.clone()), t]);
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("twice.safetensors"), &twice.collect::<Vec<_>>());
    let twice = Arc::new(Adapter::load(folder.path().join("twice.safetensors")).unwrap());
    refused(
        sd1.with_adapters(&[(twice, 1.0)]),
        ErrorKind::Damaged,
        &["`lora_unet_conv_out`", "two spellings of one layer"],
    );
    // Modules of another shape.
    let wide = damaged("sd1_kohya", |t| {
        if t.0.contains("conv_out.lora_up") {
            (t.2[0], t.3) = (5, vec![0; t.3.len() / 4 * 5]);
        }
        true
    });
    let wide = sd1.with_adapters(&[(Arc::new(wide.unwrap()), 1.0)]);
    refused(wide, ErrorKind::Mismatch, &["`lora_unet_conv_out` is for a matrix of 5 x 72", "the model's is 4 x 72"]);
    let norms = damaged("sd1_dora_outputs", |t| {
        if t.0.contains("conv_out.dora_scale") {
            (t.2, t.3) = (vec![1, 3, 1, 1], vec![0; 12]);
        }
        true
    });
    refused(sd1.with_adapters(&[(Arc::new(norms.unwrap()), 1.0)]), ErrorKind::Mismatch, &["holds 3 norms"]);
}

/// A1111's hash is of the numbers alone, so that it survives a change of the header; `find` sees folders in folders.
#[test]
fn names_and_hashes() {
    let loaded = adapter("sd1_kohya");
    let bytes = std::fs::read(file("sd1_kohya")).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    use sha2::{Digest, Sha256};
    let hex = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(loaded.sha256(), hex(&bytes));
    assert_eq!(loaded.hash(), &hex(&bytes[header..])[..12]);
    assert_eq!(loaded.name(), "sd1_kohya");
    let info = loaded.info();
    assert_eq!((info.kinds["LoRA"], info.networks["unet"], info.networks["text_encoder"]), (15, 12, 3));
    assert_eq!((info.ranks, info.text_width), (Some((2, 5)), Some(32)));

    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("style/old");
    std::fs::create_dir_all(&inside).unwrap();
    std::fs::copy(file("sd1_kohya"), inside.join("my lora.v2.safetensors")).unwrap();
    assert_eq!(Adapter::find(folder.path(), "my lora.v2").unwrap(), inside.join("my lora.v2.safetensors"));
    refused(Adapter::find(folder.path(), "other"), ErrorKind::NotFound, &["`other`", "it holds my lora.v2"]);
    refused(Adapter::find(folder.path(), "../style/old/my lora.v2"), ErrorKind::NotFound, &["it holds"]);
    refused(Adapter::find(folder.path().join("none"), "other"), ErrorKind::NotFound, &["none"]);
}
