//! The kernels in this binary, as compiled by `build.rs`; none if it found no nvcc.

/// A compiled source file of `kernels/`.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// The file's stem.
    pub name: &'static str,
    /// Machine code for the GPUs that `build.rs` lists, and PTX.
    pub fatbin: &'static [u8],
    /// Its kernels' names.
    pub kernels: &'static [&'static str],
}

/// The resources that a kernel needs, as reported by the assembler. No kernel spills registers, since the build would
/// fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// The kernel's name in `kernels/`.
    pub kernel: &'static str,
    /// The architecture of the machine code, such as `80` or `90a`.
    pub architecture: &'static str,
    /// Registers per thread.
    pub registers: u32,
    /// Bytes of static shared memory, in addition to what a launch requests.
    pub shared: u32,
    /// Bytes of local memory per thread, for arrays that registers cannot hold.
    pub stack: u32,
}

/// The driver reads fatbins in place.
#[allow(dead_code)] // a build without nvcc has none
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

#[allow(unused_macros)] // likewise
macro_rules! aligned {
    ($path:literal) => {{
        static FATBIN: &Aligned<[u8]> = &Aligned(*include_bytes!($path));
        &FATBIN.0
    }};
}

include!(concat!(env!("OUT_DIR"), "/compiled.rs"));
