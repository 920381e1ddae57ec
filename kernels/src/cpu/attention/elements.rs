//! What keys and values are kept as.

use super::super::bf16::Bf16;
use super::super::simd::Simd;

/// An element of the cache.
pub(super) trait Element: Copy {
    /// It is a multiple of a scale.
    const SCALED: bool = false;

    /// The same in a float.
    type Wide: Element;

    fn widen(self) -> f32;

    /// Widens as many as a vector has lanes, scales left out.
    ///
    /// # Safety
    /// The elements are there, and the processor has the instructions of `S`.
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
}

impl Element for f32 {
    type Wide = Self;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::vload(p) }
    }
}

/// The bits of an f16.
impl Element for u16 {
    type Wide = f32;

    fn widen(self) -> f32 {
        half::f16::from_bits(self).to_f32()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::vload_f16(p) }
    }
}

impl Element for Bf16 {
    type Wide = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        Self::widen(self)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's promise; it is as its bits.
        unsafe { S::vload_bf16(p.cast()) }
    }
}

/// A multiple of a scale.
impl Element for i8 {
    const SCALED: bool = true;

    type Wide = Multiple;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::vto_float(S::wload_i8(p.cast())) }
    }
}

/// A multiple of a scale, in a float.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Multiple(f32);

impl Element for Multiple {
    const SCALED: bool = true;

    type Wide = Self;

    #[inline(always)]
    fn widen(self) -> f32 {
        self.0
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's promise; it is as its float.
        unsafe { S::vload(p.cast()) }
    }
}
