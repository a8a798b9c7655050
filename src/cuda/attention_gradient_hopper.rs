//! Launches of `kernels/attention_gradient_hopper.cu`.

use super::attention_hopper::{ROWS, SPAN, SPAN_BYTES, head_tiles, suits};
use super::device::{Launch, Limits, TensorTiles};
use super::site::Site;
use crate::Result;
use crate::graph::{Attention, Shape, TensorId, View};

/// Consumer warpgroups of a block; one more has the producer.
const GROUPS: usize = 2;
/// Threads of a block.
pub(super) const THREADS: usize = 128 * (GROUPS + 1);
/// Stages of the ring of others.
const STAGES: usize = 4;
/// Bytes of a query's statistics.
const STATISTICS: usize = 4 * size_of::<f32>();

crate::params! {
    pub(super) struct AttentionGradientHopperParams {
        own_first: [u64; 16],
        own_second: [u64; 16],
        other_first: [u64; 16],
        other_second: [u64; 16],
        out_first: [u64; 16],
        out_second: [u64; 16],
        statistics_tiles: [u64; 16],
        statistics: u64,
        own: i32,
        others: i32,
        exponent: f32,
        scale: f32,
        padding: [i32; 26],
    }
}

/// A pair of the kernels: the mirror of their `Tile`.
#[derive(Debug, PartialEq)]
pub(super) struct AttentionGradientHopperTile {
    pub by_query: &'static str,
    pub by_key: &'static str,
    head_dim: usize,
    /// Others per stage.
    others: usize,
}

const fn tile(
    by_query: &'static str,
    by_key: &'static str,
    head_dim: usize,
    others: usize,
) -> AttentionGradientHopperTile {
    AttentionGradientHopperTile { by_query, by_key, head_dim, others }
}

pub(super) const TILES: [AttentionGradientHopperTile; 4] = [
    tile("attention_gradient_hopper_40_by_query", "attention_gradient_hopper_40_by_key", 40, 64),
    tile("attention_gradient_hopper_64_by_query", "attention_gradient_hopper_64_by_key", 64, 64),
    tile("attention_gradient_hopper_80_by_query", "attention_gradient_hopper_80_by_key", 80, 64),
    tile("attention_gradient_hopper_160_by_query", "attention_gradient_hopper_160_by_key", 160, 32),
];

impl AttentionGradientHopperTile {
    /// Bytes of shared memory: own rows and stages of others, of two tensors each, the statistics of others, and 256
    /// bytes of barriers.
    pub fn shared(&self) -> usize {
        let rows = 2 * (GROUPS * ROWS + STAGES * self.others);
        rows * self.head_dim.div_ceil(SPAN) * SPAN_BYTES + STAGES * self.others * STATISTICS + 256
    }
}

/// The kernels for one image's shape, if there are any: where the forward pass has one of 9.0, except for the VAE's
/// head.
pub(super) fn choose(
    attention: &Attention,
    shape: impl Fn(TensorId) -> Shape,
    limits: Limits,
) -> Option<&'static AttentionGradientHopperTile> {
    TILES.iter().find(|tile| tile.head_dim == attention.head_dim && suits(attention, &shape, limits))
}

/// Appends the launches of a gradient: by queries alone, to `out`; or, if `fused`, by queries, keys and values, at the
/// places in `out` that they have in the one tensor which holds them.
///
/// # Errors
/// [`crate::ErrorKind::Unsupported`] if TMA does not take the tensors.
pub(super) fn attention_gradient(
    of: &Attention,
    fused: bool,
    d: TensorId,
    out: TensorId,
    site: &Site,
    tile: &AttentionGradientHopperTile,
    launches: &mut Vec<Launch>,
) -> Result<()> {
    let Attention { q, k, v, heads, head_dim, scale, .. } = *of;
    let (queries, keys, images) = (site.shape(d).tokens(), site.shape(k.tensor).tokens(), site.shape(d).n);
    let map = |view: View, rows: usize| head_tiles(view, heads, head_dim, rows, site);
    let result = |view: View| View { tensor: out, offset: if fused { view.offset } else { 0 } };
    // The first and the second tensor of each kind of rows.
    let (of_query, of_key) = ([q, d.into()], [k, v]);
    let params = |own: [View; 2], own_count: usize, others: [View; 2], other_count: usize| {
        Ok::<_, crate::Error>(AttentionGradientHopperParams {
            own_first: map(own[0], ROWS)?,
            own_second: map(own[1], ROWS)?,
            other_first: map(others[0], tile.others)?,
            other_second: map(others[1], tile.others)?,
            out_first: map(result(own[0]), ROWS)?,
            out_second: [0; 16],
            statistics_tiles: [0; 16],
            statistics: 0,
            own: own_count as i32,
            others: other_count as i32,
            exponent: scale * std::f32::consts::LOG2_E,
            scale,
            padding: [0; 26],
        })
    };
    let mut launch = |kernel, rows: usize, params: &AttentionGradientHopperParams| {
        let grid = [rows.div_ceil(GROUPS * ROWS), heads, images];
        launches.push(Launch::new(kernel, grid, THREADS, tile.shared(), params));
    };
    let by_query = params(of_query, queries, of_key, keys)?;
    if !fused {
        launch(tile.by_query, queries, &by_query);
        return Ok(());
    }
    launch(tile.by_query, queries, &AttentionGradientHopperParams { statistics: site.workspace(), ..by_query });
    let statistics_tiles = (site.bindings.tensor_map)(&TensorTiles {
        address: site.workspace(),
        sizes: &[STATISTICS / 2, queries, heads * images].map(|n| n as u64),
        strides: &[STATISTICS, queries * STATISTICS].map(|n| n as u64),
        tile: &[STATISTICS as u32 / 2, tile.others as u32, 1],
        swizzle: 0,
    })?;
    let by_key = params(of_key, keys, of_query, queries)?;
    let by_key = AttentionGradientHopperParams { out_second: map(result(v), ROWS)?, statistics_tiles, ..by_key };
    launch(tile.by_key, keys, &by_key);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tiles::tests::trainings;
    use super::*;
    use crate::graph::Op;
    use std::collections::BTreeSet;

    /// The head widths of the real networks' gradients, with true if they have kernels of 9.0.
    fn chosen(limits: Limits) -> BTreeSet<(usize, bool)> {
        let mut all = BTreeSet::new();
        for (_, graph) in trainings() {
            for node in graph.nodes() {
                let Op::AttentionGradient { of, .. } = &node.op else { continue };
                all.insert((of.head_dim, choose(of, |id| graph.shape(id), limits).is_some()));
            }
        }
        all
    }

    #[test]
    fn kernels_of_real_networks_on_an_h100() {
        let heads = [40, 64, 80, 160];
        assert_eq!(chosen(Limits::H100), heads.map(|head_dim| (head_dim, true)).into());
        for limits in Limits::CARDS.into_iter().filter(|&limits| limits != Limits::H100) {
            assert_eq!(chosen(limits), heads.map(|head_dim| (head_dim, false)).into(), "{limits:?}");
        }
        assert!(TILES.iter().all(|tile| tile.shared() <= Limits::H100.shared as usize));
    }
}
