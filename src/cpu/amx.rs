//! Products of rounded matrices by AMX, which multiplies tiles of 16 rows of 64 bytes: the same operands as those of
//! AVX-512's instructions, 16 times as many at once. Rust has no stable intrinsics for AMX, so the instructions are
//! inline assembly. Linux wants a process to ask before it uses the tile registers (its
//! Documentation/arch/x86/xstate.rst).

use super::gemm::PANEL;
use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// Rows of a tile.
const ROWS: usize = 16;
/// Bytes of a tile's row.
const BYTES: usize = 64;

/// Number formats of both operands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Operands {
    /// bf16 on both sides, sums in fp32.
    Bf16,
    /// Unsigned bytes on the left and signed bytes on the right, sums in 32-bit integers.
    Int8,
}

/// True if AMX can multiply rows of this many bytes: the processor has the instructions, the system lets this process
/// use them, and a row is a whole number of tiles.
pub fn suits(operands: Operands, row_bytes: usize) -> bool {
    static USABLE: OnceLock<[bool; 2]> = OnceLock::new();
    let usable = USABLE.get_or_init(|| {
        // SAFETY: every x86-64 processor has CPUID. The intrinsic is safe in newer Rust and unsafe in 1.91.
        #[allow(unused_unsafe)]
        let features = unsafe { __cpuid_count(7, 0) }.edx;
        let [bf16, tiles, int8] = [22, 24, 25].map(|bit| features >> bit & 1 == 1);
        let allowed = tiles && allowed();
        [allowed && bf16, allowed && int8]
    });
    usable[operands as usize] && row_bytes.is_multiple_of(BYTES)
}

#[cfg(target_os = "linux")]
fn allowed() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two integers and changes only what this process may do.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn allowed() -> bool {
    false
}

/// Configuration of the eight tile registers: sums in 0 to 3 as two rows of two, left operands in 4 and 5, right ones
/// in 6 and 7.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// A configuration for `upper` rows of sums in the upper tiles and `lower` rows in the lower ones.
    fn new(upper: usize, lower: usize) -> Self {
        let [a, b, whole] = [upper, lower, ROWS].map(|rows| rows as u8);
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        row_bytes[..8].fill(BYTES as u16);
        rows[..8].copy_from_slice(&[a, a, b, b, a, b, whole, whole]);
        Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    }
}

/// Sets `rows` rows of sums, each of [`PANEL`] 32-bit numbers, to the product of as many rows of bytes with a panel.
///
/// # Safety
/// Rows and panel must be readable and sums writable in full, and [`suits`] must be true for the operands and rows.
pub unsafe fn multiply(
    operands: Operands,
    left: *const u8,
    (rows, row_bytes): (usize, usize),
    panel: *const u8,
    sums: *mut u8,
) {
    const PITCH: usize = PANEL * size_of::<f32>();
    let mut row = 0;
    while row < rows {
        let upper = ROWS.min(rows - row);
        // A tile has at least one row. If no rows are left for the lower tiles, the upper ones are computed twice.
        let (second, lower) = if row + ROWS < rows { (row + ROWS, ROWS.min(rows - row - ROWS)) } else { (row, upper) };
        let shapes = Shapes::new(upper, lower);
        macro_rules! product {
            ($instruction:literal) => {
                asm!(
                    "ldtilecfg [{shapes}]",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tileloadd tmm4, [{upper} + {row_bytes} * 1]",
                    "tileloadd tmm5, [{lower} + {row_bytes} * 1]",
                    "tileloadd tmm6, [{panel} + {pitch} * 1]",
                    "tileloadd tmm7, [{panel} + {pitch} * 1 + 64]",
                    concat!($instruction, " tmm0, tmm4, tmm6"),
                    concat!($instruction, " tmm1, tmm4, tmm7"),
                    concat!($instruction, " tmm2, tmm5, tmm6"),
                    concat!($instruction, " tmm3, tmm5, tmm7"),
                    "add {upper}, 64",
                    "add {lower}, 64",
                    "add {panel}, 2048",
                    "dec {count}",
                    "jnz 2b",
                    "tilestored [{to_upper} + {pitch} * 1], tmm0",
                    "tilestored [{to_upper} + {pitch} * 1 + 64], tmm1",
                    "tilestored [{to_lower} + {pitch} * 1], tmm2",
                    "tilestored [{to_lower} + {pitch} * 1 + 64], tmm3",
                    "tilerelease",
                    shapes = in(reg) &shapes,
                    upper = inout(reg) left.add(row * row_bytes) => _,
                    lower = inout(reg) left.add(second * row_bytes) => _,
                    panel = inout(reg) panel => _,
                    count = inout(reg) row_bytes / BYTES => _,
                    row_bytes = in(reg) row_bytes,
                    pitch = in(reg) PITCH,
                    to_upper = in(reg) sums.add(row * PITCH),
                    to_lower = in(reg) sums.add(second * PITCH),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            };
        }
        // SAFETY: guaranteed by the caller; a panel has 16 lines of 128 bytes for every 64 bytes of a row.
        unsafe {
            match operands {
                Operands::Bf16 => product!("tdpbf16ps"),
                Operands::Int8 => product!("tdpbusd"),
            }
        }
        row += 2 * ROWS;
    }
}
