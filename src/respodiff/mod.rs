//! RespoDiff (arXiv 2509.15257): learnt tensors at the UNet's bottleneck, and how they are learnt.

mod balance;
mod checkpoint;
mod concept;
mod halves;
mod import;
mod module;
mod objective;
mod pickle;
mod plot;
mod recipe;
mod rollout;
mod shift;
mod trainer;

pub use balance::{Group, assign, quotas};
pub use concept::{Concept, Kind, Metadata, Precision};
pub use halves::{Halves, HalvesMemory};
pub use import::import;
pub use module::{Form, Module};
pub use objective::{Adam, Objective, Slope};
pub use plot::{loss_plot, sheet};
pub use recipe::{Recipe, Variant};
pub(crate) use shift::Shift;
pub use trainer::{Losses, Task, Times, Trainer, TrainingMemory};
