//! `kernels/attention_gradient.cu` and `kernels/attention_gradient_hopper.cu`.

use super::attention::{CASE, Case, From};
use super::*;

impl Case {
    /// The gradient with respect to the first input: to queries, keys and values of one tensor, or to queries alone.
    /// The softmax, the gradients of both products and the results are rounded.
    fn plain_gradient(&self, inputs: &[Numbers], round: Round) -> Numbers {
        let (queries, keys, c) = (self.queries.0 * self.queries.1, self.keys(), self.heads * self.head_dim);
        let scale = (self.head_dim as f32).powf(-0.5) as f64;
        let (shapes, seed) = (self.shapes(), inputs.last().unwrap());
        let [q, k, v] = self.views();
        let place = |(tensor, offset): (usize, usize), token: usize, j: usize| token * shapes[tensor].c + offset + j;
        let mut out = vec![0.0; inputs[0].len()];
        for (image, head) in (0..self.images * self.heads).map(|i| (i / self.heads, i % self.heads)) {
            let channels = head * self.head_dim..(head + 1) * self.head_dim;
            let of = |view: (usize, usize), token: usize| {
                &inputs[view.0][place(view, token, channels.start)..][..self.head_dim]
            };
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            for query in image * queries..(image + 1) * queries {
                let d = &seed[query * c + channels.start..][..self.head_dim];
                let tokens = image * keys..(image + 1) * keys;
                let scores: Numbers = tokens.clone().map(|key| round(dot(of(q, query), of(k, key)) * scale)).collect();
                let top = scores.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
                let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                let weights: Numbers = scores.iter().map(|s| round((s - top).exp() / total)).collect();
                let slopes: Numbers = tokens.clone().map(|key| round(dot(d, of(v, key)))).collect();
                let mean = round(dot(&weights, &slopes));
                for (i, key) in tokens.enumerate() {
                    let slope = round(weights[i] * (slopes[i] - mean)) * scale;
                    for (j, d) in d.iter().enumerate() {
                        let channel = channels.start + j;
                        out[place(q, query, channel)] += slope * inputs[k.0][place(k, key, channel)];
                        if self.from == From::Fused {
                            out[place(k, key, channel)] += slope * inputs[q.0][place(q, query, channel)];
                            out[place(v, key, channel)] += weights[i] * d;
                        }
                    }
                }
            }
        }
        out.into_iter().map(round).collect()
    }

    /// Checks with the queries times `size` and the seed times `seed`.
    fn check_gradient(&self, size: f64, seed: f64) {
        let mut inputs = self.inputs(size);
        let numbers = random(self.images * self.queries.0 * self.queries.1 * self.heads * self.head_dim, 91);
        inputs.push(numbers.iter().map(|x| to_half(x * seed)).collect());
        self.check_gradient_with(&format!("times {size} and {seed}"), inputs);
    }

    /// Returns the outputs of each kind of card that has kernels of its own.
    fn check_gradient_with(&self, what: &str, inputs: Vec<Numbers>) -> Vec<Vec<f32>> {
        let plain = |given: &Given, round: Round| self.plain_gradient(&given.inputs, round);
        let label = format!("{what}: {self:?}");
        let check =
            |limits| check_gradient(limits, &label, &self.shapes(), inputs.clone(), |g, x| self.build(g, x), plain);
        // An H100 has kernels of its own for the head widths of UNets.
        let hopper = [40, 64, 80, 160].contains(&self.head_dim);
        [Limits::A100].into_iter().chain(hopper.then_some(Limits::H100)).map(check).collect()
    }
}

#[test]
fn self_attention() {
    for (images, queries, heads, head_dim) in [
        (1, (1, 1), 2, 40),
        (3, (1, 5), 3, 8),
        (2, (5, 7), 2, 64),
        (1, (1, 113), 2, 80),
        (2, (7, 19), 1, 40),
        (1, (8, 8), 2, 160),
        (1, (5, 7), 1, 128),
    ] {
        Case { images, queries, heads, head_dim, from: From::Fused, ..CASE }.check_gradient(2.0, 1.0);
    }
}

#[test]
fn cross_attention_with_77_keys() {
    for (images, queries, heads, head_dim) in
        [(2, (11, 13), 2, 40), (1, (9, 9), 2, 64), (3, (5, 7), 1, 80), (1, (3, 5), 2, 160)]
    {
        Case { images, queries, heads, head_dim, ..CASE }.check_gradient(4.0, 1.0);
    }
}

/// On an H100: rings that wrap around, tiles of 128 rows, and greatest scores in any stage.
#[test]
fn long_rows() {
    for (queries, keys, heads, head_dim, from) in [
        ((1, 331), 331, 1, 40, From::Fused),
        ((3, 67), 390, 2, 64, From::Text),
        ((1, 140), 331, 1, 80, From::Apart(0)),
        ((1, 139), 139, 1, 160, From::Fused),
    ] {
        Case { queries, keys, heads, head_dim, from, ..CASE }.check_gradient(8.0, 1.0);
    }
}

#[test]
fn heads_that_begin_anywhere() {
    for (head_dim, from) in [
        (4, From::Fused),
        (12, From::Text),
        (35, From::Text),
        (33, From::Fused),
        (97, From::Fused),
        (159, From::Text),
        (24, From::Apart(0)),
    ] {
        Case { images: 2, queries: (5, 7), keys: 19, heads: 3, head_dim, from, ..CASE }.check_gradient(2.0, 1.0);
    }
}

/// Weights of a thousandth, gradients at both ends of fp16's range, and weights that are 0 or 1.
#[test]
fn ranges() {
    let case = Case { queries: (23, 45), head_dim: 8, from: From::Fused, ..CASE };
    case.check_gradient(1.0, 1.0);
    case.check_gradient(1.0, 1e-3);
    let case = Case { queries: (5, 19), head_dim: 40, from: From::Fused, ..CASE };
    for (size, seed) in [(1.0, 1e-4), (1.0, 500.0), (30000.0, 1.0)] {
        case.check_gradient(size, seed);
    }
}

#[test]
fn an_image_alone_and_among_others() {
    for (queries, head_dim, from) in [((5, 29), 40, From::Fused), ((5, 9), 160, From::Fused), ((5, 7), 64, From::Text)]
    {
        let case = Case { images: 3, queries, heads: 2, head_dim, from, ..CASE };
        let mut inputs = case.inputs(2.0);
        inputs.push(random(3 * queries.0 * queries.1 * 2 * head_dim, 91));
        let together = case.check_gradient_with("together", inputs.clone());
        for image in 0..3 {
            let own = |x: &Numbers| x[image * x.len() / 3..(image + 1) * x.len() / 3].to_vec();
            let alone = Case { images: 1, ..case };
            let alone = alone.check_gradient_with("alone", inputs.iter().map(own).collect());
            for (alone, together) in alone.iter().zip(&together) {
                let among = &together[image * alone.len()..(image + 1) * alone.len()];
                let same = alone.iter().zip(among).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "heads of {head_dim}: image {image} depends on the others");
            }
        }
    }
}
