//! [`Bf16`]: rounding to bfloat16 in code that compilers turn into vectors.

/// The bits of a bfloat16.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Bf16(u16);

impl Bf16 {
    /// The nearest, ties to even.
    #[inline(always)]
    pub fn of(x: f32) -> Self {
        let bits = x.to_bits();
        // Rounding must not carry a NaN's bits into those of infinity.
        let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
        Self(if x.is_nan() { 0x7fc0 } else { rounded })
    }

    #[inline(always)]
    pub fn bits(self) -> u16 {
        self.0
    }

    #[inline(always)]
    pub fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}
