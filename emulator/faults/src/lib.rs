//! Small kernels with planted faults (`faults.cu`): link this crate and launch them by name.

pub use respodiff_emulator::*;
