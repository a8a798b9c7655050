//! Launches of `kernels/attention_gradient.cu`, where those of `attention_gradient_hopper.cu` are not taken.

use super::attention::is_aligned;
use super::attention_gradient_hopper as hopper;
use super::device::{Launch, Limits};
use super::site::Site;
use crate::graph::{Attention, Graph, TensorId, View};
use crate::{Error, Result, Subject};

/// Queries or keys of a block, and its threads.
const OWN: usize = 64;
pub(super) const THREADS: usize = 128;
/// Bytes of a query's statistics.
const STATISTICS: usize = 4 * size_of::<f32>();

crate::params! {
    pub(super) struct AttentionGradientParams {
        q: u64,
        k: u64,
        v: u64,
        d: u64,
        dq: u64,
        dk: u64,
        dv: u64,
        statistics: u64,
        queries: i32,
        keys: i32,
        head_dim: i32,
        q_width: i32,
        k_width: i32,
        v_width: i32,
        d_width: i32,
        out_width: i32,
        exponent: f32,
        scale: f32,
    }
}

/// A pair of the kernels of `kernels/attention_gradient.cu`: the mirror of their `Tile`.
#[derive(Debug, PartialEq)]
pub(super) struct AttentionGradientTile {
    pub by_query: &'static str,
    pub by_key: &'static str,
    /// The head dimension, padded.
    width: usize,
    /// True if it copies 16 bytes at a time.
    vector: bool,
}

const fn tile(by_query: &'static str, by_key: &'static str, width: usize, vector: bool) -> AttentionGradientTile {
    AttentionGradientTile { by_query, by_key, width, vector }
}

/// In order of width.
pub(super) const TILES: [AttentionGradientTile; 6] = [
    tile("attention_gradient_by_query_40", "attention_gradient_by_key_40", 40, true),
    tile("attention_gradient_by_query_64", "attention_gradient_by_key_64", 64, true),
    tile("attention_gradient_by_query_80", "attention_gradient_by_key_80", 80, true),
    tile("attention_gradient_by_query_160", "attention_gradient_by_key_160", 160, true),
    tile("attention_gradient_by_query_40_unaligned", "attention_gradient_by_key_40_unaligned", 40, false),
    tile("attention_gradient_by_query_160_unaligned", "attention_gradient_by_key_160_unaligned", 160, false),
];

impl AttentionGradientTile {
    /// Bytes of shared memory: own rows of two tensors, two stages of others, and the statistics of these queries.
    pub fn shared(&self) -> usize {
        let others = if self.width > 80 { 32 } else { 64 };
        2 * (OWN + 2 * others) * ((self.width / 8) | 1) * 16 + 2 * others * STATISTICS
    }
}

/// The narrowest pair that supports the heads.
fn choose(head_dim: usize, aligned: bool, limits: Limits) -> Option<&'static AttentionGradientTile> {
    let able = |tile: &&AttentionGradientTile| {
        head_dim <= tile.width && (aligned || !tile.vector) && tile.shared() <= limits.shared as usize
    };
    TILES.iter().find(able)
}

/// Bytes of the statistics that the first kernel leaves to the second.
pub(super) fn workspace(graph: &Graph, of: &Attention, fused: bool) -> usize {
    let shape = graph.shape(of.q.tensor);
    if fused { shape.rows() * of.heads * STATISTICS } else { 0 }
}

/// # Errors
/// [`crate::ErrorKind::Unsupported`] for heads wider than any kernel's, for causal attention, or if TMA does not take
/// the tensors.
pub(super) fn attention_gradient(
    of: &Attention,
    fused: bool,
    d: TensorId,
    out: TensorId,
    site: &Site,
    launches: &mut Vec<Launch>,
) -> Result<()> {
    if let Some(tile) = hopper::choose(of, |t| site.shape(t), site.limits) {
        return hopper::attention_gradient(of, fused, d, out, site, tile, launches);
    }
    let Attention { q, k, v, heads, head_dim, scale, causal } = *of;
    let width = |view: View| site.shape(view.tensor).c;
    let shape = site.shape(d);
    let (queries, keys) = (shape.tokens(), site.shape(k.tensor).tokens());
    let tile =
        choose(head_dim, is_aligned(of, |t| site.shape(t)), site.limits).filter(|_| !causal).ok_or_else(|| {
            let widest = TILES.iter().map(|tile| tile.width).max().unwrap_or(0);
            let problem = format!("the gradient of attention with heads of {head_dim} channels, causal {causal}");
            Error::unsupported(Subject::Device, format!("{problem}; the kernels take {widest}, not causal"))
                .advise("choose the CPU")
        })?;
    let result = |view: View| if fused { site.view(View { tensor: out, ..view }) } else { site.address(out) };
    let params = AttentionGradientParams {
        q: site.view(q),
        k: site.view(k),
        v: site.view(v),
        d: site.address(d),
        dq: result(q),
        dk: result(k),
        dv: result(v),
        statistics: if fused { site.workspace() } else { 0 },
        queries: queries as i32,
        keys: keys as i32,
        head_dim: head_dim as i32,
        q_width: width(q) as i32,
        k_width: width(k) as i32,
        v_width: width(v) as i32,
        d_width: shape.c as i32,
        out_width: site.shape(out).c as i32,
        exponent: scale * std::f32::consts::LOG2_E,
        scale,
    };
    let mut launch = |kernel, rows: usize| {
        let grid = [rows.div_ceil(OWN), heads, shape.n];
        launches.push(Launch::new(kernel, grid, THREADS, tile.shared(), &params));
    };
    launch(tile.by_query, queries);
    if fused {
        launch(tile.by_key, keys);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_of_a_unet_has_a_kernel() {
        for head_dim in 1..=160 {
            for aligned in [false, head_dim % 8 == 0] {
                // The least shared memory that a supported GPU offers.
                let tile = choose(head_dim, aligned, Limits { shared: 99 << 10, ..Limits::A100 }).unwrap();
                assert!(tile.width >= head_dim && (aligned || !tile.vector));
            }
        }
        assert_eq!(choose(40, true, Limits::A100).unwrap().by_query, "attention_gradient_by_query_40");
        assert_eq!(choose(48, true, Limits::A100).unwrap().by_key, "attention_gradient_by_key_64");
        assert_eq!(choose(64, false, Limits::A100).unwrap().by_key, "attention_gradient_by_key_160_unaligned");
        assert_eq!(choose(161, true, Limits::H100), None);
    }
}
