//! [`PageGroup`]: layers whose keys and values share pages, and how many of these a sequence needs.
//!
//! Layers that attend to everything and layers that attend to a window of the last positions keep different numbers of positions. A model
//! that has both divides its layers into groups of equal size; a block holds `block_size` positions for the layers of *one* group, and one
//! pool serves all groups. A sequence's block table is interleaved: entry `i · groups + g` is group `g`'s block of the positions from
//! `i · block_size`, or [`BlockId::NONE`](crate::BlockId::NONE) where no query will read them again.

/// Layers that keep the same positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageGroup {
    /// The query at position `p` reads the keys at `p - window + 1 ..= p`; `None`: all up to `p`.
    pub window: Option<u32>,
}

impl PageGroup {
    /// Layers that attend to everything before them.
    pub const FULL: Self = Self { window: None };

    /// Whether its layers attend to everything.
    pub fn is_full(self) -> bool {
        self.window.is_none()
    }

    /// Of the first `blocks` full blocks of a sequence, those at the beginning that nobody reads who computes what comes after them.
    ///
    /// Counted from a block's beginning: until the block that is being filled is full, the window may have passed one block more. It is
    /// kept because a sequence that begins alike will begin at this boundary and read it.
    pub(crate) fn passed(self, blocks: u32, block_size: u32) -> u32 {
        self.window.map_or(0, |window| {
            blocks.saturating_sub((window - 1).div_ceil(block_size))
        })
    }
}

/// The most blocks of all groups that a sequence holds at once while it computes `from..tokens`, at most `chunk` positions a step.
/// `from` is a multiple of `block_size`.
///
/// Before a step that computes `c..end` a group holds what it keeps up to `c`, and blocks for everything up to `end`. That is most where
/// `end` is the first position of the last block: earlier ends need fewer blocks, later ones have passed more.
pub(crate) fn most_blocks(
    groups: &[PageGroup],
    block_size: u32,
    chunk: u32,
    from: u32,
    tokens: u32,
) -> u64 {
    let blocks = tokens.div_ceil(block_size);
    let end = blocks.saturating_sub(1) * block_size + 1;
    let begin = end.saturating_sub(chunk).max(from) / block_size;
    groups
        .iter()
        .map(|group| u64::from(blocks - group.passed(begin, block_size)))
        .sum()
}

/// The most blocks that `samples` sequences of `tokens` tokens with the same prompt hold at once when nothing else runs: one of
/// them reads its prompt in chunks of at most `chunk`, all of them generate.
///
/// This is the rule by which a request is refused for ever ([`Config::check`](crate::Config::check)), and by which a cache is sized.
pub fn blocks_needed(
    groups: &[PageGroup],
    block_size: u32,
    chunk: u32,
    tokens: u32,
    samples: u32,
) -> u64 {
    let one = most_blocks(groups, block_size, chunk, 0, tokens);
    let other = most_blocks(groups, block_size, 1, 0, tokens);
    one + other * u64::from(samples.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(windows: &[u32]) -> Vec<PageGroup> {
        let group = |&window: &u32| PageGroup {
            window: (window > 0).then_some(window),
        };
        windows.iter().map(group).collect()
    }

    #[test]
    fn a_full_group_needs_a_block_for_every_position() {
        for tokens in 1..100 {
            let needed = blocks_needed(&[PageGroup::FULL], 16, 7, tokens, 3);
            assert_eq!(needed, 3 * u64::from(tokens.div_ceil(16)));
        }
    }

    #[test]
    fn a_windowed_group_needs_no_more_than_window_and_chunk_however_long_the_sequence_is() {
        let groups = windows(&[4096]);
        let needed = blocks_needed(&groups, 16, 512, 1 << 20, 1);
        assert!(needed <= (4096 + 512) / 16 + 2, "{needed}");
        assert!(needed >= (4096 + 512) / 16, "{needed}");
    }

    #[test]
    fn what_is_passed_is_what_no_later_query_reads() {
        for (window, size, blocks) in (1..20_u32)
            .flat_map(|w| (1..6_u32).flat_map(move |s| (0..9_u32).map(move |b| (w, s, b))))
        {
            let group = PageGroup {
                window: Some(window),
            };
            // The query at `blocks · size` reads from here on; later ones read later keys.
            let first_read = (blocks * size + 1).saturating_sub(window);
            assert_eq!(group.passed(blocks, size), (first_read / size).min(blocks));
        }
    }

    #[test]
    fn the_most_is_the_most_of_every_step_there_can_be() {
        for groups in [
            windows(&[0]),
            windows(&[5]),
            windows(&[0, 7, 1]),
            windows(&[16, 3]),
        ] {
            for (size, chunk, from_block, more) in (1..6_u32).flat_map(|s| {
                (1..12_u32).flat_map(move |c| {
                    (0..4_u32).flat_map(move |f| (1..30_u32).map(move |m| (s, c, f, m)))
                })
            }) {
                let (from, tokens) = (from_block * size, from_block * size + more);
                let held = |begin: u32, end: u32| -> u64 {
                    let blocks = end.div_ceil(size);
                    let of = |g: &PageGroup| u64::from(blocks - g.passed(begin / size, size));
                    groups.iter().map(of).sum()
                };
                let most = (from..tokens)
                    .flat_map(|begin| {
                        (begin + 1..=tokens.min(begin + chunk)).map(move |end| (begin, end))
                    })
                    .map(|(begin, end)| held(begin, end))
                    .max();
                assert_eq!(
                    Some(most_blocks(&groups, size, chunk, from, tokens)),
                    most,
                    "{groups:?} {size} {chunk} {from} {tokens}"
                );
            }
        }
    }
}
