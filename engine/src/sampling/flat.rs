//! Top-p and min-p where thousands of tokens are about as likely: at high temperatures, or in a model that has learnt nothing.
//!
//! To draw from them best first needs no sorted list, only two places in it: where top-p ends, and where the draw falls. Either is a weight, and how
//! much is heavier than a weight is a sum that takes a pass over the vocabulary, a few microseconds. A sorted sample says where to look; when a few
//! hundred tokens are left that the place could be among, those are sorted.

use std::ops::Range;

use quire_kernels::cpu::rows::{self, Mass};

use super::Scratch;
use super::filter::walk;
use super::logprobs::better;

/// Weights in the sample.
const SAMPLE: usize = 512;
/// Fewer of it between two cuts say less than that they are between them.
const TELLING: usize = 8;
/// Tokens that are sorted.
const FEW: usize = 256;
/// Looks that are guessed; if they did not do, weights are halved.
const GUESSES: usize = 12;

/// As [`super::filter::drawn`], from the best tokens of those with logits of `least` or more that together have `top_p` of their probability.
/// `scratch.exponentials` are the tokens' weights.
pub(super) fn drawn(
    logits: &[f32],
    least: f32,
    top_p: f32,
    draw: f64,
    scratch: &mut Scratch,
) -> u32 {
    let Scratch {
        candidates,
        weights: listed,
        exponentials: weights,
        sample,
        places,
        ..
    } = scratch;
    if least > f32::NEG_INFINITY {
        for (weight, &x) in weights.iter_mut().zip(logits) {
            *weight = if x < least { 0.0 } else { *weight };
        }
    }
    sample.clear();
    let stride = weights.len().div_ceil(SAMPLE);
    sample.extend(weights.iter().step_by(stride).filter(|w| **w > 0.0));
    sample.sort_unstable_by(|a, b| b.total_cmp(a));
    let row = Row {
        logits,
        weights,
        sample,
    };
    let everything = row.cuts([1; 2])[0];
    let nothing = Cut {
        bits: f32::INFINITY.to_bits(),
        mass: Mass::default(),
    };

    let (mut kept, mut goal) = (everything, draw * everything.mass.sum);
    let enough = everything.mass.sum * f64::from(top_p);
    if enough < everything.mass.sum {
        let end = row.narrow(nothing, everything, enough);
        row.list(end.clone(), places, candidates, listed);
        // What is heavier than all that was listed, and what of that is kept.
        kept = end.start;
        let before = kept.mass.sum;
        let mut sum = before;
        let last = listed.iter().position(|weight| {
            sum += weight;
            sum >= enough
        });
        listed.truncate(last.map_or(listed.len(), |last| last + 1));
        goal = draw * (before + listed.iter().sum::<f64>());
        if goal >= before {
            return candidates[walk(listed, goal - before)].0;
        }
    }
    // (A draw just below 1 may be rounded up.)
    let goal = goal.min(kept.mass.sum.next_down());
    let around = row.narrow(nothing, kept, goal);
    row.list(around.clone(), places, candidates, listed);
    candidates[walk(listed, goal - around.start.mass.sum)].0
}

/// The tokens of some weight or more, from the heaviest.
#[derive(Debug, Clone, Copy)]
struct Cut {
    /// Of the least weight that belongs to it: positive floats are in the order of their bits.
    bits: u32,
    mass: Mass,
}

struct Row<'a> {
    logits: &'a [f32],
    /// `e^(logit - largest)`, or 0 for what may not be drawn.
    weights: &'a [f32],
    /// Some of them that are above zero, heaviest first.
    sample: &'a [f32],
}

impl Row<'_> {
    fn cuts(&self, bits: [u32; 2]) -> [Cut; 2] {
        let masses = rows::masses(self.weights, bits.map(f32::from_bits));
        [0, 1].map(|at| Cut {
            bits: bits[at],
            mass: masses[at],
        })
    }

    /// Two cuts with few tokens between them, or with tokens of one weight: the first has at most `goal`, the second more. `above` and `below` are two
    /// such cuts.
    fn narrow(&self, above: Cut, below: Cut, goal: f64) -> Range<Cut> {
        let mut around = above..below;
        for look in 0.. {
            let Range { start, end } = around;
            if end.mass.count - start.mass.count <= FEW || start.bits - end.bits <= 1 {
                break;
            }
            let guesses = if look < GUESSES {
                self.guess(&around, goal)
            } else {
                [end.bits + (start.bits - end.bits) / 2; 2]
            };
            let cuts = self.cuts(guesses.map(|bits| bits.clamp(end.bits + 1, start.bits - 1)));
            for cut in cuts {
                if cut.mass.sum > goal {
                    around.end = cut;
                    break;
                }
                around.start = cut;
            }
        }
        around
    }

    /// Two weights between which the goal is likely to be, the heavier first.
    fn guess(&self, around: &Range<Cut>, goal: f64) -> [u32; 2] {
        let Range { start, end } = around;
        let share = (goal - start.mass.sum) / (end.mass.sum - start.mass.sum);
        let before = |bits: u32| self.sample.partition_point(|w| w.to_bits() >= bits);
        let between = &self.sample[before(start.bits)..before(end.bits)];
        if between.len() < TELLING {
            // As if the weights were even.
            let width = f64::from(start.bits - end.bits);
            let count = (end.mass.count - start.mass.count) as f64;
            let margin = (width * FEW as f64 / (3.0 * count)) as u32;
            let middle = start.bits - (width * share) as u32;
            return [middle.saturating_add(margin), middle.saturating_sub(margin)];
        }
        let all = between.iter().map(|&w| f64::from(w)).sum::<f64>();
        let mut sum = 0.0;
        let at = between.iter().position(|&w| {
            sum += f64::from(w);
            sum > share * all
        });
        let at = at.unwrap_or(between.len() - 1);
        // A binomial's deviation is half of the root at most.
        let margin = between.len().isqrt();
        let below = (at + margin).min(between.len() - 1);
        [at.saturating_sub(margin), below].map(|at| between[at].to_bits())
    }

    /// The tokens between two cuts, best first, and their weights.
    fn list(
        &self,
        around: Range<Cut>,
        places: &mut Vec<u32>,
        candidates: &mut Vec<(u32, f32)>,
        weights: &mut Vec<f64>,
    ) {
        places.clear();
        let range = f32::from_bits(around.end.bits)..f32::from_bits(around.start.bits);
        rows::within(self.weights, range, usize::MAX, places);
        candidates.clear();
        candidates.extend(places.iter().map(|&id| (id, self.logits[id as usize])));
        candidates.sort_unstable_by(|a, b| better(*a, *b));
        weights.clear();
        let weight = |c: &(u32, f32)| f64::from(self.weights[c.0 as usize]);
        weights.extend(candidates.iter().map(weight));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits that fall evenly between 0 and `-depth`, not in order.
    fn row(n: usize, depth: f32) -> Vec<f32> {
        (0..n)
            .map(|i| -depth * ((i * 7919) % n) as f32 / n as f32)
            .collect()
    }

    fn run(logits: &[f32], least: f32, top_p: f32, draw: f64, scratch: &mut Scratch) -> u32 {
        scratch.exponentials.resize(logits.len(), 0.0);
        rows::exponentials(logits, rows::largest(logits), &mut scratch.exponentials);
        drawn(logits, least, top_p, draw, scratch)
    }

    /// The same from a sorted list, and how far the draw is from the token's edges, as a share of all.
    fn sorted(logits: &[f32], least: f32, top_p: f32, draw: f64) -> (u32, f64) {
        let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        all.retain(|c| c.1 >= least);
        all.sort_by(|a, b| better(*a, *b));
        let weight = |x: f32| f64::from(x).exp();
        let enough = all.iter().map(|c| weight(c.1)).sum::<f64>() * f64::from(top_p);
        let mut total = 0.0;
        all.retain(|c| {
            let keep = total < enough;
            if keep {
                total += weight(c.1);
            }
            keep
        });
        let mut sum = 0.0;
        for (id, x) in all {
            let next = sum + weight(x);
            if next > draw * total {
                let edge = (draw * total - sum).min(next - draw * total);
                return (id, edge / total);
            }
            sum = next;
        }
        unreachable!("draws are below 1")
    }

    #[test]
    fn a_draw_falls_on_the_token_that_a_sorted_list_has_there() {
        let mut compared = 0;
        for (n, depth) in [(5000, 0.0), (5000, 0.5), (20_000, 3.0), (20_000, 30.0)] {
            let logits = row(n, depth);
            for top_p in [0.1, 0.5, 0.9, 0.999, 1.0] {
                for least in [f32::NEG_INFINITY, -1.0] {
                    for step in 0..20 {
                        let draw = (f64::from(step) + 0.37) / 20.0;
                        let (expected, edge) = sorted(&logits, least, top_p, draw);
                        let mut scratch = Scratch::default();
                        let token = run(&logits, least, top_p, draw, &mut scratch);
                        // Sums of thousands of weights in f32 are not those in f64.
                        if edge > 1e-6 {
                            assert_eq!(token, expected, "{n} {depth} {top_p} {least} {draw}");
                            compared += 1;
                        }
                    }
                }
            }
        }
        assert!(compared > 600, "{compared} draws away from edges");
    }

    #[test]
    fn what_weighs_nothing_is_never_drawn() {
        let mut logits = row(6000, 1.0);
        for (at, x) in logits.iter_mut().enumerate() {
            match at % 3 {
                0 => *x = f32::NAN,
                1 => *x = f32::NEG_INFINITY,
                _ => {}
            }
        }
        let mut scratch = Scratch::default();
        for step in 0..1000 {
            let draw = f64::from(step) / 1000.0;
            for (least, top_p) in [(f32::NEG_INFINITY, 0.95), (-0.5, 1.0)] {
                let token = run(&logits, least, top_p, draw, &mut scratch);
                assert_eq!(token % 3, 2);
            }
        }
    }
}
