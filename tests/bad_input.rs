//! Damaged checkpoints are errors that name the file, never panics.

mod support;

use respodiff::Error;
use respodiff::weights::{Source, Tensors};
use std::fs;
use std::path::Path;
use support::golden;

/// A component folder `unet/` with this one weights file.
fn open(folder: &Path, bytes: &[u8]) -> Result<Tensors, Error> {
    fs::create_dir_all(folder.join("unet")).unwrap();
    fs::write(folder.join("unet/config.json"), "{}").unwrap();
    fs::write(folder.join("unet/diffusion_pytorch_model.safetensors"), bytes).unwrap();
    Source::folder(folder).unwrap().tensors("unet")
}

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

fn one(dtype: &str, data: &[u8]) -> Vec<u8> {
    let header = format!(r#"{{"a":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,{}]}}}}"#, data.len());
    file(&header, data)
}

fn refused<T>(result: Result<T, Error>, word: &str) {
    let error = result.err().unwrap_or_else(|| panic!("accepted; expected an error with {word:?}"));
    let text = error.to_string();
    assert!(text.contains(word) && !text.contains('\n') && error.exit_code() == 1, "{text} (expected {word:?})");
}

#[test]
fn every_truncation_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let whole = one("F32", &[0; 8]);
    assert!(open(folder.path(), &whole).is_ok());
    for length in 0..whole.len() {
        refused(open(folder.path(), &whole[..length]), "diffusion_pytorch_model.safetensors");
    }
}

#[test]
fn damaged_headers_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let whole = one("F16", &[0; 4]);
    for at in 0..whole.len() - 4 {
        for bit in 0..8 {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            if let Ok(tensors) = open(folder.path(), &bytes) {
                let _ = tensors.read("a", &[&[2]]);
            }
        }
    }
    for header in [u64::MAX, 1 << 40, 0] {
        refused(open(folder.path(), &header.to_le_bytes()), "safetensors");
    }
}

#[test]
fn tensors_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let floats = |values: [f32; 2]| one("F32", &values.map(f32::to_le_bytes).concat());
    let read = |bytes: &[u8], name: &str, shape: &[usize]| open(folder.path(), bytes).unwrap().read(name, &[shape]);
    assert_eq!(read(&floats([1.0, -2.0]), "a", &[2]).unwrap(), [1.0, -2.0]);
    assert_eq!(read(&one("BF16", &[0x80, 0x3f, 0, 0xc0]), "a", &[2]).unwrap(), [1.0, -2.0]);
    assert_eq!(read(&one("F16", &[0, 0x3c, 0, 0xc0]), "a", &[2]).unwrap(), [1.0, -2.0]);
    refused(read(&floats([1.0, f32::NAN]), "a", &[2]), "NaN");
    refused(read(&floats([f32::INFINITY, 1.0]), "a", &[2]), "inf");
    refused(read(&floats([1.0, 1.0]), "a", &[1, 2]), "shape");
    refused(read(&floats([1.0, 1.0]), "b", &[2]), "`b` is missing");
    refused(read(&one("I32", &[0; 8]), "a", &[2]), "I32");
}

#[test]
fn missing_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let unet = folder.path().join("unet");
    refused(Source::folder(folder.path()), "save_pretrained");
    fs::create_dir(&unet).unwrap();
    fs::write(unet.join("config.json"), "{}").unwrap();
    let tensors = || Source::folder(folder.path()).unwrap().tensors("unet");
    refused(tensors(), "download it again");
    fs::write(unet.join("diffusion_pytorch_model.bin"), "").unwrap();
    refused(tensors(), "safe_serialization");
    let index = unet.join("diffusion_pytorch_model.safetensors.index.json");
    for (text, word) in [
        ("{", "not a shard index"),
        (r#"{"weight_map":{"a":"gone.safetensors"}}"#, "gone.safetensors"),
        (r#"{"weight_map":{"a":"../x.safetensors"}}"#, "not the name"),
        (r#"{"weight_map":{"a":"/x.safetensors"}}"#, "not the name"),
    ] {
        fs::write(&index, text).unwrap();
        refused(tensors(), word);
    }
    let shard = one("F16", &[0, 0x3c, 0, 0xc0]);
    fs::write(unet.join("s1.safetensors"), &shard).unwrap();
    fs::write(unet.join("s2.safetensors"), &shard).unwrap();
    fs::write(&index, r#"{"weight_map":{"a":"s1.safetensors"}}"#).unwrap();
    assert_eq!(tensors().unwrap().read("a", &[&[2]]).unwrap(), [1.0, -2.0]);
    fs::write(&index, r#"{"weight_map":{"a":"s1.safetensors","b":"s2.safetensors"}}"#).unwrap();
    refused(tensors(), "two files");
}

#[test]
fn both_precisions_and_shards_load() {
    for (name, component) in [("sd1", "unet"), ("sd2", "unet"), ("sd2", "vae"), ("sdxl", "text_encoder_2")] {
        let source = Source::folder(golden().join("checkpoints").join(name)).unwrap();
        assert!(source.tensors(component).unwrap().entries().count() > 0, "{name}/{component}");
    }
}
