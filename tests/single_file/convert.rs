//! Checkpoints written anew, as folders and as single files.

use super::Original;
use respodiff::models::{MidBlock, UNetConfig};
use respodiff::weights::{Format, Source};
use respodiff::{Device, Engine, ErrorKind, Image, Picture, Request, SessionOptions, Size};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

fn picture(source: &Source) -> Picture {
    let engine = Engine::open(source, Device::cpu()).unwrap();
    let request = Request::from(Image::new("a boat").seed(3)).steps(2);
    let mut session = engine.session(SessionOptions::new(Size::new(32, 48))).unwrap();
    session.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap().pictures.remove(0)
}

/// Formats, shapes and bytes by name.
fn content(path: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, view)| {
            (name.to_string(), (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec()))
        })
        .collect()
}

/// A file becomes a folder and a file again, with the names and shapes that diffusers' readers know, and makes the same
/// picture each time.
#[test]
fn there_and_back() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["sd1", "sd2", "sdxl"] {
        let original = Original::named(name);
        let source = original.open().unwrap();
        let before = picture(&source);
        let [written, back] = ["", ".safetensors"].map(|end| folder.path().join(format!("{name}{end}")));
        assert_eq!(source.convert(&written, None).unwrap(), [""; 0]);
        let as_folder = Source::folder(&written).unwrap();
        assert_eq!(picture(&as_folder), before, "{name}");
        assert_eq!(as_folder.convert(&back, None).unwrap(), [""; 0]);
        assert_eq!(picture(&Source::file(&back).unwrap()), before, "{name}");

        // What nobody reads is left out: the last of 2.x's layers and its projection, and the recorder's clutter.
        let unread = |key: &str| {
            key.ends_with(".position_ids")
                || key.ends_with(".logit_scale")
                || key.contains(".loss.")
                || key == "betas"
                || key.starts_with("model_ema.")
                || (name == "sd2" && (key.contains("resblocks.23.") || key.ends_with("text_projection")))
        };
        let mut truth = content(&original.path());
        truth.retain(|key, _| !unread(key));
        let mut ours = content(&back);
        ours.retain(|key, _| key != "v_pred");
        assert_eq!(ours.keys().collect::<Vec<_>>(), truth.keys().collect::<Vec<_>>(), "{name}");
        assert!(ours == truth, "{name}");
    }
    // Nothing else is left there.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 6);
}

/// Networks with less in them than the families' own are recognised by their tensors, and keep them all on the way.
#[test]
fn distilled_networks() {
    let unet = "model.diffusion_model.";
    let folder = tempfile::tempdir().unwrap();
    let opened = |name: &str, original: &Original| {
        let source = original.open().unwrap();
        let [written, back] = ["", ".safetensors"].map(|end| folder.path().join(format!("{name}{end}")));
        source.convert(&written, None).unwrap();
        let as_folder = Source::folder(&written).unwrap();
        assert_eq!(picture(&as_folder), picture(&source), "{name}");
        as_folder.convert(&back, None).unwrap();
        let (mut ours, mut truth) = (content(&back), content(&original.path()));
        for content in [&mut ours, &mut truth] {
            content.retain(|key, _| key.starts_with(unet));
        }
        assert!(ours == truth, "{name}");
        let config = source.read_text("unet/config.json").unwrap();
        UNetConfig::parse(&config, Path::new("config")).unwrap()
    };

    // As in BK-SDM.
    let mut original = Original::named("sd1");
    original.tensors.retain(|name, _| !name.contains(".middle_block."));
    assert_eq!(opened("small", &original).mid, MidBlock::None);
    // As in SSD-1B.
    let mut original = Original::named("sdxl");
    let is_lost = |name: &str| {
        let block = name.strip_prefix("model.diffusion_model.input_blocks.8.1.transformer_blocks.");
        let deep = block.and_then(|rest| rest.split('.').next()).is_some_and(|k| k.parse::<usize>().unwrap() > 3);
        deep || name.contains(".middle_block.1.") || name.contains(".middle_block.2.")
    };
    original.tensors.retain(|name, _| !is_lost(name));
    let config = opened("ssd", &original);
    assert_eq!(config.mid, MidBlock::Resnet);
    let depths: Vec<_> = config.levels.iter().map(|level| (&level.down[..], &level.up[..])).collect();
    assert_eq!(depths, [(&[][..], &[][..]), (&[2, 2], &[2, 2, 2]), (&[10, 4], &[10, 10, 10])]);
    // As in latent consistency models.
    let mut original = Original::named("sd1");
    original.add(&format!("{unet}time_embed.cond_proj.weight"), &[32, 16]);
    assert_eq!(opened("lcm", &original).time_cond_proj_dim, Some(16));
}

#[test]
fn number_formats() {
    let folder = tempfile::tempdir().unwrap();
    let source = Original::named("sd1").open().unwrap();
    let tensors = source.tensors("vae").unwrap();
    let (name, shape) = tensors.entries().find(|(name, _)| name.ends_with("conv_in.weight")).unwrap();
    let truth = tensors.read(name, &[shape]).unwrap();
    let before = picture(&source);
    for (format, rounded) in [
        (Format::F32, Box::new(|x: f32| x) as Box<dyn Fn(f32) -> f32>),
        (Format::F16, Box::new(|x| x)),
        (Format::BF16, Box::new(|x| half::bf16::from_f32(x).to_f32())),
    ] {
        let path = folder.path().join(format!("{format:?}.safetensors"));
        source.convert(&path, Some(format)).unwrap();
        let written = Source::file(&path).unwrap();
        let ours = written.tensors("vae").unwrap().read(name, &[shape]).unwrap();
        assert_eq!(ours, truth.iter().map(|&x| rounded(x)).collect::<Vec<_>>());
        assert_eq!(picture(&written) == before, format != Format::BF16, "{format:?}");
    }
    // Eight bits become fp16, which holds them, or with a scale fp32.
    let mut small = Original::named("sd1");
    for (i, name) in ["out.2.weight", "middle_block.1.proj_in.weight"].iter().enumerate() {
        small.tensors.get_mut(&format!("model.diffusion_model.{name}")).unwrap().2 = safetensors::Dtype::F8_E4M3;
        if i == 1 {
            let scale = format!("model.diffusion_model.{}", name.replace(".weight", ".scale_weight"));
            small.tensors.insert(scale, (vec![], vec![0.7], safetensors::Dtype::F32));
        }
    }
    let (small, path) = (small.open().unwrap(), folder.path().join("from 8 bits.safetensors"));
    small.convert(&path, None).unwrap();
    assert_eq!(picture(&Source::file(&path).unwrap()), picture(&small));
    let written = content(&path);
    assert_eq!(written["model.diffusion_model.out.2.weight"].0, "F16");
    assert_eq!(written["model.diffusion_model.middle_block.1.proj_in.weight"].0, "F32");
    std::fs::remove_file(path).unwrap();
    let mut large = Original::named("sd1").stored(safetensors::Dtype::F32);
    large.tensors.get_mut("model.diffusion_model.out.2.bias").unwrap().1[1] = 7e4;
    let error = large.open().unwrap().convert(&folder.path().join("large"), Some(Format::F16)).expect_err("refused");
    assert!(error.to_string().contains("conv_out.bias") && error.to_string().contains("70000"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
}

#[test]
fn what_cannot_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let golden = Source::folder(crate::support::golden().join("checkpoints/sd1")).unwrap();
    // Its heads and groups are those of no known checkpoint, and a file would not tell them.
    let error = golden.convert(&at("x.safetensors"), None).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("convert it to a folder"), "{error}");
    std::fs::create_dir(at("full")).unwrap();
    std::fs::write(at("full/file"), "mine").unwrap();
    for name in ["full", "full/file"] {
        let error = golden.convert(&at(name), None).expect_err("refused");
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("is there already"), "{error}");
    }
    assert!(golden.convert(&at("nowhere/x"), None).is_err());
    let mut bare = Original::named("sd1");
    bare.keep(&["model.diffusion_model.", "cond_stage_model."]);
    let error = bare.open().unwrap().convert(&at("bare"), None).expect_err("refused");
    assert!(error.to_string().contains("holds no vae"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

    // An empty folder is filled, and a folder is copied with its tokenizer.
    std::fs::create_dir(at("empty")).unwrap();
    golden.convert(&at("empty"), None).unwrap();
    let copy = Source::folder(at("empty")).unwrap();
    assert_eq!(picture(&copy), picture(&golden));
    let file = "tokenizer/vocab.json";
    assert_eq!(copy.read(file).unwrap(), golden.read(file).unwrap());
    // What a file does not say is told: here a scheduler other than that of the first release.
    let original = Original::named("sd1");
    original.open().unwrap().convert(&at("other"), None).unwrap();
    let path = at("other/scheduler/scheduler_config.json");
    let text = std::fs::read_to_string(&path).unwrap().replace("PNDMScheduler", "DDIMScheduler");
    std::fs::write(&path, text).unwrap();
    let notes = Source::folder(at("other")).unwrap().convert(&at("other.safetensors"), None).unwrap();
    assert!(notes.len() == 1 && notes[0].contains("DDIMScheduler"), "{notes:?}");
}
