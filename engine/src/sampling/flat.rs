//! Top-p and min-p where thousands of tokens are about as likely: at high temperatures, or in a model that has learnt nothing.
//!
//! To draw from them best first needs no sorted list, only the place where the draw falls. Tokens are put into bins by their logits — counted, not
//! moved — and bins are in order by themselves: the one in which top-p ends and the one in which the draw falls are the two that are sorted.

use quire_kernels::cpu::rows;

use super::Scratch;
use super::filter::walk;
use super::logprobs::better;

/// Bins of a unit of logits. A flat row of 152 k tokens puts a few hundred into one.
const PER_UNIT: f32 = 128.0;
/// The last of them is for all that are 16 or more below the best, which is a ten-millionth as likely.
const BINS: usize = 2048 + 1;
/// One more, for what may not be drawn.
const OUT: f32 = BINS as f32;
/// Tokens whose bins are found together, in vectors.
const RUN: usize = 16;
/// A float with this added to it is an integer in its low bits.
const TWO_TO_23: f32 = 8_388_608.0;

/// As [`super::filter::drawn`], from the best tokens of those with logits of `least` or more that together have `top_p` of their probability.
pub(super) fn drawn(
    logits: &[f32],
    largest: f32,
    least: f32,
    top_p: f32,
    draw: f64,
    scratch: &mut Scratch,
) -> u32 {
    let Scratch {
        candidates,
        weights: listed,
        exponentials: weights,
        places,
        bins,
        ..
    } = scratch;
    weights.resize(logits.len(), 0.0);
    rows::exponentials(logits, largest, weights);
    places.clear();
    places.reserve(logits.len());
    bins.clear();
    bins.resize(BINS + 1, 0.0);
    for (logits, weights) in logits.chunks(RUN).zip(weights.chunks(RUN)) {
        let mut run = [0; RUN];
        for (place, &x) in run.iter_mut().zip(logits) {
            *place = place_of(x, largest, least);
        }
        for (&place, &weight) in run.iter().zip(weights) {
            bins[usize::from(place)] += f64::from(weight);
        }
        places.extend_from_slice(&run[..logits.len()]);
    }
    bins.truncate(BINS);
    let row = Row {
        logits,
        weights,
        places,
    };
    let enough = bins.iter().sum::<f64>() * f64::from(top_p);
    // The bin in which the sum reaches what is enough, and how much of it is kept.
    let (end, before) = reach(bins, enough);
    row.list(end, candidates, listed);
    let last = kept(listed, enough - before);
    let total = before + listed[..last].iter().sum::<f64>();

    let goal = draw * total;
    let (at, below) = reach(&bins[..=end], goal);
    if at == end {
        listed.truncate(last);
    } else {
        row.list(at, candidates, listed);
    }
    candidates[walk(listed, goal - below)].0
}

/// How many of the first it takes for a sum of `enough`: all of them, if they do not have it.
fn kept(weights: &[f64], enough: f64) -> usize {
    let mut sum = 0.0;
    for (at, weight) in weights.iter().enumerate() {
        sum += weight;
        if sum >= enough {
            return at + 1;
        }
    }
    weights.len()
}

/// The first bin with which the running sum exceeds `goal`, or else the last that holds anything; and the sum of those before it.
fn reach(bins: &[f64], goal: f64) -> (usize, f64) {
    let (mut sum, mut found) = (0.0, (0, 0.0));
    for (at, &bin) in bins.iter().enumerate() {
        if bin > 0.0 {
            found = (at, sum);
            sum += bin;
            if sum > goal {
                break;
            }
        }
    }
    found
}

/// The bin of a logit. A better token is never in a later bin; what is less than `least` is in none of them.
fn place_of(x: f32, largest: f32, least: f32) -> u16 {
    let steps = (largest - x) * PER_UNIT;
    let last = OUT - 1.0;
    // No `min`: not-a-number, which weighs nothing, is to end in the last bin.
    let steps = if steps < last { steps } else { last };
    let steps = if x < least { OUT } else { steps };
    // Rounds to an integer, in the low bits; conversions that saturate are not made in vectors.
    (steps + TWO_TO_23).to_bits() as u16
}

struct Row<'a> {
    logits: &'a [f32],
    /// `e^(logit - largest)`
    weights: &'a [f32],
    /// The bin of each.
    places: &'a [u16],
}

impl Row<'_> {
    /// The tokens of a bin, best first, and their weights.
    fn list(&self, bin: usize, candidates: &mut Vec<(u32, f32)>, weights: &mut Vec<f64>) {
        candidates.clear();
        let bin = bin as u16;
        for (run, places) in self.places.chunks(RUN).enumerate() {
            if places.contains(&bin) {
                let ids = run * RUN..run * RUN + places.len();
                let there = ids.filter(|&id| self.places[id] == bin && self.weights[id] > 0.0);
                candidates.extend(there.map(|id| (id as u32, self.logits[id])));
            }
        }
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
                        let token = drawn(&logits, 0.0, least, top_p, draw, &mut scratch);
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
        let largest = rows::largest(&logits);
        for step in 0..1000 {
            let draw = f64::from(step) / 1000.0;
            for (least, top_p) in [(f32::NEG_INFINITY, 0.95), (-0.5, 1.0)] {
                let token = drawn(&logits, largest, least, top_p, draw, &mut scratch);
                assert_eq!(token % 3, 2);
            }
        }
    }
}
