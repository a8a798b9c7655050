//! Damaged checkpoints: always an error that names the file, never a panic or a picture.

mod support;

use respodiff::Error;
use respodiff::engine::Engine;
use respodiff::weights::Source;
use std::fs;
use std::path::{Path, PathBuf};

/// A copy of a golden checkpoint to damage.
fn copy(name: &str) -> tempfile::TempDir {
    fn tree(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap().map(|e| e.unwrap()) {
            let to = to.join(entry.file_name());
            if entry.path().is_dir() {
                tree(&entry.path(), &to);
            } else {
                fs::copy(entry.path(), to).unwrap();
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    tree(&support::golden().join("checkpoints").join(name), folder.path());
    folder
}

fn open(folder: &Path) -> Result<Engine, Error> {
    Engine::open(&Source::folder(folder)?)
}

/// Opens and expects one line that contains all of `words`.
fn refused(folder: &Path, words: &[&str]) {
    let error = open(folder).err().expect("refused").to_string();
    assert!(!error.contains('\n'), "{error}");
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

#[test]
fn truncated_weights() {
    let folder = copy("sd1");
    let file = folder.path().join(UNET);
    let whole = fs::read(&file).unwrap();
    for len in [0, 1, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&file, &whole[..len]).unwrap();
        refused(folder.path(), &[UNET, "download"]);
    }
    fs::write(&file, &whole).unwrap();
    assert!(open(folder.path()).is_ok());
}

#[test]
fn corrupt_headers() {
    let folder = copy("sd1");
    let file = folder.path().join(UNET);
    let whole = fs::read(&file).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for position in (0..header + 8).step_by(header / 150) {
        let mut bytes = whole.clone();
        bytes[position] ^= 0x15;
        fs::write(&file, &bytes).unwrap();
        // A flip in a name that is not read, or in white space, may be harmless; a panic never is.
        let _ = open(folder.path());
    }
    let mut bytes = whole.clone();
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&file, &bytes).unwrap();
    refused(folder.path(), &[UNET]);
}

#[test]
fn weights_that_are_not_numbers() {
    let folder = copy("sd1");
    let file = folder.path().join(UNET);
    let mut bytes = fs::read(&file).unwrap();
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&0x7e00u16.to_le_bytes());
    fs::write(&file, &bytes).unwrap();
    refused(folder.path(), &[UNET, "NaN", "tensor `"]);
}

#[test]
fn missing_files() {
    for (name, word) in [
        ("unet/config.json", "unet/config.json"),
        (UNET, "no diffusion_pytorch_model.safetensors"),
        ("text_encoder/model.safetensors", "no model.safetensors"),
        ("scheduler/scheduler_config.json", "scheduler_config.json"),
        ("tokenizer/merges.txt", "tokenizer"),
    ] {
        let folder = copy("sd1");
        fs::remove_file(folder.path().join(name)).unwrap();
        refused(folder.path(), &[word]);
    }
    let folder = copy("sd2");
    fs::remove_file(folder.path().join("unet/diffusion_pytorch_model.fp16-00002-of-00003.safetensors")).unwrap();
    refused(folder.path(), &["00002-of-00003", "missing"]);
    assert!(Source::folder(PathBuf::from("/nowhere/at/all")).is_err());
}

#[test]
fn shard_names_stay_in_the_folder() {
    let folder = copy("sd2");
    let index = folder.path().join("unet/diffusion_pytorch_model.safetensors.index.fp16.json");
    let text = fs::read_to_string(&index).unwrap().replace("diffusion_pytorch_model.fp16-00002", "../../etc/x");
    fs::write(index, text).unwrap();
    refused(folder.path(), &["not the name of a shard"]);
}

#[test]
fn configs_of_another_model() {
    for (file, from, to, word) in [
        ("unet/config.json", "\"cross_attention_dim\": 32", "\"cross_attention_dim\": 40", "text"),
        ("unet/config.json", "\"layers_per_block\": 2", "\"layers_per_block\": 3", "missing"),
        ("unet/config.json", "\"layers_per_block\": 2", "\"layers_per_block\": 0", "layers_per_block"),
        ("unet/config.json", "\"act_fn\": \"silu\"", "\"act_fn\": \"mish\"", "act_fn"),
        ("unet/config.json", "UNet2DConditionModel", "UNet3DConditionModel", "UNet3DConditionModel"),
        ("scheduler/scheduler_config.json", "scaled_linear", "quadratic", "quadratic"),
        ("vae/config.json", "AutoencoderKL", "AutoencoderTiny", "AutoencoderTiny"),
        ("unet/config.json", "{", "{{", "unet/config.json"),
    ] {
        let folder = copy("sd1");
        let path = folder.path().join(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{file} has no {from}");
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        refused(folder.path(), &[word]);
    }
}
