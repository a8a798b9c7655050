//! Single-file checkpoints compared with the results of diffusers' `from_single_file` for the same files
//! (`tests/golden/single.py`). The files have all tensors of the released ones under the same names, but with few
//! channels, and with numbers that are computed from the names.

mod convert;
mod parts;
#[path = "../support/mod.rs"]
mod support;
mod taesd;

use respodiff::models::{ClipConfig, UNetConfig, VaeConfig};
use respodiff::weights::Source;
use respodiff::{Device, Engine, Error, Image, Request, SessionOptions, Size};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use support::{Case, cases, relative_l2};

/// The same numbers that `numbers` in the recorder computes; fp16 represents all of them exactly.
fn numbers(name: &str, shape: &[usize]) -> Vec<f32> {
    let seed = name.bytes().fold(2_166_136_261u32, |state, byte| (state ^ u32::from(byte)).wrapping_mul(16_777_619));
    let fan_in: usize = shape.iter().skip(1).product();
    let scale = 2f32.powi(1 - (usize::BITS - fan_in.leading_zeros()) as i32 / 2);
    let number = |i: u32| {
        let mut x = i.wrapping_mul(2_654_435_761).wrapping_add(seed);
        for (shift, factor) in [(16, 0x7feb_352d), (15, 0x846c_a68b)] {
            x = (x ^ (x >> shift)).wrapping_mul(factor);
        }
        let uniform = ((x ^ (x >> 16)) >> 21) as f32 / 1024.0 - 1.0;
        match shape.len() {
            2.. => uniform * scale,
            _ if name.ends_with("weight") => 1.0 + (uniform * 128.0).floor() / 512.0,
            _ => uniform / 8.0,
        }
    };
    (0..shape.iter().product::<usize>() as u32).map(number).collect()
}

/// The byte of an 8-bit format whose number is nearest, and this number, by the formats' definition (arXiv 2209.05433).
fn eight_bits(x: f32, format: Dtype) -> (u8, f32) {
    let mantissa = if format == Dtype::F8_E4M3 { 3 } else { 2 };
    let (bias, steps) = (if mantissa == 3 { 7 } else { 15 }, f32::from(1u8 << mantissa));
    let number = |byte: u8| {
        let (exponent, fraction) = (i32::from(byte & 127) >> mantissa, f32::from(byte & ((1 << mantissa) - 1)) / steps);
        let magnitude = match exponent {
            0 => fraction * 2f32.powi(1 - bias),
            _ => (1.0 + fraction) * 2f32.powi(exponent - bias),
        };
        if byte < 128 { magnitude } else { -magnitude }
    };
    let finite = (0..=255u8).filter(|byte| byte & 127 < if mantissa == 3 { 0x7f } else { 0x7c });
    let byte = finite.min_by(|a, b| (number(*a) - x).abs().total_cmp(&(number(*b) - x).abs())).unwrap();
    (byte, number(byte))
}

/// The content of a single file that is to be written: the shape, numbers and format of each tensor, and the metadata
/// of the header.
struct Original {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>, Dtype)>,
    notes: HashMap<String, String>,
    folder: tempfile::TempDir,
}

impl Original {
    fn new(case: &Case) -> Self {
        let listing: BTreeMap<String, (String, Vec<usize>)> = recorded(case, "listing");
        let tensor = |(name, (format, shape)): (String, (String, Vec<usize>))| {
            let dtype = match format.as_str() {
                "F16" => Dtype::F16,
                "F32" => Dtype::F32,
                _ => Dtype::I64,
            };
            let values = numbers(&name, &shape);
            (name, (shape, values, dtype))
        };
        let folder = tempfile::tempdir().unwrap();
        Original { tensors: listing.into_iter().map(tensor).collect(), notes: recorded(case, "file_metadata"), folder }
    }

    fn named(name: &str) -> Self {
        Self::new(&cases(&format!("single_{name}"), 1)[0])
    }

    /// Stores all weights in another format.
    fn stored(mut self, format: Dtype) -> Self {
        self.tensors
            .values_mut()
            .filter(|(_, _, dtype)| *dtype == Dtype::F16)
            .for_each(|(_, _, dtype)| *dtype = format);
        self
    }

    fn keep(&mut self, prefixes: &[&str]) {
        self.tensors.retain(|name, _| prefixes.iter().any(|prefix| name.starts_with(prefix)));
    }

    fn add(&mut self, name: &str, shape: &[usize]) {
        self.tensors.insert(name.into(), (shape.to_vec(), numbers(name, shape), Dtype::F16));
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("a model.safetensors")
    }

    /// The bytes of each tensor in the order of their names.
    fn bytes(&self) -> Vec<Vec<u8>> {
        let bytes = |(_, values, dtype): &(Vec<usize>, Vec<f32>, Dtype)| -> Vec<u8> {
            match dtype {
                Dtype::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
                Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
                Dtype::F8_E4M3 | Dtype::F8_E5M2 => values.iter().map(|&x| eight_bits(x, *dtype).0).collect(),
                _ => values.iter().flat_map(|&x| (x as i64).to_le_bytes()).collect(),
            }
        };
        self.tensors.values().map(bytes).collect()
    }

    fn write(&self) -> PathBuf {
        let data = self.bytes();
        let views = self
            .tensors
            .iter()
            .zip(&data)
            .map(|((name, (shape, _, dtype)), data)| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        std::fs::write(self.path(), safetensors::serialize(views, Some(self.notes.clone())).unwrap()).unwrap();
        self.path()
    }

    fn open(&self) -> Result<Source, Error> {
        Source::file(self.write())
    }

    /// Writes the file, opens it as a model, and expects an error of one line that names the file and contains all of
    /// `words`.
    fn refused(&self, words: &[&str]) {
        let error = self.open().and_then(|source| Engine::open(&source, Device::cpu())).err().expect("refused");
        expect(&error, words);
    }
}

fn expect(error: &Error, words: &[&str]) {
    let error = error.to_string();
    assert!(!error.contains('\n') && error.contains("a model."), "{error}");
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

fn recorded<T: serde::de::DeserializeOwned>(case: &Case, field: &str) -> T {
    serde_json::from_str(&case.metadata()[field]).unwrap()
}

fn prediction(source: &Source) -> String {
    let config: Value = serde_json::from_str(&source.read_text("scheduler/scheduler_config.json").unwrap()).unwrap();
    config["prediction_type"].as_str().unwrap().to_string()
}

#[test]
fn networks_are_those_of_diffusers() {
    for case in cases("single_", 3) {
        let format = if case.name.ends_with("sd2") { Dtype::F32 } else { Dtype::F16 };
        let original = Original::new(&case).stored(format);
        let source = original.open().unwrap();
        assert_eq!(source.name(), "a model");
        let digests: BTreeMap<String, String> = recorded(&case, "digests");
        for (component, digest) in &digests {
            let tensors = source.tensors(component).unwrap();
            let mut entries: Vec<(&str, &[usize])> = tensors.entries().collect();
            entries.sort();
            let mut hash = Sha256::new();
            for (name, shape) in entries {
                hash.update(format!("{name} {shape:?}\n"));
                let values = tensors.read(name, &[shape]).unwrap();
                hash.update(values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect::<Vec<u8>>());
            }
            let ours: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(ours, *digest, "{}: {component}", case.name);
        }
        assert!(digests.len() >= 3);
        let fingerprint = source.tensors("unet").unwrap().fingerprint().unwrap();
        assert_eq!(fingerprint, case.metadata()["fingerprint"].trim_matches('"'), "{}", case.name);

        let configs: BTreeMap<String, Value> = recorded(&case, "configs");
        let path = Path::new("recorded");
        for (component, theirs) in &configs {
            if component == "scheduler" {
                continue;
            }
            let (ours, theirs) = (source.read_text(&format!("{component}/config.json")).unwrap(), theirs.to_string());
            match component.as_str() {
                "unet" => {
                    assert_eq!(UNetConfig::parse(&ours, path).unwrap(), UNetConfig::parse(&theirs, path).unwrap())
                }
                "vae" => assert_eq!(VaeConfig::parse(&ours, path).unwrap(), VaeConfig::parse(&theirs, path).unwrap()),
                _ => assert_eq!(ClipConfig::parse(&ours, path).unwrap(), ClipConfig::parse(&theirs, path).unwrap()),
            }
        }
        let ours: BTreeMap<String, Value> =
            serde_json::from_str(&source.read_text("scheduler/scheduler_config.json").unwrap()).unwrap();
        for (field, value) in ours {
            // The scheduler files of the first releases lack some settings of PNDM and DDIM, which step as if these
            // were set as here.
            let theirs = &configs["scheduler"][&field];
            assert!(value == *theirs || theirs.is_null(), "{}: {field} is {value}, not {theirs}", case.name);
        }
        assert_eq!(source.has("text_encoder_2/config.json"), case.name.ends_with("xl"));
    }
}

#[test]
fn pictures_are_those_of_diffusers() {
    for case in cases("single_", 3) {
        let engine = Engine::open(&Original::new(&case).open().unwrap(), Device::cpu()).unwrap();
        let text = |field: &str| recorded::<Vec<String>>(&case, field)[0].clone();
        let mut image = Image::new(text("prompt")).negative(text("negative_prompt")).seed(recorded(&case, "seed"));
        image.guidance = Some(recorded(&case, "guidance_scale"));
        let request = Request::from(image).steps(recorded(&case, "steps"));
        let (height, width) = (recorded(&case, "height"), recorded(&case, "width"));
        let options = SessionOptions::new(Size::new(width, height));
        let mut session = engine.session(options).unwrap();
        let output = session.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap();
        let error = relative_l2(&output.latents, &case.floats("out.latents"));
        println!("{:12} latents {error:.1e}", case.name);
        assert!(error < 1e-4, "{}: latents are off by {error:.2e}", case.name);
        let theirs = support::nchw_to_nhwc(&case.floats("out.image"), 1, 3);
        let truth = respodiff::Picture::from_hwc(&theirs, height, width).unwrap();
        let far = output.pictures[0].rgb.iter().zip(&truth.rgb).filter(|(a, b)| a.abs_diff(**b) > 1).count();
        assert_eq!(far, 0, "{}: {far} bytes differ by more than rounding", case.name);
    }
}

#[test]
fn prediction_types_are_recognised() {
    let mut original = Original::named("sd2");
    let mut predicts = |what: &str, change: &dyn Fn(&mut Original)| {
        change(&mut original);
        assert_eq!(prediction(&original.open().unwrap()), what);
    };
    predicts("v_prediction", &|_| {});
    // ComfyUI's rule decides by the standard deviation of these biases, which is 0.072, and then 0.108.
    let biases = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias";
    predicts("epsilon", &|o| o.notes.clear());
    predicts("v_prediction", &|o| o.tensors.get_mut(biases).unwrap().1.iter_mut().for_each(|x| *x *= 1.5));
    predicts("epsilon", &|o| {
        o.notes.insert("modelspec.architecture".into(), "stable-diffusion-v2-512".into());
    });
    predicts("v_prediction", &|o| {
        o.notes.insert("modelspec.predict_key".into(), "v".into());
    });
    predicts("epsilon", &|o| {
        let yaml = "model:\n  params:\n    parameterization: \"eps\" # not v\n";
        std::fs::write(o.path().with_extension("yaml"), yaml).unwrap();
    });

    let mut original = Original::named("sdxl");
    original.keep(&["model.diffusion_model.", "conditioner.embedders.1."]);
    assert_eq!(prediction(&original.open().unwrap()), "epsilon");
    original.add("v_pred", &[0]);
    assert_eq!(prediction(&original.open().unwrap()), "v_prediction");
    original.add("ztsnr", &[0]);
    let config = original.open().unwrap().read_text("scheduler/scheduler_config.json").unwrap();
    assert!(config.contains("\"rescale_betas_zero_snr\":true") && config.contains("\"trailing\""), "{config}");
}

/// Layouts of other tools: text encoders of 2022 and of transformers 5, SD 2.x in the layout of Stability AI's later
/// code with only the layers in use, and a projection that is stored as the weight of a linear layer.
#[test]
fn other_spellings() {
    let digest = |source: &Source| {
        let tensors = source.tensors("text_encoder").unwrap();
        tensors.fingerprint().unwrap()
    };
    let rename = |original: &mut Original, change: &dyn Fn(String) -> String| {
        let tensors = std::mem::take(&mut original.tensors);
        original.tensors = tensors.into_iter().map(|(name, tensor)| (change(name), tensor)).collect();
    };
    for name in ["sd1", "sdxl"] {
        let mut original = Original::named(name);
        let before = digest(&original.open().unwrap());
        assert!(original.tensors.keys().any(|name| name.contains(".transformer.text_model.")));
        rename(&mut original, &|name| name.replace(".transformer.text_model.", ".transformer."));
        assert_eq!(digest(&original.open().unwrap()), before);
    }

    let mut original = Original::named("sd2");
    let before = digest(&original.open().unwrap());
    original.tensors.retain(|name, _| !name.contains("resblocks.23.") && !name.ends_with("text_projection"));
    rename(&mut original, &|name| name.replace("cond_stage_model.model.", "conditioner.embedders.0.model."));
    assert_eq!(digest(&original.open().unwrap()), before);

    let mut original = Original::named("sdxl");
    let read = |original: &Original| {
        let tensors = original.open().unwrap().tensors("text_encoder_2").unwrap();
        tensors.read("text_projection.weight", &[&[96, 128]]).unwrap()
    };
    let before = read(&original);
    let name = "conditioner.embedders.1.model.text_projection";
    original.tensors.remove(name);
    original.tensors.insert(format!("{name}.weight"), (vec![96, 128], before.clone(), Dtype::F16));
    assert_eq!(read(&original), before);
}

/// Files of ComfyUI hold matrices in eight bits, some with a scale beside them. The numbers are read as they are.
#[test]
fn eight_bit_numbers() {
    let mut small = Original::named("sd1");
    let mut plain = Original::named("sd1");
    let unet = |name: &str| name.starts_with("model.diffusion_model.");
    let matrices: Vec<String> = small
        .tensors
        .iter()
        .filter(|(name, (shape, ..))| unet(name) && shape.len() > 1 && shape.iter().product::<usize>() < 10_000)
        .map(|(name, _)| name.clone())
        .collect();
    assert!(matrices.len() > 100);
    for (i, name) in matrices.iter().enumerate() {
        let format = [Dtype::F8_E4M3, Dtype::F8_E5M2][i % 2];
        let scale = [1.0, 0.03, 7.5][i % 3];
        let (_, values, dtype) = small.tensors.get_mut(name).unwrap();
        *dtype = format;
        let held: Vec<f32> = values.iter().map(|&x| eight_bits(x, format).1).collect();
        *plain.tensors.get_mut(name).unwrap() =
            (plain.tensors[name].0.clone(), held.iter().map(|x| x * scale).collect(), Dtype::F32);
        if scale != 1.0 {
            let stem = name.strip_suffix("weight").unwrap();
            let shape = if i % 2 == 0 { vec![] } else { vec![1] };
            small.tensors.insert(format!("{stem}scale_weight"), (shape, vec![scale], Dtype::F32));
            small.tensors.insert(format!("{stem}scale_input"), (vec![], vec![2.0], Dtype::F32));
        }
    }
    small.tensors.insert("model.diffusion_model.scaled_fp8".into(), (vec![0], vec![], Dtype::F8_E4M3));
    let (small, plain) = (small.open().unwrap(), plain.open().unwrap());
    let tensors = [&small, &plain].map(|source| source.tensors("unet").unwrap());
    let mut names: Vec<_> = tensors[0].entries().collect();
    names.sort();
    for &(name, shape) in &names {
        let [ours, truth] = [0, 1].map(|i| tensors[i].read(name, &[shape]).unwrap());
        assert_eq!(ours, truth, "{name}");
    }
    assert_eq!(names.len(), tensors[1].entries().count());
    assert_eq!(tensors[0].fingerprint().unwrap(), tensors[1].fingerprint().unwrap());

    // A scale of each row is another format, and one that is not finite is damage.
    let name = "model.diffusion_model.out.2.";
    let mut odd = Original::named("sd1");
    odd.tensors.get_mut(&format!("{name}weight")).unwrap().2 = Dtype::F8_E4M3;
    odd.add(&format!("{name}scale_weight"), &[4]);
    odd.refused(&["scale_weight", "[4]"]);
    odd.tensors.insert(format!("{name}scale_weight"), (vec![], vec![f32::NAN], Dtype::F32));
    odd.refused(&["scale_weight", "NaN"]);
}

#[test]
fn truncated() {
    let original = Original::named("sd1");
    let path = original.write();
    let whole = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let spread = (1..20).map(|i| whole.len() * i / 20);
    for len in (0..12).chain(header - 2..header + 2).chain(spread).chain(whole.len() - 3..whole.len()) {
        std::fs::write(&path, &whole[..len]).unwrap();
        expect(&Source::file(&path).expect_err("refused"), &["downloaded or saved again"]);
    }
}

#[test]
fn tensors_that_are_there_twice() {
    let mut original = Original::named("sd1");
    original.add("cond_stage_model.transformer.final_layer_norm.bias", &[64]);
    original.refused(&["final_layer_norm.bias", "second time"]);
    let mut original = Original::named("sd1");
    let tower = |name: &String| name.starts_with("cond_stage_model.");
    for name in original.tensors.keys().filter(|name| tower(name)).cloned().collect::<Vec<_>>() {
        let other = name.replace("cond_stage_model.", "conditioner.embedders.0.");
        let tensor = original.tensors[&name].clone();
        original.tensors.insert(other, tensor);
    }
    original.refused(&["more than one text_encoder"]);

    // The header gives two tensors the same name. Spaces, which JSON permits, keep its length.
    let original = Original::named("sd1");
    let path = original.write();
    let mut bytes = std::fs::read(&path).unwrap();
    let (old, new) = (b".diffusion_model.out.0.weight\":", b".diffusion_model.out.0.bias\":  ");
    let at = bytes.windows(old.len()).position(|w| w == old).unwrap();
    bytes[at..][..old.len()].copy_from_slice(new);
    std::fs::write(&path, &bytes).unwrap();
    expect(&Source::file(&path).expect_err("refused"), &["not a whole safetensors file"]);
}

#[test]
fn parts_that_are_missing() {
    let (unet, vae, text) = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.");
    for (parts, words) in [
        (&[unet][..], &["holds no", "only unet"][..]),
        (&[unet, vae], &["no text_encoder", "unet, vae"]),
        (&[unet, text], &["no vae", "text_encoder, unet"]),
        (&[vae], &["VAE alone"]),
        (&[text], &["nothing under model.diffusion_model."]),
    ] {
        let mut original = Original::named("sd1");
        original.keep(parts);
        original.refused(words);
    }
    // A file with only a UNet is enough for uses that need no more.
    let mut original = Original::named("sd1");
    let whole = original.open().unwrap().tensors("unet").unwrap().fingerprint().unwrap();
    original.keep(&[unet]);
    assert_eq!(original.open().unwrap().tensors("unet").unwrap().fingerprint().unwrap(), whole);
}

#[test]
fn files_that_are_something_else() {
    let empty = || Original { tensors: BTreeMap::new(), notes: HashMap::new(), folder: tempfile::tempdir().unwrap() };
    for (name, word) in [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "LoRA"),
        ("unet.down_blocks.0.attentions.0.attn1.to_q.lora_A.weight", "LoRA"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("emb_params", "embedding"),
        ("clip_g", "embedding"),
        ("down_blocks.0.resnets.0.conv1.weight", "one component"),
        ("decoder.up.0.block.0.conv1.weight", "VAE alone"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "not that of Stable Diffusion"),
        ("ram", "--concept"),
        ("weight", "`weight`"),
    ] {
        let mut original = empty();
        original.add(name, &[4, 4]);
        original.refused(&[word, "not a Stable Diffusion checkpoint"]);
    }

    let folder = tempfile::tempdir().unwrap();
    let resolve = |name: &str| Source::open(folder.path().join(name)).expect_err("refused");
    for (content, words) in [
        (&b"\x89PNG\r\n\x1a\n, and more bytes than a header's length takes"[..], &["not a whole"][..]),
        (b"\x08\0\0\0\0\0\0\0{}      ", &["`nothing`"]),
        (b"PK\x03\x04\0\0\x08\x08\0\0", &["torch.save", "save it anew"]),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", &["before PyTorch 1.6", "nothing was run"]),
        (b"GGUF\x03\0\0\0\x10\0\0\0\0\0\0\0", &["GGUF", "safetensors file that it was made from"]),
        (b"<!DOCTYPE html><html><head>", &["web page", "download it again"]),
        (b"{\"error\": \"Unauthorized\"}", &["JSON", "download"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", &["Git LFS", "git lfs pull"]),
        (b"", &["not a whole"]),
    ] {
        for name in ["a model.safetensors", "a model.ckpt"] {
            std::fs::write(folder.path().join(name), content).unwrap();
            expect(&resolve(name), words);
        }
    }
    expect(&resolve("no such/a model.safetensors"), &["cannot open"]);
    std::fs::create_dir(folder.path().join("a model.folder.safetensors")).unwrap();
    expect(&resolve("a model.folder.safetensors"), &["model_index.json"]);
}

#[test]
fn networks_that_are_something_else() {
    let unet = "model.diffusion_model.";
    let sd1 = |change: &dyn Fn(&mut Original), words: &[&str]| {
        let mut original = Original::named("sd1");
        change(&mut original);
        original.refused(words);
    };
    sd1(&|o| o.add(&format!("{unet}input_blocks.0.0.weight"), &[32, 5, 3, 3]), &["5"]);
    sd1(&|o| o.add(&format!("{unet}input_blocks.1.1.time_stack.weight"), &[32, 9]), &["time_stack"]);
    sd1(&|o| o.add(&format!("{unet}middle_block.3.in_layers.0.weight"), &[32]), &["middle_block.3"]);
    sd1(&|o| drop(o.tensors.remove(&format!("{unet}out.2.bias"))), &["conv_out.bias", "incomplete"]);
    sd1(&|o| drop(o.tensors.remove(&format!("{unet}middle_block.1.proj_in.weight"))), &["proj_in", "missing"]);
    sd1(
        &|o| drop(o.tensors.remove("first_stage_model.decoder.up.1.block.0.nin_shortcut.bias")),
        &["up_blocks.2.resnets.0.conv_shortcut.bias", "incomplete"],
    );
    sd1(&|o| o.add("first_stage_model.decoder.up.0.attn.0.q.weight", &[32, 32, 1, 1]), &["attn.0.q"]);
    sd1(&|o| o.add(&format!("{unet}out.2.bias"), &[2, 2]), &["conv_out.bias", "[2, 2]"]);
    sd1(&|o| o.add(&format!("{unet}out.2.weight"), &[]), &["conv_out.weight", "[]"]);
    sd1(
        &|o| o.add("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", &[602, 64]),
        &["49408", "602"],
    );
    sd1(
        &|o| {
            let (_, values, _) = o.tensors.get_mut(&format!("{unet}out.2.bias")).unwrap();
            values[1] = f32::NAN;
        },
        &["conv_out.bias", "NaN"],
    );

    let mut original = Original::named("sd2");
    original.tensors.retain(|name, _| name.starts_with(unet));
    original.add(&format!("{unet}label_emb.0.0.weight"), &[256, 192]);
    original.add("cond_stage_model.model.ln_final.weight", &[128]);
    original.refused(&["unCLIP"]);
    let mut original = Original::named("sdxl");
    original.keep(&[unet]);
    original.add("conditioner.embedders.0.model.ln_final.weight", &[128]);
    original.refused(&["refiner"]);
    original.keep(&[unet]);
    original.add("edm_mean", &[1, 4, 1, 1]);
    original.refused(&["EDM"]);
}

/// Commands read a single file. A concept recognises its model by the fingerprint, which is that of the same model as a
/// folder (see above).
#[test]
fn command_line() {
    let mut original = Original::named("sd1");
    let folder = original.folder.path().to_path_buf();
    original.write();
    // Arguments are separated by spaces; `_` stands for a space within an argument.
    let respodiff = |args: &str| {
        let args = args.split(' ').map(|arg| arg.replace('_', " "));
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_respodiff"));
        let output = command.args(args).current_dir(&folder).output().expect("runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{}", text(&output.stderr));
        (text(&output.stdout), text(&output.stderr))
    };
    let file = "--model a_model.safetensors";
    let (info, _) = respodiff(&format!("info {file} --device cpu"));
    for word in ["a model", "text encoder", "unet", "vae", "picture    512x512"] {
        assert!(info.replace('_', " ").contains(word), "`{word}` is not in: {info}");
    }
    std::fs::write(folder.join("a model.vae.pt"), "another VAE").unwrap();
    let (_, tip) = respodiff("convert a_model.safetensors a_folder");
    assert!(tip.contains("a model.vae.pt lies beside") && tip.contains("--vae"), "{tip}");
    assert!(folder.join("a folder/model_index.json").is_file());
    let size = "--width 16 --height 16";
    respodiff(&format!("train --target woman {file} {size} --iterations 1 --batch 1 --out woman.safetensors"));
    let sample = || {
        let concept = "--concept woman.safetensors --out boat.png";
        let (_, warnings) = respodiff(&format!("sample boat {file} --device cpu {size} --steps 2 {concept}"));
        assert!(folder.join("boat.png").is_file());
        warnings.contains("was trained on")
    };
    assert!(!sample());
    original.tensors.get_mut("model.diffusion_model.out.2.bias").unwrap().1[0] += 0.125;
    original.write();
    assert!(sample());
}
