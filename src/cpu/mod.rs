//! The CPU executor: fp32 arithmetic on plans, in NHWC, on rayon's threads (those of the pool it is called from).
//!
//! One file an op family. [`gemm`] holds the one matrix kernel, [`simd`] the instruction sets.

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod attention_gradient;
mod bf16;
mod conv;
mod elementwise;
mod gemm;
mod int8;
mod norm;
mod rounded;
mod simd;
mod weights;
mod winograd;

pub use simd::{Isa, isa};
pub(crate) use simd::{silu, silu_slope};
pub use weights::Weights;

use crate::graph::{Graph, Node, Op, Shape, TensorId};
use crate::plan::{Plan, Storage};
use crate::{Error, Result};
use memmap2::MmapMut;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Activations in fp32: what to make plans with for the CPU.
pub struct Fp32;

/// Number format of linear layers and 1x1 convolutions; everything else is fp32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MatrixPrecision {
    /// fp32 arithmetic on the checkpoint's own numbers.
    #[default]
    Fp32,
    /// bf16 numbers with sums in fp32: a third of the time with AMX; on other machines it may be slower than fp32.
    Bf16,
    /// 8-bit integers, weights rounded once for each column and activations in every call for each row. A third to half
    /// of the time with AMX or AVX-512 VNNI, half the memory of fp16; pictures differ in details.
    Int8,
}

impl Storage for Fp32 {
    fn name(&self) -> String {
        "the CPU".into()
    }

    fn tensor(&self, graph: &Graph, id: TensorId) -> usize {
        graph.shape(id).len() * size_of::<f32>()
    }

    fn workspace(&self, graph: &Graph, node: &Node) -> usize {
        let shape = |t| graph.shape(t);
        let numbers = match &node.op {
            Op::Conv(conv) => winograd::workspace(shape, conv, shape(node.output)),
            Op::GroupNorm(norm) => norm::workspace(norm, shape),
            Op::GroupNormGradient { of, .. } => norm::gradient_workspace(of, shape),
            Op::Attention(attention) => attention::workspace(attention, shape),
            Op::AttentionGradient { of, fused, .. } => attention_gradient::workspace(of, *fused, shape),
            _ => 0,
        };
        numbers * size_of::<f32>()
    }
}

/// Where an activation's numbers lie among the arena's.
fn range(plan: &Plan, id: TensorId) -> Range<usize> {
    let start = plan.offset(id) / size_of::<f32>();
    start..start + plan.graph().shape(id).len()
}

/// A plan (made with [`Fp32`]) with its arena and weights: writes inputs, runs, reads outputs.
pub struct Executor {
    plan: Arc<Plan>,
    weights: Arc<Weights>,
    arena: Arena,
}

impl Executor {
    /// Allocates the arena, zeroed.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the plan was not made with [`Fp32`], the weights are another network's, or memory is
    /// short.
    pub fn new(plan: Arc<Plan>, weights: Arc<Weights>) -> Result<Self> {
        plan.check(&Fp32, weights.specs())?;
        let arena = Arena::new(plan.arena_bytes())?;
        Ok(Executor { plan, weights, arena })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Writes the named input, NHWC. It keeps its value from run to run.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] for an index beyond what it chooses from.
    ///
    /// # Panics
    /// If the graph has no such input, or one of another length.
    pub fn write(&mut self, name: &str, values: &[f32]) -> Result<()> {
        self.plan.graph().check_values(name, values)?;
        self.input_mut(name).copy_from_slice(values);
        Ok(())
    }

    /// The named input itself, for what is no index.
    pub(crate) fn input_mut(&mut self, name: &str) -> &mut [f32] {
        let range = range(&self.plan, self.plan.graph().input(name));
        &mut self.arena.numbers_mut()[range]
    }

    /// The named output of the last run, NHWC.
    pub fn output(&self, name: &str) -> &[f32] {
        &self.arena.numbers()[range(&self.plan, self.plan.graph().output(name))]
    }

    /// Runs what depends on constant inputs alone; needed once after they change.
    pub fn prologue(&mut self) {
        let plan = self.plan.clone();
        self.all(&plan, plan.prologue());
    }

    /// Runs one step.
    pub fn step(&mut self) {
        let plan = self.plan.clone();
        self.all(&plan, plan.step());
    }

    /// Runs all nodes, and tells of every node for which `wanted` is true how long it took.
    pub fn timed(&mut self, wanted: impl Fn(&Node) -> bool + Send, mut tell: impl FnMut(&Node, Duration) + Send) {
        let plan = self.plan.clone();
        rayon::scope(move |_| {
            for (node, workspace) in plan.all() {
                let start = Instant::now();
                self.run(&plan, node, workspace);
                if wanted(node) {
                    tell(node, start.elapsed());
                }
            }
        });
    }

    /// Runs one step, stopping before an [`Op::Shift`] to let `fill` write its shift from the numbers it shifts.
    pub fn step_shifting(&mut self, fill: impl Fn(&[f32], &mut [f32]) + Send) {
        let plan = self.plan.clone();
        rayon::scope(move |_| {
            for (node, workspace) in plan.step() {
                if let Op::Shift { x, shift } = node.op {
                    // A copy, so that one slice may be written while the other is read; the bottleneck is small.
                    let x = self.arena.numbers()[range(&plan, x)].to_vec();
                    fill(&x, &mut self.arena.numbers_mut()[range(&plan, shift)]);
                }
                self.run(&plan, node, workspace);
            }
        });
    }

    /// Runs the reverse half, from the last step's activations and the seed in the input `d.<output>`.
    pub fn backward(&mut self) {
        let plan = self.plan.clone();
        self.all(&plan, plan.backward());
    }

    /// Runs nodes from inside the pool: each operation called from outside would have to wake it, and be woken.
    fn all<'a>(&mut self, plan: &Plan, nodes: impl Iterator<Item = (&'a Node, (usize, usize))> + Send) {
        rayon::scope(|_| nodes.for_each(|(node, workspace)| self.run(plan, node, workspace)));
    }

    fn run(&mut self, plan: &Plan, node: &Node, workspace: (usize, usize)) {
        let memory = Memory { plan, arena: self.arena.numbers_mut().as_mut_ptr(), workspace };
        let (weights, out) = (&*self.weights, node.output);
        match node.op {
            Op::Conv(ref conv) => conv::run(conv, out, &memory, weights),
            Op::GroupNorm(ref norm) => norm::group_norm(norm, weights, out, &memory),
            Op::GroupNormGradient { ref of, d } => norm::group_norm_gradient(of, weights, d, out, &memory),
            Op::LayerNorm { x, weight, bias, eps } => {
                norm::layer_norm(x, (weights.get(weight), weights.get(bias)), eps, out, &memory)
            }
            Op::LayerNormGradient { x, weight, eps, d } => {
                norm::layer_norm_gradient(x, weights.get(weight), eps, d, out, &memory)
            }
            Op::Attention(ref attention) => attention::run(attention, out, &memory),
            Op::AttentionGradient { ref of, fused, d } => attention_gradient::run(of, fused, d, out, &memory),
            Op::Add { a, b } => elementwise::add(a, b, out, &memory),
            Op::ActivateGradient { x, activation, d } => elementwise::activate_gradient(x, activation, d, out, &memory),
            Op::ResizeGradient { d } => elementwise::resize_gradient(d, out, &memory),
            Op::Activate { x, activation } => elementwise::activate(x, activation, out, &memory),
            Op::Embed { ids, tokens, positions } => {
                elementwise::embed(ids, weights.get(tokens), weights.get(positions), out, &memory)
            }
            Op::Sinusoid { x, dim, flip_sin_to_cos, freq_shift } => {
                elementwise::sinusoid(x, dim, flip_sin_to_cos, freq_shift, out, &memory)
            }
            Op::ClassToken { x, class, positions } => {
                elementwise::class_token(x, weights.get(class), weights.get(positions), out, &memory)
            }
            Op::Shift { x, shift } => elementwise::shift(x, shift, out, &memory),
            Op::SelectToken { x, index } => elementwise::select_token(x, index, out, &memory),
        }
    }
}

/// What one node sees of the arena.
struct Memory<'a> {
    plan: &'a Plan,
    arena: *mut f32,
    workspace: (usize, usize),
}

// SAFETY: the pointer is used only by the methods below, under their own promises; the rest is shared data.
unsafe impl Sync for Memory<'_> {}

/// A node's output, written by many threads at once, each at places of its own.
struct SharedOutput<'a> {
    start: *mut f32,
    len: usize,
    owner: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: `at` demands of its callers that no two overlap.
unsafe impl Sync for SharedOutput<'_> {}

impl<'a> SharedOutput<'a> {
    fn new(numbers: &'a mut [f32]) -> Self {
        SharedOutput { start: numbers.as_mut_ptr(), len: numbers.len(), owner: std::marker::PhantomData }
    }

    /// `len` numbers from `offset` on.
    ///
    /// # Safety
    /// No other call may give any of them while they are in use.
    #[allow(clippy::mut_from_ref)]
    unsafe fn at(&self, offset: usize, len: usize) -> &mut [f32] {
        assert!(offset + len <= self.len);
        // SAFETY: inside the slice it was made of; the caller promises the rest.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) }
    }
}

impl Memory<'_> {
    fn shape(&self, id: TensorId) -> Shape {
        self.plan.graph().shape(id)
    }

    /// An input of the node.
    fn read(&self, id: TensorId) -> &[f32] {
        // SAFETY: the plan keeps the node's inputs, output and workspace apart (tested there), inside the arena.
        unsafe { std::slice::from_raw_parts(self.arena.add(range(self.plan, id).start), self.shape(id).len()) }
    }

    /// The node's output; called once a node.
    #[allow(clippy::mut_from_ref)]
    fn write(&self, id: TensorId) -> &mut [f32] {
        // SAFETY: as for `read`; nothing else refers to the output while the node runs.
        unsafe { std::slice::from_raw_parts_mut(self.arena.add(range(self.plan, id).start), self.shape(id).len()) }
    }

    /// The node's scratch memory; called once a node.
    #[allow(clippy::mut_from_ref)]
    fn workspace(&self) -> &mut [f32] {
        let (offset, len) = (self.workspace.0 / size_of::<f32>(), self.workspace.1 / size_of::<f32>());
        // SAFETY: as for `write`.
        unsafe { std::slice::from_raw_parts_mut(self.arena.add(offset), len) }
    }
}

/// Runs a task with so many numbers of its thread's own, which hold anything, on cache-line boundaries. A thread keeps
/// the most that it needed, 1.4 MB.
fn with_scratch<R>(len: usize, task: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local!(static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) });
    SCRATCH.with_borrow_mut(|lines| {
        lines.resize(lines.len().max(len.div_ceil(16)), Line([0.0; 16]));
        task(&mut bytemuck::cast_slice_mut(lines)[..len])
    })
}

#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Zeroed memory on cache-line boundaries, which takes none before it is written.
fn pages(bytes: usize, purpose: &str) -> Result<MmapMut> {
    MmapMut::map_anon(bytes.max(size_of::<f32>())).map_err(|problem| {
        let gib = bytes as f64 / (1u64 << 30) as f64;
        Error::out_of_memory(format!("{gib:.1} GiB of memory for {purpose} are not to be had: {problem}"))
    })
}

/// A plan's activations.
struct Arena(MmapMut);

impl Arena {
    /// Zeros, in huge pages where the system has them: neighbouring rows of an image are often pages of the usual size
    /// apart, and a processor remembers few of those.
    fn new(bytes: usize) -> Result<Self> {
        let map = pages(bytes, "activations")?;
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage); // without it, pages are of the usual size
        Ok(Arena(map))
    }

    fn numbers(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }

    fn numbers_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}
