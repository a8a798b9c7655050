//! Where networks run, and one face for both executors.

use crate::cpu::{self, MatrixPrecision};
use crate::cuda;
use crate::graph::{Graph, Node, WeightSpec};
use crate::plan::Plan;
use crate::weights::Tensors;
use crate::{Error, Result};
use std::sync::Arc;
use std::time::Duration;

/// Where networks run.
#[derive(Clone, Default)]
pub enum Device {
    /// This machine's processor, in fp32.
    #[default]
    Cpu,
    /// The CUDA kernels, in fp16, on a GPU or on the emulator.
    Cuda(Arc<dyn cuda::CudaDevice>),
}

impl Device {
    /// The GPU if there is one that this build has kernels for, else the CPU.
    pub fn auto() -> Self {
        cuda::open().map_or(Device::Cpu, Device::Cuda)
    }

    /// What it is.
    pub fn name(&self) -> String {
        match self {
            Device::Cpu => format!("CPU ({:?})", cpu::isa()),
            Device::Cuda(device) => device.name(),
        }
    }

    /// Compiles a graph for it; `constant` as in [`Plan::new`].
    pub fn plan(&self, graph: Graph, constant: &[&str]) -> Plan {
        match self {
            Device::Cpu => Plan::new(graph, constant, &cpu::Fp32),
            Device::Cuda(device) => Plan::new(graph, constant, &device.limits()),
        }
    }

    /// Reads and packs a network's weights.
    ///
    /// # Errors
    /// What the files have wrong, or [`Error::Device`] when device memory is short.
    pub fn weights(&self, specs: &[WeightSpec], tensors: &Tensors) -> Result<Weights> {
        self.weights_beside(specs, tensors, &[], MatrixPrecision::Fp32)
    }

    /// The same with linear layers in another precision, which only the CPU has, taking what `others` of the same
    /// checkpoint hold from them.
    ///
    /// # Errors
    /// As [`Device::weights`], and [`Error::Usage`] for a precision that the device has not.
    pub fn weights_beside(
        &self,
        specs: &[WeightSpec],
        tensors: &Tensors,
        others: &[&Weights],
        precision: MatrixPrecision,
    ) -> Result<Weights> {
        Ok(match self {
            Device::Cuda(_) if precision != MatrixPrecision::Fp32 => {
                return Err(Error::usage(
                    "linear layers in bf16 and int8 exist on the CPU alone; choose the CPU, or full precision, which is fp16 here",
                ));
            }
            Device::Cpu => {
                let others: Vec<_> = others.iter().filter_map(|other| other.on_cpu()).collect();
                Weights::Cpu(cpu::Weights::load_beside(specs, tensors, &others, precision)?)
            }
            Device::Cuda(device) => {
                let others: Vec<_> = others.iter().filter_map(|other| other.on_cuda()).collect();
                Weights::Cuda(cuda::CudaWeights::load_beside(device, specs, tensors, &others)?)
            }
        })
    }

    /// Allocates what a plan of this device needs and readies it to run.
    ///
    /// # Errors
    /// [`Error::Device`] when memory is short, an operation has no kernel, or plan or weights are another device's or
    /// network's.
    pub fn executor(&self, plan: Plan, weights: &Weights) -> Result<Executor> {
        let plan = Arc::new(plan);
        match (self, weights) {
            (Device::Cpu, Weights::Cpu(weights)) => Ok(Executor::Cpu(cpu::Executor::new(plan, weights.clone())?)),
            (Device::Cuda(device), Weights::Cuda(weights)) => {
                Ok(Executor::Cuda(cuda::CudaExecutor::new(device, plan, weights.clone())?))
            }
            _ => Err(Error::Device(format!("the weights were not loaded for {}; load them there", self.name()))),
        }
    }
}

/// A network's weights on a device. Cloning shares them.
#[derive(Clone)]
pub enum Weights {
    /// In fp32.
    Cpu(Arc<cpu::Weights>),
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

    fn on_cpu(&self) -> Option<&cpu::Weights> {
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
    Cpu(cpu::Executor),
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
    /// [`Error::Usage`] for an index (a token id) beyond what it chooses from, [`Error::Device`] with the driver's
    /// word.
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
    /// [`Error::Device`] with the driver's word.
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
    /// [`Error::Device`]: the driver's word, also about the run.
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
    /// [`Error::Device`] with the driver's word, or the emulator's about a faulty kernel.
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
    /// [`Error::Device`] with the driver's word about that work.
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
