//! AMX: registers that are matrices of 16 rows of 64 bytes, and products of two of them, on Intel's servers from the fourth generation of Xeon on.
//!
//! They are written in assembly, since the compiler's own names for them are not stable. A process has to ask before it touches them — the system keeps 8 KiB more
//! of each thread's state from then on —, and ends with SIGILL otherwise; see Linux' `Documentation/arch/x86/xstate.rst`.

use std::arch::asm;
use std::sync::OnceLock;

/// Rows of a tile.
pub(crate) const ROWS: usize = 16;
/// Bytes of a row.
pub(crate) const ROW: usize = 64;

/// Whether this processor has them and this process may use them. Asks the system, once.
pub(crate) fn is_available() -> bool {
    static IS_AVAILABLE: OnceLock<bool> = OnceLock::new();
    *IS_AVAILABLE.get_or_init(|| has_tiles() && may_use_tiles())
}

/// Whether the processor multiplies bfloat16 so.
fn has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const BF16: u32 = 1 << 22;
    const TILES: u32 = 1 << 24;
    let all = BF16 | TILES;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & all == all
}

/// Asks the system for the permission, which is for all threads of the process.
#[cfg(target_os = "linux")]
fn may_use_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: numbers alone; a system that does not know the call says so.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn may_use_tiles() -> bool {
    false
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row of each.
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// A thread's tiles, with shapes for products of bfloat16: sums of two times 16 rows with two panels, 32 of k at a time. Without shapes they are nothing that a
/// system would have to save when the thread sleeps.
pub(crate) struct Tiles(());

#[allow(clippy::unused_self)] // that there is one says that there are shapes
impl Tiles {
    /// For up to `rows` rows of activations in a tile.
    ///
    /// # Safety
    /// [`is_available`]; `rows` is 1 to [`ROWS`]. The thread has no other tiles.
    #[inline(always)]
    pub unsafe fn new(rows: usize) -> Self {
        let mut shapes = Shapes {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        // Four of sums, two of activations, two of weights.
        shapes.row_bytes[..8].fill(ROW as u16);
        shapes.rows[..6].fill(rows as u8);
        shapes.rows[6..8].fill(ROWS as u8);
        // SAFETY: the caller's promise.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly)) };
        Self(())
    }

    /// Begins the sums.
    #[inline(always)]
    pub fn begin(&self) {
        // SAFETY: nothing else uses these registers.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem, preserves_flags),
            );
        }
    }

    /// Adds the products of `R` (1 or 2) times 16 rows of 32 activations, each 64 bytes, with those of `P` (1 or 2) panels, two of k of each lane side by side.
    ///
    /// # Safety
    /// They are there.
    #[inline(always)]
    pub unsafe fn multiply<const R: usize, const P: usize>(
        &self,
        x: [*const u8; R],
        w: [*const u8; P],
    ) {
        macro_rules! multiply {
            ($($line:literal),+) => {
                asm!(
                    $($line,)+
                    x0 = in(reg) x[0],
                    x1 = in(reg) x[R - 1],
                    w0 = in(reg) w[0],
                    w1 = in(reg) w[P - 1],
                    row = in(reg) ROW,
                    options(nostack, readonly, preserves_flags),
                )
            };
        }
        // SAFETY: the caller's promise; nothing else uses these registers. (Operands that an arm does not need are named in a comment.)
        unsafe {
            match (R, P) {
                (1, 1) => multiply!(
                    "tileloadd tmm4, [{x0} + {row}]",
                    "tileloadd tmm6, [{w0} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "/* {x1} {w1} */"
                ),
                (1, _) => multiply!(
                    "tileloadd tmm4, [{x0} + {row}]",
                    "tileloadd tmm6, [{w0} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{w1} + {row}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "/* {x1} */"
                ),
                (_, 1) => multiply!(
                    "tileloadd tmm4, [{x0} + {row}]",
                    "tileloadd tmm6, [{w0} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{x1} + {row}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "/* {w1} */"
                ),
                _ => multiply!(
                    "tileloadd tmm4, [{x0} + {row}]",
                    "tileloadd tmm6, [{w0} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{w1} + {row}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{x1} + {row}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7"
                ),
            }
        }
    }

    /// Writes the sums of rows `r` with panel `p`: `[rows][16]`.
    ///
    /// # Safety
    /// There is room for them.
    #[inline(always)]
    pub unsafe fn store(&self, r: usize, p: usize, to: *mut f32) {
        macro_rules! store {
            ($tile:literal) => {
                asm!(
                    concat!("tilestored [{to} + {row}], tmm", $tile),
                    to = in(reg) to,
                    row = in(reg) ROW,
                    options(nostack, preserves_flags),
                )
            };
        }
        // SAFETY: the caller's promise.
        unsafe {
            match (r, p) {
                (0, 0) => store!(0),
                (0, _) => store!(1),
                (_, 0) => store!(2),
                (_, _) => store!(3),
            }
        }
    }
}

impl Drop for Tiles {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: whoever made it has the instruction.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}
