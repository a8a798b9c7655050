//! The CUDA kernels: plans as lists of launches of the kernels in `kernels/`, on a GPU or on the emulator.
//!
//! There is one file per operation family, with the same name as its kernels. Storage is fp16, accumulation fp32,
//! layout NHWC.
//!
//! Sums never depend on the batch: everything that decides the order of summation (splits of a depth, tiles of keys,
//! stretches of pixels) is a function of one image's shape. So an image gives the same bits alone and in a batch.

mod attention;
mod attention_gradient;
mod attention_gradient_hopper;
mod attention_hopper;
pub mod compiled;
mod conv;
mod conv_hopper;
mod cut;
mod device;
mod driver;
mod elementwise;
#[cfg(feature = "emulated")]
mod emulated;
mod epilogue;
mod folded;
mod gpu;
mod group_norm;
mod layer_norm;
mod moments;
mod params;
mod program;
mod sampler;
mod sampling;
mod site;
mod tiles;
mod weights;

pub use device::{Buffer, CudaDevice, Launch, Limits, Recording, TensorTiles};
pub use driver::{Card, Version};
#[cfg(feature = "emulated")]
pub use emulated::Emulated;
pub use gpu::{cards, open};
#[cfg(feature = "emulated")]
pub use params::{layouts, tiles};
pub use program::{Lowered, lowered};
pub use sampler::{DeviceSampler, SampledImage};
pub use site::Element;
pub use weights::CudaWeights;

use crate::backend::{Backend, Cache, Denoiser, Executor, Parts, Planned, Precision, UNetBatch, Weights};
use crate::graph::{Graph, Node, Op, TensorId, WeightSpec};
use crate::plan::{Plan, Storage};
use crate::weights::Tensors;
use crate::{Error, Result, Subject};
use half::f16;
use moments::Moments;
use program::Program;
use sampling::CudaDenoiser;
use site::{Bindings, COUNTERS};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

impl Storage for Limits {
    fn name(&self) -> String {
        let Limits { capability, multiprocessors, shared } = self;
        format!("kernels for {multiprocessors} multiprocessors of {capability} with {shared} bytes of shared memory")
    }

    fn tensor(&self, graph: &Graph, id: TensorId) -> usize {
        let shape = graph.shape(id);
        match conv::moments(graph, id, *self) {
            Some(moments) => Moments::offset(shape) + moments.bytes(shape),
            None if conv::is_added(graph, id, *self) || folded::has_no_launch(graph, id, *self) => 0,
            None => shape.len() * Element::of(graph, id).bytes(),
        }
    }

    fn reads(&self, graph: &Graph, node: &Node) -> Vec<TensorId> {
        match &node.op {
            Op::Conv(conv) => conv::reads(graph, conv, node.output, *self),
            op => op.inputs().collect(),
        }
    }

    fn workspace(&self, graph: &Graph, node: &Node) -> usize {
        program::workspace(graph, node, *self)
    }

    fn reserved(&self) -> usize {
        COUNTERS * size_of::<u32>()
    }
}

/// The kernels on a machine: a GPU or the emulator.
pub struct Kernels(pub Arc<dyn CudaDevice>);

impl Backend for Kernels {
    fn name(&self) -> String {
        self.0.name()
    }

    fn number_bytes(&self, graph: &Graph, id: TensorId) -> usize {
        Element::of(graph, id).bytes()
    }

    fn free_bytes(&self) -> Option<usize> {
        self.0.free_bytes()
    }

    fn used_bytes(&self) -> Option<usize> {
        self.0.used_bytes()
    }

    fn plan(&self, graph: Graph, constant: &[&str]) -> Plan {
        Plan::new(graph, constant, &self.0.limits())
    }

    fn weights(
        &self,
        specs: &[WeightSpec],
        tensors: &Tensors,
        others: &[&Weights],
        precision: Precision,
    ) -> Result<Weights> {
        if precision != Precision::Full {
            return Err(Error::invalid("precision", "linear layers in bf16 and int8 exist on the CPU alone")
                .advise("choose the CPU, or full precision, which is fp16 here"));
        }
        let others: Vec<&CudaWeights> =
            others.iter().filter_map(|other| (&***other as &dyn Any).downcast_ref()).collect();
        Ok(CudaWeights::load_beside(&self.0, specs, tensors, &others)?)
    }

    fn executor(&self, plan: Plan, weights: &Weights) -> Result<Box<dyn Executor>> {
        Ok(Box::new(self.ready((plan, weights))?))
    }

    fn denoiser(
        &self,
        plans: Vec<(UNetBatch, Plan)>,
        weights: &Weights,
        vae: Option<(Parts<Plan>, &Weights)>,
    ) -> Result<Box<dyn Denoiser>> {
        let weights = loaded(weights, &self.0)?;
        let bytes = plans.iter().map(|(_, plan)| plan.arena_bytes()).max().unwrap_or(0);
        let arena = Arc::new(Buffer::zeroed(&self.0, bytes)?);
        let unet = |(batch, plan)| {
            let plan = Arc::new(plan);
            check(&plan, &weights, &self.0)?;
            Ok((batch, CudaExecutor::in_arena(&self.0, plan, weights.clone(), arena.clone())?))
        };
        let unets = plans.into_iter().map(unet).collect::<Result<_>>()?;
        let vae = vae.map(|(parts, weights)| parts.ready(|plan| self.ready((plan, weights))));
        Ok(Box::new(CudaDenoiser::new(unets, vae.transpose()?)?))
    }

    fn denoiser_bytes(&self, unet: &Plan, images: usize, vae: Option<&Parts<Plan>>) -> usize {
        CudaDenoiser::own_bytes(unet, images, vae)
    }
}

impl Kernels {
    /// An executor of a plan with weights that were loaded here.
    fn ready(&self, (plan, weights): Planned) -> Result<CudaExecutor> {
        CudaExecutor::new(&self.0, Arc::new(plan), loaded(weights, &self.0)?)
    }
}

/// Weights that were loaded for the kernels.
fn loaded(weights: &Weights, device: &Arc<dyn CudaDevice>) -> Result<Arc<CudaWeights>> {
    let weights: Arc<dyn Any + Send + Sync> = weights.clone();
    weights.downcast().map_err(|_| {
        Error::mismatch(Subject::Run, format!("the weights were not loaded for {}", device.name()))
            .advise("load them there")
    })
}

/// The greatest finite fp16 number.
const HALF_MAX: f32 = 65504.0;

/// A plan on a device with its arena and weights: writes inputs, runs, reads outputs.
pub struct CudaExecutor {
    plan: Arc<Plan>,
    /// Kept alive because the launches point into it.
    weights: Arc<CudaWeights>,
    device: Arc<dyn CudaDevice>,
    arena: Arc<Buffer>,
    program: Program,
    /// The recorded launches of the step and of the backward nodes; each is made at its first run.
    recordings: [Option<Box<dyn Recording>>; 2],
}

impl CudaExecutor {
    /// Allocates the arena and prepares the launches.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] when memory is short, an operation has no kernel, the plan was not made with
    /// the device's [`Limits`] as storage, or the weights are another network's or on another device.
    pub fn new(device: &Arc<dyn CudaDevice>, plan: Arc<Plan>, weights: Arc<CudaWeights>) -> Result<Self> {
        check(&plan, &weights, device)?;
        let arena = Arc::new(Buffer::zeroed(device, plan.arena_bytes())?);
        Self::in_arena(device, plan, weights, arena)
    }

    /// An executor in memory of this size or more, which was zeroed, and which executors of other plans may use too: a
    /// run of one overwrites what the others hold.
    fn in_arena(
        device: &Arc<dyn CudaDevice>,
        plan: Arc<Plan>,
        weights: Arc<CudaWeights>,
        arena: Arc<Buffer>,
    ) -> Result<Self> {
        let program = bound(device, &weights, &arena, |bindings| Program::new(&plan, bindings))?;
        Ok(CudaExecutor { plan, weights, device: device.clone(), arena, program, recordings: [None, None] })
    }

    /// Runs with other weights of the same network from now on, in the same memory.
    ///
    /// # Errors
    /// Those of [`CudaExecutor::new`].
    pub fn switch_weights(&mut self, weights: &Weights) -> Result<()> {
        let weights = loaded(weights, &self.device)?;
        check(&self.plan, &weights, &self.device)?;
        *self = Self::in_arena(&self.device, self.plan.clone(), weights, self.arena.clone())?;
        Ok(())
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn CudaDevice> {
        &self.device
    }

    /// The address of the named input.
    pub fn input_address(&self, name: &str) -> u64 {
        self.arena.address() + self.plan.offset(self.plan.graph().input(name)) as u64
    }

    /// The address of the named output.
    pub fn output_address(&self, name: &str) -> u64 {
        self.arena.address() + self.plan.offset(self.plan.graph().output(name)) as u64
    }

    /// Writes an input's numbers from a place on.
    fn write_part(&self, id: TensorId, at: usize, values: &[f32]) -> Result<()> {
        let element = Element::of(self.plan.graph(), id);
        let offset = self.plan.offset(id) + at * element.bytes();
        match element {
            Element::F32 => self.arena.write(offset, bytemuck::cast_slice(values)),
            Element::F16 => {
                let halves: Vec<f16> = values.iter().map(|&x| f16::from_f32(x.clamp(-HALF_MAX, HALF_MAX))).collect();
                self.arena.write(offset, bytemuck::cast_slice(&halves))
            }
        }
    }

    /// The launches of a step, for recordings that contain more than a step.
    pub fn step_launches(&self) -> &[Launch] {
        &self.program.step
    }

    /// The launches of a step that reuses the activations which the graph keeps.
    pub fn reusing_step_launches(&self) -> &[Launch] {
        &self.program.reusing
    }
}

impl AsRef<dyn Executor> for CudaExecutor {
    fn as_ref(&self) -> &(dyn Executor + 'static) {
        self
    }
}

impl AsMut<dyn Executor> for CudaExecutor {
    fn as_mut(&mut self) -> &mut (dyn Executor + 'static) {
        self
    }
}

impl Executor for CudaExecutor {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn write(&mut self, name: &str, values: &[f32]) -> Result<()> {
        self.plan.graph().check_values(name, values)?;
        self.write_part(self.plan.graph().input(name), 0, values)
    }

    fn copy_part(
        &mut self,
        (input, at): (&str, usize),
        from: &dyn Executor,
        (output, part): (&str, Range<usize>),
    ) -> Result<()> {
        let (to, of) = (self.plan.graph(), from.plan().graph());
        let (input_id, output_id) = (to.input(input), of.output(output));
        assert!(to.choices(input_id).is_none() && at + part.len() <= to.shape(input_id).len(), "input `{input}`");
        assert!(part.end <= of.shape(output_id).len(), "output `{output}`");
        let element = Element::of(to, input_id);
        let here = (from as &dyn Any).downcast_ref().filter(|from: &&Self| from.arena.is_on(&self.device));
        match here {
            Some(from) if element == Element::of(of, output_id) => {
                let [to, of] = [(self.input_address(input), at), (from.output_address(output), part.start)]
                    .map(|(address, first)| address + (first * element.bytes()) as u64);
                // SAFETY: both are on this device, in the arenas of executors that are borrowed.
                unsafe { self.device.copy(to, of, part.len() * element.bytes()) }
            }
            _ => self.write_part(input_id, at, &from.read_part(output, part)?),
        }
    }

    fn read_part(&self, name: &str, part: Range<usize>) -> Result<Vec<f32>> {
        let graph = self.plan.graph();
        let id = graph.output(name);
        assert!(part.end <= graph.shape(id).len(), "output `{name}`");
        let element = Element::of(graph, id);
        let mut bytes = vec![0; part.len() * element.bytes()];
        self.arena.read(self.plan.offset(id) + part.start * element.bytes(), &mut bytes)?;
        Ok(match element {
            Element::F32 => bytemuck::pod_collect_to_vec(&bytes),
            Element::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        })
    }

    fn prologue(&mut self) -> Result<()> {
        // SAFETY: the launches read and write the arena and read the weights, both of which live as long as `self`.
        unsafe { self.device.run(&self.program.prologue) }
    }

    fn step(&mut self) -> Result<()> {
        replay(&self.device, &self.program.step, &mut self.recordings[0])
    }

    fn step_to(&mut self, output: &str) -> Result<()> {
        let launches = self.program.step_ends[self.plan.step_to(output) - 1];
        // SAFETY: as in `prologue`.
        unsafe { self.device.run(&self.program.step[..launches]) }
    }

    fn backward(&mut self) -> Result<()> {
        replay(&self.device, &self.program.backward, &mut self.recordings[1])
    }

    fn wait(&self) -> Result<()> {
        self.arena.read(0, &mut [0])
    }

    fn caches(&self) -> &'static [Cache] {
        &[Cache::Cold, Cache::Warm]
    }

    fn timed(
        &mut self,
        cache: Cache,
        wanted: &(dyn Fn(&Node) -> bool + Sync),
        tell: &mut (dyn FnMut(&Node, &str, Duration) + Send),
    ) -> Result<()> {
        for (node, workspace) in self.plan.all() {
            let launches = bound(&self.device, &self.weights, &self.arena, |bindings| {
                Program::lowering(&self.plan, bindings)(node, workspace)
            })?;
            // SAFETY: as in `prologue`.
            unsafe {
                match wanted(node) && !launches.is_empty() {
                    true => tell(node, &names(&launches), self.device.time(&launches, cache)?),
                    false => self.device.run(&launches)?,
                }
            }
        }
        Ok(())
    }
}

/// Checks that a plan and weights belong together and to a device.
fn check(plan: &Plan, weights: &CudaWeights, device: &Arc<dyn CudaDevice>) -> Result<()> {
    plan.check(&device.limits(), weights.specs())?;
    match weights.is_on(device) {
        true => Ok(()),
        false => Err(Error::mismatch(Subject::Device, format!("the weights are not on {}", device.name()))
            .advise("load them there")),
    }
}

/// The kernels and grids of launches, such as `conv_128x160 8x4x1`.
pub fn names(launches: &[Launch]) -> String {
    let named = launches.iter().map(|Launch { kernel, grid: [x, y, z], .. }| format!("{kernel} {x}x{y}x{z}"));
    named.collect::<Vec<_>>().join(", ")
}

/// Calls `lower` with the bindings of an executor on its device.
fn bound<T>(
    device: &Arc<dyn CudaDevice>,
    weights: &CudaWeights,
    arena: &Buffer,
    lower: impl FnOnce(&Bindings) -> Result<T>,
) -> Result<T> {
    lower(&Bindings {
        limits: device.limits(),
        weights: &weights.addresses(),
        arena: arena.address(),
        tensor_map: &|tiles| device.tensor_map(tiles),
    })
}

/// Runs launches of an executor, recording them the first time.
fn replay(device: &Arc<dyn CudaDevice>, launches: &[Launch], recording: &mut Option<Box<dyn Recording>>) -> Result<()> {
    let made = match recording.take() {
        Some(recording) => recording,
        // SAFETY: as in `CudaExecutor::prologue`.
        None => unsafe { device.clone().record(launches)? },
    };
    recording.insert(made).replay()
}
