//! A GPU as a device, through the NVIDIA driver.
//!
//! All work is submitted to one stream, in the order in which it was given.

mod graph;
mod kernels;
mod staging;

use super::compiled::{FAMILIES, Family, RESOURCES};
use super::device::{CudaDevice, Launch, Limits, Recording, TensorTiles};
use super::driver::{self, Card, Version, check, functions::*};
use crate::backend::Cache;
use crate::{Error, Result, Subject};
use cudarc::driver::sys::{
    CUcontext, CUevent, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUresult,
    CUstream, CUstream_flags, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle,
};
use graph::Graph;
use kernels::{Kernel, Loaded, MAX_PARAMS};
use staging::Staging;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// Bytes that are overwritten to empty the L2 cache: more than any L2 cache has.
const FLUSH: usize = 256 << 20;
/// Nothing waits for the legacy default stream.
const NON_BLOCKING: u32 = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;

/// Opens the first GPU that the kernels run on; `CUDA_VISIBLE_DEVICES` decides which GPUs there are.
///
/// # Errors
/// [`crate::ErrorKind::Unsupported`]: this build holds no kernels, the driver is missing or too old, or no GPU is new
/// enough.
pub fn open(ordinal: Option<usize>) -> Result<Arc<dyn CudaDevice>> {
    if FAMILIES.is_empty() {
        return Err(Error::unsupported(Subject::Device, "this build has no CUDA kernels")
            .advise("install nvcc (README, \"On a GPU\") and build again, or choose the CPU"));
    }
    let (version, cards) = cards()?;
    let chosen = match ordinal {
        Some(ordinal) => cards.get(ordinal).filter(|card| card.usable()),
        None => cards.iter().find(|card| card.usable()),
    };
    let Some(card) = chosen else {
        let names: Vec<String> = cards.iter().map(Card::to_string).collect();
        let there = if names.is_empty() { "none".into() } else { names.join(", ") };
        let number = ordinal.map_or(String::new(), |ordinal| format!(" with number {ordinal}"));
        let problem = format!("no GPU of compute capability 8.0 or more{number} here, only {there}");
        return Err(Error::not_found(Subject::Device, problem).advise("choose the CPU"));
    };
    Ok(Arc::new(Gpu::new(version, card.clone(), FAMILIES)?))
}

/// The driver's version and its GPUs, including those that the kernels do not run on.
///
/// # Errors
/// [`crate::ErrorKind::NotFound`]: no driver, or one that is too old or broken.
pub fn cards() -> Result<(Version, Vec<Card>)> {
    Ok((driver::start()?, driver::cards()?))
}

impl Card {
    /// True if the kernels run on it.
    pub fn usable(&self) -> bool {
        self.limits.capability >= 80
    }

    /// The form of compiled code that it runs, in words.
    pub fn code(&self) -> String {
        code(self.limits.capability, RESOURCES.iter().map(|kernel| kernel.architecture))
    }
}

/// The newest of the compiled architectures that a GPU of `capability` runs: one of its generation that is not newer.
/// Code of an architecture that ends in `a` runs on that architecture alone.
fn code(capability: u32, architectures: impl Iterator<Item = &'static str>) -> String {
    if capability < 80 {
        return "none: compute capability 8.0 is needed".into();
    }
    let runs = |architecture: &str| match architecture.strip_suffix('a') {
        Some(only) => only.parse() == Ok(capability),
        None => architecture.parse().is_ok_and(|of: u32| of / 10 == capability / 10 && of <= capability),
    };
    // All are of one generation here, so the order of texts is that of numbers.
    match architectures.filter(|architecture| runs(architecture)).max() {
        Some(architecture) => format!("sm_{architecture} machine code"),
        None => "PTX, which the driver compiles when a kernel is first used, and keeps".into(),
    }
}

impl std::fmt::Display for Card {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let capability = self.limits.capability;
        write!(f, "{} ({}.{})", self.name, capability / 10, capability % 10)
    }
}

struct Gpu {
    version: Version,
    card: Card,
    context: CUcontext,
    /// Bytes of memory that were free when it was opened.
    free_at_first: usize,
    stream: CUstream,
    loaded: Mutex<Loaded>,
    staging: Staging,
    timer: Mutex<Option<Timer>>,
}

/// An event of the driver. It must be dropped while the context is current.
struct Event(CUevent);

impl Event {
    fn new() -> Result<Self> {
        let mut event = null_mut();
        // SAFETY: a live local.
        check("making an event", unsafe { cuEventCreate(&mut event, 0) })?;
        Ok(Event(event))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: from `new`; not used after this. An error could not be reported.
        unsafe { cuEventDestroy_v2(self.0) };
    }
}

/// Events around the timed launches, and the memory that is overwritten before them.
struct Timer {
    start: Event,
    end: Event,
    flush: u64,
}

// SAFETY: the driver's handles may be used from every thread in which the context is current, which `bind` ensures; all
// that changes is behind locks.
unsafe impl Send for Gpu {}
// SAFETY: likewise.
unsafe impl Sync for Gpu {}
/// Locks data that no panic can leave half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Gpu {
    fn new(version: Version, card: Card, families: &'static [Family]) -> Result<Self> {
        let mut context = null_mut();
        // SAFETY: a live local, and a device that the driver gave.
        let code = unsafe { cuDevicePrimaryCtxRetain(&mut context, card.device) };
        let held = [
            (CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE, "is held by another process"),
            (CUresult::CUDA_ERROR_OUT_OF_MEMORY, "has no memory left beside what other processes hold"),
        ];
        if let Some((_, held)) = held.iter().find(|(problem, _)| code as u32 == *problem as u32) {
            let problem = format!("{card} {held} (`nvidia-smi` tells which, and its compute mode)");
            return Err(Error::out_of_memory(problem)
                .advise("end that, choose another GPU with CUDA_VISIBLE_DEVICES, or choose the CPU"));
        }
        check(&format!("starting {card}"), code)?;
        // From here on `drop` releases what has been acquired.
        let mut gpu = Gpu {
            version,
            card,
            context,
            free_at_first: 0,
            stream: null_mut(),
            loaded: Mutex::new(Loaded::new(families)),
            staging: Staging::default(),
            timer: Mutex::new(None),
        };
        gpu.bind()?;
        // SAFETY: a live local.
        check("making a stream", unsafe { cuStreamCreate(&mut gpu.stream, NON_BLOCKING) })?;
        gpu.staging.fill()?;
        gpu.free_at_first = gpu.free_bytes().unwrap_or(0);
        Ok(gpu)
    }

    /// Makes the GPU's context current in this thread.
    fn bind(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        check("choosing it", unsafe { cuCtxSetCurrent(self.context) })
    }

    /// Waits for all work.
    fn wait(&self, doing: &str) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        check(doing, unsafe { cuStreamSynchronize(self.stream) })
    }

    /// Loads the kernels of launches.
    fn kernels(&self, launches: &[Launch]) -> Result<Vec<Kernel>> {
        let mut loaded = lock(&self.loaded);
        launches.iter().map(|launch| loaded.kernel_of(launch, &self.card, self.version)).collect()
    }

    /// True if a launch may begin before the previous one in its list ends. Its kernel must wait by itself, and only
    /// the machine code for 9.0 does: `build.rs` compiles the code for newer cards from PTX for 8.0, which has no such
    /// instruction.
    fn launches_overlap(&self) -> bool {
        self.card.limits.capability == 90 && self.version.has_programmatic_edges()
    }

    /// Submits launches of `kernels` to a stream. On a stream in capture, a launch that may begin early becomes a node
    /// with a programmatic edge.
    ///
    /// # Safety
    /// As for [`CudaDevice::run`].
    unsafe fn submit(&self, kernels: &[Kernel], launches: &[Launch], stream: CUstream) -> Result<()> {
        /// Parameter structures may require 128-byte alignment (tensor maps).
        #[repr(align(128))]
        struct Params([u8; MAX_PARAMS]);
        let mut params = Params([0; MAX_PARAMS]);
        let mut early = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let overlap = self.launches_overlap();
        for (i, (kernel, launch)) in kernels.iter().zip(launches).enumerate() {
            let Launch { kernel: name, grid, block, shared, params: bytes } = launch;
            params.0[..bytes.len()].copy_from_slice(bytes);
            let mut arguments = [params.0.as_mut_ptr().cast::<c_void>()];
            let config = CUlaunchConfig {
                gridDimX: grid[0],
                gridDimY: grid[1],
                gridDimZ: grid[2],
                blockDimX: *block,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: *shared,
                hStream: stream,
                attrs: &mut early,
                numAttrs: (overlap && i > 0).into(),
            };
            // SAFETY: the driver copies the structure before it returns; the rest is the caller's promise.
            let code = unsafe { cuLaunchKernelEx(&config, kernel.function, arguments.as_mut_ptr(), null_mut()) };
            if code as u32 != 0 {
                let doing = format!("launching `{name}` (grid {grid:?}, {block} threads, {shared} bytes shared)");
                check(&doing, code)?;
            }
        }
        Ok(())
    }

    /// Makes the timer, at the first timing.
    fn timer(&self) -> Result<Timer> {
        Ok(Timer { start: Event::new()?, end: Event::new()?, flush: self.allocate(FLUSH)? })
    }
}

impl CudaDevice for Gpu {
    fn name(&self) -> String {
        self.card.name.clone()
    }

    fn limits(&self) -> Limits {
        self.card.limits
    }

    fn free_bytes(&self) -> Option<usize> {
        self.bind().ok()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: live locals.
        check("asking for free memory", unsafe { cuMemGetInfo_v2(&mut free, &mut total) }).ok()?;
        Some(free)
    }

    fn used_bytes(&self) -> Option<usize> {
        // Memory that other processes allocate or free meanwhile is counted as well.
        Some(self.free_at_first.saturating_sub(self.free_bytes()?))
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        let mut address = 0;
        // SAFETY: live locals. The driver refuses a size of zero.
        let code = unsafe { cuMemAlloc_v2(&mut address, bytes.max(1)) };
        if code as u32 == CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32 {
            let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
            let free = self.free_bytes().map_or("less is".into(), |free| format!("{:.2} GiB are", gib(free)));
            return Err(Error::out_of_memory(format!(
                "{}: {:.2} GiB of memory are wanted where {free} free",
                self.card.name,
                gib(bytes)
            ))
            .advise("choose a smaller model, picture or batch, or close other programs"));
        }
        check("allocating memory", code)?;
        Ok(address)
    }

    unsafe fn free(&self, address: u64) {
        // SAFETY: the caller's promise. The driver waits for work that may still use the memory; an error could not be
        // reported.
        let _ = self.bind().map(|()| unsafe { cuMemFree_v2(address) });
    }

    unsafe fn upload(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { self.staging.upload(address, bytes, self.stream) }
    }

    unsafe fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise; `wait` ensures that nobody sees half a copy.
        let code = unsafe { cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), address, bytes.len(), self.stream) };
        check("a download", code)?;
        self.wait("work before a download")
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // The driver refuses a size of zero.
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        check("zeroing memory", unsafe { cuMemsetD8Async(address, 0, bytes, self.stream) })
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        check("a copy", unsafe { cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream) })
    }

    fn tensor_map(&self, tiles: &TensorTiles) -> Result<[u64; 16]> {
        use {CUtensorMapDataType::*, CUtensorMapFloatOOBfill::*, CUtensorMapInterleave::*, CUtensorMapL2promotion::*};
        let TensorTiles { address, sizes, strides, tile, swizzle } = *tiles;
        let rank = sizes.len();
        let swizzle = match swizzle {
            0 => Some(CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE),
            1 => Some(CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B),
            2 => Some(CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B),
            3 => Some(CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B),
            _ => None,
        }
        .filter(|_| (1..=5).contains(&rank) && strides.len() + 1 == rank && tile.len() == rank)
        .ok_or_else(|| Error::unsupported(Subject::Device, format!("TMA has no tensors like {tiles:?}")))?;
        let mut map = CUtensorMap { opaque: [0; 16] };
        let steps = [1; 5];
        // SAFETY: live locals of the lengths that the rank promises; the address is not dereferenced.
        let code = unsafe {
            cuTensorMapEncodeTiled(
                &mut map,
                CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                rank as u32,
                address as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                steps.as_ptr(),
                CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check(&format!("describing {tiles:?} to TMA"), code)?;
        Ok(map.opaque)
    }

    unsafe fn run(&self, launches: &[Launch]) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { self.submit(&self.kernels(launches)?, launches, self.stream) }
    }

    unsafe fn record(self: Arc<Self>, launches: &[Launch]) -> Result<Box<dyn Recording>> {
        self.bind()?;
        // SAFETY: the caller's promise.
        Ok(Box::new(unsafe { Graph::record(self, launches)? }))
    }

    unsafe fn time(&self, launches: &[Launch], cache: Cache) -> Result<Duration> {
        self.bind()?;
        let mut slot = lock(&self.timer);
        let timer = match slot.take() {
            Some(timer) => timer,
            None => self.timer()?,
        };
        let Timer { start: Event(start), end: Event(end), flush } = *slot.insert(timer);
        let kernels = self.kernels(launches)?;
        let mut milliseconds = 0.0;
        // SAFETY: handles of the driver, memory of the timer, and the caller's promise.
        unsafe {
            // While this runs, the rest is queued, so the launches do not wait for the CPU.
            check("emptying the cache", cuMemsetD8Async(flush, 0, FLUSH, self.stream))?;
            if cache == Cache::Warm {
                self.submit(&kernels, launches, self.stream)?;
            }
            check("timing", cuEventRecord(start, self.stream))?;
            self.submit(&kernels, launches, self.stream)?;
            check("timing", cuEventRecord(end, self.stream))?;
            check("work that was timed", cuEventSynchronize(end))?;
            check("timing", cuEventElapsedTime(&mut milliseconds, start, end))?;
        }
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: everything came from the driver and is released once, in reverse order. Errors could not be reported.
        unsafe {
            if cuCtxSetCurrent(self.context) as u32 == 0 {
                if !self.stream.is_null() {
                    cuStreamSynchronize(self.stream);
                }
                if let Some(timer) = lock(&self.timer).take() {
                    cuMemFree_v2(timer.flush);
                }
                self.staging.free();
                lock(&self.loaded).unload();
                if !self.stream.is_null() {
                    cuStreamDestroy_v2(self.stream);
                }
            }
            cuDevicePrimaryCtxRelease_v2(self.card.device);
        }
    }
}

#[cfg(all(test, target_os = "linux", feature = "emulated"))]
mod tests;
