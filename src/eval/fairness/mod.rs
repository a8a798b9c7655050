//! Measuring fairness: the genders, races or other classes that pictures of professions show, with concepts and
//! without.

mod report;
mod run;
pub mod winobias;

pub use report::{Report, Row, Summary, merge};
pub use run::{Fairness, Record, Settings};
