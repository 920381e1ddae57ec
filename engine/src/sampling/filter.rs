//! min-p, top-k and top-p without sorting the vocabulary.
//!
//! Candidates are `(id, logit)` pairs. Only as many as are kept are ever sorted: top-k selects, top-p sorts ever larger heads of the
//! candidates until they hold enough probability.

use super::SamplingParams;
use super::logprobs::better;

/// Heads that top-p sorts: first this many, then eight times as many, and so on.
const FIRST_HEAD: usize = 64;

/// Leaves in `candidates` the tokens that may be drawn, best first, and in `weights` their probabilities up to a common factor.
///
/// `logits` are already divided by the temperature. At least one candidate is left.
pub(super) fn candidates(
    params: &SamplingParams,
    logits: &[f32],
    candidates: &mut Vec<(u32, f32)>,
    weights: &mut Vec<f64>,
) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    candidates.clear();
    weights.clear();
    let all = logits.iter().enumerate().map(|(id, &x)| (id as u32, x));
    if params.min_p > 0.0 {
        // p >= min_p · p_max, in logits.
        let least = largest + params.min_p.ln();
        candidates.extend(all.filter(|candidate| candidate.1 >= least));
    } else {
        candidates.extend(all.filter(|candidate| candidate.1 > f32::NEG_INFINITY));
    }
    if candidates.is_empty() {
        // Not a number in the row holds a finite value: any choice is as good; take the one greedy would.
        candidates.push((0, 0.0));
        weights.push(1.0);
        return;
    }
    let weight = |x: f32| f64::from((x - largest).exp());
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, |a, b| better(*a, *b));
        candidates.truncate(top_k);
    }
    if params.top_p < 1.0 {
        // Summed in order of id, which selection may have disturbed.
        let total: f64 = if candidates.len() == logits.len() {
            candidates.iter().map(|c| weight(c.1)).sum()
        } else {
            candidates.sort_unstable_by_key(|c| c.0);
            candidates.iter().map(|c| weight(c.1)).sum()
        };
        let enough = total * f64::from(params.top_p);
        let mut sorted = 0;
        let mut sum = 0.0;
        let mut head = FIRST_HEAD;
        'heads: loop {
            let end = head.min(candidates.len());
            let rest = &mut candidates[sorted..];
            if end - sorted < rest.len() {
                rest.select_nth_unstable_by(end - sorted - 1, |a, b| better(*a, *b));
            }
            rest[..end - sorted].sort_unstable_by(|a, b| better(*a, *b));
            for &(_, x) in &candidates[sorted..end] {
                weights.push(weight(x));
                sum += weight(x);
                if sum >= enough {
                    break 'heads;
                }
            }
            if end == candidates.len() {
                break;
            }
            sorted = end;
            head *= 8;
        }
        candidates.truncate(weights.len());
    } else {
        candidates.sort_unstable_by(|a, b| better(*a, *b));
        weights.extend(candidates.iter().map(|c| weight(c.1)));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
            let (mut found, mut weights) = (Vec::new(), Vec::new());
            candidates(&params, &logits, &mut found, &mut weights);
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
        let (mut found, mut weights) = (Vec::new(), Vec::new());
        candidates(&params, &logits, &mut found, &mut weights);
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn a_row_without_a_finite_number_still_leaves_a_choice() {
        for x in [f32::NAN, f32::NEG_INFINITY] {
            let (mut found, mut weights) = (Vec::new(), Vec::new());
            candidates(
                &SamplingParams {
                    top_k: 2,
                    ..SamplingParams::default()
                },
                &[x; 5],
                &mut found,
                &mut weights,
            );
            assert_eq!((found.len(), weights.len()), (1, 1));
        }
    }
}
