//! The choice of where networks run.

use crate::Result;
use crate::backend::Backend;
use crate::cpu::Cpu;
use crate::cuda::{self, Kernels};
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
