//! The face that the CPU and the CUDA kernels share: weights, executors of plans, and networks that sample. The modules
//! `cpu` and `cuda` implement it, and everything above them sees these traits alone.

mod parts;
mod slots;

pub use parts::{Parts, Piece};
pub use slots::{Active, AddedToBottleneck, Guidance, Kept, RunImage, Slots, UNetBatch, capacity, level_after};

use crate::graph::{Graph, Node, TensorId, WeightSpec};
use crate::image::Picture;
use crate::plan::Plan;
use crate::weights::Tensors;
use crate::{Error, Result};
use std::any::Any;
use std::fmt::{self, Display, Formatter};
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// Number format of linear layers and 1x1 convolutions on the CPU, where everything else is in fp32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// The device's own: on the CPU fp32 arithmetic on the checkpoint's own numbers, on a GPU fp16.
    #[default]
    Full,
    /// bf16 operands with fp32 accumulators: a third of the time with AMX. On other machines it may be slower than
    /// fp32.
    Bf16,
    /// 8-bit integers: weights are rounded once with a scale per column, activations in every call with a scale per
    /// row. A third to half of the time with AMX or AVX-512 VNNI, and half the memory of fp16; pictures differ in
    /// details.
    Int8,
}

impl Display for Precision {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Precision::Full => "full",
            Precision::Bf16 => "bf16",
            Precision::Int8 => "int8",
        })
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let all = [Precision::Full, Precision::Bf16, Precision::Int8];
        all.into_iter().find(|precision| precision.to_string() == name).ok_or_else(|| {
            Error::invalid("precision", format!("`{name}` is not a precision")).advise("give full, bf16 or int8")
        })
    }
}

/// A place where networks run.
pub trait Backend: Send + Sync {
    /// A name for people, such as `NVIDIA H100 80GB HBM3` or `CPU (Avx2)`.
    fn name(&self) -> String;

    /// Bytes of one number of an activation, 2 or 4.
    fn number_bytes(&self, graph: &Graph, id: TensorId) -> usize;

    /// Bytes of free memory, where that is known.
    fn free_bytes(&self) -> Option<usize>;

    /// Bytes of the device's memory that have been taken since it was opened, by the driver's count, where that is
    /// known.
    fn used_bytes(&self) -> Option<usize>;

    /// Compiles a graph; `constant` as in [`Plan::new`].
    fn plan(&self, graph: Graph, constant: &[&str]) -> Plan;

    /// Reads and packs a network's weights, and takes from `others` of the same checkpoint what they hold, changed by
    /// the same adapters.
    ///
    /// # Errors
    /// The files' problems, [`crate::ErrorKind::OutOfMemory`], and [`crate::ErrorKind::Invalid`] for a precision that
    /// the device does not have.
    fn weights(
        &self,
        specs: &[WeightSpec],
        tensors: &Tensors,
        others: &[&Weights],
        precision: Precision,
    ) -> Result<Weights>;

    /// Allocates the memory of a plan and makes it ready to run.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`], [`crate::ErrorKind::Unsupported`] for an operation without a kernel, and
    /// [`crate::ErrorKind::Mismatch`] for a plan or weights of another device or network.
    fn executor(&self, plan: Plan, weights: &Weights) -> Result<Box<dyn Executor>>;

    /// Makes a UNet ready to sample, and with it the VAE of a session if one is given. The UNet's plans are for several
    /// batches, of which one runs at a time; they share the memory of the plan that needs most.
    ///
    /// # Errors
    /// As for [`Backend::executor`].
    fn denoiser(
        &self,
        plans: Vec<(UNetBatch, Plan)>,
        weights: &Weights,
        vae: Option<(Parts<Plan>, &Weights)>,
    ) -> Result<Box<dyn Denoiser>>;

    /// Bytes that [`Backend::denoiser`] takes beside the arenas of the networks, for `images` images at most. On the
    /// CPU they are not counted.
    fn denoiser_bytes(&self, unet: &Plan, images: usize, vae: Option<&Parts<Plan>>) -> usize;
}

/// A plan and the weights that it runs with.
pub type Planned<'a> = (Plan, &'a Weights);

/// A network's weights on a device. Cloning shares them.
pub type Weights = Arc<dyn PackedWeights>;

/// A network's weights in a device's own layout.
pub trait PackedWeights: Any + Send + Sync {
    /// Bytes of the device's memory.
    fn bytes(&self) -> usize;

    /// Bytes that `specs` would take beside these.
    fn missing(&self, specs: &[WeightSpec]) -> usize;
}

/// A plan with its memory and weights. It writes inputs, runs, and reads outputs, all of them NHWC.
pub trait Executor: Any + Send {
    /// The plan.
    fn plan(&self) -> &Plan;

    /// Writes the named input, which keeps its value from run to run. Numbers beyond the range of the device's format
    /// saturate.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for an index (a token id) beyond what it chooses from,
    /// [`crate::ErrorKind::DeviceLost`] with the driver's message.
    ///
    /// # Panics
    /// If the graph has no such input, or one of another length.
    fn write(&mut self, name: &str, values: &[f32]) -> Result<()>;

    /// Writes the named input with an output of another executor's last run. On one device the numbers stay there.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's message.
    ///
    /// # Panics
    /// If one graph has no such input, or the other no such output of its length.
    fn copy(&mut self, input: &str, from: &dyn Executor, output: &str) -> Result<()> {
        let graph = from.plan().graph();
        let length = graph.shape(graph.output(output)).len();
        assert_eq!(length, self.plan().graph().shape(self.plan().graph().input(input)).len(), "input `{input}`");
        self.copy_part((input, 0), from, (output, 0..length))
    }

    /// The same with a part of the output, for the named input's numbers from a place on. They must not be indices.
    ///
    /// # Errors
    /// As for [`Executor::copy`].
    ///
    /// # Panics
    /// If one graph has no such input, or the other no such output, or either is too short.
    fn copy_part(&mut self, to: (&str, usize), from: &dyn Executor, of: (&str, Range<usize>)) -> Result<()>;

    /// The named output of the last run.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's message, also about the run.
    ///
    /// # Panics
    /// If the graph has no such output.
    fn read(&self, name: &str) -> Result<Vec<f32>> {
        let graph = self.plan().graph();
        self.read_part(name, 0..graph.shape(graph.output(name)).len())
    }

    /// A part of the named output of the last run.
    ///
    /// # Errors
    /// As for [`Executor::read`].
    ///
    /// # Panics
    /// If the graph has no such output, or it is too short.
    fn read_part(&self, name: &str, part: Range<usize>) -> Result<Vec<f32>>;

    /// Runs the nodes that depend on constant inputs alone; needed once after these change.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's message, or the emulator's about a faulty kernel.
    fn prologue(&mut self) -> Result<()>;

    /// Runs one step.
    ///
    /// # Errors
    /// As for [`Executor::prologue`].
    fn step(&mut self) -> Result<()>;

    /// Runs the nodes of a step up to the one that makes the named output.
    ///
    /// # Errors
    /// As for [`Executor::prologue`].
    ///
    /// # Panics
    /// If the graph has no such output.
    fn step_to(&mut self, output: &str) -> Result<()>;

    /// Runs the backward nodes, from the last step's activations and the seed in the input `d.<output>`.
    ///
    /// # Errors
    /// As for [`Executor::prologue`].
    fn backward(&mut self) -> Result<()>;

    /// Waits until all work submitted before is done, so that a clock read afterwards has timed it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's message about that work.
    fn wait(&self) -> Result<()>;

    /// The states of the cache in which [`Executor::timed`] can time a node.
    fn caches(&self) -> &'static [Cache];

    /// Runs all nodes one by one, each with the cache as asked. For every node that `wanted` names and that is not part
    /// of another's work, `tell` receives the names of its kernels and its duration.
    ///
    /// # Errors
    /// As for [`Executor::prologue`].
    fn timed(
        &mut self,
        cache: Cache,
        wanted: &(dyn Fn(&Node) -> bool + Sync),
        tell: &mut (dyn FnMut(&Node, &str, Duration) + Send),
    ) -> Result<()>;
}

/// The contents of the cache when a timing begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Nothing that a node reads on a GPU; on the CPU as the node before left it.
    Cold,
    /// The same node's data from a run just before.
    Warm,
}

/// A UNet with its samplers, and the VAE of a session. Every image has a slot, in which it begins and ends at any step
/// of the others; what it becomes does not depend on them.
pub trait Denoiser: Send {
    /// The size of the UNet's batch, in images, with which `images` images are served.
    fn capacity(&self, images: usize) -> usize;

    /// Puts an image into a slot, in place of the one that was there.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for too many steps, [`crate::ErrorKind::Unsupported`] if the device cannot add
    /// such numbers to the bottleneck, [`crate::ErrorKind::DeviceLost`].
    fn begin(&mut self, slot: usize, image: RunImage) -> Result<()>;

    /// Gives the rows of the UNet's batch to slots, writes the inputs that condition the rows, and runs the nodes that
    /// depend on these alone. `inputs` are for a batch of [`Denoiser::capacity`] images, if `guided` the unconditional
    /// rows first. Without these a step takes the conditional predictions, whatever the images' guidance.
    ///
    /// # Errors
    /// As for [`Executor::prologue`], and [`crate::ErrorKind::Internal`] if there is no plan for such a batch.
    fn place(&mut self, slots: &[usize], guided: bool, inputs: &[(&'static str, Vec<f32>)]) -> Result<()>;

    /// Takes the next step of every image that has a row and is not done. The device may still be at work afterwards.
    /// If `reusing`, the UNet takes the activations that its graph keeps from the last whole step, which had the same
    /// images and a graph that keeps activations of the same sizes.
    ///
    /// # Errors
    /// As for [`Executor::prologue`].
    fn step(&mut self, reusing: bool) -> Result<()>;

    /// Goes over to other weights of the UNet, which is neither planned nor allocated anew. Rows have to be placed
    /// again afterwards.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Mismatch`] for weights of another device or network.
    fn switch(&mut self, weights: &Weights) -> Result<()>;

    /// An image's first step, counted from 0, that gave latents that are not finite. This waits for the device.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`].
    fn fault(&mut self, slot: usize) -> Result<Option<usize>>;

    /// An image's latents, `[h, w, c]`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`].
    fn latents(&mut self, slot: usize) -> Result<Vec<f32>>;

    /// Decodes an image, whose latents are the VAE's times `scaling_factor`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NonFinite`] for a picture with numbers that are not finite.
    fn picture(&mut self, slot: usize, scaling_factor: f32) -> Result<Picture>;
}
