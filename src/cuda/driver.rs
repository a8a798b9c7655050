//! The NVIDIA driver, found at run time: one binary serves machines with a GPU and without.
//!
//! The functions and types are cudarc's. It looks functions up when they are called and panics where one is missing, so
//! all of them are looked up at the start, where that is an error. Its result codes are a Rust enum, which has no value
//! for a code that only a driver newer than CUDA 13.4 returns; no call here is known to return one.

use crate::{Error, Result};
use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute, CUresult};
use functions::*;
use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

/// The oldest driver that will do, as CUDA counts: 12.0.
const OLDEST: u32 = 12_000;

/// All that is called of the driver.
pub(super) mod functions {
    macro_rules! functions {
        ($($name:ident)*) => {
            pub use cudarc::driver::sys::{$($name),*};

            pub const NAMES: &[&str] = &[ELAPSED_TIME, $(stringify!($name)),*];
        };
    }

    use cudarc::driver::sys::{CUevent, CUresult, culib};

    /// Not in drivers before CUDA 12.4; see [`super::Version::tells_parameters`].
    pub use cudarc::driver::sys::cuFuncGetParamInfo;

    /// Under this name all drivers have it; cudarc's bindings know the one of CUDA 12.8, which older drivers lack.
    ///
    /// # Safety
    /// Events of the driver's that have passed, and a live number.
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

/// Which CUDA a driver speaks; 12040 is 12.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32);

impl Version {
    /// True if the driver has `cuFuncGetParamInfo`.
    pub(super) fn tells_parameters(self) -> bool {
        self >= Version(12_040)
    }

    /// True if graphs have edges along which a launch begins before the one before it ends. Streams have known such
    /// launches since CUDA 11.8.
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
    /// The driver's number.
    pub(super) device: CUdevice,
    /// Such as "NVIDIA H100 80GB HBM3".
    pub name: String,
    /// What kernels are planned for.
    pub limits: super::Limits,
    /// Bytes of memory.
    pub memory: usize,
}

/// The version of the machine's driver, which is started.
///
/// # Errors
/// [`Error::Device`]: none, too old, or broken, or without a GPU.
pub(super) fn start() -> Result<Version> {
    static VERSION: OnceLock<Result<Version, String>> = OnceLock::new();
    VERSION.get_or_init(load).clone().map_err(Error::Device)
}

fn load() -> Result<Version, String> {
    // SAFETY: the driver's library may be loaded at any time.
    if !unsafe { sys::is_culib_present() } {
        return Err("no NVIDIA driver (libcuda) found; install it, or use --device cpu".into());
    }
    // SAFETY: a function is only looked up.
    let lacks = |name: &&&str| unsafe { sys::culib().get::<unsafe extern "C" fn()>(**name) }.is_err();
    // Before all else: an old driver lacks functions, and its age is the better message.
    if lacks(&&"cuDriverGetVersion") {
        return Err("libcuda is not NVIDIA's driver; reinstall the driver, or use --device cpu".into());
    }
    let mut version = 0;
    // SAFETY: a live local; it may be called before cuInit.
    let known = unsafe { cuDriverGetVersion(&mut version) };
    let version = Version(version.try_into().unwrap_or(0));
    if known as u32 == 0 && version < Version(OLDEST) {
        return Err(format!(
            "the NVIDIA driver (CUDA {version}) is older than CUDA {}; update it, or use --device cpu",
            Version(OLDEST)
        ));
    }
    if let Some(missing) = NAMES.iter().find(lacks) {
        return Err(format!("the NVIDIA driver (CUDA {version}) lacks {missing}; reinstall it, or use --device cpu"));
    }
    // SAFETY: no pointers. A toolkit's stub may have refused already.
    let code = if known as u32 == 0 { unsafe { cuInit(0) } } else { known };
    let advice = match code as u32 {
        0 => return Ok(version),
        100 => {
            return Err(
                "the NVIDIA driver finds no GPU; look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, or use --device cpu"
                    .into(),
            );
        }
        34 => "this libcuda is a toolkit's stub, not the driver: take its folder off LD_LIBRARY_PATH",
        803 => "driver and kernel module are of different versions: restart the machine",
        _ => "look at `nvidia-smi`; restarting the machine often helps",
    };
    Err(format!("the NVIDIA driver does not start: {}; {advice}, or use --device cpu", word(code)))
}

/// The GPUs of the driver, which has started, in its order.
///
/// # Errors
/// [`Error::Device`] with the driver's word.
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

/// Nothing, or an error with the driver's word for `code`.
pub(super) fn check(doing: &str, code: CUresult) -> Result<()> {
    let advice = match code as u32 {
        0 => return Ok(()),
        // Illegal addresses, asserts, illegal instructions and their kin leave the process without a GPU.
        700 | 702 | 709..=720 => {
            "; a kernel failed and the GPU is lost to this process: start it again and report this"
        }
        _ => "",
    };
    Err(Error::Device(format!("GPU, {doing}: {}{advice}", word(code))))
}

/// The driver's name and description of an error.
pub(super) fn word(code: CUresult) -> String {
    let ask = |function: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: what is returned is a constant string, or none is.
        unsafe { (function(code, &mut text) as u32 == 0 && !text.is_null()).then(|| CStr::from_ptr(text)) }
    };
    match (ask(cuGetErrorName), ask(cuGetErrorString)) {
        (Some(name), Some(text)) => format!("{} ({})", name.to_string_lossy(), text.to_string_lossy()),
        _ => format!("error {}", code as u32),
    }
}
