//! Compiled kernels on a GPU: a family's module is loaded when the first of its kernels is needed.

use super::super::compiled::Family;
use super::super::device::Launch;
use super::super::driver::{self, Card, Version, check, functions::*};
use crate::{Error, Result, Subject};
use cudarc::driver::sys::{CUfunction, CUfunction_attribute, CUmodule, CUresult};
use std::collections::HashMap;
use std::ffi::CString;
use std::ptr::null_mut;

/// The most bytes that a parameter structure may have on every GPU and driver.
pub(super) const MAX_PARAMS: usize = 4096;

/// Loaded modules by family, and kernels by name. Every call needs the GPU's context.
pub(super) struct Loaded {
    families: &'static [Family],
    modules: HashMap<&'static str, CUmodule>,
    kernels: HashMap<&'static str, Kernel>,
}

// SAFETY: the driver's handles may be used from every thread in which the context is current.
unsafe impl Send for Loaded {}

/// A function of a module.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub function: CUfunction,
    /// Bytes of its parameter structure, if the driver tells: from CUDA 12.4 on.
    params: Option<usize>,
}

impl Loaded {
    /// Starts with nothing loaded.
    pub fn new(families: &'static [Family]) -> Self {
        Loaded { families, modules: HashMap::new(), kernels: HashMap::new() }
    }

    /// The kernel of a launch, which must take a structure of the size that the launch has.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] if it is not in this build, cannot be loaded, or takes another structure.
    pub fn kernel_of(&mut self, launch: &Launch, card: &Card, version: Version) -> Result<Kernel> {
        let kernel = self.kernel(launch.kernel, card, version)?;
        let given = launch.params.len();
        match kernel.params.unwrap_or(given) {
            wanted if given > MAX_PARAMS || wanted != given => Err(Error::internal(format!(
                "`{}` takes {wanted} bytes of parameters and was given {given}",
                launch.kernel
            ))),
            _ => Ok(kernel),
        }
    }

    /// The kernel of that name, allowed to use all shared memory of the card. No call to the driver is expected to
    /// fail, so a tool that watches for failures has none to report.
    fn kernel(&mut self, name: &'static str, card: &Card, version: Version) -> Result<Kernel> {
        if let Some(kernel) = self.kernels.get(name) {
            return Ok(*kernel);
        }
        let module = self.module(name, card, version)?;
        let symbol = CString::new(name)
            .map_err(|_| Error::unsupported(Subject::Device, format!("`{name}` is no kernel's name")))?;
        let mut function = null_mut();
        // SAFETY: the module is loaded; the name ends in a zero.
        let code = unsafe { cuModuleGetFunction(&mut function, module, symbol.as_ptr()) };
        check(&format!("looking for kernel `{name}`"), code)?;
        use CUfunction_attribute::*;
        for (attribute, value) in [
            (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, card.limits.shared as i32),
            // In percent. With one value for all kernels, no launch waits until a multiprocessor has repartitioned its
            // memory between shared memory and L1. An H100 showed no difference (1.16 us per launch with and without).
            (CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
        ] {
            // SAFETY: the function belongs to a loaded module.
            let code = unsafe { cuFuncSetAttribute(function, attribute, value) };
            check(&format!("giving `{name}` shared memory"), code)?;
        }
        let mut params = None;
        if version.tells_parameters() {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: live locals; every kernel has one parameter.
            let code = unsafe { cuFuncGetParamInfo(function, 0, &mut offset, &mut size) };
            check(&format!("asking for the parameters of `{name}`"), code)?;
            params = Some(size);
        }
        let kernel = Kernel { function, params };
        self.kernels.insert(name, kernel);
        Ok(kernel)
    }

    /// The module of the family that has the kernel; loads it if necessary.
    fn module(&mut self, kernel: &str, card: &Card, version: Version) -> Result<CUmodule> {
        let Some(family) = self.families.iter().find(|family| family.kernels.contains(&kernel)) else {
            return Err(Error::unsupported(Subject::Device, format!("this build has no kernel `{kernel}`"))
                .advise("build it again"));
        };
        if let Some(module) = self.modules.get(family.name) {
            return Ok(*module);
        }
        let mut module = null_mut();
        // SAFETY: fatbins are whole, aligned and constant.
        let code = unsafe { cuModuleLoadData(&mut module, family.fatbin.as_ptr().cast()) };
        if code as u32 != 0 {
            return Err(refused(family.name, code, card, version));
        }
        self.modules.insert(family.name, module);
        Ok(module)
    }

    /// Unloads all modules.
    ///
    /// # Safety
    /// No launch of their kernels may be running or come later.
    pub unsafe fn unload(&mut self) {
        self.kernels.clear();
        for (_, module) in self.modules.drain() {
            // SAFETY: from the driver, unloaded once; the rest is the caller's promise. An error could not be reported.
            unsafe { cuModuleUnload(module) };
        }
    }
}

/// The error for a family that cannot be loaded.
fn refused(family: &str, code: CUresult, card: &Card, version: Version) -> Error {
    let advice = match code as u32 {
        // Invalid image, no binary for this GPU, invalid PTX, PTX of an unknown version, invalid source.
        200 | 209 | 218 | 222 | 300 => {
            format!(
                "the driver (CUDA {version}) is older than the nvcc that built them: update it, or build with nvcc \
                 {version}"
            )
        }
        _ => "choose the CPU".into(),
    };
    let word = driver::word(code);
    Error::unsupported(Subject::Device, format!("{card}: the kernels of `{family}` cannot be loaded: {word}"))
        .advise(advice)
}
