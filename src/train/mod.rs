//! Training of concepts (arXiv 2509.15257, algorithm 1).

mod checkpoint;
mod halves;
mod objective;
mod plot;
mod recipe;
mod rollout;
mod trainer;

pub use halves::{Halves, HalvesMemory};
pub use objective::{Adam, Objective, Slope};
pub use plot::{loss_plot, sheet};
pub use recipe::{Recipe, Variant};
pub use trainer::{Losses, Task, Times, Trainer, TrainingMemory};
