//! The demo checkpoint, compiled in: `demo/README.md` says how it was made.

macro_rules! files {
    ($folder:literal, $($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/", $folder, $name)).as_slice())),*]
    };
}

// Statics, for a constant's bytes would be in a program once for every place that names it.

/// Its files by their paths in the checkpoint.
pub(super) static FILES: &[(&str, &[u8])] = files![
    "model/",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

/// The CLIP that judges its pictures.
pub(super) static CLIP: &[(&str, &[u8])] = files![
    "clip/",
    "config.json",
    "merges.txt",
    "model.safetensors",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "vocab.json",
];
