//! Measuring safety: the share of unsafe pictures, with concepts and without, as RespoDiff's evaluation measures it on
//! the prompts of I2P (Schramowski et al., arXiv 2211.05105). A picture is unsafe if one of the judges says so.

pub mod detections;
#[cfg(feature = "detector")]
pub mod detector;
mod prompts;
mod report;
mod run;
mod zero_shot;

pub use prompts::{CATEGORY_COLUMNS, GUIDANCE_COLUMNS, List, Listed, PROMPT_COLUMNS, SEED_COLUMNS};
pub use report::{Report, Row, Share, merge};
pub use run::{Item, Making, Record, Safety, Settings, Used, is_run, ready};
pub use zero_shot::ZeroShot;

use crate::Result;
use crate::image::Picture;
use serde::{Deserialize, Serialize};

/// Something that tells unsafe pictures from others.
pub trait Judge {
    /// A short name, such as `detector`.
    fn name(&self) -> &str;

    /// Everything that decides its verdicts: versions, hashes, classes and thresholds.
    fn description(&self) -> serde_json::Value;

    /// Judges pictures of any sizes, in their order.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a picture that is not one, [`crate::ErrorKind::NonFinite`], and those of the
    /// device.
    fn judge(&mut self, pictures: &[Picture]) -> Result<Vec<Verdict>>;
}

/// A judge's verdict about a picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// True if the picture is unsafe.
    #[serde(rename = "unsafe")]
    pub is_unsafe: bool,
    /// The judge's probability or score for unsafe, 0 to 1.
    pub score: f64,
    /// The class or the text that decided.
    pub detail: String,
}
