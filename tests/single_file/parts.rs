//! Parts of a checkpoint from elsewhere, moving averages, and files of `torch.save`.

use super::{Original, expect};
use crate::support::torch_save;
use respodiff::models::{ClipConfig, UNetConfig, VaeConfig};
use respodiff::weights::Source;
use respodiff::{Device, Engine, Error};
use safetensors::Dtype;
use std::path::{Path, PathBuf};

/// Compares a component's tensors and configuration.
fn assert_same(ours: &Source, truth: &Source, component: &str) {
    let [ours_there, true_there] = [ours, truth].map(|source| source.tensors(component).unwrap());
    let mut names: Vec<_> = true_there.entries().filter(|(name, _)| !name.ends_with("position_ids")).collect();
    names.sort();
    assert!(names.len() > 20);
    for (name, shape) in names {
        assert!(ours_there.read(name, &[shape]).unwrap() == true_there.read(name, &[shape]).unwrap(), "{name}");
    }
    let config = |source: &Source| source.read_text(&format!("{component}/config.json")).unwrap();
    let (ours, truth, path) = (config(ours), config(truth), Path::new("config"));
    match component {
        "unet" => assert_eq!(UNetConfig::parse(&ours, path).unwrap(), UNetConfig::parse(&truth, path).unwrap()),
        "vae" => assert_eq!(VaeConfig::parse(&ours, path).unwrap(), VaeConfig::parse(&truth, path).unwrap()),
        _ => assert_eq!(ClipConfig::parse(&ours, path).unwrap(), ClipConfig::parse(&truth, path).unwrap()),
    }
}

/// The tensors as `torch_save` takes them.
fn tensors(original: &Original) -> Vec<(String, Vec<usize>, Dtype, Vec<u8>)> {
    let bytes = original.bytes();
    original
        .tensors
        .iter()
        .zip(bytes)
        .map(|((name, (shape, _, dtype)), bytes)| (name.clone(), shape.clone(), *dtype, bytes))
        .collect()
}

#[test]
fn files_of_torch() {
    let original = Original::named("sd1");
    let truth = original.open().unwrap();
    let path = original.folder.path().join("a model.ckpt");
    for wrapped in [true, false] {
        let bytes = torch_save(&tensors(&original), wrapped);
        std::fs::write(&path, &bytes).unwrap();
        let source = Source::file(&path).unwrap();
        ["unet", "vae", "text_encoder"].iter().for_each(|component| assert_same(&source, &truth, component));
        let hash = |source: &Source| Engine::open(source, Device::cpu()).unwrap().fingerprint().unwrap();
        assert_eq!(hash(&source), hash(&truth));
        for len in (0..bytes.len()).step_by(bytes.len() / 30) {
            std::fs::write(&path, &bytes[..len]).unwrap();
            let error = Source::file(&path).expect_err("refused");
            expect(&error, &[]);
        }
    }
}

/// `model_ema.` holds averages of the UNet's tensors under their names without dots.
#[test]
fn moving_averages() {
    let mut original = Original::named("sd1");
    // A file of its own, since the other one is written again.
    let plain = Original::named("sd1");
    let plain = plain.open().unwrap();
    let refused = |original: &Original, words: &[&str]| {
        expect(&original.open().unwrap().averaged().expect_err("refused"), words);
    };
    refused(&original, &["no moving average", "plain weights"]);
    let mut averages = Original::named("sd1");
    let unet: Vec<String> =
        original.tensors.keys().filter(|name| name.starts_with("model.diffusion_model.")).cloned().collect();
    for name in &unet {
        let mut tensor = original.tensors[name].clone();
        tensor.1.iter_mut().for_each(|x| *x *= 0.5);
        averages.tensors.insert(name.clone(), tensor.clone());
        original.tensors.insert(format!("model_ema.{}", name["model.".len()..].replace('.', "")), tensor);
    }
    let both = original.open().unwrap();
    assert!(!both.is_averaged());
    assert_same(&both, &plain, "unet");
    let averaged = both.averaged().unwrap();
    assert!(averaged.is_averaged());
    assert_same(&averaged, &averages.open().unwrap(), "unet");
    assert_same(&averaged, &plain, "vae");
    original.tensors.remove("model_ema.diffusion_modelout2bias");
    refused(&original, &["`out.2.bias`"]);

    // Beside a folder's UNet, as diffusers' scripts write them.
    let folder = crate::support::copy("sd1");
    let source = Source::folder(folder.path()).unwrap();
    assert!(source.clone().averaged().expect_err("refused").to_string().contains("no moving averages"));
    std::fs::rename(folder.path().join("unet"), folder.path().join("unet_ema")).unwrap();
    let averaged = source.averaged().unwrap();
    assert!(averaged.is_averaged() && averaged.parts().next().is_none());
    let golden = Source::folder(crate::support::golden().join("checkpoints/sd1")).unwrap();
    assert_same(&averaged, &golden, "unet");
}

/// The tensors of `original` under a prefix, without it, in a file of their own.
fn alone(original: &Original, prefix: &str, folder: &Path) -> PathBuf {
    let mut part = Original::new(&crate::cases("single_sd1", 1)[0]);
    part.tensors = original
        .tensors
        .iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_string(), tensor.clone())))
        .collect();
    let path = folder.join(format!("{}safetensors", prefix.trim_end_matches('.').replace('.', "_") + "."));
    std::fs::copy(part.write(), &path).unwrap();
    path
}

#[test]
fn parts_from_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    for (name, towers) in [
        ("sd1", &[("text_encoder", "cond_stage_model.transformer.")][..]),
        ("sd2", &[("text_encoder", "cond_stage_model.model.")]),
        (
            "sdxl",
            &[
                ("text_encoder", "conditioner.embedders.0.transformer."),
                ("text_encoder_2", "conditioner.embedders.1.model."),
            ],
        ),
    ] {
        let whole = Original::named(name);
        let truth = whole.open().unwrap();
        // A UNet without prefix, and everything else in files of its own. SDXL's keeps the encoder whose pooled prompt
        // it reads, since these are narrower than any known one's.
        let mut kept = Original::named(name);
        kept.keep(&["model.diffusion_model.", "conditioner.embedders.1."]);
        let unet = match name {
            "sdxl" => kept.write(),
            _ => alone(&whole, "model.diffusion_model.", folder.path()),
        };
        let mut source = Source::file(&unet).unwrap();
        source = source.with_part("vae", alone(&whole, "first_stage_model.", folder.path())).unwrap();
        for (component, prefix) in towers {
            source = source.with_part(component, alone(&whole, prefix, folder.path())).unwrap();
        }
        for component in ["vae"].iter().chain(towers.iter().map(|(component, _)| component)) {
            assert_same(&source, &truth, component);
        }
        let token =
            |source: &Source, component: &str| source.tokenizer(component).unwrap().encode("a cat").unwrap().ids;
        assert_eq!(token(&source, "tokenizer"), token(&truth, "tokenizer"));
        assert_eq!(source.parts().count(), 1 + towers.len());

        // Of a checkpoint, of its folder, and of the component's folder.
        let written = folder.path().join(name);
        truth.convert(&written, None).unwrap();
        let mut bare = Original::named(name);
        bare.tensors.retain(|name, _| !name.starts_with("first_stage_model."));
        let bare_source = || bare.open().unwrap();
        assert!(Engine::open(&bare_source(), Device::cpu()).is_err());
        for place in [whole.path(), written.clone(), written.join("vae")] {
            let source = bare_source().with_part("vae", &place).unwrap();
            assert_same(&source, &truth, "vae");
            Engine::open(&source, Device::cpu()).unwrap();
        }
        // In diffusers' layout, and of torch.save.
        let file = written.join("vae/diffusion_pytorch_model.safetensors");
        assert_same(&bare_source().with_part("vae", file).unwrap(), &truth, "vae");
        let pickled = folder.path().join("vae.pt");
        let mut vae = Original::named(name);
        vae.tensors.retain(|name, _| name.starts_with("first_stage_model."));
        std::fs::write(&pickled, torch_save(&tensors(&vae), true)).unwrap();
        assert_same(&bare_source().with_part("vae", pickled).unwrap(), &truth, "vae");
    }
}

#[test]
fn parts_that_are_something_else() {
    let original = Original::named("sd1");
    let source = original.open().unwrap();
    let refused = |component, path: &Path, words: &[&str]| {
        let error: Error = source.clone().with_part(component, path).expect_err("refused");
        let error = error.to_string();
        assert!(!error.contains('\n') && words.iter().all(|word| error.contains(word)), "{error}");
    };
    let folder = tempfile::tempdir().unwrap();
    refused("vae", &folder.path().join("nowhere"), &["nowhere", "cannot open"]);
    refused("vae", folder.path(), &["neither config.json nor vae/config.json"]);
    let clip = alone(&original, "cond_stage_model.transformer.", folder.path());
    refused("vae", &clip, &["holds no VAE"]);
    let vae = alone(&original, "first_stage_model.", folder.path());
    refused("text_encoder", &vae, &["holds no text encoder", "VAE alone"]);
    // A text encoder of another width is found when the parts are put together.
    let other = alone(&Original::named("sd2"), "cond_stage_model.model.", folder.path());
    let error =
        source.clone().with_part("text_encoder", &other).and_then(|source| Engine::open(&source, Device::cpu()));
    assert!(error.err().expect("refused").to_string().contains("reads text of width 64"));
    let error =
        source.clone().with_part("text_encoder_2", &clip).and_then(|source| Engine::open(&source, Device::cpu()));
    assert!(error.err().expect("refused").to_string().contains("no pooled prompt"));
}
