//! A network of one's own on the crate's kernels, with the feature `unstable`: a graph of a linear layer and a SiLU is
//! planned and run: `cargo run --release --features unstable --example 06-kernel-of-ones-own`.

use respodiff::graph::{Activation, ConvOptions, GraphBuilder, Shape};
use respodiff::weights::Tensors;
use respodiff::{Device, Precision};

fn main() -> respodiff::Result<()> {
    // 77 tokens of 320 channels: a sequence is an image of height 1, and a linear layer is a 1x1 convolution.
    let mut graph = GraphBuilder::new();
    let x = graph.input("x", Shape::new(1, 1, 77, 320));
    let options = ConvOptions { activation: Activation::Silu, ..ConvOptions::default() };
    let y = graph.conv("layer", x, 640, options);
    graph.output("y", y);
    let graph = graph.finish();

    // Random weights, by the names that a checkpoint would have.
    let device = Device::auto();
    let weights = device.weights(graph.weights(), &Tensors::random(), &[], Precision::Full)?;
    let plan = device.plan(graph, &[]);
    println!("{} bytes of activations", plan.arena_bytes());
    let mut executor = device.executor(plan, &weights)?;
    executor.write("x", &vec![0.5; 77 * 320])?;
    executor.step()?;
    let y = executor.read("y")?;
    assert!(y.len() == 77 * 640 && y.iter().all(|y| y.is_finite()));
    println!("y[0..4] = {:?}", &y[..4]);
    Ok(())
}
