//! What one of several ranks has of a model: the config its decoder runs by, and the rows and columns of every tensor.
//!
//! | tensor | a rank has | whole |
//! |---|---|---|
//! | queries, keys, values; their biases; sinks | the rows of its KV heads and of the query heads that belong to them | head |
//! | attention output | the columns of its query heads | head |
//! | gate and input of the MLP, of each expert; their biases | some rows of each | [`unit`] |
//! | output of the MLP, of each expert | the columns of those | [`unit`] |
//! | embedding table, output head | the rows of some tokens | token |
//! | biases of what is cut by columns | on the first rank only: they are added once | |
//! | norms, router | all of it | |
//!
//! Where a number does not divide, the first ranks have more. Where there are more ranks than KV heads, several have the same one and divide its query
//! heads. What cannot be cut so is refused with the numbers.

use std::ops::Range;

use quire_kernels::Rank;

use super::load::LoadError;
use super::{ModelConfig, QkNorm};

/// Whether so many ranks can have a model together, as far as its shape tells. (Tensors whose blocks would be cut through are found while they are loaded.)
///
/// # Errors
/// They cannot; [`LoadError::Ranks`] says what is in the way.
pub fn check_ranks(config: &ModelConfig, ranks: usize) -> Result<(), LoadError> {
    Rank::all(ranks).try_for_each(|rank| Cuts::of(config, rank).map(drop))
}

/// The parts of a model that a rank has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cuts {
    pub rank: Rank,
    /// Query heads.
    pub heads: Range<usize>,
    /// Key/value heads.
    pub kv_heads: Range<usize>,
    /// Of the MLP's width.
    pub inner: Range<usize>,
    /// Of an expert's width; empty where there are none.
    pub expert: Range<usize>,
    /// Tokens of the vocabulary.
    pub tokens: Range<usize>,
}

impl Cuts {
    /// Divides a model.
    ///
    /// # Errors
    /// There are more ranks than there is to share, or the family normalises what would be on several ranks.
    pub fn of(config: &ModelConfig, rank: Rank) -> Result<Self, LoadError> {
        let fault = |problem: String| {
            Err(LoadError::Ranks {
                ranks: rank.of,
                problem,
            })
        };
        let expert = config.experts.as_ref().map_or(0, |of| of.intermediate_size);
        if !rank.is_alone() {
            for (what, width) in [("MLP", config.intermediate_size), ("experts", expert)] {
                if (1..rank.of).contains(&width) {
                    return fault(format!("its {what} are only {width} wide"));
                }
            }
            if config.vocab_size < rank.of {
                return fault(format!("it has only {} tokens", config.vocab_size));
            }
            if config.qk_norm == QkNorm::Together {
                return fault("its queries are normalised over all heads together".to_owned());
            }
            if config.sub_norms {
                return fault(
                    "it has norms inside attention and MLP, over what is divided".to_owned(),
                );
            }
        }
        let Some((heads, kv_heads)) = heads(config, rank) else {
            return fault(format!(
                "its {} key/value heads with {} query heads each can neither be divided nor shared by so many",
                config.kv_heads,
                config.heads / config.kv_heads
            ));
        };
        Ok(Self {
            rank,
            heads,
            kv_heads,
            inner: rank.share(
                config.intermediate_size,
                unit(config.intermediate_size, rank.of),
            ),
            expert: rank.share(expert, unit(expert, rank.of)),
            tokens: rank.share(config.vocab_size, 1),
        })
    }

    /// The config of this rank's decoder: a model with its heads and its width.
    pub fn config(&self, whole: &ModelConfig) -> ModelConfig {
        let mut config = whole.clone();
        config.heads = self.heads.len();
        config.kv_heads = self.kv_heads.len();
        config.intermediate_size = self.inner.len();
        if let Some(experts) = &mut config.experts {
            experts.intermediate_size = self.expert.len();
        }
        config
    }

    /// What is added once is added on the first rank.
    pub fn is_first(&self) -> bool {
        self.rank.index == 0
    }
}

/// The query heads and key/value heads of a rank: whole groups, or a part of one of which all have the key/value head.
fn heads(config: &ModelConfig, rank: Rank) -> Option<(Range<usize>, Range<usize>)> {
    let group = config.heads / config.kv_heads;
    if config.kv_heads >= rank.of {
        let kv_heads = rank.share(config.kv_heads, 1);
        return Some((kv_heads.start * group..kv_heads.end * group, kv_heads));
    }
    let sharing = rank.of / config.kv_heads;
    if !rank.of.is_multiple_of(config.kv_heads) || group < sharing {
        return None;
    }
    let head = rank.index / sharing;
    let within = Rank {
        index: rank.index % sharing,
        of: sharing,
    };
    let queries = within.share(group, 1);
    let first = head * group;
    Some((first + queries.start..first + queries.end, head..head + 1))
}

/// Where an MLP `width` wide may be cut among `ranks`: at multiples of the largest quantised blocks that leave something for everybody.
fn unit(width: usize, ranks: usize) -> usize {
    let units = [256, 128, 64, 32, 16, 8];
    let fits = |&unit: &usize| width.is_multiple_of(unit) && width / unit >= ranks;
    units.into_iter().find(fits).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::checkpoint::{Checkpoint, ModelSource};

    fn config() -> ModelConfig {
        Checkpoint::open(&ModelSource::Demo)
            .expect("it is part of the binary")
            .config
    }

    proptest! {
        #[test]
        fn ranks_have_everything_once_and_every_head_its_keys(
            kv_heads in 1_usize..40, group in 1_usize..9, width in 1_usize..20_000, vocab in 20_usize..200_000, of in 1_usize..9,
        ) {
            let config = ModelConfig {
                kv_heads,
                heads: kv_heads * group,
                intermediate_size: width,
                vocab_size: vocab,
                ..config()
            };
            let cuts: Result<Vec<_>, _> = Rank::all(of).map(|rank| Cuts::of(&config, rank)).collect();
            let Ok(cuts) = cuts else {
                prop_assert!(width < of || kv_heads < of && (of % kv_heads > 0 || group < of / kv_heads));
                return Ok(());
            };
            for (of_rank, whole) in [
                (&(|c: &Cuts| c.heads.clone()) as &dyn Fn(&Cuts) -> Range<usize>, kv_heads * group),
                (&|c| c.inner.clone(), width),
                (&|c| c.tokens.clone(), vocab),
            ] {
                let mut next = 0;
                for cut in &cuts {
                    let range = of_rank(cut);
                    prop_assert_eq!(range.start, next);
                    prop_assert!(!range.is_empty());
                    next = range.end;
                }
                prop_assert_eq!(next, whole);
            }
            for cut in &cuts {
                let local = cut.config(&config);
                prop_assert_eq!(local.heads % local.kv_heads, 0);
                // Every query head meets the keys and values that it has in the whole model.
                for (at, head) in cut.heads.clone().enumerate() {
                    let own = at / (local.heads / local.kv_heads);
                    prop_assert_eq!(cut.kv_heads.start + own, head / group);
                }
                prop_assert_eq!(local.vocab_size, vocab);
                prop_assert_eq!(local.intermediate_size, cut.inner.len());
            }
        }
    }

    #[test]
    fn a_rank_that_is_alone_has_the_model_as_it_is() {
        let config = config();
        let cuts = Cuts::of(&config, Rank::ALONE).expect("nothing is divided");
        assert_eq!(cuts.config(&config), config);
    }

    #[test]
    fn an_mlp_is_cut_between_blocks_of_quantised_formats() {
        // Qwen3-4B: 38 blocks of 256 for 4 ranks.
        let widths = Rank::all(4).map(|rank| rank.share(9728, unit(9728, 4)).len());
        assert_eq!(widths.collect::<Vec<_>>(), [2560, 2560, 2304, 2304]);
    }

    #[test]
    fn what_cannot_be_divided_is_refused_with_the_numbers() {
        let refused = |config: ModelConfig, of| {
            let rank = Rank { index: 0, of };
            let error = Cuts::of(&config, rank).expect_err("it cannot be divided");
            assert!(check_ranks(&config, of).is_err());
            error.to_string()
        };
        let two_heads = ModelConfig {
            kv_heads: 2,
            heads: 4,
            ..config()
        };
        for of in [3, 6] {
            let text = refused(two_heads.clone(), of);
            let numbers = "its 2 key/value heads with 2 query heads each";
            assert!(
                text.contains(numbers) && text.contains(&format!("{of} ranks")),
                "{text}"
            );
        }
        let together = ModelConfig {
            qk_norm: QkNorm::Together,
            ..config()
        };
        assert!(refused(together, 2).contains("over all heads"));
    }
}
