//! The registered kernels, and their parameter structures as the C++ compiler lays them out.

use std::ffi::{CStr, c_char, c_void};

/// A structure of parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The name.
    pub name: &'static str,
    /// The size in bytes.
    pub bytes: usize,
    /// The fields, in order.
    pub fields: Vec<Field>,
}

/// A field of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// The name.
    pub name: &'static str,
    /// The offset in bytes from the beginning of the structure.
    pub offset: usize,
    /// The size in bytes.
    pub bytes: usize,
}

/// A kernel that can be launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The name.
    pub name: &'static str,
    /// The [`Layout`] of the structure that it takes, by name; `None` if that structure has no LAYOUT beside it.
    pub structure: Option<&'static str>,
    /// The occupancy that its tile was declared with; `None` if it was not exported with a tile.
    pub occupancy: Option<Occupancy>,
}

/// The part of a multiprocessor that a kernel's blocks take.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Occupancy {
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
    /// Blocks that fit into the registers of a multiprocessor.
    pub resident: u32,
}

// Matches runtime/emu.h.
#[repr(C)]
struct RawField {
    name: *const c_char,
    offset: usize,
    bytes: usize,
}

#[repr(C)]
struct RawLayout {
    name: *const c_char,
    bytes: usize,
    count: usize,
    fields: *const RawField,
    next: *const RawLayout,
}

#[repr(C)]
struct RawKernel {
    name: *const c_char,
    params_bytes: usize,
    call: *const c_void,
    layout: *const RawLayout,
    occupancy: Occupancy,
    next: *const RawKernel,
}

unsafe extern "C" {
    fn emu_layouts() -> *const RawLayout;
    fn emu_kernels() -> *const RawKernel;
}

/// # Safety
/// `name` must be a string that is never freed, as names in a program are.
unsafe fn text(name: *const c_char) -> &'static str {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(name) }.to_str().unwrap_or("?")
}

/// The structures that have a LAYOUT beside them. One in a header is listed once for each source that includes it.
pub fn layouts() -> Vec<Layout> {
    let mut layouts = Vec::new();
    // SAFETY: a list of objects that live as long as the program, made before it began.
    unsafe {
        let mut next = emu_layouts();
        while let Some(layout) = next.as_ref() {
            let fields = std::slice::from_raw_parts(layout.fields, layout.count).iter();
            let fields = fields.map(|f| Field { name: text(f.name), offset: f.offset, bytes: f.bytes });
            layouts.push(Layout { name: text(layout.name), bytes: layout.bytes, fields: fields.collect() });
            next = layout.next;
        }
    }
    layouts
}

/// All kernels.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    // SAFETY: as above.
    unsafe {
        let mut next = emu_kernels();
        while let Some(kernel) = next.as_ref() {
            let structure = kernel.layout.as_ref().map(|layout| text(layout.name));
            let occupancy = Some(kernel.occupancy).filter(|occupancy| occupancy.threads > 0);
            kernels.push(Kernel { name: text(kernel.name), structure, occupancy });
            next = kernel.next;
        }
    }
    kernels
}
