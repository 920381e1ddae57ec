//! min-p, top-k and top-p without sorting the vocabulary.
//!
//! Candidates are `(id, logit)` pairs. Tokens that cannot be among those kept are passed over sixteen at a time, and only as many as are kept are
//! ever sorted: top-k keeps the best it has seen, top-p sorts ever larger heads of the likely tokens until they hold enough probability. Where
//! those would be thousands, none is sorted: see `flat`.

use quire_kernels::cpu::rows;

use super::logprobs::better;
use super::{SamplingParams, Scratch, flat};

/// Heads that top-p sorts: first this many, then eight times as many, and so on.
const FIRST_HEAD: usize = 64;
/// Candidates that take longer to sort than a few passes over the vocabulary.
const MANY: usize = 1024;
/// How far below the largest logit top-p looks for its tokens, first to last: e^-4 is a fiftieth as likely.
const DEPTHS: [f32; 4] = [4.0, 8.0, 16.0, f32::INFINITY];
/// Tokens that are passed over at once.
const RUN: usize = 16;

/// The token that `draw`, uniform in 0..1, falls on, if those that may be drawn stand in a row from the best to the least, each as wide as it is
/// likely.
///
/// `logits` are already divided by the temperature.
pub(super) fn drawn(
    params: &SamplingParams,
    logits: &[f32],
    draw: f64,
    scratch: &mut Scratch,
) -> u32 {
    match candidates(params, logits, scratch) {
        Kept::Few => {
            let at = pick(&scratch.weights, draw);
            scratch.candidates[at].0
        }
        Kept::Many { total } => {
            let Scratch {
                exponentials, flat, ..
            } = scratch;
            flat::drawn(logits, exponentials, total, params.top_p, draw, flat)
        }
    }
}

/// What may be drawn.
#[derive(Debug, PartialEq)]
enum Kept {
    /// `scratch.candidates`, best first; `scratch.weights` are their probabilities up to a common factor. One at least.
    Few,
    /// As many of the best tokens as top-p says among those that weigh anything: `scratch.exponentials`, together `total`.
    Many { total: f64 },
}

fn candidates(params: &SamplingParams, logits: &[f32], scratch: &mut Scratch) -> Kept {
    let largest = rows::largest(logits);
    let Scratch {
        candidates,
        weights,
        exponentials,
        places,
        ..
    } = scratch;
    candidates.clear();
    weights.clear();
    if !largest.is_finite() {
        // Nothing to weigh: any choice is as good; take the one greedy would.
        let at = logits.iter().position(|&x| x == largest).unwrap_or(0);
        candidates.push((at as u32, 0.0));
        weights.push(1.0);
        return Kept::Few;
    }
    // p >= min_p · p_max, in logits.
    let least = if params.min_p > 0.0 {
        largest + params.min_p.ln()
    } else {
        f32::NEG_INFINITY
    };
    let top_k = params.top_k as usize;
    if top_k > 0 {
        best(logits, top_k, least, candidates);
    } else if params.min_p > 0.0 && !collect(logits, least, places, candidates) {
        let total = weigh(logits, largest, least, exponentials);
        return Kept::Many { total };
    }
    let limited = top_k > 0 || params.min_p > 0.0;
    let weight = |x: f32| f64::from((x - largest).exp());
    if params.top_p >= 1.0 {
        candidates.sort_unstable_by(|a, b| better(*a, *b));
        weights.extend(candidates.iter().map(|c| weight(c.1)));
    } else if limited {
        let total: f64 = candidates.iter().map(|c| weight(c.1)).sum();
        let enough = total * f64::from(params.top_p);
        head(candidates, weights, weight, enough);
    } else {
        let total = weigh(logits, largest, least, exponentials);
        let enough = total * f64::from(params.top_p);
        // None weighs more than 1.
        if enough > MANY as f64 {
            return Kept::Many { total };
        }
        for depth in DEPTHS {
            weights.clear();
            if !collect(logits, largest - depth, places, candidates) {
                return Kept::Many { total };
            }
            // Not worth sorting, if they are not enough. (A little less may be: these are sums of other roundings.)
            let held = |c: &(u32, f32)| f64::from(exponentials[c.0 as usize]);
            let held: f64 = candidates.iter().map(held).sum();
            if depth < f32::INFINITY && held < enough * 0.999 {
                continue;
            }
            if head(candidates, weights, weight, enough) {
                break;
            }
        }
    }
    Kept::Few
}

/// `e^(logit - largest)` of the logits of `least` or more, 0 for others; and their sum.
pub(super) fn weigh(logits: &[f32], largest: f32, least: f32, weights: &mut Vec<f32>) -> f64 {
    weights.resize(logits.len(), 0.0);
    let total = rows::exponentials(logits, largest, weights);
    if least == f32::NEG_INFINITY {
        return total;
    }
    for (weight, &x) in weights.iter_mut().zip(logits) {
        *weight = if x < least { 0.0 } else { *weight };
    }
    rows::masses(weights, [0.0; 4])[0].sum
}

/// The largest of a run; one that is not a number counts as nothing.
fn most(run: &[f32]) -> f32 {
    run.iter().fold(
        f32::NEG_INFINITY,
        |most, &x| if x > most { x } else { most },
    )
}

/// The tokens whose logits, all less than infinity, are at least `least`, in order of their ids; false, and not all of them, if they are more than
/// [`MANY`].
fn collect(logits: &[f32], least: f32, places: &mut Vec<u32>, out: &mut Vec<(u32, f32)>) -> bool {
    places.clear();
    let all = rows::within(logits, least.max(f32::MIN)..f32::INFINITY, MANY, places);
    out.clear();
    out.extend(places.iter().map(|&id| (id, logits[id as usize])));
    all
}

/// The `count` best tokens whose logits are at least `least`.
pub(super) fn best(logits: &[f32], count: usize, least: f32, out: &mut Vec<(u32, f32)>) {
    let room = count.saturating_mul(2).max(RUN * 4);
    // What a token must exceed; tokens come in order of their ids, so of equals the earlier is better.
    let mut bar = f32::NEG_INFINITY;
    for (run, logits) in logits.chunks(RUN).enumerate() {
        if most(logits) <= bar {
            continue;
        }
        let ids = (run * RUN) as u32..;
        let all = ids.zip(logits.iter().copied());
        out.extend(all.filter(|c| c.1 > bar && c.1 >= least));
        if out.len() >= room && out.len() > count {
            out.select_nth_unstable_by(count - 1, |a, b| better(*a, *b));
            out.truncate(count);
            bar = out[count - 1].1;
        }
    }
    if out.len() > count {
        out.select_nth_unstable_by(count - 1, |a, b| better(*a, *b));
        out.truncate(count);
    }
    out.sort_unstable_by(|a, b| better(*a, *b));
}

/// Cuts the candidates to the smallest set of the best whose weights add up to `enough`, best first; false if all of them do not (they are then
/// sorted and weighed).
fn head(
    candidates: &mut Vec<(u32, f32)>,
    weights: &mut Vec<f64>,
    weight: impl Fn(f32) -> f64,
    enough: f64,
) -> bool {
    let mut sum = 0.0;
    let mut sorted = 0;
    let mut size = FIRST_HEAD;
    while sorted < candidates.len() {
        let end = size.min(candidates.len());
        let rest = &mut candidates[sorted..];
        if end - sorted < rest.len() {
            rest.select_nth_unstable_by(end - sorted - 1, |a, b| better(*a, *b));
        }
        rest[..end - sorted].sort_unstable_by(|a, b| better(*a, *b));
        for &(_, x) in &candidates[sorted..end] {
            weights.push(weight(x));
            sum += weight(x);
            if sum >= enough {
                candidates.truncate(weights.len());
                return true;
            }
        }
        sorted = end;
        size *= 8;
    }
    false
}

/// The first place where the running sum of `weights` exceeds `goal`, or else the last that weighs anything.
pub(super) fn walk(weights: impl IntoIterator<Item = f64>, goal: f64) -> usize {
    let mut sum = 0.0;
    let mut last = 0;
    for (at, weight) in weights.into_iter().enumerate() {
        sum += weight;
        if weight > 0.0 {
            last = at;
            if sum > goal {
                return at;
            }
        }
    }
    last
}

/// The first place where the running sum of `weights` exceeds `draw` of their total.
fn pick(weights: &[f64], draw: f64) -> usize {
    walk(weights.iter().copied(), draw * weights.iter().sum::<f64>())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(params: &SamplingParams, logits: &[f32]) -> (Vec<(u32, f32)>, Vec<f64>) {
        let mut scratch = Scratch::default();
        assert_eq!(candidates(params, logits, &mut scratch), Kept::Few);
        (scratch.candidates, scratch.weights)
    }

    /// The same by sorting everything.
    fn naive(params: &SamplingParams, logits: &[f32]) -> Vec<u32> {
        let mut all: Vec<(u32, f32)> = logits
            .iter()
            .enumerate()
            .map(|(i, &x)| (i as u32, x))
            .collect();
        all.sort_by(|a, b| better(*a, *b));
        let largest = all[0].1;
        all.retain(|c| params.min_p == 0.0 || c.1 >= largest + params.min_p.ln());
        if params.top_k > 0 {
            all.truncate(params.top_k as usize);
        }
        let total: f64 = all.iter().map(|c| f64::from((c.1 - largest).exp())).sum();
        let mut sum = 0.0;
        let mut kept = Vec::new();
        for (id, x) in all {
            kept.push(id);
            sum += f64::from((x - largest).exp());
            if params.top_p < 1.0 && sum >= total * f64::from(params.top_p) {
                break;
            }
        }
        kept
    }

    proptest! {
        #[test]
        fn the_candidates_are_those_a_full_sort_gives(
            logits in prop::collection::vec(-8.0_f32..8.0, 1..900),
            top_k in 0_u32..300,
            top_p in 0.01_f32..1.2,
            min_p in 0.0_f32..0.3,
        ) {
            // Probabilities summed in another order may differ in the last bit: keep away from exact ties with the threshold.
            let params = SamplingParams {
                top_k,
                top_p: if top_p > 1.0 { 1.0 } else { top_p },
                min_p: if min_p < 0.1 { 0.0 } else { min_p },
                ..SamplingParams::default()
            };
            // Without any filter nobody asks for candidates: see `sampler::drawn`.
            prop_assume!(top_k > 0 || params.top_p < 1.0 || params.min_p > 0.0);
            let (found, weights) = run(&params, &logits);
            let ids: Vec<u32> = found.iter().map(|c| c.0).collect();
            let expected = naive(&params, &logits);
            prop_assert!(ids.len().abs_diff(expected.len()) <= 1);
            let common = ids.len().min(expected.len());
            prop_assert_eq!(&ids[..common], &expected[..common]);
            prop_assert_eq!(ids.len(), weights.len());
        }
    }

    #[test]
    fn top_p_keeps_the_token_that_crosses_the_threshold() {
        let params = SamplingParams {
            top_p: 0.6,
            ..SamplingParams::default()
        };
        let logits: Vec<f32> = [0.5_f32, 0.3, 0.2].iter().map(|p| p.ln()).collect();
        let (found, _) = run(&params, &logits);
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn a_row_without_a_finite_number_still_leaves_a_choice() {
        for x in [f32::NAN, f32::NEG_INFINITY] {
            let params = SamplingParams {
                top_k: 2,
                ..SamplingParams::default()
            };
            let (found, weights) = run(&params, &[x; 5]);
            assert_eq!((found.len(), weights.len()), (1, 1));
        }
    }
}
