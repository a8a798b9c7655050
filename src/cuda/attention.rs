//! Launches of `kernels/attention.cu`, and the choice among its kernels, where none of `attention_hopper.cu` is taken.

use super::attention_hopper;
use super::device::{Launch, Limits};
use super::site::Site;
use super::weights::CHUNK;
use crate::graph::{Attention, Shape, TensorId, View};
use crate::{Error, Result, Subject};

crate::params! {
    pub(super) struct AttentionParams {
        q: u64,
        k: u64,
        v: u64,
        out: u64,
        queries: i32,
        keys: i32,
        head_dim: i32,
        q_width: i32,
        k_width: i32,
        v_width: i32,
        causal: i32,
        exponent: f32,
    }
}

/// One of the kernels of `kernels/attention.cu`: the mirror of its `Tile`.
#[derive(Debug, PartialEq)]
pub(super) struct AttentionTile {
    pub kernel: &'static str,
    /// The head dimension, padded.
    width: usize,
    /// Queries of a block.
    rows: usize,
    /// Keys per tile.
    keys: usize,
    /// True if it copies 16 bytes at a time.
    vector: bool,
}

const fn tile(kernel: &'static str, width: usize, rows: usize, keys: usize, vector: bool) -> AttentionTile {
    AttentionTile { kernel, width, rows, keys, vector }
}

pub(super) const TILES: [AttentionTile; 12] = [
    tile("attention_40_128", 40, 128, 64, true),
    tile("attention_40_64", 40, 64, 64, true),
    tile("attention_64_128", 64, 128, 64, true),
    tile("attention_64_64", 64, 64, 64, true),
    tile("attention_80_128", 80, 128, 64, true),
    tile("attention_80_64", 80, 64, 64, true),
    tile("attention_160_64", 160, 64, 32, true),
    tile("attention_512_64", 512, 64, 32, true),
    tile("attention_512_64_16", 512, 64, 16, true),
    tile("attention_40_64_unaligned", 40, 64, 64, false),
    tile("attention_160_64_unaligned", 160, 64, 32, false),
    tile("attention_512_64_unaligned", 512, 64, 16, false),
];

/// The number of images for which a choice is made, whatever the actual number: guidance's two.
const IMAGES: usize = 2;

impl AttentionTile {
    /// Warps that share a row group, as in the kernel.
    fn split(&self) -> usize {
        if self.width > 256 { 2 } else { 1 }
    }

    pub fn threads(&self) -> usize {
        128 * self.split()
    }

    /// True if warps that share a row divide a tile's keys among them. If not, each computes the scores of all keys.
    fn exchanges(&self) -> bool {
        self.split() > 1 && self.keys / self.split() >= 16
    }

    /// Bytes of shared memory: queries, one or two stages of keys and values, and the weights and maxima that warps
    /// exchange.
    pub fn shared(&self) -> usize {
        let stride = (self.width / 8) | 1;
        let stages = 2 / self.split();
        let exchanged =
            if self.exchanges() { self.rows * ((self.keys / 8) | 1) * 16 + self.split() * self.rows * 4 } else { 0 };
        (self.rows + 2 * stages * self.keys) * stride * 16 + exchanged
    }

    /// The reason why the kernel cannot compute an attention.
    fn rejected(&self, head_dim: usize, aligned: bool, limits: Limits) -> Option<&'static str> {
        if head_dim > self.width {
            Some("heads are wider")
        } else if self.vector && !aligned {
            Some("heads do not begin at multiples of 16 bytes")
        } else if self.shared() > limits.shared as usize {
            Some("not enough shared memory")
        } else {
            None
        }
    }

    /// Estimated time: the blocks of the busiest multiprocessor times the cost of one. Keys and values pass from shared
    /// memory to registers once per block, which costs as much as another 32 queries. Warps that share rows without
    /// exchanging compute the scores, half of the work, twice.
    fn time(&self, queries: usize, heads: usize, limits: Limits) -> usize {
        let blocks = IMAGES * heads * queries.div_ceil(self.rows);
        let halves = if self.split() > 1 && !self.exchanges() { 3 } else { 2 };
        let copying = if self.vector { 1 } else { 8 };
        blocks.div_ceil(limits.multiprocessors as usize) * (self.rows + 32) * self.width * halves * copying
    }
}

/// The kernel for one image's shape: the fastest that supports it.
fn choose(
    queries: usize,
    heads: usize,
    head_dim: usize,
    aligned: bool,
    limits: Limits,
) -> Option<&'static AttentionTile> {
    let able = TILES.iter().filter(|tile| tile.rejected(head_dim, aligned, limits).is_none());
    able.min_by_key(|tile| tile.time(queries, heads, limits))
}

/// True if every head begins at a multiple of 16 bytes.
pub(super) fn is_aligned(attention: &Attention, shape: impl Fn(TensorId) -> Shape) -> bool {
    let Attention { q, k, v, head_dim, .. } = *attention;
    let views = [q, k, v].into_iter().flat_map(|view| [view.offset, shape(view.tensor).c]);
    views.chain([head_dim]).all(|channels| channels % CHUNK == 0)
}

/// # Errors
/// [`crate::ErrorKind::Unsupported`] for heads wider than any kernel's, or if TMA does not take the tensors.
pub(super) fn attention(attention: &Attention, out: TensorId, site: &Site) -> Result<Launch> {
    if let Some(tile) = attention_hopper::choose(attention, |t| site.shape(t), site.limits) {
        return attention_hopper::launch(attention, out, site, tile);
    }
    let Attention { q, k, v, heads, head_dim, scale, causal } = *attention;
    let width = |view: View| site.shape(view.tensor).c;
    let Shape { n: images, .. } = site.shape(out);
    let (queries, keys) = (site.shape(out).tokens(), site.shape(k.tensor).tokens());
    let aligned = is_aligned(attention, |t| site.shape(t));
    let tile = choose(queries, heads, head_dim, aligned, site.limits).ok_or_else(|| {
        let widest = TILES.iter().map(|tile| tile.width).max().unwrap_or(0);
        Error::unsupported(
            Subject::Device,
            format!("attention heads of {head_dim} channels; the kernels take {widest}"),
        )
        .advise("choose the CPU")
    })?;
    let params = AttentionParams {
        q: site.view(q),
        k: site.view(k),
        v: site.view(v),
        out: site.address(out),
        queries: queries as i32,
        keys: keys as i32,
        head_dim: head_dim as i32,
        q_width: width(q) as i32,
        k_width: width(k) as i32,
        v_width: width(v) as i32,
        causal: i32::from(causal),
        exponent: scale * std::f32::consts::LOG2_E,
    };
    let grid = [queries.div_ceil(tile.rows), heads, images];
    Ok(Launch::new(tile.kernel, grid, tile.threads(), tile.shared(), &params))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(queries: usize, heads: usize, head_dim: usize, limits: Limits) -> &'static str {
        choose(queries, heads, head_dim, true, limits).unwrap().kernel
    }

    #[test]
    fn large_tiles_only_where_blocks_abound() {
        for limits in [Limits::A100, Limits::H100] {
            // SD 1.5 at 64^2, 32^2, 16^2, 8^2; SDXL at 64^2; CLIP; the VAE.
            assert_eq!(chosen(4096, 8, 40, limits), "attention_40_128");
            assert_eq!(chosen(256, 8, 160, limits), "attention_160_64");
            assert_eq!(chosen(64, 8, 160, limits), "attention_160_64");
            assert_eq!(chosen(4096, 10, 64, limits), "attention_64_128");
            assert_eq!(chosen(77, 12, 64, limits), "attention_64_64");
            assert_eq!(chosen(4096, 1, 512, limits), "attention_512_64");
        }
        // The kernels' tests rely on these choices.
        for (head_dim, kernel) in [(40, "attention_40_128"), (64, "attention_64_128"), (80, "attention_80_128")] {
            assert_eq!(chosen(65, 54, head_dim, Limits::A100), kernel);
        }
        assert_eq!(chosen(1024, 8, 80, Limits::A100), "attention_80_64");
        assert_eq!(chosen(1024, 8, 80, Limits::H100), "attention_80_128");
    }

    #[test]
    fn every_head_up_to_the_widest_has_a_kernel_on_every_card() {
        for limits in Limits::CARDS {
            for head_dim in 1..=512 {
                for aligned in [false, head_dim % CHUNK == 0] {
                    let tile = choose(35, 3, head_dim, aligned, limits).unwrap();
                    assert!(tile.width >= head_dim && (aligned || !tile.vector));
                    assert!(tile.shared() <= limits.shared as usize);
                }
            }
            assert_eq!(choose(35, 3, 513, true, limits), None);
        }
        assert_eq!(chosen(4096, 1, 512, Limits::RTX_4090), "attention_512_64_16");
        let reason = TILES[0].rejected(40, false, Limits::A100);
        assert_eq!(reason, Some("heads do not begin at multiples of 16 bytes"));
        let cramped = Limits { shared: 48 << 10, ..Limits::A100 };
        assert_eq!(TILES[6].rejected(160, true, cramped), Some("not enough shared memory"));
    }
}
