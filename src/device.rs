//! The choice of where networks run.

use crate::backend::Backend;
use crate::cpu::Cpu;
use crate::cuda::{self, Kernels};
use crate::{Error, Result};
use std::sync::Arc;

/// A place where networks run: the CPU, in fp32, or an NVIDIA GPU, in fp16. Cloning shares it.
#[derive(Clone)]
pub struct Device {
    backend: Arc<dyn Backend>,
    is_cpu: bool,
}

impl Device {
    /// This machine's processor.
    pub fn cpu() -> Self {
        Device { backend: Arc::new(Cpu), is_cpu: true }
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
        Device { backend: Arc::new(Kernels(machine)), is_cpu: false }
    }

    /// True for the CPU.
    pub fn is_cpu(&self) -> bool {
        self.is_cpu
    }

    /// Its name for people, such as `NVIDIA H100 80GB HBM3` or `CPU (Avx2)`.
    pub fn name(&self) -> String {
        self.backend.name()
    }
}

/// The choice of a device by name: `auto`, `cpu`, `cuda`, or a GPU by its number, such as `cuda:1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// The GPU if there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU by its number, or the first one on which the kernels run.
    Cuda(Option<usize>),
    /// The emulator, which runs the CUDA kernels on the CPU, slowly, for tests.
    #[cfg(feature = "emulated")]
    Emulated,
}

impl Place {
    /// The device.
    ///
    /// # Errors
    /// Those of [`Device::cuda`], unless the choice is automatic.
    pub fn device(self) -> Result<Device> {
        match self {
            Place::Auto => Ok(Device::auto()),
            Place::Cpu => Ok(Device::cpu()),
            Place::Cuda(ordinal) => Device::cuda(ordinal),
            #[cfg(feature = "emulated")]
            Place::Emulated => Ok(Device::kernels(cuda::Emulated::new(cuda::Limits::A100, cuda::Emulated::QUICK))),
        }
    }
}

impl std::str::FromStr for Place {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Place::Auto),
            "cpu" => Ok(Place::Cpu),
            "cuda" => Ok(Place::Cuda(None)),
            #[cfg(feature = "emulated")]
            "emulated" => Ok(Place::Emulated),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(|number| Place::Cuda(Some(number)))
                .ok_or_else(|| {
                    Error::invalid("device", format!("`{text}` is no device"))
                        .advise("give auto, cpu, cuda, or a GPU by its number, such as cuda:1")
                }),
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Auto => f.write_str("auto"),
            Place::Cpu => f.write_str("cpu"),
            Place::Cuda(None) => f.write_str("cuda"),
            Place::Cuda(Some(number)) => write!(f, "cuda:{number}"),
            #[cfg(feature = "emulated")]
            Place::Emulated => f.write_str("emulated"),
        }
    }
}

impl Default for Device {
    fn default() -> Self {
        Self::cpu()
    }
}

#[doc(hidden)]
impl std::ops::Deref for Device {
    type Target = dyn Backend;

    fn deref(&self) -> &Self::Target {
        &*self.backend
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({})", self.name())
    }
}
