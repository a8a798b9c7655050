//! The division of group norms into blocks.

use crate::graph::{GroupNorm, Shape, TensorId};

/// Threads of a block of `kernels/group_norm.cu`.
pub(super) const THREADS: usize = 256;
/// Channels of a vector load.
pub(super) const VECTOR: usize = 8;
/// Bytes of a pair of numbers: the mean and the squared deviations of a unit.
pub(super) const PAIR: usize = 2 * size_of::<f32>();

/// The division of one image's group norm into blocks. The image's shape alone decides it.
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
    /// For sources of so many channels each, in order.
    pub fn new(sources: &[usize], per_group: usize, pixels: usize) -> Self {
        // A slab fills sectors of 32 bytes and has at least 128 bytes of a pixel. A stretch gives every thread eight
        // vectors, which are two rounds of loads. That is 20 blocks for the smallest image that is divided at all and
        // hundreds for most. There are at most 256 stretches, since every block of the second kernel reads the moments
        // of all.
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

    /// The same with shorter stretches, in which a thread has two vectors, for a kernel whose result does not depend on
    /// them.
    pub fn finer(self, pixels: usize) -> Self {
        let stretch = (2 * THREADS * self.width).div_ceil(self.slab).min(pixels);
        Cut { stretch, stretches: pixels.div_ceil(stretch), ..self }
    }

    /// Bytes of shared memory: a pair of numbers for each group of a slab, and a pair for each channel of a slab in
    /// each thread row. A block has as many thread rows as a slab's columns fit into its threads. The last slab may be
    /// narrower and have more thread rows, and with them more pairs than a full slab; but never more than all threads
    /// hold, unless it has one thread row.
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

    /// No slab of any norm stores more pairs than its launch has memory for, by the kernel's own count of thread rows.
    #[test]
    fn shared_memory_holds_every_slab() {
        for groups in 1..=64 {
            for per_group in 1..=160 {
                let channels = groups * per_group;
                let cut = Cut::new(&[channels], per_group, 4096);
                for slab in 0..cut.slabs {
                    let channels = cut.slab.min(channels - slab * cut.slab);
                    let thread_rows = (THREADS / (channels / cut.width)).max(1);
                    let (_, sums) = cut.shared(per_group);
                    assert!(
                        thread_rows * channels * PAIR <= sums,
                        "{groups} groups of {per_group}: slab {slab} of {cut:?}"
                    );
                }
            }
        }
    }

    /// Every group norm of SD 1.5 and SDXL at their sizes: slabs are whole groups and sectors, everything is covered,
    /// an image that is divided has enough blocks for a GPU, and stretches are few enough for every block to read them.
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
