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
