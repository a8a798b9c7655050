//! Uploads through pinned buffers.

use super::{Event, lock};
use crate::Result;
use crate::cuda::driver::{check, functions::*};
use cudarc::driver::sys::CUstream;
use rayon::prelude::*;
use std::collections::VecDeque;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Mutex;

/// Bytes of a pinned buffer.
pub(super) const BUFFER: usize = 8 << 20;
/// Bytes that one thread copies into it at a time.
const PIECE: usize = 256 << 10;

/// The pinned buffers that no upload is using. The first is the one that was used longest ago.
#[derive(Default)]
pub(super) struct Staging(Mutex<VecDeque<Pinned>>);

/// A pinned buffer, and an event that passes when its last copy to the device is done.
struct Pinned {
    buffer: *mut c_void,
    copied: Event,
}

// SAFETY: the driver's handle may be used from every thread in which the context is current, and the memory is used
// only by the owner of the value.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new() -> Result<Self> {
        let (mut buffer, copied) = (null_mut(), Event::new()?);
        // SAFETY: a live local.
        check("pinning memory for uploads", unsafe { cuMemAllocHost_v2(&mut buffer, BUFFER) })?;
        Ok(Pinned { buffer, copied })
    }
}

/// All calls need the GPU's context.
impl Staging {
    /// Makes two buffers: while one is copied to the device, the other is filled.
    pub fn fill(&self) -> Result<()> {
        for _ in 0..2 {
            let pinned = Pinned::new()?;
            lock(&self.0).push_back(pinned);
        }
        Ok(())
    }

    /// Copies `bytes` to `address` in the order of `stream`; `bytes` may be reused at once.
    ///
    /// # Safety
    /// The memory at `address` is as long and belongs to the caller; the stream is alive.
    pub unsafe fn upload(&self, address: u64, bytes: &[u8], stream: CUstream) -> Result<()> {
        for (i, chunk) in bytes.chunks(BUFFER).enumerate() {
            // The lock is not held while other threads help: one of them may begin an upload of its own meanwhile.
            let oldest = lock(&self.0).pop_front();
            let pinned = oldest.map_or_else(Pinned::new, Ok)?;
            // SAFETY: the buffer is free once its event has passed; the target is the caller's promise.
            let uploaded = unsafe {
                check("an upload", cuEventSynchronize(pinned.copied.0)).and_then(|()| {
                    // Reading maps the pages of a file, which takes one thread longer than the copy to the device.
                    let memory = std::slice::from_raw_parts_mut(pinned.buffer.cast::<u8>(), chunk.len());
                    let pieces = memory.par_chunks_mut(PIECE).zip(chunk.par_chunks(PIECE));
                    pieces.for_each(|(to, from)| to.copy_from_slice(from));
                    let target = address + (i * BUFFER) as u64;
                    check("an upload", cuMemcpyHtoDAsync_v2(target, pinned.buffer, chunk.len(), stream))?;
                    check("an upload", cuEventRecord(pinned.copied.0, stream))
                })
            };
            lock(&self.0).push_back(pinned);
            uploaded?;
        }
        Ok(())
    }

    /// Frees all buffers.
    ///
    /// # Safety
    /// No copy from them may be in flight.
    pub unsafe fn free(&self) {
        for pinned in lock(&self.0).drain(..) {
            // SAFETY: from the driver, freed once. An error could not be reported.
            unsafe { cuMemFreeHost(pinned.buffer) };
        }
    }
}
