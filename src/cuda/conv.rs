//! Launches of `kernels/conv.cu`.

use super::device::{Launch, Limits};
use super::program::{Element, Site};
use super::tiles::{Choice, Product, THREADS, choose};
use super::weights::CHUNK;
use crate::graph::{Conv, Graph, Op, Shape, TensorId};
use bytemuck::NoUninit;

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct ConvParams {
    sources: [u64; 2],
    weight: u64,
    bias: u64,
    per_image: u64,
    residual: u64,
    out: u64,
    shift: u64,
    shifted: u64,
    partial: u64,
    source_channels: [i32; 2],
    depth: i32,
    height: i32,
    width: i32,
    seen_height: i32,
    seen_width: i32,
    out_height: i32,
    out_width: i32,
    kernel: i32,
    stride: i32,
    pad: i32,
    rows: i32,
    pixels: i32,
    columns: i32,
    channels: i32,
    splits: i32,
    steps: i32,
    activation: i32,
    full: i32,
    first_shifted: i32,
    gain: f32,
    bias_gain: f32,
    scale: f32,
}

/// The RespoDiff shift of `x` and its result, if there is one: the convolution that makes `x` writes both.
fn shift_of(graph: &Graph, x: TensorId) -> Option<(TensorId, TensorId)> {
    graph.nodes().iter().find_map(|node| match node.op {
        Op::Shift { x: shifted, shift } if shifted == x => Some((shift, node.output)),
        _ => None,
    })
}

/// Whether a convolution makes `x`, and with it what `x` is shifted to.
pub(super) fn makes(graph: &Graph, x: TensorId) -> bool {
    graph.nodes().iter().any(|node| node.output == x && matches!(node.op, Op::Conv(_)))
}

/// The product of one image, and how it is computed for all.
fn plan(graph: &Graph, conv: &Conv, out: TensorId, limits: Limits) -> (Product, Choice) {
    let shape = graph.shape(out);
    let channels: usize = conv.sources.iter().map(|id| graph.shape(id).c).sum();
    let one = Product {
        rows: shape.tokens(),
        columns: graph.weight(conv.weight).total_outputs(),
        depth: conv.kernel * conv.kernel * channels.next_multiple_of(CHUNK),
        vector: conv.sources.iter().all(|id| graph.shape(id).c % CHUNK == 0),
    };
    (one, choose(one, shape.n, limits))
}

/// Bytes of the sums of a depth in parts.
pub(super) fn workspace(graph: &Graph, conv: &Conv, out: TensorId, limits: Limits) -> usize {
    let (one, choice) = plan(graph, conv, out, limits);
    Product { rows: graph.shape(out).rows(), ..one }.partial_bytes(choice.splits)
}

pub(super) fn conv(conv: &Conv, out: TensorId, site: &Site, launches: &mut Vec<Launch>) {
    let graph = site.graph();
    let (input, output) = (site.shape(conv.sources.x), site.shape(out));
    let (one, Choice { tile, splits, steps }) = plan(graph, conv, out, site.limits);
    let all = Product { rows: output.rows(), ..one };
    // Where every pixel is read once and by itself, each is an image of its own: any number of tokens, no geometry.
    let pointwise = conv.kernel == 1 && conv.stride == 1 && conv.pad == 0 && conv.resize.is_none();
    let point = Shape::new(output.rows(), 1, 1, input.c);
    let (stored, made) = if pointwise { (point, point) } else { (input, output) };
    let (seen_height, seen_width) = conv.resize.unwrap_or((stored.h, stored.w));
    let shift = shift_of(graph, out);
    let params = ConvParams {
        sources: [site.address(conv.sources.x), site.optional(conv.sources.skip)],
        weight: site.weight(conv.weight),
        bias: conv.bias.map_or(0, |id| site.weight(id)),
        per_image: site.optional(conv.per_image),
        residual: site.optional(conv.residual),
        out: site.address(out),
        shift: site.optional(shift.map(|(shift, _)| shift)),
        shifted: site.optional(shift.map(|(_, shifted)| shifted)),
        partial: if splits > 1 { site.workspace() } else { 0 },
        source_channels: [input.c as i32, conv.sources.skip.map_or(0, |id| site.shape(id).c as i32)],
        depth: (one.depth / (conv.kernel * conv.kernel)) as i32,
        height: stored.h as i32,
        width: stored.w as i32,
        seen_height: seen_height as i32,
        seen_width: seen_width as i32,
        out_height: made.h as i32,
        out_width: made.w as i32,
        kernel: conv.kernel as i32,
        stride: conv.stride as i32,
        pad: conv.pad as i32,
        rows: all.rows as i32,
        pixels: output.tokens() as i32,
        columns: all.columns as i32,
        channels: output.c as i32,
        splits: splits as i32,
        steps: steps as i32,
        activation: conv.activation as i32,
        full: i32::from(site.element(out) == Element::F32),
        first_shifted: shift.map_or(0, |(shift, _)| (output.n - site.shape(shift).n) as i32),
        gain: conv.gain,
        bias_gain: conv.bias_gain,
        scale: conv.scale,
    };
    launches.push(Launch::new(tile.kernel, [tile.count(&all), splits, 1], THREADS, tile.shared(), &params));
    if splits > 1 {
        let threads = all.rows * output.c.div_ceil(CHUNK);
        launches.push(Launch::new("conv_finish", [threads.div_ceil(THREADS), 1, 1], THREADS, 0, &params));
    }
}
