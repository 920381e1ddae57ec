//! [`Draw`]: how a device chooses the token that follows a row of logits, so that a token leaves it and not a vocabulary of logits.
//!
//! What is drawn here is what `quire`'s sampler draws: the same order of tokens, the same sets, the same number on the same scale. A device's
//! weights and sums may differ in their last bits, so a draw that falls on the edge between two tokens may fall on the other one.

/// Which draws a device does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Draws {
    /// None: rows of logits come to the host.
    None,
    /// Greedy ones of rows that nothing changes. Such a device is given no [`Step::drawn_rows`](crate::Step::drawn_rows), and none of its steps is deferred.
    Largest,
    /// All.
    All,
}

impl Draws {
    /// Whether this one is among them.
    pub fn include(self, draw: &Draw) -> bool {
        match self {
            Self::None => false,
            Self::Largest => draw.greedy && draw.changes.iter().all(|&changes| changes == 0),
            Self::All => true,
        }
    }
}

/// How the token after one of a step's rows of logits is chosen.
///
/// First the row's logits are changed ([`Draw::changes`]). Greedy draws ([`Draw::greedy`]) then take the largest, of equals the first. Other draws multiply
/// the logits with [`Draw::inverse_temperature`] and draw from the tokens in a row, each as wide as it is likely: in order of their ids where
/// nothing limits them, and else from the best to the least (of equals the first is better) of those that are left by min-p, then top-k, then
/// top-p. What is not a number is never drawn; of a row whose largest logit is infinite, that one is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Which of [`Step::logit_rows`](crate::Step::logit_rows). A step's draws are in ascending order of their rows, one for a row at most.
    pub row: u32,
    /// The largest logit is taken; what follows is then of no importance.
    pub greedy: bool,
    /// What logits are multiplied with. Finite and more than 0.
    pub inverse_temperature: f32,
    /// Only so many of the best; 0: all.
    pub top_k: u32,
    /// Only as many of the best as it takes for this share of the probability. `(0, 1]`
    pub top_p: f32,
    /// Only logits that are no further than this below the largest: `-ln(min_p)`. `>= 0`; infinite: all.
    pub within: f32,
    /// The place that is drawn on the scale of the probability. `[0, 1)`
    pub place: f64,
    /// Where the row's changes begin in [`Step::changes`](crate::Step::changes).
    pub first_change: u32,
    /// How many changes there are of each kind, by [`ChangeKind`], one kind after the other.
    pub changes: [u32; ChangeKind::COUNT],
}

/// What a [`Change`] does to a logit, in the order in which kinds are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum ChangeKind {
    /// Divides by the amount what is more than 0, and multiplies the rest with it: the penalty for repetition.
    Repeated = 0,
    /// Subtracts the amount: the penalties for presence and frequency.
    Lowered = 1,
    /// Adds the amount.
    Biased = 2,
    /// Makes the token impossible.
    Forbidden = 3,
}

impl ChangeKind {
    /// How many kinds there are.
    pub const COUNT: usize = 4;
}

/// What is done to the logit of one token of a row. No token has two changes of one kind, unless it is forbidden twice; one beyond the vocabulary has no
/// effect.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// The token.
    pub token: u32,
    /// How much, see [`ChangeKind`].
    pub amount: f32,
}
