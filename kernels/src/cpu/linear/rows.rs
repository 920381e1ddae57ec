//! [`Rows`]: activations as the tiles of a product want them, as floats or in 8 bits.

use super::super::matrix::Elements;
use super::super::memory::{Buffer, Shared};
use super::super::simd::{self, Isa, Simd, dispatch};
#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{Share, TILE_ROWS, floats, pairs, unpacked};
use crate::Error;
use crate::quantize::BLOCK;

/// The largest multiple of a row's unit. 32 products of a byte and a code of five bits, times this, fit 32 bits.
pub(super) const MULTIPLES: i32 = 16383;
/// What [`Rows::offsets`] of a block are multiplied with: the offset of Q4_0's codes, which is taken off.
pub(super) const OF_BLOCK: i32 = -8;
/// What those of half a block are: the offset of Q6_K's.
pub(super) const OF_HALF: i32 = -32;
/// The kinds of offsets.
const OFFSETS: usize = 3;

/// Activation rows laid out for the tiles of a product. `T` rows are interleaved — as many as a tile takes, or one if there is only one.
pub(crate) struct Rows {
    /// Float products: `[rows / T][k][T]`; a single row is read where it is. Of pairs: see [`super::pairs`]. Integer products with a matrix whose
    /// columns are sorted: rows sorted alike, `[rows][k]`
    pub(super) floats: Buffer<f32>,
    /// Integer products: `[rows / T][k / 32][T][32]`, in `-127..=127`
    pub(super) quants: Buffer<i8>,
    /// What a row's scales are multiples of. `[rows]`
    pub(super) units: Buffer<f32>,
    /// The multiple, `0..=`[`MULTIPLES`]. `[rows / T][k / 32][T]`
    pub(super) multiples: Buffer<f32>,
    /// The sum of each block's quants. `[rows / T][k / 32][T]`
    pub(super) sums: Buffer<i32>,
    /// The sum of each block's first 16 quants. `[rows / T][k / 32][T]`
    pub(super) first_sums: Buffer<i32>,
    /// The sum of each block's quants times their multiple. `[rows / T][k / 32][T]`
    pub(super) multiplied_sums: Buffer<f32>,
    /// The multiple twice, in 16 bits each: where products are added up in 16 bits. `[rows / T][k / 32][T]`
    pub(super) pairs: Buffer<i32>,
    /// There, too: what is to be added for offsets of codes. The multiplied sum of each block's quants, times [`OF_BLOCK`], and those of its halves, times
    /// [`OF_HALF`].
    /// `[rows / T][k / 32][3][T]`
    pub(super) offsets: Buffer<i32>,
    /// Integer products: a panel that was taken apart, for each thread; see [`super::unpacked`].
    unpacked: Buffer<u8>,
}

impl Rows {
    pub fn new() -> Result<Self, Error> {
        let what = "activation rows";
        Ok(Self {
            floats: Buffer::zeroed(0, what)?,
            quants: Buffer::zeroed(0, what)?,
            units: Buffer::zeroed(0, what)?,
            multiples: Buffer::zeroed(0, what)?,
            sums: Buffer::zeroed(0, what)?,
            first_sums: Buffer::zeroed(0, what)?,
            multiplied_sums: Buffer::zeroed(0, what)?,
            pairs: Buffer::zeroed(0, what)?,
            offsets: Buffer::zeroed(0, what)?,
            unpacked: Buffer::zeroed(0, what)?,
        })
    }
}

/// Where a block of a tile's activations is; see [`Rows`].
#[derive(Clone, Copy)]
pub(super) struct Activations {
    pub quants: *const i8,
    pub multiples: *const f32,
    pub sums: *const i32,
    pub first_sums: *const i32,
    pub multiplied_sums: *const f32,
    pub pairs: *const i32,
    pub offsets: *const i32,
}

impl Activations {
    /// The first of a tile's `blocks`.
    #[inline(always)]
    pub fn of(share: &Share<'_>, row: usize, blocks: usize) -> Self {
        let (rows, at) = (share.rows, (share.linear.at + row) * blocks);
        Self {
            quants: rows.quants.as_slice()[at * BLOCK..].as_ptr(),
            multiples: rows.multiples.as_slice()[at..].as_ptr(),
            sums: rows.sums.as_slice()[at..].as_ptr(),
            first_sums: rows.first_sums.as_slice()[at..].as_ptr(),
            multiplied_sums: rows.multiplied_sums.as_slice()[at..].as_ptr(),
            pairs: rows.pairs.as_slice()[at..].as_ptr(),
            offsets: rows.offsets.as_slice()[OFFSETS * at..].as_ptr(),
        }
    }

    /// What is to be added where codes are too large by `excess`: so many times less the multiplied sum of row `t`'s quants in sub-block `sub` of
    /// `subs`, of `T` interleaved rows.
    ///
    /// # Safety
    /// The tile has the row, and the instruction set adds products up in 16 bits.
    #[inline(always)]
    pub unsafe fn offset<const T: usize>(
        &self,
        excess: i32,
        t: usize,
        sub: usize,
        subs: usize,
    ) -> i32 {
        let (kind, times) = match subs {
            1 => (0, OF_BLOCK),
            _ => (1 + sub, OF_HALF),
        };
        // SAFETY: the caller's promise.
        let offset = unsafe { *self.offsets.add(kind * T + t) };
        // What is stored is read straight into all lanes.
        if excess == -times {
            offset
        } else {
            offset / times * -excess
        }
    }

    /// The sum of row `t`'s quants in sub-block `sub` of `subs`, which are 1 or 2.
    ///
    /// # Safety
    /// The tile has the row.
    #[inline(always)]
    pub unsafe fn sum(&self, t: usize, sub: usize, subs: usize) -> i32 {
        // SAFETY: the caller's promise.
        unsafe {
            match (subs, sub) {
                (1, _) => *self.sums.add(t),
                (_, 0) => *self.first_sums.add(t),
                _ => *self.sums.add(t) - *self.first_sums.add(t),
            }
        }
    }

    /// The next of as many interleaved rows.
    #[inline(always)]
    pub fn next(self, rows: usize) -> Self {
        Self {
            quants: self.quants.wrapping_add(rows * BLOCK),
            multiples: self.multiples.wrapping_add(rows),
            sums: self.sums.wrapping_add(rows),
            first_sums: self.first_sums.wrapping_add(rows),
            multiplied_sums: self.multiplied_sums.wrapping_add(rows),
            pairs: self.pairs.wrapping_add(rows),
            offsets: self.offsets.wrapping_add(OFFSETS * rows),
        }
    }
}

/// How many of `rows` rows lie side by side.
pub(super) fn interleave(rows: usize, elements: Elements, isa: Isa) -> usize {
    match (rows, elements) {
        (1, _) => 1,
        #[cfg(target_arch = "x86_64")]
        (_, Elements::RoundedPairs) if isa == Isa::Amx => tiles::INTERLEAVE,
        (_, Elements::Quants) => TILE_ROWS,
        _ => isa.float_rows(),
    }
}

impl Rows {
    /// Makes room for `padded` rows of `k`; `sorted`: some are brought into another order first.
    pub(super) fn reserve(
        &mut self,
        padded: usize,
        k: usize,
        elements: Elements,
        sorted: bool,
    ) -> Result<(), Error> {
        let what = "activation rows";
        if sorted {
            self.floats.reserve(padded * k, what)?;
        }
        match elements {
            Elements::Quants => {
                let blocks = k / BLOCK;
                self.quants.reserve(padded * k, what)?;
                self.units.reserve(padded, what)?;
                self.multiples.reserve(padded * blocks, what)?;
                self.sums.reserve(padded * blocks, what)?;
                self.first_sums.reserve(padded * blocks, what)?;
                self.multiplied_sums.reserve(padded * blocks, what)?;
                self.pairs.reserve(padded * blocks, what)?;
                self.offsets.reserve(OFFSETS * padded * blocks, what)
            }
            Elements::Pairs | Elements::RoundedPairs => {
                self.floats.reserve(padded * pairs::padded(k), what)
            }
            Elements::Floats => self.floats.reserve(padded * k, what),
        }
    }

    /// Makes room for panels that are taken apart, where that is done for `rows` rows of `k`: one for each thread.
    pub(super) fn reserve_unpacked(
        &mut self,
        rows: usize,
        k: usize,
        threads: usize,
    ) -> Result<(), Error> {
        if rows <= TILE_ROWS {
            return Ok(());
        }
        self.unpacked
            .reserve(threads * apart_bytes(k), "activation rows")
    }

    /// The rows, to read, and the threads' memory for panels of `k` columns that are taken apart.
    pub(super) fn unpacked(&mut self, k: usize) -> (&Self, UnpackedPanels) {
        let all = Shared::new(self.unpacked.as_mut_slice());
        let bytes = apart_bytes(k);
        (self, UnpackedPanels { all, bytes })
    }

    /// Where several threads write.
    pub(super) fn target(&mut self, k: usize, elements: Elements) -> Target {
        Target {
            k,
            elements,
            floats: Shared::new(self.floats.as_mut_slice()),
            quants: Shared::new(self.quants.as_mut_slice()),
            units: Shared::new(self.units.as_mut_slice()),
            multiples: Shared::new(self.multiples.as_mut_slice()),
            sums: Shared::new(self.sums.as_mut_slice()),
            first_sums: Shared::new(self.first_sums.as_mut_slice()),
            multiplied_sums: Shared::new(self.multiplied_sums.as_mut_slice()),
            pairs: Shared::new(self.pairs.as_mut_slice()),
            offsets: Shared::new(self.offsets.as_mut_slice()),
        }
    }
}

/// Bytes a thread needs for the panels of `k` columns that are taken apart or widened.
fn apart_bytes(k: usize) -> usize {
    unpacked::bytes(k).max(floats::kept_bytes(k))
}

/// Memory for a panel that is taken apart, for each thread.
#[derive(Clone, Copy)]
pub(super) struct UnpackedPanels {
    all: Shared<u8>,
    bytes: usize,
}

impl UnpackedPanels {
    /// That of `thread`; nothing, if none was reserved.
    pub fn of(self, thread: usize) -> Shared<u8> {
        self.all.part(thread * self.bytes, self.bytes)
    }
}

/// The buffers of [`Rows`], for threads that write different tiles.
pub(super) struct Target {
    k: usize,
    elements: Elements,
    floats: Shared<f32>,
    quants: Shared<i8>,
    units: Shared<f32>,
    multiples: Shared<f32>,
    sums: Shared<i32>,
    first_sums: Shared<i32>,
    multiplied_sums: Shared<f32>,
    pairs: Shared<i32>,
    offsets: Shared<i32>,
}

impl Target {
    /// Lays out a tile: the rows `x` side by side, from row `at`, their elements in the order of a matrix's columns.
    ///
    /// # Safety
    /// Nobody else has this tile, and there is room for it.
    pub(super) unsafe fn tile(
        &self,
        x: &[f32],
        order: Option<&[u32]>,
        at: usize,
        interleave: usize,
        isa: Isa,
    ) {
        let k = self.k;
        let round = self.elements == Elements::RoundedPairs;
        if round || self.elements == Elements::Pairs {
            // SAFETY: the caller's promise.
            unsafe { pairs::lay_out(x, k, round, self.floats, at, interleave, isa) };
        } else if self.elements == Elements::Quants {
            let blocks = k / BLOCK;
            // SAFETY: the caller's promise.
            let out = unsafe {
                Quantised {
                    quants: self.quants.range(at * k, interleave * k),
                    units: self.units.range(at, interleave),
                    multiples: self.multiples.range(at * blocks, interleave * blocks),
                    sums: self.sums.range(at * blocks, interleave * blocks),
                    first_sums: self.first_sums.range(at * blocks, interleave * blocks),
                    multiplied_sums: self.multiplied_sums.range(at * blocks, interleave * blocks),
                    pairs: self.pairs.range(at * blocks, interleave * blocks),
                    offsets: self
                        .offsets
                        .range(OFFSETS * at * blocks, OFFSETS * interleave * blocks),
                    interleave,
                }
            };
            let x = match order {
                None => x,
                Some(order) => {
                    // SAFETY: the caller's promise.
                    let out = unsafe { self.floats.range(at * k, x.len()) };
                    in_order(x, order, out);
                    out
                }
            };
            dispatch!(isa, quantize_tile(x: &[f32], k: usize, out: Quantised<'_>));
        } else if interleave > 1 {
            // SAFETY: the caller's promise.
            let out = unsafe { self.floats.range(at * k, interleave * k) };
            for (t, x) in x.chunks_exact(k).enumerate() {
                for (out, &x) in out[t..].iter_mut().step_by(interleave).zip(x) {
                    *out = x;
                }
            }
        }
    }
}

/// Brings each row's elements into the order of a matrix's columns.
fn in_order(x: &[f32], order: &[u32], out: &mut [f32]) {
    let rows = x.chunks_exact(order.len());
    for (x, out) in rows.zip(out.chunks_exact_mut(order.len())) {
        for (out, &from) in out.iter_mut().zip(order) {
            *out = x[from as usize];
        }
    }
}

impl Isa {
    fn float_rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Bf16 | Self::Amx => simd::Avx512::FLOAT_ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => simd::Avx2::<simd::Maddubs>::FLOAT_ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => simd::Avx2::<simd::Vnni>::FLOAT_ROWS,
            #[cfg(target_arch = "aarch64")]
            Self::NeonDotprod => simd::Neon::<simd::Dotprod>::FLOAT_ROWS,
            #[cfg(target_arch = "aarch64")]
            Self::Neon => simd::Neon::<simd::Widening>::FLOAT_ROWS,
            _ => simd::Scalar::FLOAT_ROWS,
        }
    }
}

/// A tile's rows, quantised; see [`Rows`].
struct Quantised<'a> {
    quants: &'a mut [i8],
    units: &'a mut [f32],
    multiples: &'a mut [f32],
    sums: &'a mut [i32],
    first_sums: &'a mut [i32],
    multiplied_sums: &'a mut [f32],
    pairs: &'a mut [i32],
    offsets: &'a mut [i32],
    interleave: usize,
}

/// Quantises each row of a tile by itself: `x ≈ unit · multiple · q`, a unit for a row and a multiple for a block of 32, of which the largest
/// is [`MULTIPLES`]; `max|x| / 127 <= unit · multiple`.
///
/// The multiple of a block's scale is an integer so that products added up in 16 bits are multiplied with it by the instruction that widens them. It is
/// larger than the scale `max|x| / 127` by less than a unit: where a block is a hundredth of the row's largest, by less than 1 %.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn quantize_tile<S: Simd>(x: &[f32], k: usize, out: Quantised<'_>) {
    for (t, x) in x.chunks_exact(k).enumerate() {
        let blocks = x.as_chunks::<BLOCK>().0;
        let mut most = 0.0;
        for (block, x) in blocks.iter().enumerate() {
            let largest = unsafe { largest::<S>(x) };
            out.multiples[block * out.interleave + t] = largest;
            most = f32::max(most, largest);
        }
        let (unit, multiple) = units(most);
        out.units[t] = unit;
        for (block, x) in blocks.iter().enumerate() {
            let at = block * out.interleave + t;
            let multiple = (out.multiples[at] * multiple).ceil().min(MULTIPLES as f32);
            let scale = unit * multiple;
            let inverse = if multiple == 0.0 { 0.0 } else { 1.0 / scale };
            let quants = &mut out.quants[at * BLOCK..(at + 1) * BLOCK];
            let (first, sum) = unsafe { quantize::<S>(x, inverse, quants) };
            out.multiples[at] = multiple;
            out.sums[at] = sum;
            out.first_sums[at] = first;
            out.multiplied_sums[at] = multiple * sum as f32;
            if S::PAIRS {
                let multiple = multiple as i32;
                out.pairs[at] = multiple << 16 | multiple;
                let offsets = &mut out.offsets[block * OFFSETS * out.interleave..];
                offsets[t] = OF_BLOCK * multiple * sum;
                offsets[out.interleave + t] = OF_HALF * multiple * first;
                offsets[2 * out.interleave + t] = OF_HALF * multiple * (sum - first);
            }
        }
    }
}

/// The unit of a row whose largest element is `most`, and what the largest of a block is multiplied with to be a multiple of it.
fn units(most: f32) -> (f32, f32) {
    if most.is_infinite() {
        // Whatever it is multiplied with.
        return (most, 0.0);
    }
    // Not less than a normal number, whose inverse is finite.
    let unit = (most / (127 * MULTIPLES) as f32).max(f32::MIN_POSITIVE);
    (unit, 1.0 / (127.0 * unit))
}

/// The largest magnitude of a block.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
unsafe fn largest<S: Simd>(x: &[f32; BLOCK]) -> f32 {
    // SAFETY: the caller's promise; the block has the elements.
    unsafe {
        let zero = S::vsplat(0.0);
        let mut largest = zero;
        for i in (0..BLOCK).step_by(S::WIDE) {
            let v = S::vload(x.as_ptr().add(i));
            // Not a number counts as nothing: `max` keeps its second operand then.
            largest = S::vmax(S::vmax(v, S::vsub(zero, v)), largest);
        }
        S::vlargest(largest)
    }
}

/// A block's elements times `inverse`, rounded; the sums of the first half and of all.
///
/// # Safety
/// The processor has the instructions of `S`; there is room for a block.
#[inline(always)]
unsafe fn quantize<S: Simd>(x: &[f32; BLOCK], inverse: f32, quants: &mut [i8]) -> (i32, i32) {
    // SAFETY: the caller's promise; the block has the elements.
    unsafe {
        let inverse = S::vsplat(inverse);
        let mut sum = S::wsplat(0);
        let mut first = 0;
        for i in (0..BLOCK).step_by(S::WIDE) {
            if i == BLOCK / 2 {
                first = S::wsum(sum);
            }
            let scaled = S::vmul(S::vload(x.as_ptr().add(i)), inverse);
            // Clamped: an infinite activation must not become -128, which the integer products exclude.
            let scaled = S::vmin(S::vmax(scaled, S::vsplat(-127.0)), S::vsplat(127.0));
            let q = S::vto_int(scaled);
            S::wstore_i8(quants.as_mut_ptr().add(i), q);
            sum = S::wadd(sum, q);
        }
        (first, S::wsum(sum))
    }
}
