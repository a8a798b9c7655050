//! `kernels/attention.cu` and `kernels/attention_hopper*.cu`.

use super::*;
use respodiff::graph::View;

/// An attention over fp16 tensors, each view beginning at an offset.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub images: usize,
    /// Height and width of the queries.
    pub queries: (usize, usize),
    pub keys: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub causal: bool,
    pub from: From,
}

/// The tensors of queries, keys and values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum From {
    /// All in one tensor, with as many keys as queries.
    Fused,
    /// Keys and values in one tensor of the text.
    Text,
    /// Each in its own tensor, after so many unused channels for queries, and two and three times as many for keys and
    /// values.
    Apart(usize),
}

impl Case {
    pub fn shapes(&self) -> Vec<Shape> {
        let Case { images, queries: (h, w), keys, heads, head_dim, .. } = *self;
        let c = heads * head_dim;
        match self.from {
            From::Fused => vec![Shape::new(images, h, w, 3 * c)],
            From::Text => vec![Shape::new(images, h, w, c), Shape::new(images, 1, keys, 2 * c)],
            From::Apart(gap) => [(h, w, gap), (1, keys, 2 * gap), (1, keys, 3 * gap)]
                .map(|(h, w, gap)| Shape::new(images, h, w, c + gap))
                .into(),
        }
    }

    /// The tensor and the first channel of each view: queries, keys, values.
    pub fn views(&self) -> [(usize, usize); 3] {
        let c = self.heads * self.head_dim;
        match self.from {
            From::Fused => [(0, 0), (0, c), (0, 2 * c)],
            From::Text => [(0, 0), (1, 0), (1, c)],
            From::Apart(gap) => [(0, gap), (1, 2 * gap), (2, 3 * gap)],
        }
    }

    pub fn keys(&self) -> usize {
        if self.from == From::Fused { self.queries.0 * self.queries.1 } else { self.keys }
    }

    pub fn build(&self, g: &mut GraphBuilder, x: &[TensorId]) -> TensorId {
        let [q, k, v] = self.views().map(|(tensor, offset)| View { tensor: x[tensor], offset });
        g.attention("attention", (q, k, v), self.heads, self.head_dim, self.causal)
    }

    /// The plain loop. Scores, weights and results are rounded.
    fn plain(&self, inputs: &[Numbers], round: Round) -> Numbers {
        let (queries, keys, c) = (self.queries.0 * self.queries.1, self.keys(), self.heads * self.head_dim);
        let scale = (self.head_dim as f32).powf(-0.5) as f64;
        let shapes = self.shapes();
        let [q, k, v] = self.views();
        let at = |(tensor, offset): (usize, usize), token: usize, channel: usize| {
            inputs[tensor][token * shapes[tensor].c + offset + channel]
        };
        let mut out = Vec::with_capacity(self.images * queries * c);
        for (image, query, head) in (0..self.images * queries * self.heads)
            .map(|i| (i / self.heads / queries, i / self.heads % queries, i % self.heads))
        {
            let channels = head * self.head_dim..(head + 1) * self.head_dim;
            let seen = if self.causal { keys.min(query + 1) } else { keys };
            let scores: Numbers = (0..seen)
                .map(|key| {
                    let products =
                        channels.clone().map(|j| at(q, image * queries + query, j) * at(k, image * keys + key, j));
                    round(products.sum::<f64>() * scale)
                })
                .collect();
            let top = scores.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
            let weights: Numbers = scores.iter().map(|s| round((s - top).exp())).collect();
            let total: f64 = weights.iter().sum();
            for j in channels {
                let sum: f64 = weights.iter().enumerate().map(|(key, p)| p * at(v, image * keys + key, j)).sum();
                out.push(round(sum / total));
            }
        }
        out
    }

    /// Inputs in -1..1, with the queries times `size`.
    pub fn inputs(&self, size: f64) -> Vec<Numbers> {
        let mut inputs: Vec<Numbers> =
            self.shapes().iter().enumerate().map(|(i, shape)| random(shape.len(), 5 + i as u64)).collect();
        let (offset, c, width) = (self.views()[0].1, self.heads * self.head_dim, self.shapes()[0].c);
        for token in inputs[0].chunks_exact_mut(width) {
            token[offset..offset + c].iter_mut().for_each(|x| *x = to_half(*x * size));
        }
        inputs
    }

    fn check(&self, size: f64) {
        self.check_with(&format!("times {size}"), self.inputs(size));
    }

    /// Returns the outputs of each kind of card that has kernels of its own.
    fn check_with(&self, what: &str, inputs: Vec<Numbers>) -> Vec<Vec<f32>> {
        let label = format!("{what}: {self:?}");
        let plain = |given: &Given, round: Round| self.plain(&given.inputs, round);
        let check = |limits, inputs| check_with(limits, &label, &self.shapes(), inputs, |g, x| self.build(g, x), plain);
        // For the widest heads, cards with less shared memory have a kernel of their own.
        if self.head_dim > 160 {
            check(Limits::RTX_4090, inputs.clone());
        }
        // An H100 has kernels of its own for the head widths of Stable Diffusion. With a single multiprocessor, one
        // block processes all queries of a head; this must not change the result.
        let mut outputs = vec![check(Limits::A100, inputs.clone())];
        if [40, 64, 80, 160, 512].contains(&self.head_dim) && !self.causal {
            let small = check(Limits { multiprocessors: 1, ..Limits::H100 }, inputs.clone());
            let large = check(Limits::H100, inputs);
            let same = small.iter().zip(&large).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{label}: results depend on the number of multiprocessors");
            outputs.push(large);
        }
        outputs
    }
}

pub const CASE: Case =
    Case { images: 1, queries: (5, 7), keys: 77, heads: 1, head_dim: 40, causal: false, from: From::Text };

#[test]
fn self_attention_on_views_of_one_tensor() {
    for (images, queries, heads, head_dim) in [
        (1, (1, 1), 2, 40),
        (3, (1, 5), 3, 8),
        (2, (5, 7), 2, 64),
        (1, (1, 113), 2, 80),
        (2, (7, 29), 1, 40),
        (1, (14, 14), 1, 160),
        (1, (8, 8), 2, 160),
    ] {
        Case { images, queries, heads, head_dim, from: From::Fused, ..CASE }.check(2.0);
    }
}

#[test]
fn cross_attention_with_77_keys() {
    for (images, queries, heads, head_dim) in
        [(2, (11, 13), 2, 40), (1, (9, 9), 2, 64), (3, (5, 7), 1, 80), (1, (3, 5), 2, 160)]
    {
        Case { images, queries, heads, head_dim, ..CASE }.check(4.0);
    }
}

/// So many heads that they fill a GPU with tiles of 128 queries, of which half exist.
#[test]
fn large_tiles() {
    for (keys, head_dim, causal) in [(77, 40, false), (67, 64, false), (65, 64, true), (131, 80, false)] {
        Case { queries: (5, 13), keys, heads: 54, head_dim, causal, ..CASE }.check(2.0);
    }
}

/// On an H100: rings that wrap around, tiles of 192 or 128 queries, and scores that raise a row's reference, which the
/// softmax subtracts, in later stages.
#[test]
fn long_rows() {
    for (images, queries, keys, heads, head_dim) in [
        (1, (1, 391), 641, 1, 40),
        (1, (3, 67), 770, 2, 64),
        (2, (1, 131), 390, 1, 80),
        (1, (1, 137), 260, 1, 160),
        (2, (1, 71), 390, 1, 512),
    ] {
        Case { images, queries, keys, heads, head_dim, ..CASE }.check(30.0);
    }
    // Keys in a single stage, which is held in shared memory while tiles of queries pass: up to its last key.
    for (keys, head_dim) in [(80, 40), (17, 64), (1, 80), (79, 160)] {
        Case { queries: (1, 401), keys, head_dim, ..CASE }.check(8.0);
    }
    // Views whose pixels are a whole number of heads, and which begin at any head.
    for head_dim in [40, 80, 160] {
        Case { queries: (3, 3), keys: 133, heads: 2, head_dim, from: From::Apart(head_dim), ..CASE }.check(2.0);
    }
}

#[test]
fn causal() {
    for (queries, heads, head_dim) in [((1, 77), 2, 64), ((1, 203), 1, 40), ((1, 35), 1, 512), ((1, 5), 3, 4)] {
        Case { images: 2, queries, heads, head_dim, causal: true, from: From::Fused, ..CASE }.check(2.0);
    }
}

#[test]
fn one_wide_head() {
    for (images, queries, head_dim) in [(2, (1, 5), 512), (1, (7, 11), 512), (1, (3, 32), 264)] {
        Case { images, queries, head_dim, from: From::Fused, ..CASE }.check(1.0);
    }
}

#[test]
fn heads_that_begin_anywhere() {
    // Heads that are not a multiple of 16 bytes, then offsets and widths that are not.
    for (head_dim, from) in [
        (4, From::Fused),
        (12, From::Text),
        (35, From::Text),
        (97, From::Fused),
        (161, From::Text),
        (40, From::Apart(3)),
        (64, From::Apart(4)),
    ] {
        Case { images: 2, queries: (5, 7), keys: 19, heads: 3, head_dim, from, ..CASE }.check(2.0);
    }
    for head_dim in [24, 40, 96, 128] {
        Case { queries: (3, 3), keys: 67, heads: 2, head_dim, from: From::Apart(8), ..CASE }.check(2.0);
    }
}

#[test]
fn scores_of_ten_thousands() {
    for head_dim in [40, 80, 512] {
        Case { queries: (5, 19), head_dim, from: From::Fused, ..CASE }.check(30000.0);
    }
    // Scores that are multiples of 8 up to 16384, which fp16 can represent: the loops round only weights and results.
    let case = Case { queries: (7, 11), heads: 2, head_dim: 64, from: From::Fused, ..CASE };
    let mut inputs = case.inputs(1.0);
    for token in inputs[0].chunks_exact_mut(3 * 128) {
        token[..128].iter_mut().for_each(|q| *q = (*q * 60.0).round() * 64.0);
        token[128..256].iter_mut().for_each(|k| *k = (*k * 1.5).round());
    }
    case.check_with("scores in steps of 8", inputs);
}

/// The greatest fp16 numbers come out as they went in.
#[test]
fn largest_values_stay_finite() {
    let case = Case { keys: 77, head_dim: 40, from: From::Apart(8), ..CASE };
    let mut inputs = case.inputs(1.0);
    inputs[2].fill(65504.0);
    case.check_with("values of 65504", inputs);
}

/// The sizes of SD 1.5's and SDXL's blocks in channels, with fewer tokens.
#[test]
fn an_image_alone_and_among_others() {
    for (queries, heads, head_dim, from) in [
        ((16, 16), 8, 40, From::Fused),
        ((5, 29), 2, 64, From::Text),
        ((5, 7), 2, 80, From::Text),
        ((5, 7), 2, 160, From::Fused),
        ((5, 9), 1, 512, From::Fused),
    ] {
        let case = Case { images: 3, queries, heads, head_dim, from, ..CASE };
        let inputs = case.inputs(2.0);
        let together = case.check_with("together", inputs.clone());
        for image in 0..3 {
            let own = |x: &Numbers| x[image * x.len() / 3..(image + 1) * x.len() / 3].to_vec();
            let alone = Case { images: 1, ..case }.check_with("alone", inputs.iter().map(own).collect());
            for (alone, together) in alone.iter().zip(&together) {
                let among = &together[image * alone.len()..(image + 1) * alone.len()];
                let same = alone.iter().zip(among).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "heads of {head_dim}: image {image} depends on the others");
            }
        }
    }
}
