//! `kernels/elementwise.cu`.

use super::*;
use respodiff::graph::{Activation, ConvOptions};

/// All but GEGLU.
const ACTIVATIONS: [Activation; 8] = [
    Activation::None,
    Activation::Silu,
    Activation::Gelu,
    Activation::QuickGelu,
    Activation::Relu,
    Activation::SoftClamp,
    Activation::ToUnit,
    Activation::FromUnit,
];

#[test]
fn activate() {
    for shape in [Shape::new(1, 1, 1, 1), Shape::new(2, 3, 5, 7), Shape::new(1, 4, 4, 320)] {
        for activation in ACTIVATIONS {
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
fn mean_of_halves() {
    for shape in [Shape::new(2, 1, 1, 1), Shape::new(6, 3, 5, 7), Shape::new(2, 4, 4, 320), Shape::new(4, 1, 2, 20)] {
        check(
            &format!("{shape}"),
            &[shape],
            |g, x| g.mean_of_halves("mean", x[0]),
            |given, round| {
                let (first, second) = given.inputs[0].split_at(shape.len() / 2);
                first.iter().zip(second).map(|(a, b)| round((a + b) / 2.0)).collect()
            },
        );
    }
}

/// Numbers in -4..4, where activations are curved.
fn wide(len: usize, seed: u64) -> Numbers {
    random(len, seed).iter().map(|x| 4.0 * x).collect()
}

#[test]
fn activate_gradient() {
    for shape in [Shape::new(1, 1, 1, 1), Shape::new(2, 3, 5, 7), Shape::new(1, 4, 4, 320)] {
        for activation in ACTIVATIONS {
            check_gradient(
                Limits::A100,
                &format!("{activation:?} {shape}"),
                &[shape],
                vec![wide(shape.len(), 5), random(shape.len(), 6)],
                |g, x| g.activate("activate", x[0], activation),
                |given, round| {
                    let pairs = given.inputs[0].iter().zip(&given.inputs[1]);
                    pairs.map(|(&x, d)| round(d * round(slope(x, activation)))).collect::<Numbers>()
                },
            );
        }
    }
}

#[test]
fn geglu_and_its_gradient() {
    for shape in [Shape::new(1, 1, 1, 2), Shape::new(2, 3, 5, 14), Shape::new(1, 4, 4, 320)] {
        let c = shape.c / 2;
        let gelu = |x| activated(x, Activation::Gelu);
        check_with(
            Limits::A100,
            &format!("GEGLU {shape}"),
            &[shape],
            vec![wide(shape.len(), 5)],
            |g, x| g.activate("geglu", x[0], Activation::Geglu),
            |given, round| {
                let rows = given.inputs[0].chunks(2 * c);
                rows.flat_map(|x| (0..c).map(|i| round(x[i] * round(gelu(x[c + i])))).collect::<Numbers>()).collect()
            },
        );
        check_gradient(
            Limits::A100,
            &format!("GEGLU {shape}"),
            &[shape],
            vec![wide(shape.len(), 5), random(shape.len() / 2, 6)],
            |g, x| g.activate("geglu", x[0], Activation::Geglu),
            |given, round| {
                let rows = given.inputs[0].chunks(2 * c).zip(given.inputs[1].chunks(c));
                let both = rows.flat_map(|(x, d)| {
                    let values = (0..c).map(|i| round(d[i] * round(gelu(x[c + i]))));
                    let gates = (0..c).map(|i| round(d[i] * round(x[i] * round(slope(x[c + i], Activation::Gelu)))));
                    values.chain(gates).collect::<Numbers>()
                });
                both.collect::<Numbers>()
            },
        );
    }
}

/// A linear layer of one function of x, with another function of x as its residual: x has two readers, whose gradients
/// are added.
#[test]
fn two_readers() {
    for (rows, c) in [(5, 24), (3, 7)] {
        let shape = Shape::new(2, 1, rows, c);
        check_gradient(
            Limits::A100,
            &format!("two readers {shape}"),
            &[shape],
            vec![wide(shape.len(), 5), random(shape.len(), 6)],
            |g, x| {
                let [a, b] = [Activation::Silu, Activation::Gelu].map(|f| g.activate("activate", x[0], f));
                g.linear("linear", a, c, ConvOptions { residual: Some(b), ..Default::default() })
            },
            |given, round| {
                let (x, d, weight) = (&given.inputs[0], &given.inputs[1], &given.weights["linear.weight"]);
                let through = |i: usize| {
                    let d = &d[i / c * c..][..c];
                    round((0..c).map(|o| weight[o * c + i % c] * d[o]).sum())
                };
                let [silu, gelu] = [Activation::Silu, Activation::Gelu];
                let sum = |i: usize| round(d[i] * slope(x[i], gelu)) + round(through(i) * slope(x[i], silu));
                (0..x.len()).map(|i| round(sum(i))).collect::<Numbers>()
            },
        );
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
            |g, x| g.embed(&[("token", 300)], ("position", tokens), x[0], c),
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

/// Angles are hundreds of radians: the only allowed error is the rounding of the result to fp16.
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
