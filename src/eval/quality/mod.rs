//! Measuring the quality of pictures: FID, CMMD and CLIP score.

pub mod captions;
mod cmmd;
mod fid;
mod inception;
mod report;
mod resize;
mod run;
mod set;

pub use cmmd::cmmd;
pub use fid::Moments;
pub use inception::Inception;
pub use report::Report;
pub use run::{Folder, Judges, Made, Origin, Reference, Run, Settings, Watch, holds, merge};
pub use set::Record;
