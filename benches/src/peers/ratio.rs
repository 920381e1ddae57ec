//! [`Pair`]: our figure and a peer's for the same work, round by round, and what follows from them.

use serde::Serialize;

use crate::median::median;

/// Whether a bar is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The ratio is the bar or more.
    Reached,
    /// It is less.
    Missed,
}

impl Verdict {
    /// In a word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Reached => "reached",
            Self::Missed => "missed",
        }
    }
}

/// Figures of which more is better, a figure of each side a round.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Pair {
    /// Ours.
    pub ours: Vec<f64>,
    /// Theirs; empty: the peer is not there.
    pub theirs: Vec<f64>,
    /// The ratio to reach.
    pub bar: Option<f64>,
}

impl Pair {
    /// How many times theirs our median is.
    pub fn ratio(&self) -> Option<f64> {
        Some(median(&self.ours)? / median(&self.theirs)?)
    }

    /// The smallest and the largest ratio of a round.
    pub fn range(&self) -> Option<(f64, f64)> {
        let rounds = self.ours.iter().zip(&self.theirs);
        rounds
            .map(|(ours, theirs)| ours / theirs)
            .fold(None, |range, ratio| match range {
                None => Some((ratio, ratio)),
                Some((least, most)) => Some((ratio.min(least), ratio.max(most))),
            })
    }

    /// Whether the ratio reaches the bar; `None`: one of them is missing.
    pub fn verdict(&self) -> Option<Verdict> {
        Some(if self.ratio()? >= self.bar? {
            Verdict::Reached
        } else {
            Verdict::Missed
        })
    }

    /// `2.13 (≥ 2.8 missed)`.
    pub fn show(&self) -> String {
        let Some(ratio) = self.ratio() else {
            return "–".to_owned();
        };
        match (self.bar, self.verdict()) {
            (Some(bar), Some(verdict)) => format!("{ratio:.2} (≥ {bar} {})", verdict.word()),
            _ => format!("{ratio:.2}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_of_medians_and_its_range_of_rounds() {
        let pair = Pair {
            ours: vec![30.0, 20.0, 22.0],
            theirs: vec![10.0, 10.0, 11.0],
            bar: Some(2.2),
        };
        assert_eq!(pair.ratio(), Some(2.2));
        assert_eq!(pair.range(), Some((2.0, 3.0)));
        assert_eq!(pair.verdict(), Some(Verdict::Reached));
        assert_eq!(pair.show(), "2.20 (≥ 2.2 reached)");
        let missed = Pair {
            bar: Some(2.21),
            ..pair
        };
        assert_eq!(missed.show(), "2.20 (≥ 2.21 missed)");
    }

    #[test]
    fn without_a_peer_there_is_no_ratio() {
        let alone = Pair {
            ours: vec![1.0],
            theirs: vec![],
            bar: Some(2.0),
        };
        assert_eq!(
            (alone.ratio(), alone.range(), alone.verdict()),
            (None, None, None)
        );
        assert_eq!(alone.show(), "–");
    }
}
