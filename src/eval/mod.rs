//! Measuring fairness: who the pictures of a profession show, with and without concepts.

pub mod clip;
mod fairness;
mod report;
mod statistics;
pub mod winobias;

pub use fairness::{Fairness, Record, Settings};
pub use report::{Report, Row, Summary, merge};
pub use statistics::{count, deviation_ratio, mean_deviation_ratio};
