//! Measuring fairness: the genders, races or other classes that pictures of professions show, with concepts and
//! without.

mod audit;
mod calibration;
mod compare;
mod deviation;
mod page;
mod report;
mod run;
pub mod winobias;

pub use audit::{Audit, Finding, Profession};
pub use calibration::{Calibration, Confusion, Labelled, read_labels};
pub use compare::{Comparison, Difference, compare, text as comparison_text};
pub use deviation::{Measure, chance, deviation_ratio, mean_deviation_ratio, paired_p};
pub use report::{Agreement, Corrected, Report, Row, Summary, merge};
pub use run::{Fairness, Judge, Record, Settings};
