//! The NVIDIA driver, loaded at run time: one binary serves machines with and without a GPU.
//!
//! The functions and types are cudarc's. It looks functions up when they are called and panics where one is missing, so
//! all of them are looked up at start, where a missing one is an error. Its result codes are a Rust enum, which has no
//! value for a code that only a driver newer than CUDA 13.4 returns; no call made here is known to return one.

use crate::{Error, Result, Subject};
use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute, CUresult};
use functions::*;
use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

/// The oldest supported driver, in CUDA's encoding: 12.0.
const OLDEST: u32 = 12_000;

/// All functions of the driver that are called.
pub(super) mod functions {
    macro_rules! functions {
        ($($name:ident)*) => {
            pub use cudarc::driver::sys::{$($name),*};

            pub const NAMES: &[&str] = &[ELAPSED_TIME, $(stringify!($name)),*];
        };
    }

    use cudarc::driver::sys::{CUevent, CUresult, culib};

    // Not in drivers before CUDA 12.4; see `Version::tells_parameters`. No documentation: rustdoc fails on a link above
    // a re-export.
    pub use cudarc::driver::sys::cuFuncGetParamInfo;

    /// All drivers have this function under this name; cudarc binds the version of CUDA 12.8, which older drivers lack.
    ///
    /// # Safety
    /// `milliseconds` must be valid for writing; `start` and `end` must be events of the driver that have passed.
    #[allow(non_snake_case)]
    pub unsafe fn cuEventElapsedTime(milliseconds: *mut f32, start: CUevent, end: CUevent) -> CUresult {
        type Function = unsafe extern "C" fn(*mut f32, CUevent, CUevent) -> CUresult;
        // SAFETY: the function's type is the manual's; the rest is the caller's promise.
        unsafe {
            match culib().get::<Function>(ELAPSED_TIME) {
                Ok(function) => function(milliseconds, start, end),
                Err(_) => CUresult::CUDA_ERROR_NOT_FOUND,
            }
        }
    }

    const ELAPSED_TIME: &str = "cuEventElapsedTime";

    functions! {
        cuDriverGetVersion cuInit cuGetErrorName cuGetErrorString
        cuDeviceGetCount cuDeviceGet cuDeviceGetName cuDeviceGetAttribute cuDeviceTotalMem_v2
        cuDevicePrimaryCtxRetain cuDevicePrimaryCtxRelease_v2 cuCtxSetCurrent
        cuMemGetInfo_v2 cuMemAlloc_v2 cuMemFree_v2 cuMemAllocHost_v2 cuMemFreeHost
        cuMemsetD8Async cuMemcpyHtoDAsync_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoDAsync_v2
        cuStreamCreate cuStreamDestroy_v2 cuStreamSynchronize cuStreamBeginCapture_v2 cuStreamEndCapture
        cuGraphInstantiateWithFlags cuGraphDestroy cuGraphUpload cuGraphLaunch cuGraphExecDestroy
        cuEventCreate cuEventDestroy_v2 cuEventRecord cuEventSynchronize
        cuModuleLoadData cuModuleUnload cuModuleGetFunction cuFuncSetAttribute cuTensorMapEncodeTiled cuLaunchKernelEx
    }
}

/// The CUDA version of a driver; 12040 is 12.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32);

impl Version {
    /// True if the driver has `cuFuncGetParamInfo`.
    pub(super) fn tells_parameters(self) -> bool {
        self >= Version(12_040)
    }

    /// True if graphs have programmatic edges, along which a launch begins before the previous one ends. In streams
    /// such launches exist since CUDA 11.8.
    pub(super) fn has_programmatic_edges(self) -> bool {
        self >= Version(12_030)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// A GPU as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// The driver's handle.
    pub(super) device: CUdevice,
    /// Such as "NVIDIA H100 80GB HBM3".
    pub name: String,
    /// The properties that kernels are planned for.
    pub limits: super::Limits,
    /// Bytes of memory.
    pub memory: usize,
}

/// Starts the machine's driver and returns its version.
///
/// # Errors
/// [`crate::ErrorKind::NotFound`]: none, too old, or broken, or without a GPU.
pub(super) fn start() -> Result<Version> {
    static VERSION: OnceLock<Result<Version, (String, &str)>> = OnceLock::new();
    VERSION.get_or_init(load).clone().map_err(|(problem, advice)| {
        Error::not_found(Subject::Device, problem).advise(format!("{advice}, or choose the CPU"))
    })
}

/// Loads and starts the driver, or says what is wrong and what to do.
fn load() -> Result<Version, (String, &'static str)> {
    // SAFETY: the driver's library may be loaded at any time.
    if !unsafe { sys::is_culib_present() } {
        return Err(("no NVIDIA driver (libcuda) found".into(), "install it"));
    }
    // SAFETY: a function is only looked up.
    let lacks = |name: &&&str| unsafe { sys::culib().get::<unsafe extern "C" fn()>(**name) }.is_err();
    // Checked first: an old driver lacks functions, and its age is the better message.
    if lacks(&&"cuDriverGetVersion") {
        return Err(("libcuda is not NVIDIA's driver".into(), "reinstall the driver"));
    }
    let mut version = 0;
    // SAFETY: a live local; it may be called before cuInit.
    let known = unsafe { cuDriverGetVersion(&mut version) };
    let version = Version(version.try_into().unwrap_or(0));
    if known as u32 == 0 && version < Version(OLDEST) {
        let problem = format!("the NVIDIA driver (CUDA {version}) is older than CUDA {}", Version(OLDEST));
        return Err((problem, "update it"));
    }
    if let Some(missing) = NAMES.iter().find(lacks) {
        return Err((format!("the NVIDIA driver (CUDA {version}) lacks {missing}"), "reinstall it"));
    }
    // SAFETY: no pointers are passed. A toolkit's stub may have refused already.
    let code = if known as u32 == 0 { unsafe { cuInit(0) } } else { known };
    let advice = match code as u32 {
        0 => return Ok(version),
        100 => return Err(("the NVIDIA driver finds no GPU".into(), "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES")),
        34 => "this libcuda is a toolkit's stub, not the driver: take its folder off LD_LIBRARY_PATH",
        803 => "driver and kernel module are of different versions: restart the machine",
        _ => "look at `nvidia-smi`; restarting the machine often helps",
    };
    Err((format!("the NVIDIA driver does not start: {}", word(code)), advice))
}

/// The GPUs of the driver, in its order. The driver has been started.
///
/// # Errors
/// [`crate::ErrorKind::DeviceLost`] with the driver's word.
pub(super) fn cards() -> Result<Vec<Card>> {
    use CUdevice_attribute::*;
    let mut count = 0;
    // SAFETY: a live local.
    check("counting GPUs", unsafe { cuDeviceGetCount(&mut count) })?;
    let card = |ordinal| {
        let doing = "asking a GPU what it is";
        let mut device = 0;
        // SAFETY: a live local.
        check(doing, unsafe { cuDeviceGet(&mut device, ordinal) })?;
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: a live local, and a device that the driver gave.
            check(doing, unsafe { cuDeviceGetAttribute(&mut value, which, device) })?;
            Ok(value as u32)
        };
        let mut name = [0 as c_char; 256];
        // SAFETY: likewise; the name has room for one byte more than the length says.
        check(doing, unsafe { cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, device) })?;
        // SAFETY: the last byte is still zero.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let mut memory = 0;
        // SAFETY: a live local, and a device that the driver gave.
        check(doing, unsafe { cuDeviceTotalMem_v2(&mut memory, device) })?;
        let limits = super::Limits {
            capability: 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
                + attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            multiprocessors: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared: attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        };
        Ok(Card { device, name, limits, memory })
    };
    (0..count).map(card).collect()
}

/// Turns a result code into `Ok` or an error with the driver's description.
pub(super) fn check(doing: &str, code: CUresult) -> Result<()> {
    let problem = || format!("GPU, {doing}: {}", word(code));
    match code as u32 {
        0 => Ok(()),
        // Illegal addresses, asserts, illegal instructions and similar errors leave the process without a GPU.
        700 | 702 | 709..=720 => Err(Error::device_lost(problem())
            .advise("a kernel failed and the GPU is lost to this process: start it again and report this")),
        2 => Err(Error::out_of_memory(problem())),
        _ => Err(Error::device_lost(problem())),
    }
}

/// The driver's name and description of an error.
pub(super) fn word(code: CUresult) -> String {
    let ask = |function: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the returned text, if any, is a constant string.
        unsafe { (function(code, &mut text) as u32 == 0 && !text.is_null()).then(|| CStr::from_ptr(text)) }
    };
    match (ask(cuGetErrorName), ask(cuGetErrorString)) {
        (Some(name), Some(text)) => format!("{} ({})", name.to_string_lossy(), text.to_string_lossy()),
        _ => format!("error {}", code as u32),
    }
}
