//! The backward half of graphs, operation by operation, compared with central differences of plain f64 loops on odd
//! shapes.

mod support;

use respodiff::backend::{Executor, Precision};
use respodiff::cpu::{CpuExecutor, CpuWeights, Fp32};
use respodiff::graph::{Activation, ConvOptions, Extent, GraphBuilder, Keep, Shape, Sources, TensorId, View};
use respodiff::plan::Plan;
use respodiff::weights::Source;
use safetensors::Dtype;
use std::collections::HashMap;
use std::sync::Arc;
use support::{Numbers, narrow, random, weights};

/// Compares the executor's forward half with a plain function of `x`, and its backward half with central differences of
/// that function. The graph reads `x` and perhaps `other`, and writes `y`.
fn check(
    label: &str,
    build: impl FnOnce(&mut GraphBuilder, TensorId, Option<TensorId>) -> TensorId,
    x_shape: Shape,
    other: Option<Shape>,
    plain: impl Fn(&[f64], &[f64], &HashMap<String, Numbers>) -> Numbers,
) {
    check_around(0.0, label, build, x_shape, other, plain);
}

/// The same for an `x` with the given mean. Rounding errors are proportional to the mean, and norms divide them by the
/// deviation of `x`, which is 1 / sqrt(3).
fn check_around(
    mean: f64,
    label: &str,
    build: impl FnOnce(&mut GraphBuilder, TensorId, Option<TensorId>) -> TensorId,
    x_shape: Shape,
    other: Option<Shape>,
    plain: impl Fn(&[f64], &[f64], &HashMap<String, Numbers>) -> Numbers,
) {
    let rounding = 2.0 * f32::EPSILON as f64 * mean * 3f64.sqrt();
    let mut g = GraphBuilder::new();
    let x = g.input("x", x_shape);
    let second = other.map(|shape| g.input("other", shape));
    let y = build(&mut g, x, second);
    g.output("y", y);
    let graph = g.finish().with_gradient("y", "x", Keep::All);
    let (folder, by_name) = weights(&graph, Dtype::F32);
    let plan = Plan::new(graph, &[], &Fp32);
    let tensors = Source::folder(folder.path()).unwrap().tensors("unet").unwrap();
    let loaded = CpuWeights::load(plan.graph().weights(), &tensors, &[], Precision::Full).unwrap();
    let mut executor = CpuExecutor::new(Arc::new(plan), loaded).unwrap();

    let x: Numbers = random(x_shape.len(), 5).iter().map(|&v| (v + mean) as f32 as f64).collect();
    let rest: Numbers = narrow(&random(other.map_or(0, |s| s.len()), 9)).iter().map(|&v| v as f64).collect();
    executor.write("x", &narrow(&x)).unwrap();
    if other.is_some() {
        executor.write("other", &narrow(&rest)).unwrap();
    }
    executor.prologue().unwrap();
    executor.step().unwrap();
    let truth = plain(&x, &rest, &by_name);
    let error = support::relative_l2(executor.output("y"), &narrow(&truth));
    assert!(error < 1e-5 + rounding, "{label}: forward off by {error:e}");

    let seed = random(truth.len(), 11);
    executor.write("d.y", &narrow(&seed)).unwrap();
    executor.backward().unwrap();
    let ours = executor.output("d.x").to_vec();
    let step = 1e-5;
    let value = |x: &[f64]| plain(x, &rest, &by_name).iter().zip(&seed).map(|(y, d)| y * d).sum::<f64>();
    let mut shifted = x.clone();
    let numeric: Vec<f32> = (0..x.len())
        .map(|i| {
            shifted[i] = x[i] + step;
            let above = value(&shifted);
            shifted[i] = x[i] - step;
            let below = value(&shifted);
            shifted[i] = x[i];
            ((above - below) / (2.0 * step)) as f32
        })
        .collect();
    let error = support::relative_l2(&ours, &numeric);
    println!("{label:40} {error:.1e}");
    assert!(error < 2e-5 + rounding, "{label}: gradient off by {error:e}");
}

fn gelu(x: f64) -> f64 {
    // erf by its Taylor series: exact to f64 for the small arguments here.
    let z = x / 2f64.sqrt();
    let (mut term, mut sum) = (z, z);
    for n in 1..60 {
        term *= -z * z / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    0.5 * x * (1.0 + sum * 2.0 / std::f64::consts::PI.sqrt())
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// A plain convolution of `[n, h, w, c]` with stride 1, whose weight reads all channels.
fn conv(x: &[f64], shape: Shape, weight: &[f64], bias: &[f64], kernel: usize, resize: Option<Extent>) -> Numbers {
    let (outputs, pad) = (bias.len(), kernel / 2);
    let Extent { h, w } = resize.unwrap_or(shape.extent());
    let mut out = vec![0.0; shape.n * h * w * outputs];
    for n in 0..shape.n {
        for (y, x0, o) in (0..h * w * outputs).map(|i| (i / outputs / w, i / outputs % w, i % outputs)) {
            let mut sum = bias[o];
            for (ky, kx, c) in
                (0..kernel * kernel * shape.c).map(|i| (i / shape.c / kernel, i / shape.c % kernel, i % shape.c))
            {
                let (sy, sx) = (y + ky, x0 + kx);
                if sy < pad || sx < pad || sy - pad >= h || sx - pad >= w {
                    continue;
                }
                let (sy, sx) = ((sy - pad) * shape.h / h, (sx - pad) * shape.w / w);
                sum += weight[((o * shape.c + c) * kernel + ky) * kernel + kx]
                    * x[((n * shape.h + sy) * shape.w + sx) * shape.c + c];
            }
            out[((n * h + y) * w + x0) * outputs + o] = sum;
        }
    }
    out
}

#[test]
fn convolutions() {
    let to = |h, w| Some(Extent { h, w });
    for (kernel, c, outputs, resize) in
        [(1, 5, 7, None), (3, 5, 35, None), (3, 33, 4, None), (3, 6, 5, to(8, 10)), (3, 4, 9, to(7, 9))]
    {
        let shape = Shape::new(2, 4, 5, c);
        let options = ConvOptions { resize, ..if kernel == 3 { ConvOptions::conv3x3() } else { Default::default() } };
        check(
            &format!("conv {kernel} {c} {outputs} {resize:?}"),
            |g, x, _| g.conv("a", x, outputs, options),
            shape,
            None,
            |x, _, w| conv(x, shape, &w["a.weight"], &w["a.bias"], kernel, resize),
        );
    }
}

#[test]
fn residuals_and_sums() {
    // x is read three times: as a residual, by a convolution with a residual, and by a norm.
    let shape = Shape::new(2, 3, 3, 6);
    check(
        "residual",
        |g, x, _| {
            let a = g.layer_norm("n", x, 1e-5);
            let b = g.linear("b", a, 6, ConvOptions { residual: Some(x), ..Default::default() });
            g.conv("c", x, 6, ConvOptions { residual: Some(b), ..ConvOptions::conv3x3() })
        },
        shape,
        None,
        |x, _, w| {
            let a = layer_norm(x, 6, &w["n.weight"], &w["n.bias"]);
            let b = conv(&a, shape, &w["b.weight"], &w["b.bias"], 1, None);
            let c = conv(x, shape, &w["c.weight"], &w["c.bias"], 3, None);
            (0..x.len()).map(|i| x[i] + b[i] + c[i]).collect()
        },
    );
}

#[test]
fn sources_with_a_skip_connection() {
    let (shape, skip) = (Shape::new(2, 3, 4, 6), Shape::new(2, 3, 4, 10));
    let together = |x: &[f64], other: &[f64]| -> Numbers {
        x.chunks(6).zip(other.chunks(10)).flat_map(|(a, b)| a.iter().chain(b).copied().collect::<Vec<_>>()).collect()
    };
    let whole = Shape::new(2, 3, 4, 16);
    for silu_follows in [false, true] {
        check(
            "conv of norm of two sources",
            |g, x, other| {
                let sources = Sources { x, skip: other };
                let a = g.group_norm("n", sources, 4, 1e-5, silu_follows, None);
                let b = g.conv("b", sources, 5, ConvOptions::conv3x3());
                g.conv("c", a, 5, ConvOptions { residual: Some(b), ..ConvOptions::conv3x3() })
            },
            shape,
            Some(skip),
            |x, other, w| {
                let x = together(x, other);
                let a = group_norm(&x, whole, 4, (&w["n.weight"], &w["n.bias"]), None, silu_follows);
                let b = conv(&x, whole, &w["b.weight"], &w["b.bias"], 3, None);
                let c = conv(&a, whole, &w["c.weight"], &w["c.bias"], 3, None);
                b.iter().zip(c).map(|(b, c)| b + c).collect()
            },
        );
    }
}

fn layer_norm(x: &[f64], channels: usize, weight: &[f64], bias: &[f64]) -> Numbers {
    x.chunks(channels)
        .flat_map(|row| {
            let mean = row.iter().sum::<f64>() / channels as f64;
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / channels as f64;
            (0..channels).map(|c| (row[c] - mean) / (variance + 1e-5).sqrt() * weight[c] + bias[c]).collect::<Vec<_>>()
        })
        .collect()
}

fn group_norm(
    x: &[f64],
    shape: Shape,
    groups: usize,
    (weight, bias): (&[f64], &[f64]),
    modulation: Option<&[f64]>,
    with_silu: bool,
) -> Numbers {
    let (pixels, c, per_group) = (shape.tokens(), shape.c, shape.c / groups);
    let mut out = vec![0.0; x.len()];
    for (n, group) in (0..shape.n * groups).map(|i| (i / groups, i % groups)) {
        let places: Vec<usize> = (0..pixels * per_group)
            .map(|i| (n * pixels + i / per_group) * c + group * per_group + i % per_group)
            .collect();
        let mean = places.iter().map(|&i| x[i]).sum::<f64>() / places.len() as f64;
        let variance = places.iter().map(|&i| (x[i] - mean).powi(2)).sum::<f64>() / places.len() as f64;
        for i in places {
            let channel = i % c;
            let mut y = (x[i] - mean) / (variance + 1e-5).sqrt() * weight[channel] + bias[channel];
            if let Some(m) = modulation {
                y = y * (1.0 + m[n * 2 * c + channel]) + m[n * 2 * c + c + channel];
            }
            out[i] = if with_silu { silu(y) } else { y };
        }
    }
    out
}

#[test]
fn norms() {
    // 9 x 9 pixels are more than one stretch of pixels whose statistics are taken together.
    for (shape, groups) in [(Shape::new(2, 3, 5, 12), 3), (Shape::new(1, 9, 9, 6), 2), (Shape::new(2, 1, 2, 8), 8)] {
        for with_silu in [false, true] {
            check(
                &format!("group norm {shape} {groups} {with_silu}"),
                |g, x, _| g.group_norm("n", x, groups, 1e-5, with_silu, None),
                shape,
                None,
                |x, _, w| group_norm(x, shape, groups, (&w["n.weight"], &w["n.bias"]), None, with_silu),
            );
        }
        let modulation = Shape::new(shape.n, 1, 1, 2 * shape.c);
        check(
            &format!("group norm {shape} modulated"),
            |g, x, other| g.group_norm("n", x, groups, 1e-5, true, other.map(Into::into)),
            shape,
            Some(modulation),
            |x, m, w| group_norm(x, shape, groups, (&w["n.weight"], &w["n.bias"]), Some(m), true),
        );
    }
    // If the variance were computed as the mean of squares minus the square of the mean, the norm would be off by 1e-3
    // here. Groups have more than two numbers, since with two nearly everything cancels.
    for (shape, groups) in [(Shape::new(2, 3, 5, 12), 3), (Shape::new(1, 9, 9, 6), 2)] {
        check_around(
            100.0,
            &format!("group norm {shape} {groups} around 100"),
            |g, x, _| g.group_norm("n", x, groups, 1e-5, true, None),
            shape,
            None,
            |x, _, w| group_norm(x, shape, groups, (&w["n.weight"], &w["n.bias"]), None, true),
        );
    }
    for shape in [Shape::new(2, 3, 5, 12), Shape::new(1, 9, 9, 37)] {
        check(
            &format!("layer norm {shape}"),
            |g, x, _| g.layer_norm("n", x, 1e-5),
            shape,
            None,
            |x, _, w| layer_norm(x, shape.c, &w["n.weight"], &w["n.bias"]),
        );
    }
}

/// Plain attention of queries, and of keys and values, `[n, tokens, width]`. `offsets` are the first channels of the
/// three views.
fn attention(
    (q, q_width): (&[f64], usize),
    (kv, kv_width): (&[f64], usize),
    n: usize,
    heads: usize,
    dim: usize,
    offsets: [usize; 3],
) -> Numbers {
    let (queries, keys) = (q.len() / n / q_width, kv.len() / n / kv_width);
    let mut out = vec![0.0; n * queries * heads * dim];
    for (image, head, i) in (0..n * heads * queries).map(|i| (i / queries / heads, i / queries % heads, i % queries)) {
        let part = |data: &[f64], width: usize, tokens: usize, token: usize, offset: usize| {
            data[(image * tokens + token) * width + offset + head * dim..][..dim].to_vec()
        };
        let query = part(q, q_width, queries, i, offsets[0]);
        let scores: Numbers = (0..keys)
            .map(|j| part(kv, kv_width, keys, j, offsets[1]).iter().zip(&query).map(|(k, q)| k * q).sum::<f64>())
            .map(|s: f64| (s / (dim as f64).sqrt()).exp())
            .collect();
        let total: f64 = scores.iter().sum();
        for (j, s) in scores.iter().enumerate() {
            for (c, v) in part(kv, kv_width, keys, j, offsets[2]).iter().enumerate() {
                out[(image * queries + i) * heads * dim + head * dim + c] += s / total * v;
            }
        }
    }
    out
}

#[test]
fn attentions() {
    for (n, h, w, heads, dim) in [(2, 3, 5, 2, 4), (1, 5, 11, 1, 40), (1, 1, 3, 3, 33), (1, 7, 7, 1, 6)] {
        let width = heads * dim;
        let shape = Shape::new(n, h, w, 3 * width);
        let view = |tensor, part| View { tensor, offset: part * width };
        check(
            &format!("self attention {shape} {heads}"),
            |g, x, _| g.attention("a", (view(x, 0), view(x, 1), view(x, 2)), heads, dim, false),
            shape,
            None,
            |x, _, _| attention((x, 3 * width), (x, 3 * width), n, heads, dim, [0, width, 2 * width]),
        );
        let (shape, other) = (Shape::new(n, h, w, width), Shape::new(n, 1, 37, 2 * width));
        check(
            &format!("cross attention {shape} {heads}"),
            |g, x, other| {
                let other = other.expect("a second input");
                g.attention("a", (view(x, 0), view(other, 0), view(other, 1)), heads, dim, false)
            },
            shape,
            Some(other),
            |x, other, _| attention((x, width), (other, 2 * width), n, heads, dim, [0, 0, width]),
        );
    }
}

#[test]
fn activations() {
    let shape = Shape::new(2, 3, 5, 10);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    for (activation, f) in [
        (Activation::Silu, &silu as &dyn Fn(f64) -> f64),
        (Activation::Gelu, &gelu),
        (Activation::QuickGelu, &|x| x * sigmoid(1.702 * x)),
        (Activation::Relu, &|x| x.max(0.0)),
        (Activation::SoftClamp, &|x| 3.0 * (x / 3.0).tanh()),
        (Activation::ToUnit, &|x| (x + 1.0) / 2.0),
        (Activation::FromUnit, &|x| 2.0 * x - 1.0),
        (Activation::None, &|x| x),
    ] {
        check(
            &format!("{activation:?}"),
            |g, x, _| g.activate("a", x, activation),
            shape,
            None,
            |x, _, _| x.iter().map(|&v| f(v)).collect(),
        );
    }
    // GEGLU is fused into a convolution here, from which the backward half splits it off.
    check(
        "geglu of a linear layer",
        |g, x, _| g.linear("a", x, 14, ConvOptions { activation: Activation::Geglu, ..Default::default() }),
        shape,
        None,
        |x, _, w| {
            let y = conv(x, shape, &w["a.weight"], &w["a.bias"], 1, None);
            y.chunks(14).flat_map(|row| (0..7).map(|i| row[i] * gelu(row[7 + i])).collect::<Vec<_>>()).collect()
        },
    );
}
