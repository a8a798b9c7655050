//! Runs CUDA kernels on the CPU, under stricter rules than a GPU's.
//!
//! The threads of a block are fibers. Asynchronous copies and matrix products land at the earliest or the latest moment
//! that is legal, and their destinations are poisoned until then. Every plain load and store is checked for bounds,
//! alignment and races. So mistakes that hardware happens to tolerate are reported here.

mod layouts;

pub use layouts::{Field, Kernel, Layout, Occupancy, kernels, layouts};

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::LazyLock;

/// Determined once: on Linux this reads the limits of the control groups, which takes longer than many launches.
static PROCESSORS: LazyLock<u32> = LazyLock::new(|| std::thread::available_parallelism().map_or(1, |n| n.get() as u32));

/// The order in which ready threads run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Round robin over warps.
    Ordered = 0,
    /// Any ready thread.
    Random = 1,
    /// Warps have random priorities, occasionally reassigned: one runs as far ahead as the barriers let it.
    Priority = 2,
}

/// The time at which asynchronous results land.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landing {
    /// At once.
    Eager = 0,
    /// When a thread waits for them.
    Lazy = 1,
    /// At random moments in between.
    Random = 2,
}

/// The schedule of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// The seed of all random decisions.
    pub seed: u64,
    /// The order of threads.
    pub order: Order,
    /// The landing of asynchronous results.
    pub landing: Landing,
    /// Blocks that run at the same time, for kernels whose blocks wait for each other.
    pub resident: u32,
    /// True if races are detected, which is three to five times slower.
    pub races: bool,
    /// Processor cores that share a launch's blocks; 0 for all of them. Each block behaves the same with any number of
    /// cores, unless several blocks are `resident` at a time.
    pub threads: u32,
}

impl Schedule {
    /// The fastest schedule: nothing hostile except poison and bounds checks.
    pub const QUICK: Schedule =
        Schedule { seed: 1, order: Order::Ordered, landing: Landing::Lazy, resident: 1, races: false, threads: 0 };

    /// The five schedules that every kernel has to pass.
    pub fn hostile(seed: u64) -> [Schedule; 5] {
        let of = |order, landing, races| Schedule { seed, order, landing, resident: 1, races, threads: 1 };
        [
            of(Order::Ordered, Landing::Eager, false),
            of(Order::Ordered, Landing::Lazy, false),
            of(Order::Priority, Landing::Eager, false),
            of(Order::Priority, Landing::Lazy, false),
            of(Order::Ordered, Landing::Lazy, true),
        ]
    }
}

/// A kernel's fault: a message with the place and the rule that is broken, such as a missing wait.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Fault(pub String);

/// Counts of a launch, for tests of the emulator and of kernels' tiles.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Switches between threads.
    pub switches: u64,
    /// Collective operations of warps.
    pub collectives: u64,
    /// mma.sync instructions.
    pub mma: u64,
    /// wgmma instructions.
    pub wgmma: u64,
    /// Bytes moved by TMA.
    pub tma_bytes: u64,
    /// Asynchronous operations.
    pub asynchronous: u64,
    /// Barriers passed.
    pub barriers: u64,
    /// Blocks run.
    pub blocks: u64,
    /// Phases of ldmatrix; each reads one matrix, eight rows.
    pub ldmatrix_phases: u64,
    /// Extra phases that bank conflicts would cost.
    pub ldmatrix_conflicts: u64,
}

#[repr(C)]
struct Config {
    seed: u64,
    order: i32,
    landing: i32,
    resident: i32,
    races: i32,
    threads: i32,
}

unsafe extern "C" {
    fn emu_malloc(bytes: usize) -> *mut c_void;
    fn emu_free(memory: *mut c_void);
    fn emu_tensor_map(
        map: *mut TensorMap,
        element: u32,
        rank: u32,
        start: u64,
        sizes: *const u64,
        strides: *const u64,
        tile: *const u32,
        swizzle: u32,
    ) -> c_int;
    fn emu_list_new() -> *mut c_void;
    fn emu_list_free(list: *mut c_void);
    fn emu_launch(
        list: *mut c_void,
        name: *const c_char,
        grid: *const u32,
        threads: u32,
        shared: u32,
        params: *const c_void,
        params_bytes: usize,
        config: *const Config,
        counters: *mut Counters,
        error: *mut c_char,
        error_bytes: usize,
    ) -> c_int;
}

/// Global memory that ends at a guard page, and that is poisoned when new (all bits are ones, which is NaN).
pub struct Memory {
    start: *mut c_void,
    bytes: usize,
}

// SAFETY: plain memory; launches that use it are `unsafe`.
unsafe impl Send for Memory {}
// SAFETY: likewise.
unsafe impl Sync for Memory {}

impl Memory {
    /// Allocates poisoned memory.
    pub fn new(bytes: usize) -> Self {
        // SAFETY: any size is fine; freed once, in `drop`.
        Memory { start: unsafe { emu_malloc(bytes.max(1)) }, bytes }
    }

    /// The start address, as a kernel's pointer.
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// The size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// True if it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by `emu_malloc`.
        unsafe { emu_free(self.start) }
    }
}

/// A CUtensorMap as TMA needs it among a kernel's parameters.
#[repr(C, align(128))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap(pub [u64; 16]);

impl TensorMap {
    /// Describes a tensor at `start` with elements of `element` bytes. `sizes` and `tile` are in elements, innermost
    /// first; `strides` are in bytes, without the innermost. Swizzle 0 is none, 1 to 3 are over 32, 64 and 128 bytes.
    ///
    /// # Errors
    /// If the driver would refuse it.
    pub fn tiled(
        start: u64,
        element: u32,
        sizes: &[u64],
        strides: &[u64],
        tile: &[u32],
        swizzle: u32,
    ) -> Result<Self, Fault> {
        let rank = sizes.len();
        let fits = strides.len() + 1 == rank && tile.len() == rank;
        let mut map = TensorMap([0; 16]);
        let (sizes, strides, boxes) = (sizes.as_ptr(), strides.as_ptr(), tile.as_ptr());
        // SAFETY: as many numbers as the rank says.
        if fits && unsafe { emu_tensor_map(&mut map, element, rank as u32, start, sizes, strides, boxes, swizzle) } == 0
        {
            return Ok(map);
        }
        Err(Fault(format!(
            "no tensor map of rank {rank}, tile {tile:?}, swizzle {swizzle}: alignment, strides, size or rank"
        )))
    }
}

/// A list of launches, each of which except the first may begin while earlier ones still run. Until a thread has called
/// `griddep_wait` it may only read memory that none of them writes, and it may not end without having called it.
/// Written memory is tracked by allocations.
pub struct List(*mut c_void);

impl List {
    /// An empty list.
    pub fn new() -> Self {
        // SAFETY: freed once, in `drop`.
        List(unsafe { emu_list_new() })
    }

    /// Runs a kernel that takes one structure by value, as the next launch of the list.
    ///
    /// # Safety
    /// `params` must be what the kernel of that name expects; the memory that they point to must be alive and used by
    /// nobody else.
    ///
    /// # Errors
    /// The first fault found; results are then worthless. Parameters of another size than the kernel's structure are a
    /// fault too.
    pub unsafe fn launch(
        &mut self,
        kernel: &str,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        params: &[u8],
        schedule: &Schedule,
    ) -> Result<Counters, Fault> {
        let name = CString::new(kernel).map_err(|_| Fault("a kernel's name holds a zero".into()))?;
        let threads = match schedule.threads {
            0 => *PROCESSORS,
            n => n,
        };
        let config = Config {
            seed: schedule.seed,
            order: schedule.order as i32,
            landing: schedule.landing as i32,
            resident: schedule.resident as i32,
            races: i32::from(schedule.races),
            threads: threads as i32,
        };
        // Parameters may hold tensor maps, which are aligned to 128 bytes.
        let mut aligned = vec![TensorMap([0; 16]); params.len().div_ceil(size_of::<TensorMap>()).max(1)];
        // SAFETY: as many bytes as there are.
        unsafe { std::ptr::copy_nonoverlapping(params.as_ptr(), aligned.as_mut_ptr().cast(), params.len()) };
        let mut counters = Counters::default();
        let mut error = vec![0 as c_char; 4096];
        // SAFETY: pointers to live locals; the rest is the caller's promise.
        let code = unsafe {
            emu_launch(
                self.0,
                name.as_ptr(),
                grid.as_ptr(),
                block,
                shared,
                aligned.as_ptr().cast(),
                params.len(),
                &config,
                &mut counters,
                error.as_mut_ptr(),
                error.len(),
            )
        };
        if code == 0 {
            return Ok(counters);
        }
        // SAFETY: the runtime ends it with a zero.
        let text = unsafe { CStr::from_ptr(error.as_ptr()) }.to_string_lossy().into_owned();
        Err(Fault(format!("{kernel}: {text}")))
    }
}

impl Default for List {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: made by `emu_list_new`.
        unsafe { emu_list_free(self.0) }
    }
}

/// Runs a kernel as the only launch of a list.
///
/// # Safety
/// As for [`List::launch`].
///
/// # Errors
/// As for [`List::launch`].
pub unsafe fn launch(
    kernel: &str,
    grid: [u32; 3],
    block: u32,
    shared: u32,
    params: &[u8],
    schedule: &Schedule,
) -> Result<Counters, Fault> {
    // SAFETY: the caller's promise.
    unsafe { List::new().launch(kernel, grid, block, shared, params, schedule) }
}
