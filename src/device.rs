//! Where networks run, and one face for both executors.

use crate::cpu::{self, CpuExecutor, CpuWeights, MatrixPrecision};
use crate::cuda;
use crate::graph::{Graph, Node, WeightSpec};
use crate::plan::Plan;
use crate::weights::Tensors;
use crate::{Error, Result, Subject};
use std::sync::Arc;
use std::time::Duration;

/// A place where networks run: the CPU, in fp32, or an NVIDIA GPU, in fp16. Cloning shares it.
#[derive(Clone, Default)]
pub struct Device(pub(crate) Backend);

/// The kinds of devices.
#[derive(Clone, Default)]
pub(crate) enum Backend {
    #[default]
    Cpu,
    /// The CUDA kernels, on a GPU or on the emulator.
    Cuda(Arc<dyn cuda::CudaDevice>),
}

impl Device {
    /// This machine's processor.
    pub fn cpu() -> Self {
        Device(Backend::Cpu)
    }

    /// The first GPU that the kernels run on if there is one, else the CPU.
    pub fn auto() -> Self {
        Self::cuda(None).unwrap_or_default()
    }

    /// An NVIDIA GPU by its number in CUDA's order, of those that `CUDA_VISIBLE_DEVICES` leaves to the process, or the
    /// first that the kernels run on.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] in a build without kernels, [`crate::ErrorKind::NotFound`] without such a GPU
    /// or without a driver that is new enough, [`crate::ErrorKind::OutOfMemory`] if other processes hold it.
    pub fn cuda(ordinal: Option<usize>) -> Result<Self> {
        cuda::open(ordinal).map(Self::kernels)
    }

    /// The CUDA kernels on a machine of one's own, such as the emulator.
    pub fn kernels(machine: Arc<dyn cuda::CudaDevice>) -> Self {
        Device(Backend::Cuda(machine))
    }

    /// True for the CPU.
    pub fn is_cpu(&self) -> bool {
        matches!(self.0, Backend::Cpu)
    }

    /// A name for people, such as `NVIDIA H100 80GB HBM3` or `CPU (Avx2)`.
    pub fn name(&self) -> String {
        match &self.0 {
            Backend::Cpu => format!("CPU ({:?})", cpu::isa()),
            Backend::Cuda(device) => device.name(),
        }
    }

    /// Compiles a graph for it; `constant` as in [`Plan::new`].
    pub fn plan(&self, graph: Graph, constant: &[&str]) -> Plan {
        match &self.0 {
            Backend::Cpu => Plan::new(graph, constant, &cpu::Fp32),
            Backend::Cuda(device) => Plan::new(graph, constant, &device.limits()),
        }
    }

    /// Reads and packs a network's weights.
    ///
    /// # Errors
    /// What the files have wrong, or [`crate::ErrorKind::OutOfMemory`] when device memory is short.
    pub fn weights(&self, specs: &[WeightSpec], tensors: &Tensors) -> Result<Weights> {
        self.weights_beside(specs, tensors, &[], MatrixPrecision::Fp32)
    }

    /// The same with linear layers in another precision, which only the CPU has, taking what `others` of the same
    /// checkpoint hold from them.
    ///
    /// # Errors
    /// As [`Device::weights`], and [`crate::ErrorKind::Invalid`] for a precision that the device has not.
    pub fn weights_beside(
        &self,
        specs: &[WeightSpec],
        tensors: &Tensors,
        others: &[&Weights],
        precision: MatrixPrecision,
    ) -> Result<Weights> {
        Ok(match &self.0 {
            Backend::Cuda(_) if precision != MatrixPrecision::Fp32 => {
                return Err(Error::invalid("precision", "linear layers in bf16 and int8 exist on the CPU alone")
                    .advise("choose the CPU, or full precision, which is fp16 here"));
            }
            Backend::Cpu => {
                let others: Vec<_> = others.iter().filter_map(|other| other.on_cpu()).collect();
                Weights::Cpu(CpuWeights::load(specs, tensors, &others, precision)?)
            }
            Backend::Cuda(device) => {
                let others: Vec<_> = others.iter().filter_map(|other| other.on_cuda()).collect();
                Weights::Cuda(cuda::CudaWeights::load_beside(device, specs, tensors, &others)?)
            }
        })
    }

    /// Allocates what a plan of this device needs and readies it to run.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] when memory is short, an operation has no kernel, or plan or weights are
    /// another device's or network's.
    pub fn executor(&self, plan: Plan, weights: &Weights) -> Result<Executor> {
        let plan = Arc::new(plan);
        match (&self.0, weights) {
            (Backend::Cpu, Weights::Cpu(weights)) => Ok(Executor::Cpu(CpuExecutor::new(plan, weights.clone())?)),
            (Backend::Cuda(device), Weights::Cuda(weights)) => {
                Ok(Executor::Cuda(cuda::CudaExecutor::new(device, plan, weights.clone())?))
            }
            _ => Err(Error::mismatch(Subject::Run, format!("the weights were not loaded for {}", self.name()))
                .advise("load them there")),
        }
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({})", self.name())
    }
}

/// A network's weights on a device. Cloning shares them.
#[derive(Clone)]
pub enum Weights {
    /// In fp32.
    Cpu(Arc<CpuWeights>),
    /// In fp16.
    Cuda(Arc<cuda::CudaWeights>),
}

impl Weights {
    /// Bytes of the device's memory.
    pub fn bytes(&self) -> usize {
        match self {
            Weights::Cpu(weights) => weights.bytes(),
            Weights::Cuda(weights) => weights.bytes(),
        }
    }

    /// Bytes that `specs` would take beside these.
    pub fn missing(&self, specs: &[WeightSpec]) -> usize {
        match self {
            Weights::Cpu(weights) => weights.missing(specs),
            Weights::Cuda(weights) => weights.missing(specs),
        }
    }

    fn on_cpu(&self) -> Option<&CpuWeights> {
        match self {
            Weights::Cpu(weights) => Some(weights),
            Weights::Cuda(_) => None,
        }
    }

    fn on_cuda(&self) -> Option<&cuda::CudaWeights> {
        match self {
            Weights::Cpu(_) => None,
            Weights::Cuda(weights) => Some(weights),
        }
    }
}

/// A plan with its memory and weights: writes inputs, runs, reads outputs; numbers are NHWC.
pub enum Executor {
    /// On the CPU.
    Cpu(CpuExecutor),
    /// On the kernels.
    Cuda(cuda::CudaExecutor),
}

impl Executor {
    /// The plan.
    pub fn plan(&self) -> &Plan {
        match self {
            Executor::Cpu(executor) => executor.plan(),
            Executor::Cuda(executor) => executor.plan(),
        }
    }

    /// Writes the named input, which keeps its value from run to run.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for an index (a token id) beyond what it chooses from,
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    ///
    /// # Panics
    /// If the graph has no such input, or one of another length.
    pub fn write(&mut self, name: &str, values: &[f32]) -> Result<()> {
        match self {
            Executor::Cpu(executor) => executor.write(name, values),
            Executor::Cuda(executor) => executor.write(name, values),
        }
    }

    /// Writes the named input with an output of the last run of another executor on the same device.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    ///
    /// # Panics
    /// If one graph has no such input, or the other no such output of its length.
    pub fn copy(&mut self, input: &str, from: &Executor, output: &str) -> Result<()> {
        match (self, from) {
            (Executor::Cuda(to), Executor::Cuda(from)) => to.copy(input, from, output),
            (Executor::Cpu(to), Executor::Cpu(from)) => to.write(input, from.output(output)),
            (to, from) => to.write(input, &from.read(output)?),
        }
    }

    /// The named output of the last run.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`]: the driver's word, also about the run.
    ///
    /// # Panics
    /// If the graph has no such output.
    pub fn read(&self, name: &str) -> Result<Vec<f32>> {
        match self {
            Executor::Cpu(executor) => Ok(executor.output(name).to_vec()),
            Executor::Cuda(executor) => executor.read(name),
        }
    }

    /// Runs what depends on constant inputs alone; needed once after they change.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word, or the emulator's about a faulty kernel.
    pub fn prologue(&mut self) -> Result<()> {
        match self {
            Executor::Cpu(executor) => {
                executor.prologue();
                Ok(())
            }
            Executor::Cuda(executor) => executor.prologue(),
        }
    }

    /// Runs one step.
    ///
    /// # Errors
    /// As for [`Executor::prologue`].
    pub fn step(&mut self) -> Result<()> {
        match self {
            Executor::Cpu(executor) => {
                executor.step();
                Ok(())
            }
            Executor::Cuda(executor) => executor.step(),
        }
    }

    /// Runs the reverse half, from the last step's activations and the seed in the input `d.<output>`.
    ///
    /// # Errors
    /// As for [`Executor::prologue`].
    pub fn backward(&mut self) -> Result<()> {
        match self {
            Executor::Cpu(executor) => {
                executor.backward();
                Ok(())
            }
            Executor::Cuda(executor) => executor.backward(),
        }
    }

    /// Waits until all work given before is done, so that a clock read afterwards has timed it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word about that work.
    pub fn wait(&self) -> Result<()> {
        match self {
            Executor::Cpu(_) => Ok(()),
            Executor::Cuda(executor) => executor.wait(),
        }
    }

    /// Runs all nodes one by one, on the kernels each with the cache as asked (on the CPU as the node before left it),
    /// and tells of every node for which `wanted` is true what it launched there and how long it took.
    ///
    /// # Errors
    /// As for [`Executor::prologue`].
    pub fn timed(
        &mut self,
        cache: cuda::Cache,
        wanted: impl Fn(&Node) -> bool + Send,
        mut tell: impl FnMut(&Node, &[cuda::Launch], Duration) + Send,
    ) -> Result<()> {
        match self {
            Executor::Cpu(executor) => {
                executor.timed(wanted, |node, time| tell(node, &[], time));
                Ok(())
            }
            Executor::Cuda(executor) => executor.timed(cache, wanted, tell),
        }
    }
}
