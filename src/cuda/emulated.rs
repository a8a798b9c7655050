//! The emulator as a device: runs every launch of the engine on the CPU, under a hostile schedule.

use super::device::{CudaDevice, Launch, Limits, Recording, TensorTiles};
use crate::backend::Cache;
use crate::{Error, Result};
use respodiff_emulated_kernels::{List, Memory, Schedule, TensorMap};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Runs kernels on the CPU as if on a GPU of given limits.
pub struct Emulated {
    limits: Limits,
    schedule: Schedule,
    memory: Mutex<HashMap<u64, Memory>>,
}

impl Emulated {
    /// The schedule for whole networks: fast, but still with bounds checks and poison.
    pub const QUICK: Schedule = Schedule::QUICK;

    /// A device of `limits` whose launches all run under `schedule`.
    #[expect(clippy::new_ret_no_self, reason = "devices are used behind the trait alone")]
    pub fn new(limits: Limits, schedule: Schedule) -> Arc<dyn CudaDevice> {
        Arc::new(Emulated { limits, schedule, memory: Mutex::default() })
    }
}

impl CudaDevice for Emulated {
    fn name(&self) -> String {
        "emulated".into()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn free_bytes(&self) -> Option<usize> {
        None
    }

    fn used_bytes(&self) -> Option<usize> {
        let memory = self.memory.lock().unwrap_or_else(|e| e.into_inner());
        Some(memory.values().map(Memory::len).sum())
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let memory = Memory::new(bytes);
        let address = memory.address();
        self.memory.lock().unwrap_or_else(|e| e.into_inner()).insert(address, memory);
        Ok(address)
    }

    unsafe fn free(&self, address: u64) {
        self.memory.lock().unwrap_or_else(|e| e.into_inner()).remove(&address);
    }

    unsafe fn upload(&self, address: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise; emulated memory is the host's memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
        Ok(())
    }

    unsafe fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        // SAFETY: as above.
        unsafe { std::ptr::write_bytes(address as *mut u8, 0, bytes) };
        Ok(())
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn tensor_map(&self, tiles: &TensorTiles) -> Result<[u64; 16]> {
        let TensorTiles { address, sizes, strides, tile, swizzle } = *tiles;
        let map = TensorMap::tiled(address, size_of::<half::f16>() as u32, sizes, strides, tile, swizzle);
        map.map(|map| map.0).map_err(|fault| Error::device_lost(fault.to_string()))
    }

    unsafe fn run(&self, launches: &[Launch]) -> Result<()> {
        let mut list = List::new();
        for Launch { kernel, grid, block, shared, params } in launches {
            // SAFETY: the caller's promise.
            let outcome = unsafe { list.launch(kernel, *grid, *block, *shared, params, &self.schedule) };
            outcome.map_err(|fault| Error::device_lost(fault.to_string()))?;
        }
        Ok(())
    }

    unsafe fn record(self: Arc<Self>, launches: &[Launch]) -> Result<Box<dyn Recording>> {
        Ok(Box::new(Recorded { device: self, launches: launches.to_vec() }))
    }

    unsafe fn time(&self, launches: &[Launch], cache: Cache) -> Result<Duration> {
        if cache == Cache::Warm {
            // SAFETY: the caller's promise.
            unsafe { self.run(launches)? };
        }
        let start = Instant::now();
        // SAFETY: the caller's promise.
        unsafe { self.run(launches)? };
        Ok(start.elapsed())
    }
}

struct Recorded {
    device: Arc<Emulated>,
    launches: Vec<Launch>,
}

impl Recording for Recorded {
    fn replay(&self) -> Result<()> {
        // SAFETY: promised when it was recorded.
        unsafe { self.device.run(&self.launches) }
    }
}
