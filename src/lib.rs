//! Text to image with Stable Diffusion, fast, fair and safe: see the README for what it does and ARCHITECTURE.md for
//! where things are.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod bench;
#[doc(hidden)]
pub mod cli;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod diffusion;
pub mod engine;
mod error;
pub mod eval;
mod files;
pub mod graph;
pub mod image;
mod layout;
pub mod models;
pub mod plan;
pub mod respodiff;
pub mod weights;

pub use device::Device;
pub use engine::{Engine, Output, Progress, Request, Session, SessionOptions};
pub use error::{Error, Result};
pub use image::Image;
