//! respodiff's demo: a tiny checkpoint in Stable Diffusion's layout, the CLIP that judges its pictures, and concepts
//! that were trained on it. The README says how they were made and measured. Files are named by their paths.

macro_rules! files {
    ($folder:literal, $($name:literal),* $(,)?) => {
        [$(($name, include_bytes!(concat!($folder, $name)).as_slice())),*]
    };
}

// All of these are statics, for a constant's bytes would be in a program once for every place that names it.

/// The checkpoint's files, but for its UNet's.
static REST: [(&str, &[u8]); 10] = files![
    "model/",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

/// The checkpoint's files, as diffusers' `save_pretrained` writes them.
pub static MODEL: [(&str, &[u8]); 12] = {
    let mut files = [("unet/config.json", respodiff_demo_unet::CONFIG); 12];
    files[1] = ("unet/diffusion_pytorch_model.safetensors", respodiff_demo_unet::WEIGHTS);
    let mut i = 0;
    while i < REST.len() {
        files[i + 2] = REST[i];
        i += 1;
    }
    files
};

/// The CLIP that judges the pictures, a `CLIPModel`'s folder.
pub static CLIP: [(&str, &[u8]); 7] = files![
    "clip/",
    "config.json",
    "merges.txt",
    "model.safetensors",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "vocab.json",
];

/// Concepts for the checkpoint by name, safetensors files.
pub static CONCEPTS: [(&str, &[u8]); 5] = [
    ("asian", include_bytes!("concepts/asian.safetensors")),
    ("black", include_bytes!("concepts/black.safetensors")),
    ("man", include_bytes!("concepts/man.safetensors")),
    ("white", include_bytes!("concepts/white.safetensors")),
    ("woman", include_bytes!("concepts/woman.safetensors")),
];
