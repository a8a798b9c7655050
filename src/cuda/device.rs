//! The operations that plans need of a machine that runs the kernels: memory, copies, launches, and recorded lists of
//! launches.

use crate::Result;
use crate::backend::Cache;
use std::sync::Arc;
use std::time::Duration;

/// The properties of a card that decide tiles and splits. A plan for a card can be made on another machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Compute capability, 80 for 8.0.
    pub capability: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that one block may ask for.
    pub shared: u32,
}

impl Limits {
    /// An A100's.
    pub const A100: Limits = Limits { capability: 80, multiprocessors: 108, shared: 163 << 10 };
    /// An RTX 3090's.
    pub const RTX_3090: Limits = Limits { capability: 86, multiprocessors: 82, shared: 99 << 10 };
    /// An RTX 4090's.
    pub const RTX_4090: Limits = Limits { capability: 89, multiprocessors: 128, shared: 99 << 10 };
    /// An H100 SXM's or H200's.
    pub const H100: Limits = Limits { capability: 90, multiprocessors: 132, shared: 227 << 10 };
    /// A B200's.
    pub const B200: Limits = Limits { capability: 100, multiprocessors: 148, shared: 227 << 10 };
    /// An RTX 5090's.
    pub const RTX_5090: Limits = Limits { capability: 120, multiprocessors: 170, shared: 99 << 10 };
    /// One card for each architecture that has machine code of its own. They differ in the shared memory that a block
    /// may have.
    pub const CARDS: [Limits; 6] =
        [Limits::A100, Limits::RTX_3090, Limits::RTX_4090, Limits::H100, Limits::B200, Limits::RTX_5090];
}

/// One kernel over a grid of blocks. Every kernel takes one structure by value.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The kernel's name in `kernels/`.
    pub kernel: &'static str,
    /// The number of blocks in each dimension.
    pub grid: [u32; 3],
    /// Threads per block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// The bytes of the kernel's parameter structure.
    pub params: Box<[u8]>,
}

impl Launch {
    /// Makes a launch with `params`, the Rust mirror of the kernel's structure.
    pub fn new(
        kernel: &'static str,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        params: &impl bytemuck::NoUninit,
    ) -> Self {
        let params = bytemuck::bytes_of(params).into();
        Launch { kernel, grid: grid.map(|n| n as u32), block: block as u32, shared: shared as u32, params }
    }
}

/// A tensor of halves in device memory, of which TMA moves tiles. Dimensions are innermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorTiles<'a> {
    /// The start address, a multiple of 16.
    pub address: u64,
    /// The number of elements along each dimension.
    pub sizes: &'a [u64],
    /// The distances in bytes between elements along each dimension except the innermost, multiples of 16.
    pub strides: &'a [u64],
    /// The number of a tile's elements along each dimension.
    pub tile: &'a [u32],
    /// The swizzle of a tile in shared memory, a `CUtensorMapSwizzle`: 0 for none, 1 to 3 for spans of 32, 64 and 128
    /// bytes.
    pub swizzle: u32,
}

/// A machine that runs kernels: a GPU or the emulator. Work is done in the order in which it was submitted.
pub trait CudaDevice: Send + Sync {
    /// The device's name.
    fn name(&self) -> String;

    /// The device's properties.
    fn limits(&self) -> Limits;

    /// Bytes of free memory, where that is known.
    fn free_bytes(&self) -> Option<usize>;

    /// Bytes of memory taken since the device was opened, by the device's own count, which rounds up each request.
    fn used_bytes(&self) -> Option<usize>;

    /// Allocates memory.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] if there is not enough.
    fn allocate(&self, bytes: usize) -> Result<u64>;

    /// Frees memory.
    ///
    /// # Safety
    /// `address` came from [`CudaDevice::allocate`] and is not used again.
    unsafe fn free(&self, address: u64);

    /// Copies to the device; `bytes` may be reused at once.
    ///
    /// # Safety
    /// The memory at `address` is as long and belongs to the caller.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    unsafe fn upload(&self, address: u64, bytes: &[u8]) -> Result<()>;

    /// Copies from the device, after all work submitted before.
    ///
    /// # Safety
    /// As for [`CudaDevice::upload`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word, also about work given before.
    unsafe fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()>;

    /// Fills memory with zeros.
    ///
    /// # Safety
    /// As for [`CudaDevice::upload`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()>;

    /// Copies within the device.
    ///
    /// # Safety
    /// The memory at both addresses is as long, belongs to the caller and does not overlap.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()>;

    /// Encodes the `CUtensorMap` of a tensor, for a kernel's parameter structure. Structures align it to 128 bytes, as
    /// CUDA 13 declares it; CUDA 12 aligns to 64. Elements outside the tensor are loaded as zero.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] if TMA has no such tensors or tiles.
    fn tensor_map(&self, tiles: &TensorTiles) -> Result<[u64; 16]>;

    /// Runs kernels one after the other. Each except the first may begin while earlier ones still run, and waits for
    /// them by itself (`griddep_wait` in `kernels/ptx.cuh`). The first begins when all work submitted before is done:
    /// that may be a copy, the end of a recording, or the event that starts a timing, and overlapping it would gain
    /// nothing.
    ///
    /// # Safety
    /// The structures' pointers are valid for what the kernels do with them.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`]: an unknown kernel, or a fault.
    unsafe fn run(&self, launches: &[Launch]) -> Result<()>;

    /// Prepares launches so that they can be run many times at little cost.
    ///
    /// # Safety
    /// As for [`CudaDevice::run`], whenever the recording is replayed.
    ///
    /// # Errors
    /// As for [`CudaDevice::run`].
    unsafe fn record(self: Arc<Self>, launches: &[Launch]) -> Result<Box<dyn Recording>>;

    /// Runs kernels one after the other, waits for them, and returns their duration by the device's own clock.
    ///
    /// # Safety
    /// As for [`CudaDevice::run`].
    ///
    /// # Errors
    /// As for [`CudaDevice::run`].
    unsafe fn time(&self, launches: &[Launch], cache: Cache) -> Result<Duration>;
}

/// Recorded launches; see [`CudaDevice::record`].
pub trait Recording: Send {
    /// Runs the launches.
    ///
    /// # Errors
    /// As for [`CudaDevice::run`].
    fn replay(&self) -> Result<()>;
}

/// Memory on a device.
pub struct Buffer {
    device: Arc<dyn CudaDevice>,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// Allocates memory with undefined contents.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] if there is not enough.
    pub fn new(device: &Arc<dyn CudaDevice>, bytes: usize) -> Result<Self> {
        Ok(Buffer { address: device.allocate(bytes)?, device: device.clone(), bytes })
    }

    /// Allocates memory and fills it with zeros.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] if there is not enough.
    pub fn zeroed(device: &Arc<dyn CudaDevice>, bytes: usize) -> Result<Self> {
        let buffer = Self::new(device, bytes)?;
        // SAFETY: all of this buffer.
        unsafe { device.zero(buffer.address, bytes)? };
        Ok(buffer)
    }

    /// Allocates memory and fills it with `bytes`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] if there is not enough.
    pub fn from_bytes(device: &Arc<dyn CudaDevice>, bytes: &[u8]) -> Result<Self> {
        let buffer = Self::new(device, bytes.len())?;
        buffer.write(0, bytes)?;
        Ok(buffer)
    }

    /// The start address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// True if the memory is on this device.
    pub(super) fn is_on(&self, device: &Arc<dyn CudaDevice>) -> bool {
        Arc::ptr_eq(&self.device, device)
    }

    /// The size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// True if it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        assert!(offset <= self.bytes && bytes.len() <= self.bytes - offset);
        // SAFETY: inside this buffer.
        unsafe { self.device.upload(self.address + offset as u64, bytes) }
    }

    /// Copies from `offset`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`] with the driver's word, also about work given before.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        assert!(offset <= self.bytes && bytes.len() <= self.bytes - offset);
        // SAFETY: inside this buffer.
        unsafe { self.device.download(self.address + offset as u64, bytes) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: from `allocate`; not used after this.
        unsafe { self.device.free(self.address) }
    }
}
