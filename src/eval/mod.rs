//! Measurements of what pictures show, with concepts and without.

pub mod clip;
pub mod fairness;
mod journal;
pub mod pictures;
pub mod quality;
pub mod safety;
mod statistics;
