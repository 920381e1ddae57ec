//! A mixture of experts: which experts a row uses, and the products with their parts of the packed matrices.
//!
//! Rows are sorted by expert, so that every expert's weights are read once a step; what a row gets is the sum of its experts' answers in the
//! order in which the router scored them, whatever else is in the step.

use super::elementwise::{add_row, gate_row};
use super::linear::{Linear, OfPart, Output, PartProducts, Rows, Tasks};
use super::matrix::{Matrix, PANEL};
use super::memory::{Buffer, Shared};
use super::pool::Pool;
use super::simd::{Isa, dispatch};
use crate::{Activation, Error};

/// The experts of a layer, as [`crate::Experts`], taken apart.
pub(crate) struct Mixture<'a> {
    pub router: &'a Matrix,
    pub router_bias: Option<&'a [f32]>,
    pub gate_up: &'a Matrix,
    pub gate_up_bias: Option<&'a [f32]>,
    pub down: &'a Matrix,
    pub down_bias: Option<&'a [f32]>,
    pub experts: usize,
    pub top_k: usize,
    pub normalised: bool,
    pub activation: Activation,
}

/// Working memory, kept from step to step.
pub(crate) struct Scratch {
    /// `[rows, experts]`
    scores: Buffer<f32>,
    /// `[rows, top_k]`: an expert, and what its answer is multiplied with.
    chosen: Vec<(usize, f32)>,
    /// Where each of them is among the rows sorted by expert. `[rows, top_k]`
    places: Vec<usize>,
    /// The row of each place.
    sorted: Vec<usize>,
    groups: Vec<OfPart>,
    /// `[places, hidden]`
    x: Buffer<f32>,
    /// `[places, 2n]`
    gate_up: Buffer<f32>,
    /// `[places, n]`
    gated: Buffer<f32>,
    /// `[places, hidden]`
    answers: Buffer<f32>,
    tasks: Tasks,
}

impl Scratch {
    pub fn new() -> Result<Self, Error> {
        let empty = || Buffer::zeroed(0, "expert activations");
        Ok(Self {
            scores: empty()?,
            chosen: Vec::new(),
            places: Vec::new(),
            sorted: Vec::new(),
            groups: Vec::new(),
            x: empty()?,
            gate_up: empty()?,
            gated: empty()?,
            answers: empty()?,
            tasks: Tasks::default(),
        })
    }
}

impl Mixture<'_> {
    /// Refuses parts that do not fit each other; returns the experts' width.
    pub fn check(&self, hidden: usize) -> Result<usize, Error> {
        let wrong = |what: String| Err(Error::Shape(what));
        let Self { experts, top_k, .. } = *self;
        if experts == 0 || top_k == 0 || top_k > experts {
            return wrong(format!("{top_k} of {experts} experts"));
        }
        if self.router.rows != experts || self.router.cols != hidden {
            return wrong(format!(
                "a router {:?} for {experts} experts of rows of {hidden}",
                self.router
            ));
        }
        let n = self.down.cols;
        let fits = self.gate_up.rows == experts * 2 * n
            && self.gate_up.cols == hidden
            && self.down.rows == experts * hidden;
        if !fits {
            return wrong(format!(
                "{experts} experts of {:?} and {:?} for rows of {hidden}",
                self.gate_up, self.down
            ));
        }
        if !(2 * n).is_multiple_of(PANEL) || !hidden.is_multiple_of(PANEL) {
            return wrong(format!(
                "experts {n} wide on rows of {hidden}, expected multiples of 8 and {PANEL}"
            ));
        }
        for (matrix, features) in [(self.gate_up, 2 * n), (self.down, hidden)] {
            if matrix.parts_share_a_panel(features) {
                return wrong(format!(
                    "experts of {features} rows in {matrix:?} share a panel of {PANEL}"
                ));
            }
        }
        let biases = [
            (self.router_bias, experts),
            (self.gate_up_bias, experts * 2 * n),
            (self.down_bias, experts * hidden),
        ];
        for (bias, len) in biases {
            if let Some(bias) = bias
                && bias.len() != len
            {
                return wrong(format!("an expert bias of {}, expected {len}", bias.len()));
            }
        }
        Ok(n)
    }

    /// `out[r] += Σ weight · expert(x[r])`. `x`, `out` [rows, hidden]; `n` is what [`Mixture::check`] returned.
    #[expect(
        clippy::too_many_arguments,
        reason = "buffers and machinery of the backend"
    )]
    pub fn run(
        &self,
        x: &[f32],
        rows: usize,
        n: usize,
        out: &mut [f32],
        scratch: &mut Scratch,
        laid_out: &mut Rows,
        pool: &Pool,
        isa: Isa,
    ) -> Result<(), Error> {
        let hidden = self.router.cols;
        let what = "expert activations";
        let s = scratch;
        s.scores.reserve(rows * self.experts, what)?;
        let router = Linear::new(self.router, x, rows, self.router_bias, Output::Set);
        router.run(s.scores.as_mut_slice(), laid_out, pool, isa)?;
        self.choose(rows, s, pool);

        let places = rows * self.top_k;
        s.x.reserve(places * hidden, what)?;
        s.gate_up.reserve(places * 2 * n, what)?;
        s.gated.reserve(places * n, what)?;
        s.answers.reserve(places * hidden, what)?;
        let sorted = &s.sorted;
        let gathered = Shared::new(s.x.as_mut_slice());
        pool.each(places, &|place| {
            // SAFETY: each place is written by one task.
            let to = unsafe { gathered.range(place * hidden, hidden) };
            to.copy_from_slice(&x[sorted[place] * hidden..][..hidden]);
        });
        let products = PartProducts {
            matrix: self.gate_up,
            features: 2 * n,
            x: s.x.as_slice(),
            groups: &s.groups,
            bias: self.gate_up_bias,
        };
        products.run(s.gate_up.as_mut_slice(), laid_out, &mut s.tasks, pool, isa)?;
        let gate_up = s.gate_up.as_slice();
        let gated = Shared::new(s.gated.as_mut_slice());
        let activation = self.activation;
        pool.each(places, &|place| {
            let (gate, up) = gate_up[place * 2 * n..(place + 1) * 2 * n].split_at(n);
            // SAFETY: each place is written by one task.
            let out = unsafe { gated.range(place * n, n) };
            dispatch!(isa, gate_row(activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]));
        });
        let products = PartProducts {
            matrix: self.down,
            features: hidden,
            x: s.gated.as_slice(),
            groups: &s.groups,
            bias: self.down_bias,
        };
        products.run(s.answers.as_mut_slice(), laid_out, &mut s.tasks, pool, isa)?;

        let answers = s.answers.as_slice();
        let (chosen, places) = (&s.chosen, &s.places);
        let out = Shared::new(out);
        let top_k = self.top_k;
        pool.each(rows, &|row| {
            for choice in row * top_k..(row + 1) * top_k {
                let x = &answers[places[choice] * hidden..][..hidden];
                let scale = chosen[choice].1;
                // SAFETY: each row is written by one task.
                let out = unsafe { out.range(row * hidden, hidden) };
                let none: Option<(&[f32], f32)> = None;
                dispatch!(isa, add_row(x: &[f32], none: Option<(&[f32], f32)>, scale: f32, out: &mut [f32]));
            }
        });
        Ok(())
    }

    /// Picks each row's experts and sorts the rows by expert.
    fn choose(&self, rows: usize, s: &mut Scratch, pool: &Pool) {
        let Self { experts, top_k, .. } = *self;
        s.chosen.clear();
        s.chosen.resize(rows * top_k, (0, 0.0));
        let chosen = Shared::new(&mut s.chosen);
        let scores = s.scores.as_slice();
        pool.each(rows, &|row| {
            let scores = &scores[row * experts..][..experts];
            // SAFETY: each row is written by one task.
            let chosen = unsafe { chosen.range(row * top_k, top_k) };
            best(scores, chosen);
            weigh(chosen, scores, self.normalised);
        });
        // Counting sort: stable, so a group's rows are in order.
        s.groups.clear();
        s.groups.extend((0..experts).map(|part| OfPart {
            part,
            first: 0,
            rows: 0,
        }));
        for choice in &s.chosen {
            s.groups[choice.0].rows += 1;
        }
        let mut first = 0;
        for group in &mut s.groups {
            group.first = first;
            first += std::mem::take(&mut group.rows);
        }
        s.sorted.clear();
        s.sorted.resize(s.chosen.len(), 0);
        s.places.clear();
        for (index, choice) in s.chosen.iter().enumerate() {
            let group = &mut s.groups[choice.0];
            let place = group.first + group.rows;
            group.rows += 1;
            s.places.push(place);
            s.sorted[place] = index / top_k;
        }
        s.groups.retain(|group| group.rows > 0);
    }
}

/// The highest scores and whose they are, as many as there is room for: best first, and of equal ones the first; what is not a number comes last.
fn best(scores: &[f32], chosen: &mut [(usize, f32)]) {
    let mut count = 0;
    for choice in scores.iter().copied().enumerate() {
        let behind = |other: &(usize, f32)| other.1 >= choice.1 || choice.1.is_nan();
        if count == chosen.len() {
            if behind(&chosen[count - 1]) {
                continue;
            }
            count -= 1;
        }
        let at = chosen[..count].partition_point(behind);
        chosen.copy_within(at..count, at + 1);
        chosen[at] = choice;
        count += 1;
    }
}

/// Turns the scores of a row's chosen experts, best first, into what their answers are multiplied with.
fn weigh(chosen: &mut [(usize, f32)], scores: &[f32], normalised: bool) {
    let most = chosen.first().map_or(0.0, |choice| choice.1);
    // Of all scores in f64, so that their number and order make no difference worth a bit of f32.
    let total: f64 = if normalised {
        chosen.iter().map(|c| f64::from(c.1 - most).exp()).sum()
    } else {
        scores.iter().map(|&s| f64::from(s - most).exp()).sum()
    };
    for choice in chosen {
        choice.1 = (f64::from(choice.1 - most).exp() / total) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_come_first_and_of_equal_ones_the_first() {
        let mut random = 1_u64;
        for experts in 1..40 {
            let scores: Vec<f32> = (0..experts)
                .map(|_| {
                    random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    // Few different ones, and some that are no numbers.
                    match random >> 60 {
                        0 | 1 => f32::NAN,
                        score => score as f32,
                    }
                })
                .collect();
            let mut sorted: Vec<usize> = (0..experts).collect();
            let worth = |&expert: &usize| {
                let score = scores[expert];
                if score.is_nan() {
                    f32::NEG_INFINITY
                } else {
                    score
                }
            };
            sorted.sort_by(|a, b| worth(b).total_cmp(&worth(a)));
            for top_k in 1..=experts {
                let mut chosen = vec![(usize::MAX, 0.0); top_k];
                best(&scores, &mut chosen);
                let chosen: Vec<usize> = chosen.iter().map(|choice| choice.0).collect();
                assert_eq!(chosen, sorted[..top_k], "{scores:?}");
            }
        }
    }
}
