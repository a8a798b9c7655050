//! RespoDiff (arXiv 2509.15257): learnt tensors at the UNet's bottleneck, and how they are learnt.

mod halves;
mod module;
mod objective;

pub use halves::Halves;
pub use module::{Form, Module};
pub use objective::{Adam, Objective, Slope};
