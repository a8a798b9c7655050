//! The kernels in this binary, as `build.rs` compiled them; none if it found no nvcc.

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

/// What a kernel takes of a multiprocessor, by the assembler's account. None spills registers: the build fails then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// The kernel's name in `kernels/`.
    pub kernel: &'static str,
    /// The architecture of the machine code, such as `80` or `90a`.
    pub architecture: &'static str,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of shared memory beside what a launch asks for.
    pub shared: u32,
    /// Bytes of a thread's memory, for arrays that registers cannot hold.
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
