//! `kernels/elementwise.cu`.

use super::*;
use respodiff::graph::Activation;

#[test]
fn activate() {
    for shape in [Shape::new(1, 1, 1, 1), Shape::new(2, 3, 5, 7), Shape::new(1, 4, 4, 320)] {
        for activation in [Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
            check(
                &format!("{activation:?} {shape}"),
                &[shape],
                |g, x| g.activate("activate", x[0], activation),
                |given, round| given.inputs[0].iter().map(|&x| round(activated(x, activation))).collect(),
            );
        }
    }
}

#[test]
fn embed() {
    for (n, tokens, c) in [(2, 7, 24), (1, 3, 5), (3, 77, 768)] {
        let ids: Numbers = (0..n * tokens).map(|i| ((i * 37 + 5) % 300) as f64).collect();
        check_with(
            Limits::A100,
            &format!("{n} times {tokens} tokens of {c}"),
            &[Shape::new(n, 1, tokens, 1)],
            vec![ids],
            |g, x| g.embed(("token", 300), ("position", tokens), x[0], c),
            |given, round| {
                let rows = given.inputs[0].iter().enumerate().flat_map(|(i, &id)| {
                    let token = &given.weights["token.weight"][id as usize * c..][..c];
                    let position = &given.weights["position.weight"][i % tokens * c..][..c];
                    token.iter().zip(position).map(move |(t, p)| round(t + p))
                });
                rows.collect()
            },
        );
    }
}

#[test]
fn class_token() {
    for (n, tokens, c) in [(2, 49, 64), (3, 5, 7)] {
        check(
            &format!("{n} times {tokens} tokens of {c}"),
            &[Shape::new(n, 1, tokens, c)],
            |g, x| g.class_token("class", "position", x[0]),
            |given, round| {
                let images = given.inputs[0].chunks_exact(tokens * c).flat_map(|image| {
                    let with_class = given.weights["class"].iter().chain(image);
                    with_class.zip(&given.weights["position.weight"]).map(move |(x, p)| round(x + p))
                });
                images.collect()
            },
        );
    }
}

#[test]
fn select_token() {
    for (n, tokens, c) in [(2, 77, 40), (3, 5, 3)] {
        let index: Numbers = (0..n).map(|i| ((i * 13 + 4) % tokens) as f64).collect();
        let shape = Shape::new(n, 1, tokens, c);
        check_with(
            Limits::A100,
            &format!("{n} of {tokens} tokens of {c}"),
            &[shape, Shape::new(n, 1, 1, 1)],
            vec![random(shape.len(), 3), index],
            |g, x| g.select_token("select", x[0], x[1]),
            |given, _| {
                let (x, index) = (&given.inputs[0], &given.inputs[1]);
                (0..n).flat_map(|i| x[(i * tokens + index[i] as usize) * c..][..c].to_vec()).collect()
            },
        );
    }
}

/// The angles are hundreds of radians: the rounding of the result to fp16 is all the error there may be.
#[test]
fn sinusoid() {
    for (n, k, dim, flip, freq_shift) in [(2, 1, 320, true, 0.0), (3, 6, 256, true, 0.0), (1, 1, 6, false, 1.0)] {
        let x: Numbers = (0..n * k).map(|i| [999.0, 981.0, 0.0, 1.0, 500.5, 133.25][i % 6]).collect();
        check_with(
            Limits::A100,
            &format!("{n}x{k} numbers in {dim}"),
            &[Shape::new(n, 1, 1, k)],
            vec![x],
            |g, x| g.sinusoid("sinusoid", x[0], dim, flip, freq_shift),
            |given, _| {
                let half = dim / 2;
                let of = |x: f64, i: usize| {
                    let frequency = 10000f64.powf(-((i % half) as f64) / (half as f64 - freq_shift as f64));
                    let (sin, cos) = (x * frequency).sin_cos();
                    if (i < half) == flip { cos } else { sin }
                };
                given.inputs[0].iter().flat_map(|&x| (0..dim).map(move |i| of(x, i))).collect()
            },
        );
    }
}
