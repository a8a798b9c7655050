//! Launches of `kernels/attention_hopper.cu` and, for the widest heads, `attention_hopper_wide.cu`.

use super::attention::is_aligned;
use super::device::{Launch, Limits, TensorTiles};
use super::site::Site;
use crate::Result;
use crate::graph::{Attention, Shape, TensorId, View};
use half::f16;

/// Queries of a warpgroup.
pub(super) const ROWS: usize = 64;
/// Channels of a span in shared memory, its bytes, and its `CUtensorMapSwizzle`.
pub(super) const SPAN: usize = 64;
pub(super) const SPAN_BYTES: usize = SPAN * size_of::<f16>();
const SWIZZLE: u32 = 3;

crate::params! {
    pub(super) struct AttentionHopperParams {
        q: [u64; 16],
        k: [u64; 16],
        v: [u64; 16],
        out: [u64; 16],
        queries: i32,
        keys: i32,
        exponent: f32,
        padding: [i32; 29],
    }
}

/// One of the kernels: the mirror of their `Tile`.
#[derive(Debug, PartialEq)]
pub(super) struct AttentionHopperTile {
    pub kernel: &'static str,
    head_dim: usize,
    /// Queries per tile.
    rows: usize,
    /// True if a block may process several tiles of a head, one after the other.
    walks: bool,
    /// The most keys that it supports.
    most: usize,
    /// Tokens in one TMA load of keys, and of values.
    keys: usize,
    values: usize,
    pub threads: usize,
    /// Bytes of shared memory.
    pub shared: usize,
}

/// A kernel with `groups` consumer warpgroups and one more for the producer, and stages of `keys` keys; a single stage
/// holds all keys.
const fn tile(kernel: &'static str, head_dim: usize, groups: usize, stages: usize, keys: usize) -> AttentionHopperTile {
    // Tokens in shared memory: queries (two slots if the keys are held, else one) and results; keys and values. 256
    // bytes of barriers are added.
    let held = stages == 1;
    let slots = if held { 3 } else { 2 };
    let tokens = groups * ROWS * slots + 2 * stages * keys;
    AttentionHopperTile {
        kernel,
        head_dim,
        rows: groups * ROWS,
        walks: true,
        most: if held { keys } else { usize::MAX },
        keys,
        values: keys,
        threads: 128 * (groups + 1),
        shared: tokens * head_dim.div_ceil(SPAN) * SPAN_BYTES + 256,
    }
}

/// The kernel for the widest heads, whose warpgroups have different roles, and whose values are loaded in halves of a
/// stage.
const WIDE: AttentionHopperTile = AttentionHopperTile {
    kernel: "attention_hopper_512",
    head_dim: 512,
    rows: ROWS,
    walks: false,
    most: usize::MAX,
    keys: 64,
    values: 32,
    threads: 384,
    // Queries, keys, values; two slots of weights and one factor per query; inverse row sums; 128 bytes of barriers.
    shared: 3 * 64 * 512 * 2 + 2 * (ROWS * SPAN_BYTES + ROWS * 4) + ROWS * 4 + 128,
};

pub(super) const TILES: [AttentionHopperTile; 9] = [
    tile("attention_hopper_40_held", 40, 3, 1, 80),
    tile("attention_hopper_64_held", 64, 3, 1, 80),
    tile("attention_hopper_80_held", 80, 2, 1, 80),
    tile("attention_hopper_160_held", 160, 2, 1, 80),
    tile("attention_hopper_40_ring", 40, 3, 4, 128),
    tile("attention_hopper_64_ring", 64, 3, 4, 128),
    tile("attention_hopper_80_ring", 80, 2, 2, 128),
    tile("attention_hopper_160_ring", 160, 2, 2, 64),
    WIDE,
];

impl AttentionHopperTile {
    /// The number of blocks for each of `heads` heads of all images: the fewest with which the busiest multiprocessor
    /// finishes soonest.
    fn blocks(&self, queries: usize, heads: usize, limits: Limits) -> usize {
        let tiles = queries.div_ceil(self.rows);
        if !self.walks {
            return tiles;
        }
        let time =
            |blocks: &usize| (blocks * heads).div_ceil(limits.multiprocessors as usize) * tiles.div_ceil(*blocks);
        (1..=tiles).min_by_key(time).unwrap_or(1)
    }
}

/// True if the kernels of 9.0 support an attention, apart from the width of its heads.
pub(super) fn suits(attention: &Attention, shape: impl Fn(TensorId) -> Shape, limits: Limits) -> bool {
    limits.capability == 90 && rejected(attention, shape).is_none()
}

/// The reason why they do not support it.
fn rejected(attention: &Attention, shape: impl Fn(TensorId) -> Shape) -> Option<&'static str> {
    let Attention { q, k, v, head_dim, causal, .. } = *attention;
    if causal {
        Some("keys are hidden from queries before them")
    } else if !is_aligned(attention, &shape) {
        Some("its heads are not aligned to 16 bytes")
    } else if [q, k, v].into_iter().any(|view| !shape(view.tensor).c.is_multiple_of(head_dim)) {
        Some("its pixels do not hold a whole number of heads")
    } else {
        None
    }
}

/// The reason why an attention gets none of the kernels of 9.0 on a card of 9.0; `None` if it gets one.
pub(super) fn reason(attention: &Attention, shape: impl Fn(TensorId) -> Shape, limits: Limits) -> Option<&'static str> {
    if limits.capability != 90 || choose(attention, &shape, limits).is_some() {
        return None;
    }
    rejected(attention, shape).or(Some("no kernel has heads of this width"))
}

/// The tensor map of a view's heads, in tiles of `rows` tokens and one span of a head's channels.
///
/// # Errors
/// [`crate::ErrorKind::Unsupported`] if TMA does not take the tensor.
pub(super) fn head_tiles(view: View, heads: usize, head_dim: usize, rows: usize, site: &Site) -> Result<[u64; 16]> {
    let Shape { n: images, c: width, .. } = site.shape(view.tensor);
    let tokens = site.shape(view.tensor).tokens();
    (site.bindings.tensor_map)(&TensorTiles {
        address: site.view(view),
        sizes: &[head_dim, heads, tokens, images].map(|n| n as u64),
        strides: &[head_dim, width, tokens * width].map(|n| (n * size_of::<f16>()) as u64),
        tile: &[SPAN as u32, 1, rows as u32, 1],
        swizzle: SWIZZLE,
    })
}

/// The kernel for one image's shape, if there is one: they exist for the head widths of Stable Diffusion.
pub(super) fn choose(
    attention: &Attention,
    shape: impl Fn(TensorId) -> Shape,
    limits: Limits,
) -> Option<&'static AttentionHopperTile> {
    let keys = shape(attention.k.tensor).tokens();
    let able = |tile: &&AttentionHopperTile| tile.head_dim == attention.head_dim && keys <= tile.most;
    TILES.iter().find(able).filter(|_| suits(attention, &shape, limits))
}

/// # Errors
/// [`crate::ErrorKind::Unsupported`] if TMA does not take the tensors.
pub(super) fn launch(attention: &Attention, out: TensorId, site: &Site, tile: &AttentionHopperTile) -> Result<Launch> {
    let Attention { q, k, v, heads, head_dim, scale, .. } = *attention;
    let (queries, keys) = (site.shape(out).tokens(), site.shape(k.tensor).tokens());
    let images = site.shape(out).n;
    let map = |view: View, rows: usize| head_tiles(view, heads, head_dim, rows, site);
    let params = AttentionHopperParams {
        q: map(q, ROWS)?,
        k: map(k, tile.keys)?,
        v: map(v, tile.values)?,
        out: map(out.into(), ROWS)?,
        queries: queries as i32,
        keys: keys as i32,
        exponent: scale * std::f32::consts::LOG2_E,
        padding: [0; 29],
    };
    let grid = [tile.blocks(queries, heads * images, site.limits), heads, images];
    Ok(Launch::new(tile.kernel, grid, tile.threads, tile.shared, &params))
}

#[cfg(test)]
mod tests {
    use super::super::tiles::tests::networks;
    use super::*;
    use crate::graph::Op;
    use std::collections::BTreeSet;

    /// One image's queries and keys, heads and their channels, true if causal, and the kernel if one is chosen.
    type Chosen = (usize, usize, usize, usize, bool, Option<&'static str>);

    /// The shapes of the real networks on `limits`.
    fn chosen(limits: Limits) -> BTreeSet<Chosen> {
        let mut all = BTreeSet::new();
        for (_, graph, _) in networks() {
            for node in graph.nodes() {
                let Op::Attention(of) = &node.op else { continue };
                let (queries, keys) = (graph.shape(node.output).tokens(), graph.shape(of.k.tensor).tokens());
                let tile = choose(of, |id| graph.shape(id), limits);
                all.insert((queries, keys, of.heads, of.head_dim, of.causal, tile.map(|tile| tile.kernel)));
            }
        }
        all
    }

    #[test]
    fn kernels_of_real_networks_on_an_h100() {
        let expected = [
            // CLIP, the VAEs.
            (77, 77, 12, 64, true, None),
            (77, 77, 20, 64, true, None),
            (4096, 4096, 1, 512, false, Some("attention_hopper_512")),
            (16384, 16384, 1, 512, false, Some("attention_hopper_512")),
            // Stable Diffusion 1.5 at 512.
            (4096, 4096, 8, 40, false, Some("attention_hopper_40_ring")),
            (4096, 77, 8, 40, false, Some("attention_hopper_40_held")),
            (1024, 1024, 8, 80, false, Some("attention_hopper_80_ring")),
            (1024, 77, 8, 80, false, Some("attention_hopper_80_held")),
            (256, 256, 8, 160, false, Some("attention_hopper_160_ring")),
            (256, 77, 8, 160, false, Some("attention_hopper_160_held")),
            (64, 64, 8, 160, false, Some("attention_hopper_160_held")),
            (64, 77, 8, 160, false, Some("attention_hopper_160_held")),
            // SDXL at 1024.
            (4096, 4096, 10, 64, false, Some("attention_hopper_64_ring")),
            (4096, 77, 10, 64, false, Some("attention_hopper_64_held")),
            (1024, 1024, 20, 64, false, Some("attention_hopper_64_ring")),
            (1024, 77, 20, 64, false, Some("attention_hopper_64_held")),
        ];
        assert_eq!(chosen(Limits::H100), expected.into());
        for limits in Limits::CARDS.into_iter().filter(|&limits| limits != Limits::H100) {
            assert!(chosen(limits).into_iter().all(|(.., kernel)| kernel.is_none()), "{limits:?}");
        }
    }

    #[test]
    fn blocks_fill_the_multiprocessors() {
        let tile = |kernel| TILES.iter().find(|tile| tile.kernel == kernel).unwrap();
        let blocks = |kernel, queries, heads| tile(kernel).blocks(queries, heads, Limits::H100);
        // For a guided pair: as few rounds as if tiles were distributed one by one.
        assert_eq!(blocks("attention_hopper_40_ring", 4096, 16), 8);
        assert_eq!(blocks("attention_hopper_64_ring", 4096, 20), 6);
        assert_eq!(blocks("attention_hopper_64_ring", 1024, 40), 3);
        assert_eq!(blocks("attention_hopper_80_ring", 1024, 16), 8);
        // For eight images: 80 heads of 22 tiles, which are 13.3 per multiprocessor.
        assert_eq!(blocks("attention_hopper_64_ring", 4096, 80), 11);
        assert!(TILES.iter().all(|tile| tile.shared <= Limits::H100.shared as usize));
    }
}
