//! Products with floats: widened to f32 as they are loaded, multiplied and added in one operation.
//!
//! E4M3 floats lie in groups with a scale. It multiplies the weight and not the group's sum, so a product is to the last bit that of the widened matrix.
//!
//! What widens a weight of fewer bits takes units that multiply. Where a panel has several tiles of rows, the first one keeps what it widened, in memory of the thread's that
//! stays in the core's cache, and the others read that ([`several_tiles!`]).

use std::hint::black_box;
use std::marker::PhantomData;
use std::ptr;

use super::super::groups::f8_unit_bytes;
use super::super::simd::{Isa, PANEL, Simd, dispatch};
use super::{Ahead, LINE, Share, panels_at, store};

/// Panels multiplied at once when there is a single activation row: enough independent chains to hide an addition's latency.
pub(super) const SINGLE_PANELS: usize = 4;

/// Multiplies a panel, or two (`$several`), with the rows from `$row` to `$end`: tiles of [`Simd::FLOAT_ROWS`] rows come first, what is left over is computed in the
/// smallest tile that holds it, and rows that are not there are not stored. `$body::<$format, S, P, T>(share, panel, row)` computes `P` panels times
/// `T` rows.
macro_rules! rows_of {
    ($share:ident, $body:ident, $format:ty, $several:ident, $panel:ident, $row:expr, $end:ident) => {{
        let mut row = $row;
        while row < $end {
            // Conditions of constants rule out what is not to be compiled.
            match (($end - row).min(S::FLOAT_ROWS), $several) {
                (1, true) if const { S::FLOAT_PANELS > 1 } => {
                    $body::<$format, S, 2, 1>($share, $panel, row);
                }
                (1, false) => $body::<$format, S, 1, 1>($share, $panel, row),
                (2, true) if const { S::FLOAT_PANELS > 1 } => {
                    $body::<$format, S, 2, 2>($share, $panel, row);
                }
                (2, false) => $body::<$format, S, 1, 2>($share, $panel, row),
                (3 | 4, true) if const { S::FLOAT_PANELS > 1 } => {
                    $body::<$format, S, 2, 4>($share, $panel, row);
                }
                (3 | 4, false) => $body::<$format, S, 1, 4>($share, $panel, row),
                (5 | 6, true) if const { S::FLOAT_PANELS > 1 && S::FLOAT_ROWS >= 6 } => {
                    $body::<$format, S, 2, 6>($share, $panel, row);
                }
                (5 | 6, false) if const { S::FLOAT_ROWS >= 6 } => {
                    $body::<$format, S, 1, 6>($share, $panel, row);
                }
                (7 | 8, true) if const { S::FLOAT_PANELS > 1 && S::FLOAT_ROWS >= 8 } => {
                    $body::<$format, S, 2, 8>($share, $panel, row);
                }
                (7 | 8, false) if const { S::FLOAT_ROWS >= 8 } => {
                    $body::<$format, S, 1, 8>($share, $panel, row);
                }
                (_, true) if const { S::FLOAT_PANELS > 1 && S::FLOAT_ROWS >= 12 } => {
                    $body::<$format, S, 2, 12>($share, $panel, row);
                }
                (_, false) if const { S::FLOAT_ROWS >= 12 } => {
                    $body::<$format, S, 1, 12>($share, $panel, row);
                }
                _ => unreachable!("tiles have 4, 6, 8 or 12 rows"),
            }
            row += S::FLOAT_ROWS;
        }
    }};
}

pub(super) use rows_of;

/// Walks a share: a single row several panels at a time, others in the tiles of [`rows_of`].
macro_rules! walk {
    ($share:ident, $body:ident, $format:ident, $bytes:expr) => {{
        use $crate::cpu::linear::floats;
        let rows = $share.linear.rows;
        if rows == 1 {
            let mut panel = $share.first;
            while $share.last - panel >= floats::SINGLE_PANELS {
                $body::<$format, S, { floats::SINGLE_PANELS }, 1>($share, panel, 0);
                panel += floats::SINGLE_PANELS;
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
                let several = S::FLOAT_PANELS > 1 && panel + 2 <= $share.last;
                floats::rows_of!($share, $body, $format, several, panel, begin, end);
                panel += 1 + usize::from(several);
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

    /// Where weights come from, and whether they are kept.
    const FROM: From = From::Packed;

    /// Loads a vector of elements from element `at` of a panel, or of a unit.
    ///
    /// # Safety
    /// The elements are there, and the processor has the instructions of `S`.
    unsafe fn load<S: Simd>(panel: *const u8, at: usize) -> S::V;
}

/// Where a tile's weights come from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    /// The panels.
    Packed,
    /// The panels, and what they are widened to is kept.
    Keeping,
    /// What was kept of the same panels.
    Kept,
}

/// A format whose tile keeps what it widens, for those that follow.
struct Keeping<F>(PhantomData<F>);

impl<F: FloatFormat> FloatFormat for Keeping<F> {
    const SCALED: bool = F::SCALED;
    const BYTES: usize = F::BYTES;
    const FROM: From = From::Keeping;

    #[inline(always)]
    unsafe fn load<S: Simd>(panel: *const u8, at: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { F::load::<S>(panel, at) }
    }
}

/// What was kept.
struct Kept;

impl FloatFormat for Kept {
    const BYTES: usize = size_of::<f32>();
    const FROM: From = From::Kept;

    #[inline(always)]
    unsafe fn load<S: Simd>(panel: *const u8, at: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::vload(panel.cast::<f32>().add(at)) }
    }
}

/// The most panels whose widened weights are kept.
const PANELS: usize = 2;

/// How many times as many rows as usual stay in cache while kept panels pass over them: writing those is to be worth it. (Measured: benches/NOTES.md.)
const MORE_ROWS: usize = 2;

/// Bytes a thread needs to keep the widened panels of `k` columns.
pub(super) const fn kept_bytes(k: usize) -> usize {
    PANELS * PANEL * size_of::<f32>() * k.next_multiple_of(2)
}

/// Where kept panels begin.
#[inline(always)]
pub(super) fn kept_at<const P: usize>(share: &Share<'_>) -> [*mut f32; P] {
    let k = share.linear.matrix.cols;
    assert!(P <= PANELS);
    // SAFETY: the memory is the thread's own, and nothing else of it is in use.
    let kept = unsafe { share.unpacked.range(0, kept_bytes(k)) };
    std::array::from_fn(|p| {
        kept.as_mut_ptr()
            .wrapping_add(p * kept_bytes(k) / PANELS)
            .cast()
    })
}

/// Walks a share of which every panel has several tiles of rows: the first tile, of `$keeping`, keeps what it widens of `$format`, and the others are `$kept`.
macro_rules! several_tiles {
    ($share:ident, $body:ident, $format:ty, $keeping:ty, $kept:ty) => {{
        use $crate::cpu::linear::floats;
        let rows = $share.linear.rows;
        let cached = $share.cached_rows(floats::bytes_of_row($share));
        let mut begin = 0;
        while begin < rows {
            let end = (begin + cached).min(rows);
            let mut panel = $share.first;
            while panel < $share.last {
                let several = S::FLOAT_PANELS > 1 && panel + 2 <= $share.last;
                if end - begin <= S::FLOAT_ROWS {
                    // What is left of many rows.
                    floats::rows_of!($share, $body, $format, several, panel, begin, end);
                } else {
                    match several {
                        true if const { S::FLOAT_PANELS > 1 && S::FLOAT_ROWS == 12 } => {
                            $body::<$keeping, S, 2, 12>($share, panel, begin);
                        }
                        true if const { S::FLOAT_PANELS > 1 && S::FLOAT_ROWS == 6 } => {
                            $body::<$keeping, S, 2, 6>($share, panel, begin);
                        }
                        _ if const { S::FLOAT_ROWS == 12 } => {
                            $body::<$keeping, S, 1, 12>($share, panel, begin);
                        }
                        _ if const { S::FLOAT_ROWS == 6 } => {
                            $body::<$keeping, S, 1, 6>($share, panel, begin);
                        }
                        _ => {
                            const {
                                assert!(
                                    S::FLOAT_PANELS == 1 && S::FLOAT_ROWS == 4
                                        || matches!(S::FLOAT_ROWS, 6 | 12)
                                );
                            };
                            $body::<$keeping, S, 1, 4>($share, panel, begin);
                        }
                    }
                    let begin = begin + S::FLOAT_ROWS;
                    floats::rows_of!($share, $body, $kept, several, panel, begin, end);
                }
                panel += 1 + usize::from(several);
            }
            begin = end;
        }
    }};
}

pub(super) use several_tiles;

/// Bytes that count for an activation row where panels are kept.
#[inline(always)]
pub(super) fn bytes_of_row(share: &Share<'_>) -> usize {
    size_of::<f32>() * share.linear.matrix.cols / MORE_ROWS
}

/// `T` activation rows from `row` times `P` panels from `panel`.
///
/// # Safety
/// The share's panels are in the format, its rows are laid out in tiles of so many, and the processor has the instructions of `S`.
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
        let mut kept = match F::FROM {
            From::Packed => [ptr::null_mut(); P],
            From::Keeping | From::Kept => kept_at::<P>(share),
        };
        let mut units = match F::FROM {
            From::Kept => kept.map(|kept| kept.cast_const().cast()),
            _ => panels_at::<P>(share, panel),
        };
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
                if F::FROM != From::Kept && at.is_multiple_of(LINE) {
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
                        if F::FROM == From::Keeping {
                            S::vstore(kept[p].add(half * S::WIDE), w[p][half]);
                        }
                    }
                    kept[p] = kept[p].wrapping_add(PANEL);
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
    ($($name:ident: $format:ident, $widens:literal, $scaled:literal, $element:ty, $load:ident;)*) => {$(
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
                    if $widens && share.linear.rows > S::FLOAT_ROWS {
                        return several_tiles!(share, float_tile, $format, Keeping<$format>, Kept);
                    }
                    walk!(share, float_tile, $format, bytes);
                }
            }
            dispatch!(isa, panels(share: &Share<'_>));
        }
    )*};
}

kernels! {
    // Name and type; whether what widens takes units that multiply; whether there are scales; elements and how they are loaded.
    f32: F32, false, false, f32, vload;
    f16: F16, true, false, u16, vload_f16;
    // Loads as a 256th of what it is worth; scales have the rest.
    e4m3: E4m3, true, true, u8, vload_f8;
}
