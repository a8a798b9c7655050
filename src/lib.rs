//! This crate generates images from text with Stable Diffusion 1.x, 2.x and SDXL, fast, fair and safe, without an ML
//! framework: on the CPU, and on NVIDIA GPUs with kernels of its own. It implements RespoDiff (arXiv 2509.15257):
//! learnt concepts that are added to the UNet's bottleneck, and the training of such concepts.
//!
//! An [`Engine`] is a checkpoint that is loaded on a [`Device`]. It makes [`Session`]s, each for one picture size and
//! one batch size. A session answers [`Request`]s: lists of [`Image`]s, each with its own prompt, seed, guidance scale
//! and [`Concept`]s.
//!
//! ```
//! use respodiff::{Device, Engine, Image, Source};
//! use std::ops::ControlFlow;
//!
//! # fn main() -> respodiff::Result<()> {
//! let engine = Engine::open(&Source::demo(), Device::auto())?;
//! let mut session = engine.session(engine.options())?;
//! let request = Image::new("a photo of a nurse").seed(7).into();
//! let output = session.generate(&request, &mut |_| ControlFlow::Continue(()))?;
//! let png = output.pictures[0].to_png(&[])?;
//! # assert!(png.len() > 1000);
//! # Ok(())
//! # }
//! ```
//!
//! Names that every program needs are at the root; modules hold those of one subject: [`adapters`], [`concepts`],
//! [`pictures`], [`prompts`] and [`samplers`], and with their features `requests`, `training`, `eval` and `hub`.
//!
//! The library prints nothing, reads no environment variables and handles no signals. Errors are data: see [`Error`].
//!
//! # Features
//!
//! | feature | what it adds |
//! | --- | --- |
//! | `demo` | [`Source::demo`], the demo checkpoint, 19 MB |
//! | `download` | `hub`: checkpoints by model id from Hugging Face |
//! | `pipeline` | [`Pipeline`]: whole requests by the fields of the server, with quotas and records |
//! | `train` | `Trainer`, its tasks, recipes and reports |
//! | `pictures` | `Picture::read`: pictures out of PNG, JPEG and WebP files |
//! | `eval` | `eval`: measurement of fairness, safety, and the quality of pictures |
//! | `detector` | `eval::safety::detector`: NudeNet as a judge of safety; takes a minute or two to compile |
//! | `c2pa` | `Signer`: signed marks of generated pictures, and `--sign`; takes a minute or two to compile |
//! | `cli` | the command `respodiff`, and all of the above but `detector` |
//! | `emulated` | an emulator that runs the CUDA kernels on the CPU, slowly, for tests; needs a C++ compiler |
//! | `unstable` | the internal modules: graphs, plans, executors and kernels, without any promise of stability |

// Some items of these modules are used by tests and benches alone, which enable the feature `unstable`.
#![cfg_attr(not(feature = "unstable"), allow(dead_code, unused_imports))]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

#[cfg(not(feature = "unstable"))]
mod backend;
#[cfg(feature = "unstable")]
pub mod backend;
#[cfg(all(feature = "cli", not(feature = "unstable")))]
mod bench;
#[cfg(feature = "unstable")]
pub mod bench;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
#[cfg(not(feature = "unstable"))]
mod concept;
#[cfg(feature = "unstable")]
pub mod concept;
#[cfg(not(feature = "unstable"))]
mod cpu;
#[cfg(feature = "unstable")]
pub mod cpu;
#[cfg(not(feature = "unstable"))]
mod cuda;
#[cfg(feature = "unstable")]
pub mod cuda;
mod device;
#[cfg(not(feature = "unstable"))]
mod diffusion;
#[cfg(feature = "unstable")]
pub mod diffusion;
mod draws;
#[cfg(not(feature = "unstable"))]
mod engine;
#[cfg(feature = "unstable")]
pub mod engine;
mod error;
#[cfg(feature = "eval")]
pub mod eval;
mod files;
#[cfg(not(feature = "unstable"))]
mod graph;
#[cfg(feature = "unstable")]
pub mod graph;
#[cfg(not(feature = "unstable"))]
mod image;
#[cfg(feature = "unstable")]
pub mod image;
mod json;
mod layout;
mod memory;
#[cfg(not(feature = "unstable"))]
mod models;
#[cfg(feature = "unstable")]
pub mod models;
#[cfg(feature = "pipeline")]
mod pipeline;
#[cfg(not(feature = "unstable"))]
mod plan;
#[cfg(feature = "unstable")]
pub mod plan;
#[cfg(all(feature = "train", not(feature = "unstable")))]
mod train;
#[cfg(all(feature = "train", feature = "unstable"))]
pub mod train;
#[cfg(not(feature = "unstable"))]
mod weights;
#[cfg(feature = "unstable")]
pub mod weights;

pub use backend::Precision;
pub use concept::{Concept, Strength};
pub use device::{Device, Place};
pub use diffusion::scheduler::{Sampler, SamplerChoice};
pub use engine::{
    Engine, EngineOptions, Event, Image, ImageId, MemoryPlan, Output, Progress, Prompt, Request, RunningBatch, Session,
    SessionOptions, Size, Start,
};
pub use error::{Error, ErrorKind, Result, Subject};
pub use image::Picture;
#[cfg(feature = "pipeline")]
pub use pipeline::Pipeline;
#[cfg(feature = "train")]
pub use train::{Recipe, Task, Trainer};
pub use weights::Source;
#[cfg(feature = "download")]
pub use weights::hub;

/// Files that change a model: LoRA and its kin, and textual inversion.
pub mod adapters {
    pub use crate::weights::{Adapter, AdapterInfo, Embedding, Format};
}

/// Parts of a concept's file, groups of concepts, and where concepts are found by name.
pub mod concepts {
    pub use crate::concept::{Calibration, Group, Kind, Metadata, NumberFormat};
    #[cfg(feature = "pipeline")]
    pub use crate::concept::{Files, Shelf};
}

/// Pictures that images begin with, and what the files of finished pictures say.
pub mod pictures {
    pub use crate::engine::{EncodedPicture, InitImage, Original};
    #[cfg(feature = "c2pa")]
    pub use crate::image::Signer;
    pub use crate::image::{
        Filter, GenerationInfo, Region, UsedAdapter, UsedConcept, UsedEmbedding, UsedFile, UsedHires, UsedPart,
        UsedPicture,
    };
}

/// Prompts with weights and of any length, and prompts that are encoded once for many images.
pub mod prompts {
    pub use crate::engine::{Conditioning, PromptText};
    pub use crate::models::prompt::{LoraTag, PromptSyntax, lora_tags};
    pub use crate::models::tokenizer::TokenizerRules;
}

/// Whole requests by the fields of the server.
#[cfg(feature = "pipeline")]
pub mod requests {
    pub use crate::pipeline::{Answer, Made};
    pub use respodiff_fields as fields;
}

/// The settings of samplers.
pub mod samplers {
    pub use crate::diffusion::noise::Rng;
    pub use crate::diffusion::scheduler::{Prediction, Preset, Spacing, StepNoise, Tuning};
}

/// The parts of a training and its reports.
#[cfg(feature = "train")]
pub mod training {
    pub use crate::train::{Losses, Times, TrainingMemory, Variant};
}

/// The README's example is compiled and run as a test.
#[cfg(all(doctest, feature = "demo"))]
#[doc = include_str!("../README.md")]
struct Readme;
