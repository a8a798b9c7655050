//! Plans, weights and inputs that do not belong together are errors, on every device, before anything is read or
//! written.

use respodiff::backend::{Executor, Precision};
use respodiff::cpu::{CpuExecutor, CpuWeights, Fp32};
use respodiff::cuda::Limits;
use respodiff::graph::{Activation, ConvOptions, Graph, GraphBuilder, Shape};
use respodiff::models::{ClipConfig, text_encoder};
use respodiff::plan::{Plan, Storage};
use respodiff::weights::Tensors;
use std::path::Path;
use std::sync::Arc;

/// A matrix product whose sums are long enough to be split among blocks (split-K), so that its workspace depends on a
/// device's limits.
fn product(outputs: usize) -> Graph {
    let mut b = GraphBuilder::new();
    let x = b.input("x", Shape::new(1, 8, 8, 640));
    let y = b.conv("layer", x, outputs, ConvOptions::conv3x3());
    b.output("y", y);
    b.finish()
}

fn plan(graph: Graph, storage: &dyn Storage) -> Arc<Plan> {
    Arc::new(Plan::new(graph, &[], storage))
}

fn on_cpu(graph: &Graph) -> Arc<CpuWeights> {
    CpuWeights::load(graph.weights(), &Tensors::random(), &[], Precision::Full).unwrap()
}

#[test]
fn the_cpu_takes_no_plan_of_a_gpu() {
    let weights = on_cpu(&product(64));
    let problem = CpuExecutor::new(plan(product(64), &Limits::A100), weights.clone()).err().unwrap().to_string();
    assert!(problem.contains("made for kernels for 108 multiprocessors of 80"), "{problem}");
    assert!(problem.contains("this is the CPU; plan again"), "{problem}");
    CpuExecutor::new(plan(product(64), &Fp32), weights.clone()).unwrap();
    let problem = CpuExecutor::new(plan(product(65), &Fp32), weights).err().unwrap().to_string();
    assert!(problem.contains("another network's"), "{problem}");
}

/// A petabyte exceeds every address space.
#[test]
fn memory_that_cannot_be_allocated_is_an_error() {
    let mut b = GraphBuilder::new();
    let x = b.input("x", Shape::new(1, 1 << 20, 1 << 20, 1 << 7));
    let y = b.activate("y", x, Activation::Silu);
    b.output("y", y);
    let graph = b.finish();
    let weights = on_cpu(&graph);
    let problem = CpuExecutor::new(plan(graph, &Fp32), weights).err().unwrap().to_string();
    assert!(problem.contains("1048576.00 GiB of memory are needed for activations"), "{problem}");
}

/// A tiny text encoder, whose token ids choose from ten rows.
fn text() -> Graph {
    let config = r#"{"architectures": ["CLIPTextModel"], "vocab_size": 10, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 5, "hidden_act": "gelu"}"#;
    text_encoder(&ClipConfig::parse(config, Path::new("config.json")).unwrap(), 1)
}

/// Writes valid token ids, and then expects an error for every value that no index may have, at every position.
fn refused(mut write: impl FnMut(&[f32]) -> respodiff::Result<()>) {
    write(&[0.0, 9.0, 3.0, 0.0, 1.0]).unwrap();
    for bad in [10.0, -1.0, 49_407.0, 0.5, f32::NAN, f32::INFINITY, 1e30] {
        for place in 0..5 {
            let mut ids = [1.0; 5];
            ids[place] = bad;
            let problem = write(&ids).unwrap_err().to_string();
            let words = format!("`input_ids` holds {bad} at position {place}, where whole numbers from 0 to 9");
            assert!(problem.contains(&words), "{problem}");
        }
    }
}

#[test]
fn token_ids_are_of_the_vocabulary() {
    let graph = text();
    let weights = on_cpu(&graph);
    let mut executor = CpuExecutor::new(plan(graph, &Fp32), weights).unwrap();
    refused(|ids| executor.write("input_ids", ids));
    executor.prologue().unwrap();
    executor.step().unwrap();
}

/// If the same indices read several tables, the smallest one limits them.
#[test]
fn indices_are_of_every_table_that_is_read() {
    let mut b = GraphBuilder::new();
    let ids = b.input("ids", Shape::new(1, 1, 2, 1));
    for (table, rows) in [("many", 9), ("few", 4)] {
        let embedded = b.embed(&[(table, rows)], ("positions", 2), ids, 8);
        b.output(table, embedded);
    }
    let graph = b.finish();
    graph.check_values("ids", &[3.0, 0.0]).unwrap();
    assert!(graph.check_values("ids", &[4.0, 0.0]).unwrap_err().to_string().contains("from 0 to 3"));
}

#[test]
#[should_panic(expected = "indices must be an input of the graph")]
fn computed_indices_are_refused() {
    let mut b = GraphBuilder::new();
    let x = b.input("x", Shape::new(1, 1, 2, 1));
    let ids = b.activate("floor", x, Activation::None);
    b.embed(&[("tokens", 9)], ("positions", 2), ids, 8);
}

#[cfg(feature = "emulated")]
mod on_kernels {
    use super::*;
    use respodiff::backend::PackedWeights;
    use respodiff::cuda::{CudaDevice, CudaExecutor, CudaWeights, Emulated};

    fn device(limits: Limits) -> Arc<dyn CudaDevice> {
        Emulated::new(limits, Emulated::QUICK)
    }

    #[test]
    fn a_gpu_takes_no_plan_of_another() {
        let here = device(Limits::A100);
        let load = |device, outputs| CudaWeights::load(device, product(outputs).weights(), &Tensors::random()).unwrap();
        let problem = |plan, weights| CudaExecutor::new(&here, plan, weights).err().unwrap().to_string();
        let weights = load(&here, 64);
        // Only the number of multiprocessors differs. It decides on the split of the sums, and with it on the
        // workspace.
        let fewer = Limits { multiprocessors: 20, ..Limits::A100 };
        assert_ne!(
            plan(product(64), &fewer).arena_bytes(),
            plan(product(64), &Limits::A100).arena_bytes(),
            "limits that make no difference here"
        );
        let other = problem(plan(product(64), &fewer), weights.clone());
        assert!(other.contains("made for kernels for 20 multiprocessors"), "{other}");
        let other = problem(plan(product(64), &Fp32), weights.clone());
        assert!(other.contains("made for the CPU"), "{other}");
        let other = problem(plan(product(72), &Limits::A100), weights.clone());
        assert!(other.contains("another network's"), "{other}");
        let other = problem(plan(product(64), &Limits::A100), load(&device(Limits::A100), 64));
        assert!(other.contains("not on emulated"), "{other}");
        CudaExecutor::new(&here, plan(product(64), &Limits::A100), weights).unwrap();
    }

    /// Weights that were loaded on another device are not shared, since their addresses mean nothing here: all weights
    /// are loaded again.
    #[test]
    fn weights_are_shared_on_one_device_alone() {
        let (here, there) = (device(Limits::A100), device(Limits::A100));
        let graph = product(64);
        let beside = |device, others: &[&CudaWeights]| {
            CudaWeights::load_beside(device, graph.weights(), &Tensors::random(), others).unwrap()
        };
        let first = beside(&here, &[]);
        assert_eq!(beside(&here, &[&first]).bytes(), 0);
        assert_eq!(beside(&there, &[&first]).bytes(), first.bytes());
        assert!(first.bytes() > 0);
    }

    #[test]
    fn token_ids_are_of_the_vocabulary() {
        let (device, graph) = (device(Limits::A100), text());
        let weights = CudaWeights::load(&device, graph.weights(), &Tensors::random()).unwrap();
        let mut executor = CudaExecutor::new(&device, plan(graph, &Limits::A100), weights).unwrap();
        refused(|ids| executor.write("input_ids", ids));
        executor.step().unwrap();
    }

    /// Inputs beyond fp16's range become its greatest numbers, not infinity.
    #[test]
    fn inputs_saturate() {
        let mut b = GraphBuilder::new();
        let x = b.input("x", Shape::new(1, 1, 2, 8));
        let index = b.input("index", Shape::new(1, 1, 1, 1));
        let row = b.select_token("select", x, index);
        b.output("row", row);
        let (device, graph) = (device(Limits::A100), b.finish());
        let weights = CudaWeights::load(&device, graph.weights(), &Tensors::random()).unwrap();
        let mut executor = CudaExecutor::new(&device, plan(graph, &Limits::A100), weights).unwrap();
        let given = [7e4, -7e4, f32::INFINITY, 65519.0, 1.0, -1e30, 65504.0, 0.0];
        executor.write("x", &[[0.0; 8], given].concat()).unwrap();
        executor.write("index", &[1.0]).unwrap();
        assert!(executor.write("index", &[2.0]).unwrap_err().to_string().contains("from 0 to 1"));
        executor.step().unwrap();
        let wanted = [65504.0, -65504.0, 65504.0, 65504.0, 1.0, -65504.0, 65504.0, 0.0];
        assert_eq!(executor.read("row").unwrap(), wanted);
    }
}
