//! Every operation gives the same bits in every instruction set, also at the edges that no kernel's test happens upon.

use std::fmt::Debug;

use proptest::prelude::*;

use super::{Isa, LANES, PANEL, QUAD, Simd, dispatch, exp, exp2, tanh, vexp, vexp2, vtanh};
use crate::quantize::BLOCK;

/// Values at which floating-point units disagree if they can.
const EDGES: [f32; 24] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    -0.5,
    1.5,
    2.5,
    -2.5,
    0.499_999_97,
    126.5,
    -126.5,
    f32::MIN_POSITIVE,
    -f32::MIN_POSITIVE,
    1e-45,
    -1e-40,
    f32::MAX,
    f32::MIN,
    1e20,
    -87.4,
    88.1,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
];

/// Holds what a kernel computes of `input` in every instruction set against plain Rust.
fn agree<I: Debug>(kernel: fn(Isa, &I, &mut Vec<u32>), input: &I) {
    let mut expected = Vec::new();
    kernel(Isa::Scalar, input, &mut expected);
    assert!(!expected.is_empty());
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let mut got = Vec::new();
        kernel(isa, input, &mut got);
        assert!(got == expected, "{}: {input:?}", isa.name());
    }
}

/// A function that appends what a body, generic over `S`, computes with an instruction set.
macro_rules! kernel {
    ($name:ident($x:ident: $ty:ty, $out:ident) $body:block) => {
        fn $name(isa: Isa, x: &$ty, out: &mut Vec<u32>) {
            #[inline(always)]
            #[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the body: see `dispatch!`; inputs have a panel's elements
            unsafe fn body<S: Simd>($x: &$ty, $out: &mut Vec<u32>) {
                unsafe { $body }
            }
            dispatch!(isa, body(x: &$ty, out: &mut Vec<u32>));
        }
    };
}

/// Appends an `F` of the eight lanes from `$i`, for all of a panel.
macro_rules! eight {
    ($out:ident, |$i:ident| $x:expr) => {
        for $i in (0..PANEL).step_by(LANES) {
            let mut lanes = [0.0; LANES];
            S::store(lanes.as_mut_ptr(), $x);
            push($out, &lanes);
        }
    };
}

/// Appends a `V` of the lanes from `$i`, for all of a panel.
macro_rules! wide {
    ($out:ident, |$i:ident| $x:expr) => {
        for $i in (0..PANEL).step_by(S::WIDE) {
            let mut lanes = [0.0; PANEL];
            S::vstore(lanes.as_mut_ptr(), $x);
            push($out, &lanes[..S::WIDE]);
        }
    };
}

/// Appends a `W`, whose lanes are small, as [`wide!`] does.
macro_rules! integers {
    ($out:ident, |$i:ident| $x:expr) => {
        wide!($out, |$i| S::vto_float($x))
    };
}

/// Appends the bytes of a `B` from byte `4 · $i` on: first the first of every four.
macro_rules! bytes {
    ($out:ident, |$i:ident| $x:expr) => {
        for byte in 0..4 {
            integers!($out, |$i| S::bdot_wide(S::wsplat(0), $x, 1 << (8 * byte)));
        }
    };
}

/// The bits of floats; one pattern for all that are not numbers.
fn push(out: &mut Vec<u32>, values: &[f32]) {
    let canonical = |x: &f32| if x.is_nan() { f32::NAN } else { *x };
    out.extend(values.iter().map(|x| canonical(x).to_bits()));
}

kernel! { arithmetic(x: [[f32; PANEL]; 3], out) {
    let [a, b, c] = [x[0].as_ptr(), x[1].as_ptr(), x[2].as_ptr()];
    eight!(out, |i| S::add(S::load(a.add(i)), S::load(b.add(i))));
    eight!(out, |i| S::sub(S::load(a.add(i)), S::load(b.add(i))));
    eight!(out, |i| S::mul(S::load(a.add(i)), S::load(b.add(i))));
    eight!(out, |i| S::div(S::load(a.add(i)), S::load(b.add(i))));
    eight!(out, |i| S::max(S::load(a.add(i)), S::load(b.add(i))));
    eight!(out, |i| S::min(S::load(a.add(i)), S::load(b.add(i))));
    eight!(out, |i| S::fma(S::load(a.add(i)), S::load(b.add(i)), S::load(c.add(i))));
    eight!(out, |i| {
        let mut halves = [0; LANES];
        S::store_f16(halves.as_mut_ptr(), S::load(a.add(i)));
        S::load_f16(halves.as_ptr())
    });
    eight!(out, |i| exp::<S>(S::load(a.add(i))));
    eight!(out, |i| exp2::<S>(S::load(a.add(i))));
    eight!(out, |i| tanh::<S>(S::load(a.add(i))));
    wide!(out, |i| S::vadd(S::vload(a.add(i)), S::vload(b.add(i))));
    wide!(out, |i| S::vsub(S::vload(a.add(i)), S::vload(b.add(i))));
    wide!(out, |i| S::vmul(S::vload(a.add(i)), S::vload(b.add(i))));
    wide!(out, |i| S::vdiv(S::vload(a.add(i)), S::vload(b.add(i))));
    wide!(out, |i| S::vmax(S::vload(a.add(i)), S::vload(b.add(i))));
    wide!(out, |i| S::vmin(S::vload(a.add(i)), S::vload(b.add(i))));
    wide!(out, |i| S::vfma(S::vload(a.add(i)), S::vload(b.add(i)), S::vload(c.add(i))));
    wide!(out, |i| S::vwhere(S::vload(a.add(i)), S::vload(b.add(i)), S::vload(c.add(i))));
    let mut bits = 0;
    for i in (0..PANEL).step_by(S::WIDE) {
        bits |= S::vbetween(S::vload(a.add(i)), S::vload(b.add(i)), S::vload(c.add(i))) << i;
    }
    out.push(bits);
    wide!(out, |i| vexp::<S>(S::vload(a.add(i))));
    wide!(out, |i| vexp2::<S>(S::vload(a.add(i))));
    wide!(out, |i| vtanh::<S>(S::vload(a.add(i))));
} }

#[test]
fn floats_are_added_multiplied_and_compared_alike() {
    let n = EDGES.len();
    let operand = |at: usize| -> [f32; PANEL] { std::array::from_fn(|i| EDGES[(at + i) % n]) };
    for first in 0..n {
        for second in 0..n {
            agree(arithmetic, &[operand(0), operand(first), operand(second)]);
        }
    }
}

kernel! { across(x: [[f32; LANES]; LANES], out) {
    let vectors = x.map(|x| S::load(x.as_ptr()));
    let mut lanes = [0.0; LANES];
    S::store(lanes.as_mut_ptr(), S::sums(vectors));
    push(out, &lanes);
    S::store(lanes.as_mut_ptr(), S::largests(vectors));
    push(out, &lanes);
} }

proptest! {
    #[test]
    fn sums_and_largest_lanes_of_eight_vectors_are_those_of_each(
        x in prop::array::uniform8(prop::array::uniform8(-1e6_f32..1e6)),
    ) {
        agree(across, &x);
        let mut out = Vec::new();
        across(Isa::best(), &x, &mut out);
        for (n, lanes) in x.iter().enumerate() {
            let [a, b, c, d, e, f, g, h] = *lanes;
            let sum = ((a + e) + (c + g)) + ((b + f) + (d + h));
            prop_assert_eq!(f32::from_bits(out[n]), sum);
            let largest = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!(f32::from_bits(out[LANES + n]), largest);
        }
    }
}

kernel! { rounding(x: [f32; PANEL], out) {
    let x = x.as_ptr();
    eight!(out, |i| S::to_float(S::to_int(S::load(x.add(i)))));
    eight!(out, |i| S::exp2_int(S::to_int(S::load(x.add(i)))));
    wide!(out, |i| S::vto_float(S::vto_int(S::vload(x.add(i)))));
    wide!(out, |i| S::vexp2_int(S::vto_int(S::vload(x.add(i)))));
    let (mut q, mut sum) = ([0_i8; PANEL], 0);
    let mut largest = f32::NEG_INFINITY;
    for i in (0..PANEL).step_by(S::WIDE) {
        let v = S::vload(x.add(i));
        largest = largest.max(S::vlargest(v));
        let w = S::vto_int(v);
        S::wstore_i8(q.as_mut_ptr().add(i), w);
        sum += S::wsum(S::wadd(w, S::wsplat(3))) - 3 * S::WIDE as i32;
    }
    out.push(largest.to_bits());
    out.push(sum.cast_unsigned());
    out.extend(q.map(|q| i32::from(q).cast_unsigned()));
    for i in (0..PANEL).step_by(LANES) {
        let q = S::to_int(S::load(x.add(i)));
        let mut bytes = [0_i8; LANES];
        S::store_i8(bytes.as_mut_ptr(), q);
        out.extend(bytes.map(|q| i32::from(q).cast_unsigned()));
    }
} }

kernel! { packing(lanes: u32, out) {
    let bytes: [u8; PANEL] = std::array::from_fn(|i| 200 + i as u8);
    let (mut packed, mut count) = ([0_u32; 2 * PANEL], 0);
    for i in (0..PANEL).step_by(S::WIDE) {
        let lanes = lanes >> i & ((1 << S::WIDE) - 1);
        S::wpack(packed.as_mut_ptr().add(count), S::wload_u8(bytes.as_ptr().add(i)), lanes);
        count += lanes.count_ones() as usize;
    }
    out.extend_from_slice(&packed[..count]);
    out.push(count as u32);
} }

#[test]
fn lanes_are_packed_in_order() {
    for lanes in 0..=0xffff_u32 {
        let mut out = Vec::new();
        packing(Isa::Scalar, &lanes, &mut out);
        let expected = (0..16).filter(|lane| lanes >> lane & 1 == 1);
        assert!(
            out[..out.len() - 1]
                .iter()
                .copied()
                .eq(expected.map(|lane| 200 + lane))
        );
        agree(packing, &lanes);
    }
}

#[test]
fn halves_round_to_even_and_bytes_keep_their_sign() {
    for from in -126..112 {
        agree(
            rounding,
            &std::array::from_fn(|i| from as f32 + i as f32 + [0.0, 0.5, -0.499_99][i % 3]),
        );
    }
}

kernel! { halves(x: [u16; PANEL], out) {
    let x = x.as_ptr();
    eight!(out, |i| S::load_f16(x.add(i)));
    wide!(out, |i| S::vload_f16(x.add(i)));
    wide!(out, |i| S::vload_bf16(x.add(i)));
} }

kernel! { pairs_of_halves(x: [u16; 2 * PANEL], out) {
    let x = x.as_ptr();
    wide!(out, |i| S::vload_bf16_even(x.add(2 * i)));
    wide!(out, |i| S::vload_bf16_odd(x.add(2 * i)));
} }

#[test]
fn every_16_bit_float_is_worth_the_same() {
    for first in (0..=u16::MAX).step_by(PANEL) {
        agree(halves, &std::array::from_fn(|i| first + i as u16));
        // Beside one with all of its bits, or none.
        for beside in [0, u16::MAX] {
            let pairs = |odd: usize| {
                std::array::from_fn(|i| {
                    if i % 2 == odd {
                        first + i as u16 / 2
                    } else {
                        beside
                    }
                })
            };
            agree(pairs_of_halves, &pairs(0));
            agree(pairs_of_halves, &pairs(1));
        }
    }
}

kernel! { widened_bytes(x: [u8; PANEL], out) {
    let x = x.as_ptr();
    wide!(out, |i| S::vload_f8(x.add(i)));
    integers!(out, |i| S::wload_u8(x.add(i)));
    integers!(out, |i| S::wload_i8(x.add(i)));
    integers!(out, |i| S::wand(S::wload_i8(x.add(i)), 0x5a));
    integers!(out, |i| S::wsub(S::wload_u8(x.add(i)), S::wload_i8(x.add(i))));
    for n in 0..8 {
        integers!(out, |i| S::wshr(S::wload_u8(x.add(i)), n));
    }
    integers!(out, |i| S::wshr(S::wload_i8(x.add(i)), 9));
} }

#[test]
fn every_byte_is_worth_the_same() {
    for first in (0..=u8::MAX).step_by(PANEL) {
        agree(widened_bytes, &std::array::from_fn(|i| first + i as u8));
    }
}

kernel! { quads(x: [u8; QUAD], out) {
    let x = x.as_ptr();
    let table = std::array::from_fn(|i| (255 - 13 * i) as u8);
    bytes!(out, |i| S::bload(x.add(4 * i)));
    let mut stored = [0; QUAD];
    for i in (0..PANEL).step_by(S::WIDE) {
        S::bstore(stored.as_mut_ptr().add(4 * i), S::bload(x.add(4 * i)));
    }
    out.extend(stored.map(u32::from));
    bytes!(out, |i| S::bor(S::bload(x.add(4 * i)), S::band(S::bload(x.add(4 * i)), 0x5a)));
    bytes!(out, |i| S::blookup(S::band(S::bload(x.add(4 * i)), 15), &table));
    for n in 0..8 {
        let kept = 0xff >> n;
        bytes!(out, |i| S::band(S::bshr(S::bload(x.add(4 * i)), n), kept));
        bytes!(out, |i| S::bshl(S::band(S::bload(x.add(4 * i)), kept), n));
    }
    for power in [1, 3, 9, 27, 81] {
        bytes!(out, |i| S::btrit(S::bload(x.add(4 * i)), power));
    }
} }

#[test]
fn bytes_are_shifted_looked_up_and_read_as_ternary_alike() {
    for first in (0..=u8::MAX).step_by(QUAD) {
        agree(quads, &std::array::from_fn(|i| first + i as u8));
    }
}

/// Most activation rows of a tile.
const ROWS: usize = 8;

/// What products are taken of.
#[derive(Debug)]
struct Factors {
    /// Eight groups of a panel's rows of four bytes.
    w: [u8; 8 * QUAD],
    /// [`ROWS`] blocks of activations.
    x: [i8; ROWS * BLOCK],
}

impl Factors {
    /// Bytes that `w` and `x` give for each place; `x` is brought into `-127..=127`.
    fn new(w: impl FnMut(usize) -> u8, x: impl Fn(usize) -> i8) -> Self {
        Self {
            w: std::array::from_fn(w),
            x: std::array::from_fn(|i| x(i).max(-127)),
        }
    }
}

kernel! { products(factors: Factors, out) {
    let (w, x) = (factors.w.as_ptr(), factors.x.as_ptr().cast::<i32>());
    let one = x.read_unaligned();
    integers!(out, |i| S::bdot(S::wsplat(-3), S::band(S::bload(w.add(4 * i)), 0x7f), one));
    integers!(out, |i| S::bdot_wide(S::wsplat(5), S::bload(w.add(4 * i)), one));
    integers!(out, |i| S::bdot_signed(S::wsplat(5), S::bsigned(S::bload(w.add(4 * i))), one));
    // As large as so many together may be.
    integers!(out, |i| together::<S, 1>(w.add(4 * i), 127, x));
    integers!(out, |i| together::<S, 2>(w.add(4 * i), 63, x));
    integers!(out, |i| together::<S, 4>(w.add(4 * i), 31, x));
    integers!(out, |i| together::<S, 8>(w.add(4 * i), 15, x));
} }

/// 7, and the dot products of `K` groups of bytes of at most `most` with as many of `x`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // as in `kernel!`
unsafe fn together<S: Simd, const K: usize>(w: *const u8, most: u8, x: *const i32) -> S::W {
    unsafe {
        let seven = S::wsplat(7);
        let mut pairs = S::pbegin(seven);
        for k in 0..K {
            let codes = S::band(S::bload(w.add(QUAD * k)), most);
            pairs = S::pdot(pairs, codes, x.add(k).read_unaligned());
            S::settle(&mut pairs);
        }
        S::pend(seven, pairs)
    }
}

kernel! { tiles(factors: Factors, out) {
    tile::<S, 1>(factors, out);
    tile::<S, 2>(factors, out);
    tile::<S, 4>(factors, out);
    tile::<S, ROWS>(factors, out);
} }

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // as in `kernel!`
unsafe fn tile<S: Simd, const T: usize>(factors: &Factors, out: &mut Vec<u32>) {
    let (w, x) = (factors.w.as_ptr(), factors.x.as_ptr());
    let blocks = factors.x.as_chunks::<BLOCK>().0;
    let sums: [i32; T] = std::array::from_fn(|t| blocks[t].iter().map(|&x| i32::from(x)).sum());
    unsafe {
        for dots in [
            S::dot_i8::<T>(w, x, sums.as_ptr()),
            S::dot_q4::<T>(w, x, sums.as_ptr()),
        ] {
            for dots in dots {
                integers!(out, |i| dots[i / S::WIDE]);
            }
        }
    }
}

#[test]
fn products_of_bytes_are_exact_up_to_the_largest() {
    let mut random = 1_u64;
    let mut byte = |_: usize| {
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (random >> 56) as u8
    };
    let mut all = vec![];
    for _ in 0..8 {
        let x: [u8; ROWS * BLOCK] = std::array::from_fn(&mut byte);
        all.push(Factors::new(&mut byte, |i| x[i].cast_signed()));
    }
    for w in [0, 127, 128, 255] {
        for x in [-127, 127] {
            all.push(Factors::new(|_| w, |_| x));
            all.push(Factors::new(|i| w ^ (i % 2) as u8, |i| [x, -x][i % 2]));
        }
    }
    for factors in &all {
        agree(products, factors);
        agree(tiles, factors);
    }
}

#[test]
fn plain_products_are_the_definition() {
    let factors = Factors::new(|i| (i * 7) as u8, |i| (i * 5) as i8);
    let mut got = Vec::new();
    tiles(Isa::Scalar, &factors, &mut got);
    // The first row of weights times the first of activations.
    let dot = |w: &dyn Fn(usize) -> i32| -> i32 {
        (0..BLOCK).map(|k| w(k) * i32::from(factors.x[k])).sum()
    };
    let eight = dot(&|k| i32::from(factors.w[k / 4 * QUAD + k % 4]) - 128);
    let four = dot(&|k| {
        let byte = factors.w[k / 8 * QUAD + k % 4];
        i32::from(if k % 8 < 4 { byte & 15 } else { byte >> 4 }) - 8
    });
    assert_eq!(f32::from_bits(got[0]), eight as f32);
    assert_eq!(f32::from_bits(got[PANEL]), four as f32);
}
