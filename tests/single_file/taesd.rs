//! TAESD in place of a checkpoint's VAE: in diffusers' layout and in that of its authors.

use crate::support::{golden, torch_save};
use respodiff::models::VaeConfig;
use respodiff::weights::Source;
use respodiff::{Device, Engine, EngineOptions, Error, Image, Picture, Request, SessionOptions, Size};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Name, shape, format and bytes, as `torch_save` takes them.
type Tensors = Vec<(String, Vec<usize>, Dtype, Vec<u8>)>;

const SIZE: Size = Size::new(40, 24);

fn diffusers_file() -> PathBuf {
    golden().join("checkpoints/taesd/vae/diffusion_pytorch_model.safetensors")
}

fn sd1() -> Source {
    Source::folder(golden().join("checkpoints/sd1")).unwrap()
}

/// Expects an error of one line that contains all of `words`.
fn expect(error: &Error, words: &[&str]) {
    let error = error.to_string();
    assert!(!error.contains('\n') && words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
}

fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Tensors = file
        .iter()
        .map(|(name, view)| (name.to_string(), view.shape().to_vec(), view.dtype(), view.data().to_vec()))
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, shape, dtype, bytes)| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// TAESD's encoder or decoder under its authors' names: the layers of the decoder are counted from its clamp.
fn original(part: &str) -> Tensors {
    let named = |name: &str| {
        let (layer, rest) = name.strip_prefix(part)?.strip_prefix(".layers.")?.split_once('.')?;
        Some(format!("{}.{rest}", layer.parse::<usize>().unwrap() + usize::from(part == "decoder")))
    };
    read(&diffusers_file())
        .into_iter()
        .filter_map(|(name, shape, dtype, bytes)| Some((named(&name)?, shape, dtype, bytes)))
        .collect()
}

fn engine(vae: &Path) -> Result<Engine, Error> {
    Engine::open(&sd1().with_part("vae", vae)?, Device::cpu())
}

fn picture(engine: &Engine) -> Picture {
    let request = Request::from(Image::new("a boat").seed(3)).steps(2);
    let mut session = engine.session(SessionOptions::new(SIZE)).unwrap();
    session.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap().pictures.remove(0)
}

/// The latents of a picture that begins with one.
fn from_picture(engine: &Engine) -> Result<Vec<f32>, Error> {
    let rgb = (0..SIZE.width * SIZE.height * 3).map(|i| (i * 37 % 251) as u8).collect();
    let original = Picture { width: SIZE.width as u32, height: SIZE.height as u32, rgb };
    let init = respodiff::pictures::InitImage::new(original.into(), 0.8);
    let request = Request::from(Image::new("a boat").start(respodiff::Start::Image(init))).steps(2);
    let mut session = engine.session(SessionOptions::new(SIZE))?;
    Ok(session.generate(&request, &mut |_| ControlFlow::Continue(()))?.latents)
}

#[test]
fn every_layout_is_the_same_vae() {
    let whole = engine(&golden().join("checkpoints/taesd")).unwrap();
    let (truth, begun) = (picture(&whole), from_picture(&whole).unwrap());
    let own = Engine::open(&sd1(), Device::cpu()).unwrap();
    assert_ne!(picture(&own), truth);
    assert_ne!(from_picture(&own).unwrap(), begun);

    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write(&at("taesd_decoder.safetensors"), &original("decoder"));
    write(&at("taesd_encoder.safetensors"), &original("encoder"));
    std::fs::write(at("taesdxl_decoder.pth"), torch_save(&original("decoder"), false)).unwrap();
    std::fs::write(at("taesdxl_encoder.pth"), torch_save(&original("encoder"), false)).unwrap();
    for vae in [
        golden().join("checkpoints/taesd/vae"),
        diffusers_file(),
        at("taesd_decoder.safetensors"),
        at("taesdxl_decoder.pth"),
    ] {
        let engine = engine(&vae).unwrap();
        assert_eq!(picture(&engine), truth, "{}", vae.display());
        assert_eq!(from_picture(&engine).unwrap(), begun, "{}", vae.display());
        let config = |source: &Source| {
            VaeConfig::parse(&source.read_text("vae/config.json").unwrap(), Path::new("config.json")).unwrap()
        };
        assert_eq!(config(engine.source()), config(whole.source()));
        // A folder can be written of it, as diffusers does, but no file with a VAE of another kind.
        let written = at("written");
        engine.source().convert(&written, None).unwrap();
        let index = std::fs::read_to_string(written.join("model_index.json")).unwrap();
        assert!(index.contains("AutoencoderTiny"), "{index}");
        let again = Engine::open(&Source::folder(&written).unwrap(), Device::cpu()).unwrap();
        assert_eq!(picture(&again), truth);
        std::fs::remove_dir_all(written).unwrap();
        let error = engine.source().convert(&at("one.safetensors"), None).expect_err("refused");
        expect(&error, &["original layout", "TAESD", "to a folder"]);
    }

    // The decoder alone.
    std::fs::remove_file(at("taesd_encoder.safetensors")).unwrap();
    let alone = engine(&at("taesd_decoder.safetensors")).unwrap();
    assert_eq!(picture(&alone), truth);
    expect(&from_picture(&alone).expect_err("refused"), &["taesd_decoder", "without the encoder", "taesd_encoder"]);
    let error = alone.source().convert(&at("folder"), None).expect_err("refused");
    expect(&error, &["encoder.layers.0.weight"]);
}

#[test]
fn incomplete_and_foreign_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("taesd_decoder.safetensors");
    let refused = |words: &[&str]| expect(&engine(&path).err().expect("refused"), words);
    write(&path, &original("encoder"));
    refused(&["the encoder of TAESD alone", "give its decoder"]);
    let whole = original("decoder");
    for i in 0..whole.len() {
        let mut tensors = whole.clone();
        let (name, ..) = tensors.remove(i);
        write(&path, &tensors);
        expect(&engine(&path).err().unwrap_or_else(|| panic!("{name} is missing")), &[]);
    }
    for i in (0..whole.len()).step_by(5) {
        let mut tensors = whole.clone();
        tensors[i].1[0] *= 2;
        let bytes = tensors[i].3.repeat(2);
        tensors[i].3 = bytes;
        write(&path, &tensors);
        expect(&engine(&path).err().unwrap_or_else(|| panic!("{} is larger", whole[i].0)), &[]);
    }
    let mut more = whole.clone();
    more.push(("3.conv.6.bias".into(), vec![3], Dtype::F16, vec![0; 6]));
    write(&path, &more);
    refused(&["is called"]);
    write(&path, &whole);
    let bytes = std::fs::read(&path).unwrap();
    for len in (0..bytes.len()).step_by(bytes.len() / 20) {
        std::fs::write(&path, &bytes[..len]).unwrap();
        refused(&[]);
    }
    // A decoder for other latents, and a file in place of a checkpoint.
    let mut wide = whole.clone();
    let first = wide.iter_mut().find(|(name, ..)| name == "1.weight").unwrap();
    first.1[1] *= 4;
    first.3 = first.3.repeat(4);
    write(&path, &wide);
    refused(&["latents of 16 channels", "the UNet's have 4"]);
    let options = EngineOptions::new(Device::cpu()).preview_vae(&path);
    expect(&Engine::open(&sd1(), options).err().expect("refused"), &["latents with 16 channels", "4 channels"]);
    expect(&Source::file(&path).expect_err("refused"), &["TAESD", "give a checkpoint"]);

    // In diffusers' folder.
    let folder = crate::support::copy("taesd");
    let file = folder.path().join("vae/diffusion_pytorch_model.safetensors");
    let all = read(&file);
    let without = |name: &str| all.iter().filter(|tensor| tensor.0 != name).cloned().collect::<Tensors>();
    write(&file, &without("decoder.layers.3.conv.2.bias"));
    expect(&engine(folder.path()).err().expect("refused"), &["decoder.layers.3.conv.2.bias"]);
    write(&file, &without("encoder.layers.1.conv.2.bias"));
    let lame = engine(folder.path()).unwrap();
    expect(&from_picture(&lame).expect_err("refused"), &["encoder.layers.1.conv.2.bias"]);
    let config = folder.path().join("vae/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    for (from, to, word) in [
        ("\"relu\"", "\"mish\"", "act_fn"),
        ("\"nearest\"", "\"bilinear\"", "upsample_fn"),
        ("\"num_decoder_blocks\": [\n    2,", "\"num_decoder_blocks\": [\n    2, 2,", "decoder_block_out_channels"),
        ("\"shift_factor\": 0.0", "\"shift_factor\": 0.1", "shift_factor"),
        ("\"AutoencoderTiny\"", "\"AsymmetricAutoencoderKL\"", "AutoencoderTiny"),
    ] {
        assert!(text.contains(from), "{from}");
        std::fs::write(&config, text.replace(from, to)).unwrap();
        expect(&engine(folder.path()).err().expect("refused"), &["config.json", word]);
    }
}
