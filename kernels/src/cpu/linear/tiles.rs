//! Products of bfloat16 with AMX: 16 rows of activations times the 16 of a panel, 32 of k at a time.
//!
//! Of 32 of k the products of even and of odd ones are summed each for themselves, in their order, and the two sums are added to what was there; what is below
//! 2^-126 is zero (Intel's manual, volume 2, `TDPBF16PS`). Nothing else adds up like that, so these are bits of their own: every row takes this way, a single one, too.
//!
//! Activations lie as in [`super::pairs`], pairs of them side by side, 16 rows to a tile.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::simd::amx::{ROW, ROWS, Tiles};
use super::super::simd::{Avx512, PANEL, Simd};
use super::pairs::padded;
use super::{Ahead, Next, Share, panels_at, store};

/// Activation rows that are interleaved for it.
pub(super) const INTERLEAVE: usize = ROWS;

/// Consecutive k that are multiplied at once, and bytes of a panel for them.
const TOGETHER: usize = 32;
const BYTES: usize = TOGETHER / 2 * ROW;

/// Rows of a tile of activations, all sums in use.
const TILE: usize = 2 * ROWS;
/// Bytes of activations that panels pass over: a quarter of the second-level cache of the processors that have AMX.
const CACHED_ROWS: usize = 512 << 10;

/// A panel's last weights, filled up with zeroes, where there are not 32 of k.
#[repr(C, align(64))]
struct Last([u8; BYTES]);

/// A product of 16 rows with 16.
#[repr(C, align(64))]
struct Sums([[f32; PANEL]; ROWS]);

/// Multiplies a share whose activations are rounded.
///
/// # Safety
/// The share's panels hold pairs, and the processor has AMX and AVX-512, with which this is compiled.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise
pub(super) unsafe fn panels(share: &Share<'_>) {
    let rows = share.linear.rows;
    if rows == 0 {
        return;
    }
    assert!(share.interleave == if rows == 1 { 1 } else { INTERLEAVE });
    let cached = cached_rows(rows, padded(share.linear.matrix.cols));
    unsafe {
        let tiles = Tiles::new(rows.min(ROWS));
        for begin in (0..rows).step_by(cached) {
            let end = (begin + cached).min(rows);
            let mut panel = share.first;
            while panel < share.last {
                if share.last - panel >= 2 {
                    rows_of::<2>(share, &tiles, panel, begin..end);
                    panel += 2;
                } else {
                    rows_of::<1>(share, &tiles, panel, begin..end);
                    panel += 1;
                }
            }
        }
    }
}

/// Of `rows` rows of `k` as many as stay in a core's cache, about as many at each time, and whole tiles of them.
fn cached_rows(rows: usize, k: usize) -> usize {
    let most = (CACHED_ROWS / (2 * k)).max(1).next_multiple_of(TILE);
    rows.div_ceil(rows.div_ceil(most)).next_multiple_of(TILE)
}

/// Multiplies `P` panels from `panel` with several rows.
///
/// # Safety
/// That of [`panels`].
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise
unsafe fn rows_of<const P: usize>(
    share: &Share<'_>,
    tiles: &Tiles,
    panel: usize,
    rows: Range<usize>,
) {
    unsafe {
        let k = share.linear.matrix.cols;
        let w = panels_at::<P>(share, panel);
        let whole = k / TOGETHER;
        let mut last = [const { Last([0; BYTES]) }; P];
        let left = (k % TOGETHER).div_ceil(2) * ROW;
        for (last, w) in last.iter_mut().zip(w) {
            last.0.as_mut_ptr().copy_from(w.add(whole * BYTES), left);
        }
        let last = (left > 0).then_some(&last);
        // Several tiles of rows ask for the next panels all along, a single one for what it needs a little later itself.
        let passes = rows.len().div_ceil(TILE);
        let next = &mut match passes {
            1 => Next::none(),
            _ => Next::new(share, panel + P, P, passes),
        };
        for row in rows.clone().step_by(TILE) {
            if rows.end - row > ROWS {
                tile::<2, P>(share, tiles, (panel, w, last), row, passes == 1, next);
            } else {
                tile::<1, P>(share, tiles, (panel, w, last), row, passes == 1, next);
            }
        }
    }
}

/// `R` times 16 activation rows from `row` times `P` panels: which, where they are, and their last weights if they have to be filled up.
///
/// # Safety
/// That of [`panels`].
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise
unsafe fn tile<const R: usize, const P: usize>(
    share: &Share<'_>,
    tiles: &Tiles,
    (panel, mut w, last): (usize, [*const u8; P], Option<&[Last; P]>),
    row: usize,
    only: bool,
    next: &mut Next,
) {
    unsafe {
        let k = share.linear.matrix.cols;
        let words = padded(k) / 2;
        let first = share.linear.at + row;
        let mut x = [std::ptr::null::<u8>(); R];
        for (r, x) in x.iter_mut().enumerate() {
            let at = (first + r * ROWS) * words;
            *x = share.rows.floats.as_slice()[at..].as_ptr().cast();
        }
        let step = share.interleave * ROW;
        let ahead = Ahead::new::<P>(share);
        tiles.begin();
        for block in 0..k / TOGETHER {
            if only {
                for line in (0..BYTES).step_by(ROW) {
                    ahead.ask::<Avx512, P>(w.map(|w| w.wrapping_add(line)), block * BYTES + line);
                }
            } else {
                next.ask::<Avx512>();
            }
            tiles.multiply::<R, P>(x, w);
            x = x.map(|x| x.wrapping_add(step));
            w = w.map(|w| w.wrapping_add(BYTES));
        }
        if let Some(last) = last {
            for (w, last) in w.iter_mut().zip(last) {
                *w = last.0.as_ptr();
            }
            tiles.multiply::<R, P>(x, w);
        }
        let mut out = MaybeUninit::<Sums>::uninit();
        for r in 0..R {
            for p in 0..P {
                let out = out.as_mut_ptr().cast::<f32>();
                tiles.store(r, p, out);
                let mut sums = [[[Avx512::vsplat(0.0); 2]; ROWS]; 1];
                for (t, sum) in sums[0].iter_mut().enumerate() {
                    *sum = [Avx512::vload(out.add(t * PANEL)); 2];
                }
                store::<Avx512, 1, ROWS>(share, panel + p, row + r * ROWS, &sums);
            }
        }
    }
}
