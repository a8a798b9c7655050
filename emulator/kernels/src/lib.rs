//! The engine's kernels, compiled for the emulator: link this crate and launch them by name.

pub use respodiff_emulator::*;
