//! Measurements of what pictures show, with concepts and without.

pub mod clip;
pub mod fairness;
pub mod quality;
mod statistics;

pub use statistics::{count, deviation_ratio, mean_deviation_ratio};
