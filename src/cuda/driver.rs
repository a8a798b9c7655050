//! The NVIDIA driver's functions, found at run time: one binary serves machines with a GPU and without.
//!
//! Only the functions that are called are looked up, all at once, so that a driver which lacks one is an error and never
//! a panic. Results are plain numbers, since a newer driver may return codes that nobody here knows.

use crate::{Error, Result};
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// What the driver hands out: contexts, streams, modules, functions, events, graphs.
pub(super) type Handle = *mut c_void;

/// The oldest driver that will do, as CUDA counts: 12.0.
const OLDEST: u32 = 12_000;

#[cfg(windows)]
const LIBRARY: &str = "nvcuda.dll";
#[cfg(not(windows))]
const LIBRARY: &str = "libcuda.so.1";

/// Of a `CUdevice_attribute`.
pub(super) mod attribute {
    pub const MULTIPROCESSORS: i32 = 16;
    pub const CAPABILITY_MAJOR: i32 = 75;
    pub const CAPABILITY_MINOR: i32 = 76;
    pub const SHARED_MEMORY_OPTIN: i32 = 97;
}

/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
pub(super) const MAX_DYNAMIC_SHARED: c_int = 8;
/// `CU_STREAM_NON_BLOCKING`: nothing waits for the legacy default stream.
pub(super) const NON_BLOCKING: c_uint = 1;
/// `CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`: other threads may go on allocating.
pub(super) const CAPTURE_THREAD_LOCAL: c_int = 1;

macro_rules! functions {
    ($($name:ident: $symbol:literal ($($argument:ty),*),)*) => {
        /// Pointers into the library, named as the library names them but for prefixes and versions.
        pub(super) struct Functions {
            $(pub $name: unsafe extern "system" fn($($argument),*) -> c_int,)*
            /// Keeps the pointers valid.
            _library: Library,
        }

        impl Functions {
            /// # Errors
            /// The name of a function that is missing.
            fn load(library: Library) -> Result<Self, &'static str> {
                $(
                    // SAFETY: the type is the function's in cuda.h.
                    let $name = *unsafe { library.get::<unsafe extern "system" fn($($argument),*) -> c_int>($symbol) }
                        .map_err(|_| $symbol)?;
                )*
                Ok(Functions { $($name,)* _library: library })
            }
        }
    };
}

functions! {
    init: "cuInit"(c_uint),
    get_error_name: "cuGetErrorName"(c_int, *mut *const c_char),
    get_error_string: "cuGetErrorString"(c_int, *mut *const c_char),
    device_count: "cuDeviceGetCount"(*mut c_int),
    device_get: "cuDeviceGet"(*mut c_int, c_int),
    device_name: "cuDeviceGetName"(*mut c_char, c_int, c_int),
    device_attribute: "cuDeviceGetAttribute"(*mut c_int, c_int, c_int),
    device_memory: "cuDeviceTotalMem_v2"(*mut usize, c_int),
    context_retain: "cuDevicePrimaryCtxRetain"(*mut Handle, c_int),
    context_release: "cuDevicePrimaryCtxRelease_v2"(c_int),
    context_set: "cuCtxSetCurrent"(Handle),
    memory_info: "cuMemGetInfo_v2"(*mut usize, *mut usize),
    memory_allocate: "cuMemAlloc_v2"(*mut u64, usize),
    memory_free: "cuMemFree_v2"(u64),
    memory_set: "cuMemsetD8Async"(u64, u8, usize, Handle),
    host_allocate: "cuMemAllocHost_v2"(*mut Handle, usize),
    host_free: "cuMemFreeHost"(Handle),
    copy_up: "cuMemcpyHtoDAsync_v2"(u64, *const c_void, usize, Handle),
    copy_down: "cuMemcpyDtoHAsync_v2"(*mut c_void, u64, usize, Handle),
    stream_create: "cuStreamCreate"(*mut Handle, c_uint),
    stream_destroy: "cuStreamDestroy_v2"(Handle),
    stream_synchronize: "cuStreamSynchronize"(Handle),
    stream_capture: "cuStreamBeginCapture_v2"(Handle, c_int),
    stream_end_capture: "cuStreamEndCapture"(Handle, *mut Handle),
    graph_instantiate: "cuGraphInstantiateWithFlags"(*mut Handle, Handle, u64),
    graph_destroy: "cuGraphDestroy"(Handle),
    graph_upload: "cuGraphUpload"(Handle, Handle),
    graph_launch: "cuGraphLaunch"(Handle, Handle),
    graph_exec_destroy: "cuGraphExecDestroy"(Handle),
    event_create: "cuEventCreate"(*mut Handle, c_uint),
    event_destroy: "cuEventDestroy_v2"(Handle),
    event_record: "cuEventRecord"(Handle, Handle),
    event_synchronize: "cuEventSynchronize"(Handle),
    event_elapsed: "cuEventElapsedTime"(*mut f32, Handle, Handle),
    module_load: "cuModuleLoadData"(*mut Handle, *const c_void),
    module_unload: "cuModuleUnload"(Handle),
    module_function: "cuModuleGetFunction"(*mut Handle, Handle, *const c_char),
    function_set: "cuFuncSetAttribute"(Handle, c_int, c_int),
    tensor_map: "cuTensorMapEncodeTiled"(
        *mut [u64; 16], c_int, c_uint, *mut c_void, *const u64, *const u64, *const c_uint, *const c_uint, c_int, c_int, c_int, c_int
    ),
    launch: "cuLaunchKernel"(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void
    ),
}

/// A driver that has started and knows at least one GPU.
pub(super) struct Driver {
    pub functions: Functions,
    pub version: Version,
}

/// Which CUDA a driver speaks; 12040 is 12.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// A GPU as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// The driver's number.
    pub(super) device: c_int,
    /// Such as "NVIDIA H100 80GB HBM3".
    pub name: String,
    /// What kernels are planned for.
    pub limits: super::Limits,
    /// Bytes of memory.
    pub memory: usize,
}

impl Driver {
    /// The machine's driver.
    ///
    /// # Errors
    /// [`Error::Device`]: none, too old, broken, or without a GPU.
    pub fn get() -> Result<&'static Self> {
        static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
        DRIVER.get_or_init(|| Self::load(LIBRARY)).as_ref().map_err(|problem| Error::Device(problem.clone()))
    }

    /// Takes the driver from a library.
    pub fn load(name: &str) -> Result<Self, String> {
        // SAFETY: the driver's library may be loaded at any time.
        let library = unsafe { Library::new(name) }.map_err(|error| {
            // The loader's own word tells a missing file from one of the wrong architecture.
            let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), |cause| cause.to_string());
            format!("no NVIDIA driver ({}); install it, or use --device cpu", cause.replace('\n', " "))
        })?;
        // Before all else: an old driver lacks functions, and its age is the better message.
        let mut version: c_int = 0;
        // SAFETY: the type is the function's in cuda.h; it may be called before cuInit.
        let code = match unsafe { library.get::<unsafe extern "system" fn(*mut c_int) -> c_int>("cuDriverGetVersion") }
        {
            Ok(get) => unsafe { get(&mut version) },
            Err(_) => return Err(format!("{name} is not NVIDIA's driver; reinstall the driver, or use --device cpu")),
        };
        let version = Version(version.try_into().unwrap_or(0));
        if code != 0 || version < Version(OLDEST) {
            return Err(format!(
                "the NVIDIA driver (CUDA {version}) is older than CUDA {}; update it, or use --device cpu",
                Version(OLDEST)
            ));
        }
        let functions = Functions::load(library).map_err(|missing| {
            format!("the NVIDIA driver (CUDA {version}) lacks {missing}; reinstall it, or use --device cpu")
        })?;
        let driver = Driver { functions, version };
        // SAFETY: no arguments.
        match unsafe { (driver.functions.init)(0) } {
            0 => Ok(driver),
            100 => Err(
                "the NVIDIA driver finds no GPU; look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, or use --device cpu"
                    .into(),
            ),
            code => {
                let advice = match code {
                    34 => "this libcuda is a toolkit's stub, not the driver: take its folder off LD_LIBRARY_PATH",
                    803 => "driver and kernel module are of different versions: restart the machine",
                    _ => "look at `nvidia-smi`; restarting the machine often helps",
                };
                let word = driver.word(code);
                Err(format!("the NVIDIA driver does not start: {word}; {advice}, or use --device cpu"))
            }
        }
    }

    /// The GPUs, in the driver's order.
    ///
    /// # Errors
    /// [`Error::Device`] with the driver's word.
    pub fn cards(&self) -> Result<Vec<Card>> {
        let f = &self.functions;
        let mut count = 0;
        // SAFETY (of all calls): the arguments are live locals of the types in cuda.h.
        self.check("counting GPUs", unsafe { (f.device_count)(&mut count) })?;
        let card = |ordinal| {
            let doing = "asking a GPU what it is";
            let mut device = 0;
            self.check(doing, unsafe { (f.device_get)(&mut device, ordinal) })?;
            let attribute = |which| {
                let mut value = 0;
                self.check(doing, unsafe { (f.device_attribute)(&mut value, which, device) })?;
                Ok(value as u32)
            };
            let mut name = [0 as c_char; 256];
            self.check(doing, unsafe { (f.device_name)(name.as_mut_ptr(), name.len() as c_int - 1, device) })?;
            // SAFETY: the last byte is still zero.
            let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
            let mut memory = 0;
            self.check(doing, unsafe { (f.device_memory)(&mut memory, device) })?;
            let limits = super::Limits {
                capability: 10 * attribute(attribute::CAPABILITY_MAJOR)? + attribute(attribute::CAPABILITY_MINOR)?,
                multiprocessors: attribute(attribute::MULTIPROCESSORS)?,
                shared: attribute(attribute::SHARED_MEMORY_OPTIN)?,
            };
            Ok(Card { device, name, limits, memory })
        };
        (0..count).map(card).collect()
    }

    /// Nothing, or an error with the driver's word for `code`.
    pub fn check(&self, doing: &str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let advice = match code {
            // Illegal addresses, asserts, illegal instructions and their kin leave the process without a GPU.
            700 | 702 | 709..=720 => {
                "; a kernel failed and the GPU is lost to this process: start it again and report this"
            }
            _ => "",
        };
        Err(Error::Device(format!("GPU, {doing}: {}{advice}", self.word(code))))
    }

    /// The driver's name and description of an error.
    pub fn word(&self, code: c_int) -> String {
        let ask = |function: unsafe extern "system" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text = std::ptr::null();
            // SAFETY: what is returned is a constant string, or none is.
            unsafe { (function(code, &mut text) == 0 && !text.is_null()).then(|| CStr::from_ptr(text)) }
        };
        match (ask(self.functions.get_error_name), ask(self.functions.get_error_string)) {
            (Some(name), Some(text)) => format!("{} ({})", name.to_string_lossy(), text.to_string_lossy()),
            _ => format!("error {code}"),
        }
    }
}
