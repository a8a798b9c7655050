//! Launches captured as a CUDA graph, which replays them at little cost.

use super::{Gpu, NON_BLOCKING};
use crate::Result;
use crate::cuda::device::{Launch, Recording};
use crate::cuda::driver::{check, functions::*};
use cudarc::driver::sys::{CUgraphExec, CUstream, CUstreamCaptureMode};
use std::ptr::null_mut;
use std::sync::Arc;

/// A captured list of launches.
pub(super) struct Graph {
    gpu: Arc<Gpu>,
    executable: CUgraphExec,
}

// SAFETY: as for `Gpu`.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures launches on a stream of their own, so that nothing another thread submits meanwhile can end up among
    /// them. Needs the GPU's context.
    ///
    /// # Safety
    /// As for [`crate::cuda::CudaDevice::record`].
    pub unsafe fn record(gpu: Arc<Gpu>, launches: &[Launch]) -> Result<Self> {
        let mut stream = null_mut();
        // SAFETY: handles of the driver, and the caller's promise.
        let executable = unsafe {
            check("making a stream", cuStreamCreate(&mut stream, NON_BLOCKING))?;
            let executable = capture(&gpu, launches, stream);
            cuStreamDestroy_v2(stream);
            executable?
        };
        let graph = Graph { gpu, executable };
        // SAFETY: as above. Without the upload the first replay would take longer.
        let code = unsafe { cuGraphUpload(executable, graph.gpu.stream) };
        check("uploading a graph", code)?;
        Ok(graph)
    }
}

/// Captures the launches on `stream` and instantiates their graph.
///
/// # Safety
/// As for [`crate::cuda::CudaDevice::record`]; the stream is alive.
unsafe fn capture(gpu: &Gpu, launches: &[Launch], stream: CUstream) -> Result<CUgraphExec> {
    // Loading a module may have to wait for the device, which is forbidden in a capture.
    let kernels = gpu.kernels(launches)?;
    let (mut graph, mut executable) = (null_mut(), null_mut());
    // SAFETY: handles of the driver, live locals, and the caller's promise about the launches.
    unsafe {
        // In this mode other threads may continue to allocate.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        check("beginning a capture", cuStreamBeginCapture_v2(stream, mode))?;
        let submitted = gpu.submit(&kernels, launches, stream);
        // End the capture even after an error, or the stream would stay in it.
        let ended = cuStreamEndCapture(stream, &mut graph);
        let made = submitted
            .and_then(|()| check("ending a capture", ended))
            .and_then(|()| check("making a graph", cuGraphInstantiateWithFlags(&mut executable, graph, 0)));
        if !graph.is_null() {
            cuGraphDestroy(graph);
        }
        made?;
    }
    Ok(executable)
}

impl Recording for Graph {
    fn replay(&self) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: the graph is complete; what its launches touch was promised when it was recorded.
        check("launching a graph", unsafe { cuGraphLaunch(self.executable, self.gpu.stream) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by the driver, destroyed once; the driver lets running launches end.
        let _ = self.gpu.bind().map(|()| unsafe { cuGraphExecDestroy(self.executable) });
    }
}
