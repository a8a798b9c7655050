//! Measuring fairness: the genders, races or other classes that pictures of professions show, with concepts and
//! without.

pub mod clip;
mod fairness;
mod report;
mod statistics;
pub mod winobias;

pub use fairness::{Fairness, Record, Settings};
pub use report::{Report, Row, Summary, merge};
pub use statistics::{count, deviation_ratio, mean_deviation_ratio};
