//! Launches of `kernels/elementwise.cu`.

use super::device::Launch;
use super::program::Site;
use crate::graph::{Activation, TensorId};
use bytemuck::NoUninit;

/// Threads of a block, each of which takes eight numbers.
const THREADS: usize = 256;

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct ActivateParams {
    x: u64,
    out: u64,
    length: u64,
    activation: i32,
    unused: i32,
}

pub(super) fn activate(x: TensorId, activation: Activation, out: TensorId, site: &Site) -> Launch {
    let length = site.shape(out).len();
    let params = ActivateParams {
        x: site.address(x),
        out: site.address(out),
        length: length as u64,
        activation: activation as i32,
        unused: 0,
    };
    Launch::new("activate", [length.div_ceil(8 * THREADS), 1, 1], THREADS, 0, &params)
}
