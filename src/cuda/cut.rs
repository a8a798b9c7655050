//! How group norms are cut into blocks.

use crate::graph::{GroupNorm, Shape, TensorId};

/// Threads of a group norm's block.
pub(super) const THREADS: usize = 256;
/// Channels of a vector load.
pub(super) const VECTOR: usize = 8;
/// Bytes of the mean and the squared deviations of a unit.
pub(super) const PAIR: usize = 2 * size_of::<f32>();

/// How one image's group norm is cut into blocks. The image's shape alone decides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Channels of a thread.
    pub width: usize,
    /// Channels of a block: whole groups.
    pub slab: usize,
    /// Pixels of a block.
    pub stretch: usize,
    pub slabs: usize,
    pub stretches: usize,
}

impl Cut {
    /// For channels of the sources, in order.
    pub fn new(sources: &[usize], per_group: usize, pixels: usize) -> Self {
        // A slab fills sectors of 32 bytes and has at least 128 bytes of a pixel. A stretch gives every thread eight
        // vectors, two rounds of loads, which is 20 blocks for the smallest image that is cut at all and hundreds for most;
        // and there are no more than 256, all of which every block of the second kernel reads.
        const SECTOR: usize = 16;
        const SLAB: usize = 64;
        const STRETCH: usize = 8 * THREADS;
        const UNCUT: usize = 4 * STRETCH;
        const STRETCHES: usize = 256;
        let channels: usize = sources.iter().sum();
        let width = if sources.iter().all(|c| c.is_multiple_of(VECTOR)) { VECTOR } else { 1 };
        let unit = per_group / gcd(per_group, SECTOR) * SECTOR;
        let slab = (unit * SLAB.div_ceil(unit)).min(channels);
        let columns = pixels * (slab / width);
        let wanted = if columns <= UNCUT { 1 } else { (columns / STRETCH).min(STRETCHES) };
        let stretch = pixels.div_ceil(wanted);
        Cut { width, slab, stretch, slabs: channels.div_ceil(slab), stretches: pixels.div_ceil(stretch) }
    }

    pub fn of(norm: &GroupNorm, shape: impl Fn(TensorId) -> Shape) -> Self {
        let sources: Vec<usize> = norm.sources.iter().map(|t| shape(t).c).collect();
        let per_group = sources.iter().sum::<usize>() / norm.groups;
        Cut::new(&sources, per_group, shape(norm.sources.x).tokens())
    }

    /// With stretches so short that a thread has two vectors, for a kernel to which they mean nothing.
    pub fn finer(self, pixels: usize) -> Self {
        let stretch = (2 * THREADS * self.width).div_ceil(self.slab).min(pixels);
        Cut { stretch, stretches: pixels.div_ceil(stretch), ..self }
    }

    /// Bytes of shared memory: a pair of numbers for each group of a slab, and one for each channel of a slab in each
    /// lane. A block has as many lanes as a slab's columns fit into its threads. The last slab may be narrower and have
    /// more lanes, and with them more channels in all than a full slab; but never more than all threads hold, unless it
    /// has one lane.
    pub fn shared(&self, per_group: usize) -> (usize, usize) {
        (self.slab / per_group * PAIR, (THREADS * self.width).max(self.slab) * PAIR)
    }
}

pub(super) fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No slab of any norm stores more pairs than its launch has memory for, by the kernel's own count of lanes.
    #[test]
    fn shared_memory_holds_every_slab() {
        for groups in 1..=64 {
            for per_group in 1..=160 {
                let channels = groups * per_group;
                let cut = Cut::new(&[channels], per_group, 4096);
                for slab in 0..cut.slabs {
                    let channels = cut.slab.min(channels - slab * cut.slab);
                    let lanes = (THREADS / (channels / cut.width)).max(1);
                    let (_, sums) = cut.shared(per_group);
                    assert!(lanes * channels * PAIR <= sums, "{groups} groups of {per_group}: slab {slab} of {cut:?}");
                }
            }
        }
    }

    /// Every group norm of SD 1.5 and SDXL at their sizes: whole groups and sectors, everything covered, blocks enough
    /// for a GPU where an image is cut, and stretches few enough for every block to read them.
    #[test]
    fn cuts_of_real_layers() {
        let unet = [320, 640, 960, 1280, 1920, 2560].map(|c| (c, [8, 16, 32, 64, 128]));
        let vae = [128, 256, 512].map(|c| (c, [64, 128, 256, 512, 1024]));
        for (channels, sides) in unet.into_iter().chain(vae) {
            for side in sides {
                let (per_group, pixels) = (channels / 32, side * side);
                let cut = Cut::new(&[channels], per_group, pixels);
                let label = format!("{side}x{side}x{channels}: {cut:?}");
                assert!(
                    cut.width == VECTOR && cut.slab.is_multiple_of(per_group) && cut.slab.is_multiple_of(16),
                    "{label}"
                );
                assert!(cut.slab >= 64 && cut.slabs * cut.slab >= channels, "{label}");
                assert!((cut.slabs - 1) * cut.slab < channels && (cut.stretches - 1) * cut.stretch < pixels, "{label}");
                assert!(cut.stretches * cut.stretch >= pixels && cut.stretches <= 256, "{label}");
                assert!(cut.stretches == 1 || cut.stretches * cut.slabs >= 20, "{label}");
            }
        }
    }
}
