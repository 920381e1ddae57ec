//! Top-p and min-p where thousands of tokens are about as likely: at high temperatures, or in a model that has learnt nothing.
//!
//! To draw from them best first needs no sorted list, only two places in it: where top-p ends, and where the draw falls. Either is a weight, and how
//! much is heavier than a weight is a sum that takes a pass over the vocabulary, a few microseconds. A sorted sample says where to look, for both places
//! in one pass. The tokens that a place is among are then taken out, and looked through in the same way until few are left, which are sorted.

use std::ops::Range;

use quire_kernels::cpu::rows::{self, Mass};

use super::filter::walk;
use super::logprobs::better;

/// Weights in the sample.
const SAMPLE: usize = 512;
/// Fewer of it between two cuts say less than that they are between them.
const TELLING: usize = 8;
/// Of a vocabulary, what part is taken out of it.
const PART: usize = 8;
/// Tokens that are sorted.
const FEW: usize = 64;
/// Looks that are guessed; if they did not do, weights are halved.
const GUESSES: usize = 12;

/// What a call leaves for the next to use again.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    sample: Vec<u32>,
    part: Part,
}

/// Tokens that a place is among.
#[derive(Debug, Default)]
struct Part {
    ids: Vec<u32>,
    weights: Vec<f32>,
    /// Where in `ids` those are that are left.
    left: Vec<u32>,
    /// Those, with their logits, best first.
    sorted: Vec<(u32, f32)>,
}

/// As [`super::filter::drawn`], from the best of the tokens that weigh anything, which together have `top_p` of the weight.
///
/// `total` is what [`rows::masses`] finds of all `weights`.
pub(super) fn drawn(
    logits: &[f32],
    weights: &[f32],
    total: f64,
    top_p: f32,
    draw: f64,
    scratch: &mut Scratch,
) -> u32 {
    let Scratch { sample, part } = scratch;
    sample.clear();
    let some = weights.iter().step_by(weights.len().div_ceil(SAMPLE));
    sample.extend(some.filter(|w| **w > 0.0).map(|w| w.to_bits()));
    sample.sort_unstable_by(|a, b| b.cmp(a));
    let row = Row {
        logits,
        weights,
        sample,
    };
    let nothing = Cut {
        bits: f32::INFINITY.to_bits(),
        mass: Mass::default(),
    };
    let everything = Cut {
        bits: 1,
        mass: Mass {
            sum: total,
            count: weights.len(),
        },
    };
    let enough = total * f64::from(top_p);
    // Where the draw falls is known but for the weight of the token with which top-p ends.
    let [end, at] = [enough, draw * enough].map(|goal| row.guess(&(nothing..everything), goal));
    let mut bits = [end[0], end[3], at[0], at[3]];
    bits.sort_unstable_by(|a, b| b.cmp(a));
    let [a, b, c, d] = cuts(weights, Mass::default(), &(nothing..everything), bits);
    let known = [nothing, a, b, c, d, everything];
    let around = |goal: f64| {
        let end = known.partition_point(|cut| cut.mass.sum <= goal);
        known[end - 1]..known[end]
    };

    let (mut kept, mut goal) = (total, draw * total);
    if enough < total {
        kept = row.find(around(enough), enough, part);
        let mut sum = kept;
        let last = part.sorted.iter().position(|token| {
            sum += row.weight(*token);
            sum >= enough
        });
        let those = &part.sorted[..last.map_or(part.sorted.len(), |last| last + 1)];
        let held: f64 = those.iter().map(|token| row.weight(*token)).sum();
        goal = draw * (kept + held);
        if goal >= kept {
            return row.pick(those, goal - kept);
        }
    }
    // A draw just below 1 may be rounded up.
    let goal = goal.min(kept.min(total).next_down());
    let before = row.find(around(goal), goal, part);
    row.pick(&part.sorted, goal - before)
}

/// The tokens of some weight or more.
#[derive(Debug, Clone, Copy)]
struct Cut {
    /// Of the least weight that belongs to it: positive floats are in the order of their bits.
    bits: u32,
    mass: Mass,
}

/// The cuts at four weights, heaviest first, which are moved between two others. `before` is what is heavier than all `weights`.
fn cuts(weights: &[f32], before: Mass, between: &Range<Cut>, bits: [u32; 4]) -> [Cut; 4] {
    let bits = bits.map(|bits| bits.clamp(between.end.bits + 1, between.start.bits - 1));
    let masses = rows::masses(weights, bits.map(f32::from_bits));
    [0, 1, 2, 3].map(|at| Cut {
        bits: bits[at],
        mass: Mass {
            sum: before.sum + masses[at].sum,
            count: before.count + masses[at].count,
        },
    })
}

/// The weights between two cuts.
fn range(between: &Range<Cut>) -> Range<f32> {
    f32::from_bits(between.end.bits)..f32::from_bits(between.start.bits)
}

struct Row<'a> {
    logits: &'a [f32],
    /// `e^(logit - largest)`, or 0 for what may not be drawn.
    weights: &'a [f32],
    /// Bits of some of them that are above zero, heaviest first.
    sample: &'a [u32],
}

impl Row<'_> {
    fn weight(&self, token: (u32, f32)) -> f64 {
        f64::from(self.weights[token.0 as usize])
    }

    /// The token at which the running sum of their weights exceeds `goal`.
    fn pick(&self, tokens: &[(u32, f32)], goal: f64) -> u32 {
        tokens[walk(tokens.iter().map(|token| self.weight(*token)), goal)].0
    }

    /// Lists a few tokens, or some of one weight, among which the running sum of all weights, heaviest first, exceeds `goal`; what is heavier than they
    /// are weighs at most that, and is returned. Of the cuts `around`, the first has at most `goal`, the second more.
    fn find(&self, around: Range<Cut>, goal: f64, part: &mut Part) -> f64 {
        let nothing = Mass::default();
        let most = (self.weights.len() / PART).max(FEW);
        let mut around = self.narrow(self.weights, nothing, around, goal, most);
        part.ids.clear();
        rows::within(self.weights, range(&around), usize::MAX, &mut part.ids);
        part.weights.clear();
        let weights = part.ids.iter().map(|&id| self.weights[id as usize]);
        part.weights.extend(weights);
        let before = around.start.mass;
        // Sums of a part are not rounded as those of all, and may not reach the goal: a place among the part's tokens is looked for in any case.
        let least = f32::from_bits(around.end.bits);
        let [all, ..] = rows::masses(&part.weights, [least; 4]);
        around.end.mass = Mass {
            sum: before.sum + all.sum,
            count: before.count + all.count,
        };
        let goal = goal.min(around.end.mass.sum.next_down());
        let around = self.narrow(&part.weights, before, around, goal, FEW);
        part.left.clear();
        rows::within(&part.weights, range(&around), usize::MAX, &mut part.left);
        part.sorted.clear();
        let ids = part.left.iter().map(|&at| part.ids[at as usize]);
        part.sorted
            .extend(ids.map(|id| (id, self.logits[id as usize])));
        part.sorted.sort_unstable_by(|a, b| better(*a, *b));
        around.start.mass.sum
    }

    /// Two cuts with at most `most` tokens between them, or with tokens of one weight, as [`Row::find`] wants and is given them. `weights` are those
    /// between the ones given, `before` is what is heavier.
    fn narrow(
        &self,
        weights: &[f32],
        before: Mass,
        mut around: Range<Cut>,
        goal: f64,
        most: usize,
    ) -> Range<Cut> {
        for look in 0.. {
            let Range { start, end } = around;
            if end.mass.count - start.mass.count <= most || start.bits - end.bits <= 1 {
                break;
            }
            let bits = if look < GUESSES {
                self.guess(&around, goal)
            } else {
                [end.bits + (start.bits - end.bits) / 2; 4]
            };
            for cut in cuts(weights, before, &(start..end), bits) {
                if cut.mass.sum > goal {
                    around.end = cut;
                    break;
                }
                around.start = cut;
            }
        }
        around
    }

    /// Four weights, the heaviest first: the goal is likely to be between the inner two, and hardly outside of the others.
    fn guess(&self, around: &Range<Cut>, goal: f64) -> [u32; 4] {
        let Range { start, end } = around;
        let share = (goal - start.mass.sum) / (end.mass.sum - start.mass.sum);
        let before = |bits: u32| self.sample.partition_point(|&w| w >= bits);
        let between = &self.sample[before(start.bits)..before(end.bits)];
        if between.len() < TELLING {
            // As if the weights were even.
            let width = f64::from(start.bits - end.bits);
            let count = (end.mass.count - start.mass.count) as f64;
            let near = (width * FEW as f64 / (3.0 * count)) as u32;
            let far = near.saturating_mul(4);
            let middle = start.bits - (width * share) as u32;
            return [
                middle.saturating_add(far),
                middle.saturating_add(near),
                middle.saturating_sub(near),
                middle.saturating_sub(far),
            ];
        }
        let weight = |&bits: &u32| f64::from(f32::from_bits(bits));
        let all = between.iter().map(weight).sum::<f64>();
        let mut sum = 0.0;
        let at = between.iter().position(|bits| {
            sum += weight(bits);
            sum > share * all
        });
        let last = between.len() - 1;
        let at = at.unwrap_or(last);
        // A binomial's deviation is half of the root at most.
        let far = between.len().isqrt();
        let near = far / 3;
        [
            at.saturating_sub(far),
            at.saturating_sub(near),
            (at + near).min(last),
            (at + far).min(last),
        ]
        .map(|at| between[at])
    }
}

#[cfg(test)]
mod tests {
    use super::super::filter::weigh;
    use super::*;

    /// Logits that fall evenly between 0 and `-depth`, not in order.
    fn row(n: usize, depth: f32) -> Vec<f32> {
        (0..n)
            .map(|i| -depth * ((i * 7919) % n) as f32 / n as f32)
            .collect()
    }

    fn run(logits: &[f32], least: f32, top_p: f32, draw: f64, scratch: &mut Scratch) -> u32 {
        let mut weights = Vec::new();
        let total = weigh(logits, rows::largest(logits), least, &mut weights);
        drawn(logits, &weights, total, top_p, draw, scratch)
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

    /// A few hundred tokens are lighter than all others, and none of them is in the sample: the place looked for is in a part whose sums are not rounded
    /// as those of the row.
    #[test]
    fn a_draw_next_to_the_end_falls_on_a_token() {
        let mut scratch = Scratch::default();
        let mut random = 1_u64;
        for _ in 0..100 {
            let logits: Vec<f32> = (0..6 * SAMPLE)
                .map(|id| {
                    random = random
                        .wrapping_mul(0x5851_f42d_4c95_7f2d)
                        .wrapping_add(0x1405_7b7e_f767_814f);
                    let light = id % 6 == 1 && id < 1800;
                    (random >> 40) as f32 / (1 << 24) as f32 * 0.1 - f32::from(u8::from(light))
                })
                .collect();
            for top_p in [1.0_f32.next_down(), 1.0] {
                for below in [f64::EPSILON / 2.0, 1e-12, 1e-10, 4e-10, 1e-9, 1e-8] {
                    let token = run(&logits, -13.8, top_p, 1.0 - below, &mut scratch);
                    let logit = logits[token as usize];
                    assert!(logit < 0.0, "{token} of {logit} is none of the lightest");
                }
            }
        }
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
