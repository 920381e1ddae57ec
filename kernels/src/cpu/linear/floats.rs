//! Products with floats: widened to f32 as they are loaded, multiplied and added in one operation.
//!
//! E4M3 floats lie in groups with a scale. It multiplies the weight and not the group's sum, so a product is to the last bit that of the widened matrix.

use std::hint::black_box;

use super::super::groups::f8_unit_bytes;
use super::super::simd::{Isa, PANEL, Simd, dispatch};
use super::{Ahead, LINE, Share, panels_at, store};

/// Panels multiplied at once when there is a single activation row: enough independent chains to hide an addition's latency.
pub(super) const SINGLE_PANELS: usize = 4;

/// Walks a share. `$body::<$format, S, P, T>(share, panel, row)` computes `P` panels times `T` rows; tiles of `$rows` rows come first, what is left over is
/// computed in the smallest tile that holds it, and rows that are not there are not stored.
macro_rules! walk {
    ($share:ident, $body:ident, $format:ident, $bytes:expr, $panels:expr, $rows:expr) => {{
        let rows = $share.linear.rows;
        if rows == 1 {
            use $crate::cpu::linear::floats::SINGLE_PANELS;
            let mut panel = $share.first;
            while $share.last - panel >= SINGLE_PANELS {
                $body::<$format, S, SINGLE_PANELS, 1>($share, panel, 0);
                panel += SINGLE_PANELS;
            }
            while panel < $share.last {
                $body::<$format, S, 1, 1>($share, panel, 0);
                panel += 1;
            }
            return;
        }
        let cached = $share.cached_rows($bytes);
        let mut begin = 0;
        while begin < rows {
            let end = (begin + cached).min(rows);
            let mut panel = $share.first;
            while panel < $share.last {
                let several = $panels > 1 && panel + 2 <= $share.last;
                let after = panel + 1 + usize::from(several);
                let mut row = begin;
                while row < end {
                    // Conditions of constants rule out what is not to be compiled.
                    match ((end - row).min($rows), several) {
                        (1, true) if const { $panels > 1 } => {
                            $body::<$format, S, 2, 1>($share, panel, row);
                        }
                        (1, false) => $body::<$format, S, 1, 1>($share, panel, row),
                        (2, true) if const { $panels > 1 } => {
                            $body::<$format, S, 2, 2>($share, panel, row);
                        }
                        (2, false) => $body::<$format, S, 1, 2>($share, panel, row),
                        (3 | 4, true) if const { $panels > 1 } => {
                            $body::<$format, S, 2, 4>($share, panel, row);
                        }
                        (3 | 4, false) => $body::<$format, S, 1, 4>($share, panel, row),
                        (5 | 6, true) if const { $panels > 1 && $rows >= 6 } => {
                            $body::<$format, S, 2, 6>($share, panel, row);
                        }
                        (5 | 6, false) if const { $rows >= 6 } => {
                            $body::<$format, S, 1, 6>($share, panel, row);
                        }
                        (7 | 8, true) if const { $panels > 1 && $rows >= 8 } => {
                            $body::<$format, S, 2, 8>($share, panel, row);
                        }
                        (7 | 8, false) if const { $rows >= 8 } => {
                            $body::<$format, S, 1, 8>($share, panel, row);
                        }
                        (_, true) if const { $panels > 1 && $rows >= 12 } => {
                            $body::<$format, S, 2, 12>($share, panel, row);
                        }
                        (_, false) if const { $rows >= 12 } => {
                            $body::<$format, S, 1, 12>($share, panel, row);
                        }
                        _ => unreachable!("tiles have 4, 6, 8 or 12 rows"),
                    }
                    row += $rows;
                }
                panel = after;
            }
            begin = end;
        }
    }};
}

pub(super) use walk;

/// A format whose elements are widened to f32.
trait FloatFormat {
    /// Whether elements lie in units, each a scale of every row and then a group of k, and are worth that scale times what they load as.
    const SCALED: bool = false;

    /// Bytes of an element.
    const BYTES: usize;

    /// Loads a vector of elements from element `at` of a panel, or of a unit.
    ///
    /// # Safety
    /// The elements are there, and the processor has the instructions of `S`.
    unsafe fn load<S: Simd>(panel: *const u8, at: usize) -> S::V;
}

/// `T` activation rows from `row` times `P` panels from `panel`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body: see `dispatch!` and `Linear::run`
unsafe fn float_tile<F: FloatFormat, S: Simd, const P: usize, const T: usize>(
    share: &Share<'_>,
    panel: usize,
    row: usize,
) {
    unsafe {
        let linear = share.linear;
        let k = linear.matrix.cols;
        // Without scales, all of k is one group.
        let group = if F::SCALED {
            share.segment.format.block_size()
        } else {
            k
        };
        let mut units = panels_at::<P>(share, panel);
        let stride = share.interleave;
        let mut x = if stride == 1 {
            linear.x.as_ptr()
        } else {
            share.rows.floats.as_slice()[(linear.at + row) * k..].as_ptr()
        };
        let zero = S::vsplat(0.0);
        let mut sums = [[[zero; 2]; T]; P];
        let ahead = Ahead::new::<P>(share);
        let mut done = 0;
        for _ in 0..k / group {
            let mut scales = [[zero; 2]; P];
            let mut elements = units;
            if F::SCALED {
                for p in 0..P {
                    for half in 0..S::HALVES {
                        scales[p][half] = S::vload(units[p].cast::<f32>().add(half * S::WIDE));
                    }
                    elements[p] = units[p].add(4 * PANEL);
                    units[p] = units[p].add(f8_unit_bytes(group));
                }
            }
            for i in 0..group {
                let at = i * PANEL * F::BYTES;
                if at.is_multiple_of(LINE) {
                    ahead.ask::<S, P>(elements.map(|panel| panel.add(at)), done);
                }
                done += PANEL * F::BYTES;
                let mut w = [[zero; 2]; P];
                for p in 0..P {
                    for half in 0..S::HALVES {
                        let element = F::load::<S>(elements[p], i * PANEL + half * S::WIDE);
                        w[p][half] = if F::SCALED {
                            S::vmul(element, scales[p][half])
                        } else {
                            element
                        };
                    }
                }
                for t in 0..T {
                    let x = S::vsplat(*x.add(t));
                    for p in 0..P {
                        for half in 0..S::HALVES {
                            sums[p][t][half] = S::vfma(w[p][half], x, sums[p][t][half]);
                        }
                    }
                }
                x = x.add(stride);
            }
        }
        // Behind a black box: sums that are read in a loop, as they are stored, compilers keep in memory all along, a store for every product.
        store::<S, P, T>(share, panel, row, &black_box(sums));
    }
}

/// Makes a format's entry point: how it is loaded, and the walk over a share.
macro_rules! kernels {
    ($($name:ident: $format:ident, $scaled:literal, $element:ty, $load:ident;)*) => {$(
        struct $format;

        impl FloatFormat for $format {
            const SCALED: bool = $scaled;
            const BYTES: usize = size_of::<$element>();

            #[inline(always)]
            unsafe fn load<S: Simd>(panel: *const u8, at: usize) -> S::V {
                // SAFETY: the caller's promise.
                unsafe { S::$load(panel.cast::<$element>().add(at)) }
            }
        }

        pub(super) fn $name(share: &Share<'_>, isa: Isa) {
            #[inline(always)]
            unsafe fn panels<S: Simd>(share: &Share<'_>) {
                let bytes = 4 * share.linear.matrix.cols;
                // SAFETY: panels hold their elements as the format says; the rest is the caller's promise.
                unsafe {
                    walk!(share, float_tile, $format, bytes, S::FLOAT_PANELS, S::FLOAT_ROWS);
                }
            }
            dispatch!(isa, panels(share: &Share<'_>));
        }
    )*};
}

kernels! {
    f32: F32, false, f32, vload;
    f16: F16, false, u16, vload_f16;
    // Loads as a 256th of what it is worth; scales have the rest.
    e4m3: E4m3, true, u8, vload_f8;
}
