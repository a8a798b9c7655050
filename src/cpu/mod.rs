//! The CPU: runs plans in fp32, in NHWC, on the threads of the rayon pool that it is called from.
//!
//! There is one file per family of operations. `gemm` holds the only matrix kernel, `simd` the instruction sets.

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod attention_gradient;
mod bf16;
mod conv;
mod elementwise;
pub(crate) mod gemm;
mod group_norm;
mod int8;
mod layer_norm;
mod rounded;
mod sampling;
mod simd;
mod weights;
mod winograd;

pub use simd::{Isa, isa};
pub(crate) use simd::{silu, silu_slope};
pub use weights::CpuWeights;

use crate::backend::{Backend, Cache, Denoiser, Executor, Parts, Planned, Precision, UNetBatch, Weights};
use crate::graph::{Graph, Node, Op, Shape, TensorId, WeightSpec};
use crate::plan::{Plan, Storage};
use crate::weights::Tensors;
use crate::{Error, Result, Subject, memory};
use memmap2::MmapMut;
use sampling::CpuDenoiser;
use std::any::Any;
use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The storage to make plans with for the CPU: activations in fp32.
pub struct Fp32;

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
            Op::GroupNorm(norm) => group_norm::workspace(norm, shape),
            Op::GroupNormMoments { of } => group_norm::row_moments_workspace(of, shape),
            Op::GroupNormGradient { of, .. } => group_norm::gradient_workspace(of, shape),
            Op::Attention(attention) => attention::workspace(attention, shape),
            Op::AttentionGradient { of, fused, .. } => attention_gradient::workspace(of, *fused, shape),
            _ => 0,
        };
        numbers * size_of::<f32>()
    }
}

/// This machine's processor.
pub struct Cpu;

impl Backend for Cpu {
    fn name(&self) -> String {
        format!("CPU ({:?})", isa())
    }

    fn number_bytes(&self, _: &Graph, _: TensorId) -> usize {
        size_of::<f32>()
    }

    fn free_bytes(&self) -> Option<usize> {
        memory::free()
    }

    fn used_bytes(&self) -> Option<usize> {
        None
    }

    fn plan(&self, graph: Graph, constant: &[&str]) -> Plan {
        Plan::new(graph, constant, &Fp32)
    }

    fn weights(
        &self,
        specs: &[WeightSpec],
        tensors: &Tensors,
        others: &[&Weights],
        precision: Precision,
    ) -> Result<Weights> {
        let others: Vec<&CpuWeights> =
            others.iter().filter_map(|other| (&***other as &dyn Any).downcast_ref()).collect();
        Ok(CpuWeights::load(specs, tensors, &others, precision)?)
    }

    fn executor(&self, plan: Plan, weights: &Weights) -> Result<Box<dyn Executor>> {
        Ok(Box::new(ready((plan, weights))?))
    }

    fn denoiser(
        &self,
        plans: Vec<(UNetBatch, Plan)>,
        weights: &Weights,
        vae: Option<(Parts<Plan>, &Weights)>,
    ) -> Result<Box<dyn Denoiser>> {
        let plans: Vec<_> = plans.into_iter().map(|(batch, plan)| (batch, Arc::new(plan))).collect();
        let largest = plans.iter().map(|(_, plan)| plan).max_by_key(|plan| plan.arena_bytes());
        let largest = largest.ok_or_else(|| Error::internal("a denoiser without a UNet"))?;
        let vae = vae.map(|(parts, weights)| parts.ready(|plan| ready((plan, weights))));
        let unet = CpuExecutor::new(largest.clone(), loaded(weights)?)?;
        Ok(Box::new(CpuDenoiser::new(unet, plans, vae.transpose()?)))
    }

    fn denoiser_bytes(&self, _: &Plan, _: usize, _: Option<&Parts<Plan>>) -> usize {
        0
    }
}

/// An executor of a plan with weights that were loaded here.
fn ready((plan, weights): Planned) -> Result<CpuExecutor> {
    CpuExecutor::new(Arc::new(plan), loaded(weights)?)
}

/// Weights that were loaded here.
fn loaded(weights: &Weights) -> Result<Arc<CpuWeights>> {
    let weights: Arc<dyn Any + Send + Sync> = weights.clone();
    weights
        .downcast()
        .map_err(|_| Error::mismatch(Subject::Run, "the weights were not loaded for the CPU").advise("load them there"))
}

/// The range of an activation's elements in the arena, counted in fp32 elements.
fn range(plan: &Plan, id: TensorId) -> Range<usize> {
    let start = plan.offset(id) / size_of::<f32>();
    start..start + plan.graph().shape(id).len()
}

/// Writes a shift, given the activation that it is added to.
type WriteShift<'a> = dyn Fn(&[f32], &mut [f32]) + Sync + 'a;

/// A plan (made with [`Fp32`]) with its arena and weights. Writes inputs, runs, and reads outputs.
pub struct CpuExecutor {
    plan: Arc<Plan>,
    weights: Arc<CpuWeights>,
    arena: Arena,
}

impl CpuExecutor {
    /// Allocates the arena, zeroed.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Mismatch`] if the plan was not made with [`Fp32`], the weights are another network's, or
    /// memory is short.
    pub fn new(plan: Arc<Plan>, weights: Arc<CpuWeights>) -> Result<Self> {
        plan.check(&Fp32, weights.specs())?;
        let arena = Arena::new(plan.arena_bytes())?;
        Ok(CpuExecutor { plan, weights, arena })
    }

    /// Runs another plan from now on, in the same memory and with the same weights.
    ///
    /// # Panics
    /// If the plan needs more memory.
    pub(crate) fn switch(&mut self, plan: &Arc<Plan>) {
        assert!(plan.arena_bytes() <= self.arena.0.len(), "a plan that needs more memory than this executor has");
        self.plan = plan.clone();
    }

    /// Runs with other weights of the same network from now on.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Mismatch`] for the weights of another network.
    pub(crate) fn switch_weights(&mut self, weights: Arc<CpuWeights>) -> Result<()> {
        self.plan.check(&Fp32, weights.specs())?;
        self.weights = weights;
        Ok(())
    }

    /// The weights.
    pub fn weights(&self) -> &CpuWeights {
        &self.weights
    }

    /// The named input itself, for values that are not indices.
    pub(crate) fn input_mut(&mut self, name: &str) -> &mut [f32] {
        let range = range(&self.plan, self.plan.graph().input(name));
        &mut self.arena.numbers_mut()[range]
    }

    /// The named output of the last run, NHWC.
    pub fn output(&self, name: &str) -> &[f32] {
        &self.arena.numbers()[range(&self.plan, self.plan.graph().output(name))]
    }

    /// Runs one step, `reusing` the kept activations or not. Before an [`Op::Shift`], `write` writes the shift for the
    /// activation that it is added to.
    fn run_step(&mut self, reusing: bool, write: Option<&WriteShift<'_>>) {
        let plan = self.plan.clone();
        // From inside the pool: see `all`.
        rayon::scope(move |_| {
            let mut run = |(node, workspace): (&Node, (usize, usize))| {
                if let (Op::Shift { x, shift }, Some(write)) = (&node.op, write) {
                    // A copy, so that `write` may read one slice while it writes the other. The bottleneck is small.
                    let x = self.arena.numbers()[range(&plan, *x)].to_vec();
                    write(&x, &mut self.arena.numbers_mut()[range(&plan, *shift)]);
                }
                self.run(&plan, node, workspace);
            };
            match reusing {
                true => plan.reusing_step().for_each(&mut run),
                false => plan.step().for_each(&mut run),
            }
        });
    }

    /// Runs nodes from inside the pool. An operation called from outside would have to wake the pool and wait to be
    /// woken.
    fn all<'a>(&mut self, plan: &Plan, nodes: impl Iterator<Item = (&'a Node, (usize, usize))> + Send) {
        rayon::scope(|_| nodes.for_each(|(node, workspace)| self.run(plan, node, workspace)));
    }

    fn run(&mut self, plan: &Plan, node: &Node, workspace: (usize, usize)) {
        let memory = NodeMemory { plan, arena: self.arena.numbers_mut().as_mut_ptr(), workspace };
        let (weights, out) = (&*self.weights, node.output);
        match node.op {
            Op::Conv(ref conv) => conv::run(conv, out, &memory, weights),
            Op::GroupNorm(ref norm) => group_norm::run(norm, weights, out, &memory),
            Op::GroupNormMoments { ref of } => group_norm::row_moments(of, out, &memory),
            Op::GroupNormGradient { ref of, d } => group_norm::gradient(of, weights, d, out, &memory),
            Op::LayerNorm { x, weight, bias, eps } => {
                layer_norm::run(x, (weights.get(weight), weights.get(bias)), eps, out, &memory)
            }
            Op::LayerNormGradient { x, weight, eps, d } => {
                layer_norm::gradient(x, weights.get(weight), eps, d, out, &memory)
            }
            Op::Attention(ref attention) => attention::run(attention, out, &memory),
            Op::AttentionGradient { ref of, fused, d } => attention_gradient::run(of, fused, d, out, &memory),
            Op::Add { a, b } => elementwise::add(a, b, out, &memory),
            Op::MeanOfHalves { x } => elementwise::mean_of_halves(x, out, &memory),
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

impl AsRef<dyn Executor> for CpuExecutor {
    fn as_ref(&self) -> &(dyn Executor + 'static) {
        self
    }
}

impl AsMut<dyn Executor> for CpuExecutor {
    fn as_mut(&mut self) -> &mut (dyn Executor + 'static) {
        self
    }
}

impl Executor for CpuExecutor {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn copy_part(
        &mut self,
        (input, at): (&str, usize),
        from: &dyn Executor,
        (output, part): (&str, Range<usize>),
    ) -> Result<()> {
        let numbers = match (from as &dyn Any).downcast_ref() {
            Some(from) => Self::output(from, output)[part].into(),
            None => Cow::Owned(from.read_part(output, part)?),
        };
        self.input_mut(input)[at..][..numbers.len()].copy_from_slice(&numbers);
        Ok(())
    }

    fn write(&mut self, name: &str, values: &[f32]) -> Result<()> {
        self.plan.graph().check_values(name, values)?;
        self.input_mut(name).copy_from_slice(values);
        Ok(())
    }

    fn read_part(&self, name: &str, part: Range<usize>) -> Result<Vec<f32>> {
        Ok(self.output(name)[part].to_vec())
    }

    fn prologue(&mut self) -> Result<()> {
        let plan = self.plan.clone();
        self.all(&plan, plan.prologue());
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        self.run_step(false, None);
        Ok(())
    }

    fn step_to(&mut self, output: &str) -> Result<()> {
        let plan = self.plan.clone();
        let nodes = plan.step_to(output);
        self.all(&plan, plan.step().take(nodes));
        Ok(())
    }

    fn backward(&mut self) -> Result<()> {
        let plan = self.plan.clone();
        self.all(&plan, plan.backward());
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        Ok(())
    }

    fn caches(&self) -> &'static [Cache] {
        &[Cache::Cold]
    }

    fn timed(
        &mut self,
        _: Cache,
        wanted: &(dyn Fn(&Node) -> bool + Sync),
        tell: &mut (dyn FnMut(&Node, &str, Duration) + Send),
    ) -> Result<()> {
        let plan = self.plan.clone();
        rayon::scope(move |_| {
            for (node, workspace) in plan.all() {
                let start = Instant::now();
                self.run(&plan, node, workspace);
                if wanted(node) {
                    tell(node, "", start.elapsed());
                }
            }
        });
        Ok(())
    }
}

/// A node's view of the arena.
struct NodeMemory<'a> {
    plan: &'a Plan,
    arena: *mut f32,
    workspace: (usize, usize),
}

// SAFETY: only the methods below use the pointer, each under its own conditions; the other fields are shared data.
unsafe impl Sync for NodeMemory<'_> {}

/// A node's output (or workspace), which many threads write at once, each in places of its own.
struct SharedOutput<'a> {
    start: *mut f32,
    len: usize,
    owner: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: `at` requires of its callers that no two slices overlap.
unsafe impl Sync for SharedOutput<'_> {}

impl<'a> SharedOutput<'a> {
    fn new(numbers: &'a mut [f32]) -> Self {
        SharedOutput { start: numbers.as_mut_ptr(), len: numbers.len(), owner: std::marker::PhantomData }
    }

    /// The `len` elements from `offset` on.
    ///
    /// # Safety
    /// No other call may return any of these elements while they are in use.
    #[allow(clippy::mut_from_ref)]
    unsafe fn at(&self, offset: usize, len: usize) -> &mut [f32] {
        assert!(offset + len <= self.len);
        // SAFETY: in bounds of the slice that it was made of, as asserted; the caller guarantees the rest.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) }
    }
}

impl NodeMemory<'_> {
    fn shape(&self, id: TensorId) -> Shape {
        self.plan.graph().shape(id)
    }

    /// An input of the node.
    fn read(&self, id: TensorId) -> &[f32] {
        // SAFETY: in bounds of the arena; the plan keeps the node's inputs, output and workspace disjoint (tested
        // there).
        unsafe { std::slice::from_raw_parts(self.arena.add(range(self.plan, id).start), self.shape(id).len()) }
    }

    /// The node's output. To be called once per node.
    #[allow(clippy::mut_from_ref)]
    fn write(&self, id: TensorId) -> &mut [f32] {
        // SAFETY: as for `read`, and nothing else refers to the output while the node runs.
        unsafe { std::slice::from_raw_parts_mut(self.arena.add(range(self.plan, id).start), self.shape(id).len()) }
    }

    /// The node's scratch memory. To be called once per node.
    #[allow(clippy::mut_from_ref)]
    fn workspace(&self) -> &mut [f32] {
        let (offset, len) = (self.workspace.0 / size_of::<f32>(), self.workspace.1 / size_of::<f32>());
        // SAFETY: as for `write`.
        unsafe { std::slice::from_raw_parts_mut(self.arena.add(offset), len) }
    }
}

/// Runs a task with `len` elements of thread-local scratch memory, aligned to a cache line, whose content is undefined.
/// A thread keeps the largest scratch memory that it ever needed, 1.4 MB.
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

/// Zeroed, page-aligned memory. The system assigns a page only when it is first written.
/// Under a limit, such as a container's, the process would be ended at that point: so what is free is asked before.
fn pages(bytes: usize, purpose: &str) -> Result<MmapMut> {
    let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
    let short = |problem: String| {
        Error::out_of_memory(format!("{:.2} GiB of memory are needed for {purpose}: {problem}", gib(bytes)))
            .advise("choose a smaller model, picture or batch, or end other programs")
    };
    match memory::free() {
        Some(free) if free < bytes => Err(short(format!("{:.2} GiB are free", gib(free)))),
        _ => MmapMut::map_anon(bytes.max(size_of::<f32>())).map_err(|problem| short(problem.to_string())),
    }
}

/// The memory of a plan's activations.
struct Arena(MmapMut);

impl Arena {
    /// Zeroed, in huge pages where the system has them: neighbouring rows of an image are often one or more normal
    /// pages apart, and the processor's TLB holds few of those.
    fn new(bytes: usize) -> Result<Self> {
        let map = pages(bytes, "activations")?;
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage); // If it fails, pages have the normal size.
        Ok(Arena(map))
    }

    fn numbers(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }

    fn numbers_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}
