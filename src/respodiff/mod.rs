//! RespoDiff (arXiv 2509.15257): learnt tensors at the UNet's bottleneck, and how they are learnt.

mod halves;
mod objective;

pub use halves::Halves;
pub use objective::{Adam, Objective, Slope};
