//! Concepts of RespoDiff (arXiv 2509.15257): learnt tensors that are added to the UNet's bottleneck, their files, and
//! their assignment to the images of a batch.

mod balance;
#[cfg(feature = "pipeline")]
mod choice;
mod file;
mod import;
mod module;
mod shift;
mod strength;

pub use balance::{Group, assign, quotas};
#[cfg(feature = "cli")]
pub(crate) use choice::{Assignment, members, name_and_weight};
#[cfg(feature = "pipeline")]
pub use choice::{Files, Shelf};
#[cfg(feature = "pipeline")]
pub(crate) use choice::{Used, group, shared_out, used};
pub use file::{Concept, Kind, Metadata, NumberFormat};
pub use import::import;
pub use module::{Form, Module};
pub(crate) use shift::Shift;
pub use strength::{Calibration, Strength};
