//! Sampling: schedules and noise. No network and no device.

pub mod brownian;
pub mod noise;
pub mod scheduler;
