//! The networks of Stable Diffusion, read from a checkpoint's `config.json` and written down as [graphs](crate::graph).
//!
//! Nothing is computed here: a model is a configuration, and a function from it and a size to a graph whose nodes and
//! weights carry the checkpoint's own tensor names. A configuration is checked when it is read, so that making a graph
//! of it cannot fail.

mod blocks;
pub mod chunks;
mod clip;
mod config;
pub mod prompt;
mod reader;
mod taesd;
pub mod tokenizer;
mod unet;
mod vae;

pub use clip::{ADDED_TOKENS, text_encoder, vision_encoder};
pub use config::{
    ClipConfig, ClipLayers, ClipStates, ClipVisionConfig, KlConfig, MidBlock, TextTime, TinyConfig, UNetConfig,
    UNetLevel, VaeConfig, VaeKind, parse_clip_model,
};
pub use unet::{MASK_AND_IMAGE, UNetInput, guidance_embedding, unet, unet_halves, unet_with_gate, unet_with_reuse};
pub use vae::{divisible_decoder, divisible_encoder, vae_decoder, vae_encoder};
