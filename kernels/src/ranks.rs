//! [`Rank`]: one of several devices that compute a model together, and what it has of it.
//!
//! The cuts are those of Megatron-LM (Shoeybi et al. 2019). Projections into heads and into the MLP are cut by rows, so that a rank has whole heads and
//! whole columns of activations; the projections back are cut by columns, so that each rank has a part of every sum, and the parts are added up over
//! the ranks. Embedding table and output head are cut by tokens of the vocabulary. Everything else is whole on every rank.

use std::ops::Range;

/// One of `of` ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rank {
    /// Which one, from 0.
    pub index: usize,
    /// How many there are.
    pub of: usize,
}

impl Rank {
    /// The only one.
    pub const ALONE: Self = Self { index: 0, of: 1 };

    /// All ranks of a group of `of`.
    pub fn all(of: usize) -> impl Iterator<Item = Self> {
        (0..of).map(move |index| Self { index, of })
    }

    /// Whether it has the whole model.
    pub fn is_alone(self) -> bool {
        self.of == 1
    }

    /// This rank's share of `items` in order, cut at multiples of `unit`: as even as that allows, the first ranks' larger by a unit where it does not
    /// divide. What is left of a last, incomplete unit belongs to the unit.
    pub fn share(self, items: usize, unit: usize) -> Range<usize> {
        let units = items.div_ceil(unit);
        let begin = |rank: usize| {
            let units = units / self.of * rank + rank.min(units % self.of);
            (units * unit).min(items)
        };
        begin(self.index)..begin(self.index + 1)
    }
}

/// A matrix of which a rank has a part that changes what products with it are. (A part of the rows of a projection does not: it is a projection with
/// fewer outputs.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shard {
    /// Some of the columns. Products with it are parts of sums: [`crate::Backend::linear`], [`crate::Backend::linear_add`] and
    /// [`crate::Backend::experts`] add them up over all ranks.
    Columns,
    /// The rows of some tokens of a vocabulary. [`crate::Backend::embed`] finds every token on the rank that has it, and [`crate::Backend::logits`] puts
    /// the ranks' logits together.
    Vocabulary {
        /// Tokens of the vocabulary; the rank has those of [`Rank::share`] by units of one.
        of: usize,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn shares_cover_everything_once_in_order_and_are_even_up_to_a_unit(
            items in 0_usize..10_000, unit in 1_usize..300, of in 1_usize..17,
        ) {
            let shares: Vec<_> = Rank::all(of).map(|rank| rank.share(items, unit)).collect();
            let mut next = 0;
            for share in &shares {
                prop_assert_eq!(share.start, next);
                prop_assert!(share.start % unit == 0 || share.start == items);
                next = share.end;
            }
            prop_assert_eq!(next, items);
            let units = shares.iter().map(|share| share.len().div_ceil(unit));
            let (least, most) = (units.clone().min().unwrap_or(0), units.max().unwrap_or(0));
            prop_assert!(most - least <= 1);
        }
    }

    #[test]
    fn alone_it_has_everything() {
        assert_eq!(Rank::ALONE.share(77, 32), 0..77);
    }
}
