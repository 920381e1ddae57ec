//! [`Random`]: the one source of chance here, seeded, the same on every machine.

/// SplitMix64 (Steele et al. 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A stream for the `n`th of something: equal seeds give equal streams, different `n` different ones.
    pub fn nth(seed: u64, n: u64) -> Self {
        let mut outer = Self(seed ^ n.wrapping_mul(0xd605_0b4c_d8b4_5f1d));
        Self(outer.next())
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0. (The bias is below n / 2^64.)
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    /// Uniform in (0, 1].
    pub fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_in_their_range_and_fill_it() {
        let mut random = Random::nth(7, 0);
        let mut seen = [0_u32; 10];
        for _ in 0..10_000 {
            seen[random.below(10) as usize] += 1;
            let unit = random.unit();
            assert!(unit > 0.0 && unit <= 1.0);
        }
        assert!(seen.iter().all(|&n| (800..1200).contains(&n)), "{seen:?}");
    }

    #[test]
    fn streams_differ_and_repeat() {
        assert_eq!(Random::nth(1, 2).next(), Random::nth(1, 2).next());
        assert_ne!(Random::nth(1, 2).next(), Random::nth(1, 3).next());
        assert_ne!(Random::nth(1, 2).next(), Random::nth(2, 2).next());
    }
}
