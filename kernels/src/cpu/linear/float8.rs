//! Products with E4M3 floats in groups: each is widened, times its group's scale, and multiplied as f32.
//!
//! The scale multiplies the weight and not the group's sum, so a product is to the last bit that of the widened matrix.

use super::super::groups::f8_unit_bytes;
use super::super::simd::{PANEL, Simd};
use super::{FloatFormat, SINGLE_PANELS, Share, panels_at, store};

/// A 256th of what the bytes are worth; scales have the rest.
struct E4m3;

impl FloatFormat for E4m3 {
    #[inline(always)]
    unsafe fn load<S: Simd>(panel: *const u8, at: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::vload_f8(panel.add(at)) }
    }
}

/// `T` activation rows from `row` times `P` panels from `panel`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body: see `dispatch!` and `Linear::run`
unsafe fn scaled_tile<F: FloatFormat, S: Simd, const P: usize, const T: usize>(
    share: &Share<'_>,
    panel: usize,
    row: usize,
) {
    unsafe {
        let linear = share.linear;
        let k = linear.matrix.cols;
        let group = share.segment.format.block_size();
        let mut units = panels_at::<P>(share.segment, panel);
        let stride = share.interleave;
        let mut x = if stride == 1 {
            linear.x.as_ptr()
        } else {
            share.rows.floats.as_slice()[(linear.at + row) * k..].as_ptr()
        };
        let zero = S::vsplat(0.0);
        let mut sums = [[[zero; 2]; T]; P];
        for _ in 0..k / group {
            let mut scales = [[zero; 2]; P];
            for p in 0..P {
                for half in 0..S::HALVES {
                    scales[p][half] = S::vload(units[p].cast::<f32>().add(half * S::WIDE));
                }
            }
            for i in 0..group {
                let mut w = [[zero; 2]; P];
                for p in 0..P {
                    let elements = units[p].add(4 * PANEL);
                    for half in 0..S::HALVES {
                        let element = F::load::<S>(elements, i * PANEL + half * S::WIDE);
                        w[p][half] = S::vmul(element, scales[p][half]);
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
            for unit in &mut units {
                *unit = unit.add(f8_unit_bytes(group));
            }
        }
        store::<S, P, T>(share, panel, row, &sums);
    }
}

#[inline(always)]
pub(super) unsafe fn panels_f8<S: Simd>(share: &Share<'_>) {
    let bytes = 4 * share.linear.matrix.cols;
    // SAFETY: panels hold `cols / group` units; the rest is the caller's promise.
    unsafe {
        walk!(
            share,
            scaled_tile,
            E4m3,
            bytes,
            SINGLE_PANELS,
            3 - S::HALVES,
            S::FLOAT_ROWS
        );
    }
}
