//! Log-probabilities of a row of raw logits.

use std::cmp::Ordering;

use quire_kernels::cpu::rows;
use quire_scheduler::TokenId;

use super::Scratch;
use super::filter::best;

/// Log-probabilities of one position, generated or of a prompt, of the model's raw distribution (before temperature, penalties and filters).
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// ln p of the token that was chosen, or is there in the prompt.
    pub logprob: f32,
    /// The chosen token's place among all tokens, 1 = likeliest.
    pub rank: u32,
    /// The likeliest tokens, best first, ties by id.
    pub top: Vec<(TokenId, f32)>,
}

/// Better first: larger logit, then smaller id. Not-a-number is worse than everything.
pub(super) fn better(a: (u32, f32), b: (u32, f32)) -> Ordering {
    let key = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
    key(b.1)
        .partial_cmp(&key(a.1))
        .unwrap_or(Ordering::Equal)
        .then(a.0.cmp(&b.0))
}

/// The largest logit, and `ln Σ e^(x - largest)`. `exponentials` is working memory.
fn log_sum_exp(logits: &[f32], exponentials: &mut Vec<f32>) -> (f32, f64) {
    let largest = rows::largest(logits);
    if !largest.is_finite() {
        return (largest, 0.0);
    }
    exponentials.resize(logits.len(), 0.0);
    (
        largest,
        rows::exponentials(logits, largest, exponentials).ln(),
    )
}

/// What is reported of `chosen`, with the `count` likeliest tokens. `scratch` is working memory.
pub(crate) fn of(
    logits: &[f32],
    chosen: TokenId,
    count: usize,
    scratch: &mut Scratch,
) -> TokenLogprobs {
    let (largest, log_total) = log_sum_exp(logits, &mut scratch.exponentials);
    let candidates = &mut scratch.candidates;
    let logprob = |x: f32| {
        if x.is_nan() {
            f32::NEG_INFINITY
        } else if x == f32::INFINITY {
            // Nothing else has a chance; there is no difference to it.
            0.0
        } else {
            (f64::from(x - largest) - log_total) as f32
        }
    };
    let own = (chosen.0, logits[chosen.0 as usize]);
    let ahead = if own.1.is_nan() {
        // Behind everything that is a number, and behind minus infinities and others of its kind with smaller ids.
        logits
            .iter()
            .enumerate()
            .filter(|&(id, &x)| better((id as u32, x), own) == Ordering::Less)
            .count()
    } else {
        let larger = logits.iter().filter(|&&x| x > own.1).count();
        let before = &logits[..chosen.0 as usize];
        larger + before.iter().filter(|&&x| x == own.1).count()
    };
    let rank = 1 + ahead as u32;
    let count = count.min(logits.len());
    let mut top = Vec::with_capacity(count);
    if count > 0 {
        candidates.clear();
        best(logits, count, f32::NEG_INFINITY, candidates);
        if candidates.len() < count {
            // Not so many are numbers: the others are as bad as each other, and still in order of their ids.
            candidates.clear();
            candidates.extend(logits.iter().enumerate().map(|(id, &x)| (id as u32, x)));
            candidates.sort_unstable_by(|a, b| better(*a, *b));
            candidates.truncate(count);
        }
        top.extend(candidates.iter().map(|&(id, x)| (TokenId(id), logprob(x))));
    }
    TokenLogprobs {
        logprob: logprob(own.1),
        rank,
        top,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_the_log_softmax_with_ranks_and_alternatives() {
        let logits = [1.0, 3.0, 2.0, 3.0];
        let total: f64 = logits.iter().map(|x: &f32| f64::from(*x).exp()).sum();
        let expected = |x: f64| (x - total.ln()) as f32;
        let got = of(&logits, TokenId(2), 3, &mut Scratch::default());
        assert!((got.logprob - expected(2.0)).abs() < 1e-6);
        assert_eq!(got.rank, 3);
        let ids: Vec<u32> = got.top.iter().map(|t| t.0.0).collect();
        assert_eq!(ids, [1, 3, 2], "ties by id");
        assert!((got.top[0].1 - expected(3.0)).abs() < 1e-6);
    }

    #[test]
    fn asking_for_more_than_there_are_gives_all() {
        assert_eq!(
            of(&[0.0, 1.0], TokenId(0), 20, &mut Scratch::default())
                .top
                .len(),
            2
        );
    }

    #[test]
    fn a_row_that_is_not_numbers_has_defined_logprobs() {
        let got = of(
            &[f32::NAN, 1.0, f32::NEG_INFINITY],
            TokenId(1),
            3,
            &mut Scratch::default(),
        );
        assert_eq!(got.rank, 1);
        assert!(got.logprob.abs() < 1e-6);
        assert!(got.top.iter().all(|t| !t.1.is_nan()));
        let infinite = [0.0, f32::INFINITY, f32::NEG_INFINITY];
        let got = of(&infinite, TokenId(1), 3, &mut Scratch::default());
        assert_eq!((got.logprob, got.rank), (0.0, 1));
        assert!(got.top.iter().all(|t| !t.1.is_nan()));
    }
}
