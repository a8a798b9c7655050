//! Tests of the binary, which they run as a user does.

mod adapters;
mod bench;
mod checkpoints;
mod init_image;
mod output;
mod probe;
mod process;
mod prompts;
mod refusals;
mod reports;
mod rerun;
mod sample;
#[cfg(feature = "c2pa")]
mod sign;
#[path = "../support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Output};

fn respodiff(folder: &Path, args: &[&str]) -> Output {
    command(folder, args).output().expect("runs")
}

/// The program with a folder for caches that is not the user's.
fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_respodiff"));
    command.args(args).current_dir(folder).env("XDG_CACHE_HOME", std::env::temp_dir().join("respodiff-test-caches"));
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Writes a file for `--latents`, with images of the demo's size.
fn write_latents(path: &Path, numbers: &[f32]) {
    let (shape, bytes) = (vec![numbers.len() / 256, 4, 8, 8], bytemuck::cast_slice(numbers));
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes).unwrap();
    std::fs::write(path, safetensors::serialize([("latents", view)], None).unwrap()).unwrap();
}

/// Named fp32 tensors of a file.
fn tensors(path: &Path) -> HashMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = |data: &[u8]| data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    file.iter().map(|(name, view)| (name.to_string(), (view.shape().to_vec(), floats(view.data())))).collect()
}

fn write(path: &Path, named: &[(&str, Vec<usize>, &[f32])]) {
    let views = named.iter().map(|(name, shape, values)| {
        let bytes = bytemuck::cast_slice(values);
        (*name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}
