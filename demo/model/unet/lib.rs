//! The UNet of respodiff's demo checkpoint, in a crate of its own since crates.io takes no more than 10 MiB in one.

/// Its `config.json`.
pub static CONFIG: &[u8] = include_bytes!("config.json");
/// Its weights, a safetensors file.
pub static WEIGHTS: &[u8] = include_bytes!("diffusion_pytorch_model.safetensors");
