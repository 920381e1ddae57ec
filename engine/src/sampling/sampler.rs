//! [`Sampler`]: one sample's parameters, random stream and memory of its tokens.

use std::sync::Arc;

use quire_kernels::cpu::rows;
use quire_kernels::{Change, Draw};
use quire_scheduler::TokenId;

use super::filter::walk;
use super::logprobs::{self, TokenLogprobs};
use super::penalties::{self, Seen, forbid};
use super::{SamplingParams, filter, flat, random};

/// Temperatures below this are greedy, as in vLLM.
const GREEDY_BELOW: f32 = 1e-5;

/// Weights of a chunk of the vocabulary that are added up before they join the running sum.
const CHUNK: usize = 1024;

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: TokenId,
    /// Present if asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Working memory of a thread that samples, for one row at a time; kept, because a vocabulary's worth of it is megabytes.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The row as parameters change it.
    changed: Vec<f32>,
    pub(super) candidates: Vec<(u32, f32)>,
    pub(super) weights: Vec<f64>,
    pub(super) exponentials: Vec<f32>,
    pub(super) places: Vec<u32>,
    pub(super) flat: flat::Scratch,
}

/// Chooses one sample's tokens. Lives as long as the sample and survives preemption.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: Arc<SamplingParams>,
    seed: u64,
    index: u32,
    generated: u32,
    seen: Seen,
    /// What may not be chosen before `min_tokens`: the tokens that would end the sample.
    ends: Arc<[TokenId]>,
}

impl Sampler {
    /// `seed` is already resolved; `index` is the sample's index among `n`; `eos` the model's end ids, forbidden before `min_tokens`.
    pub fn new(
        params: Arc<SamplingParams>,
        seed: u64,
        index: u32,
        prompt: &[TokenId],
        eos: &[TokenId],
    ) -> Self {
        let ends = if params.min_tokens > 0 {
            [&params.stop_token_ids, eos].concat()
        } else {
            Vec::new()
        };
        Self {
            seen: Seen::new(&params, prompt),
            params,
            seed,
            index,
            generated: 0,
            ends: ends.into(),
        }
    }

    /// The same request's sampler for another sample index, before anything was generated.
    #[must_use]
    pub fn fork(&self, index: u32) -> Self {
        Self {
            index,
            ..self.clone()
        }
    }

    /// Chooses the next token from one row of raw logits and records it.
    ///
    /// The row stays as it is: the samples of a prompt read the same one, on several threads.
    pub fn sample(&mut self, logits: &[f32], scratch: &mut Scratch) -> Choice {
        let mut changed = std::mem::take(&mut scratch.changed);
        let token = self.choose(logits, &mut changed, scratch);
        scratch.changed = changed;
        let logprobs = self
            .params
            .logprobs
            .map(|count| logprobs::of(logits, token, count as usize, scratch));
        self.record(token);
        Choice { token, logprobs }
    }

    /// How a device chooses the next token from row `row` of a step's logits, its changes appended to `changes`; `None` for what only
    /// [`Sampler::sample`] does: log-probabilities, and rows of which more than `most` logits are changed.
    ///
    /// `pending` tokens before it were drawn and are still to be [taken](Sampler::take); only of a sampler that does not [read](Sampler::reads_tokens) them.
    pub fn draw(
        &self,
        row: u32,
        pending: u32,
        most: usize,
        changes: &mut Vec<Change>,
    ) -> Option<Draw> {
        let params = &*self.params;
        if params.logprobs.is_some() {
            return None;
        }
        let first_change = changes.len() as u32;
        let greedy = params.temperature < GREEDY_BELOW;
        let at = self.generated + pending;
        let of_kinds = penalties::changes(&self.seen, params, self.forbidden(at), most, changes)?;
        Some(Draw {
            row,
            greedy,
            inverse_temperature: if greedy {
                1.0
            } else {
                1.0 / params.temperature
            },
            top_k: params.top_k,
            top_p: params.top_p,
            within: -params.min_p.ln(),
            place: random::uniform(self.seed, self.index, at),
            first_change,
            changes: of_kinds,
        })
    }

    /// Whether the tokens so far change how the next one is chosen: they are penalised.
    pub fn reads_tokens(&self) -> bool {
        Seen::penalises(&self.params)
    }

    /// Takes the token that a device drew as [`Sampler::draw`] said.
    pub fn take(&mut self, token: TokenId) -> Choice {
        self.record(token);
        Choice {
            token,
            logprobs: None,
        }
    }

    fn record(&mut self, token: TokenId) {
        self.seen.record(&self.params, token);
        self.generated += 1;
    }

    /// What may not be chosen after so many tokens.
    fn forbidden(&self, generated: u32) -> &[TokenId] {
        if generated < self.params.min_tokens {
            &self.ends
        } else {
            &[]
        }
    }

    /// The next token; `changed` is memory for the row where parameters change it.
    fn choose(&self, raw: &[f32], changed: &mut Vec<f32>, scratch: &mut Scratch) -> TokenId {
        let params = &*self.params;
        let forbidden = self.forbidden(self.generated);
        let adjusted = Seen::changes(params) || !forbidden.is_empty();
        if adjusted {
            changed.clear();
            changed.extend_from_slice(raw);
            self.seen.apply(params, changed);
            forbid(changed, forbidden);
        }
        if params.temperature < GREEDY_BELOW {
            return greedy(if adjusted { changed } else { raw });
        }
        if params.temperature != 1.0 {
            let inverse = 1.0 / params.temperature;
            if adjusted {
                for x in changed.iter_mut() {
                    *x *= inverse;
                }
            } else {
                changed.clear();
                changed.extend(raw.iter().map(|x| x * inverse));
            }
        }
        let logits = if adjusted || params.temperature != 1.0 {
            changed
        } else {
            raw
        };
        let draw = random::uniform(self.seed, self.index, self.generated);
        drawn(params, logits, draw, scratch)
    }

    /// Tokens chosen so far.
    pub fn generated(&self) -> u32 {
        self.generated
    }
}

/// The likeliest token, ties to the smallest id; not-a-number never wins.
fn greedy(logits: &[f32]) -> TokenId {
    let largest = rows::largest(logits);
    let at = logits.iter().position(|&x| x == largest).unwrap_or(0);
    TokenId(at as u32)
}

/// A token by the inverse of the cumulative distribution, walked in a fixed order. `logits` are already divided by the temperature.
fn drawn(params: &SamplingParams, logits: &[f32], draw: f64, scratch: &mut Scratch) -> TokenId {
    let filtered = params.top_k > 0 || params.top_p < 1.0 || params.min_p > 0.0;
    if filtered {
        return TokenId(filter::drawn(params, logits, draw, scratch));
    }
    let largest = rows::largest(logits);
    if !largest.is_finite() {
        return greedy(logits);
    }
    let weights = &mut scratch.exponentials;
    weights.resize(logits.len(), 0.0);
    let total = rows::exponentials(logits, largest, weights);
    // First the chunk in which the running sum exceeds the goal, then the place in it.
    let mut left = draw * total;
    let mut at = 0;
    for chunk in weights.chunks(CHUNK) {
        let sum: f64 = chunk
            .chunks(CHUNK / 16)
            .map(|part| f64::from(part.iter().sum::<f32>()))
            .sum();
        if left < sum || at + chunk.len() == weights.len() {
            return TokenId((at + walk(chunk.iter().map(|&w| f64::from(w)), left)) as u32);
        }
        left -= sum;
        at += chunk.len();
    }
    greedy(logits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(params: SamplingParams, seed: u64) -> Sampler {
        Sampler::new(Arc::new(params), seed, 0, &[], &[TokenId(0)])
    }

    fn sample(sampler: &mut Sampler, logits: &[f32]) -> u32 {
        sampler.sample(logits, &mut Scratch::default()).token.0
    }

    #[test]
    fn greedy_takes_the_largest_and_of_equals_the_first() {
        let greedy = SamplingParams {
            temperature: 0.0,
            ..SamplingParams::default()
        };
        let mut sampler = sampler(greedy, 0);
        assert_eq!(sample(&mut sampler, &[1.0, 5.0, 5.0]), 1);
        assert_eq!(sample(&mut sampler, &[f32::NAN, -1.0, -2.0]), 1);
        assert_eq!(sample(&mut sampler, &[f32::NAN, f32::NAN]), 0);
        assert_eq!(sample(&mut sampler, &[f32::NEG_INFINITY; 3]), 0);
        assert_eq!(sample(&mut sampler, &[1.0, f32::INFINITY, 0.0]), 1);
    }

    #[test]
    fn tokens_come_as_often_as_their_probabilities_say() {
        let logits: Vec<f32> = [0.5_f32, 0.25, 0.125, 0.125]
            .iter()
            .map(|p| p.ln())
            .collect();
        for params in [
            SamplingParams::default(),
            // A filter that keeps everything takes the other path to the same distribution.
            SamplingParams {
                top_k: 4,
                ..SamplingParams::default()
            },
        ] {
            let mut sampler = sampler(params, 3);
            let mut counts = [0_u32; 4];
            for _ in 0..80_000 {
                counts[sample(&mut sampler, &logits) as usize] += 1;
            }
            let expected = [40_000.0, 20_000.0, 10_000.0, 10_000.0];
            let chi: f64 = counts
                .iter()
                .zip(expected)
                .map(|(&c, e)| (f64::from(c) - e).powi(2) / e)
                .sum();
            assert!(
                chi < 16.3,
                "chi-square with 3 degrees of freedom, p = 0.001: {chi}"
            );
        }
    }

    #[test]
    fn temperature_sharpens_and_flattens() {
        let logits = [1.0, 0.0];
        let share = |temperature| {
            let mut sampler = sampler(
                SamplingParams {
                    temperature,
                    ..SamplingParams::default()
                },
                5,
            );
            (0..20_000)
                .filter(|_| sample(&mut sampler, &logits) == 0)
                .count() as f64
                / 20_000.0
        };
        for temperature in [0.25_f32, 1.0, 4.0] {
            let expected = 1.0 / (1.0 + (-1.0 / f64::from(temperature)).exp());
            assert!((share(temperature) - expected).abs() < 0.015);
        }
    }

    #[test]
    fn the_stream_depends_on_seed_index_and_position_only() {
        let logits = vec![0.0; 1000];
        let run = |seed, index| {
            let mut sampler = sampler(SamplingParams::default(), seed).fork(index);
            (0..20)
                .map(|_| sample(&mut sampler, &logits))
                .collect::<Vec<_>>()
        };
        assert_eq!(run(1, 0), run(1, 0));
        assert_ne!(run(1, 0), run(2, 0));
        assert_ne!(run(1, 0), run(1, 1));
    }

    #[test]
    fn an_end_cannot_be_chosen_before_min_tokens() {
        let mut sampler = sampler(
            SamplingParams {
                temperature: 0.0,
                min_tokens: 2,
                stop_token_ids: vec![TokenId(1)],
                ..SamplingParams::default()
            },
            0,
        );
        let logits = [9.0, 8.0, 7.0];
        let chosen: Vec<u32> = (0..3).map(|_| sample(&mut sampler, &logits)).collect();
        assert_eq!(chosen, [2, 2, 0]);
    }

    #[test]
    fn logprobs_are_of_the_raw_row() {
        let mut sampler = sampler(
            SamplingParams {
                temperature: 0.1,
                logit_bias: vec![(TokenId(1), 100.0)],
                logprobs: Some(1),
                ..SamplingParams::default()
            },
            0,
        );
        let choice = sampler.sample(&[0.0, 0.0, 0.0, 0.0], &mut Scratch::default());
        assert_eq!(choice.token, TokenId(1));
        let logprobs = choice.logprobs.expect("asked for");
        assert!((logprobs.logprob - 0.25_f32.ln()).abs() < 1e-6);
        assert_eq!((logprobs.rank, logprobs.top[0].0), (2, TokenId(0)));
    }

    #[test]
    fn a_forbidden_token_is_never_drawn() {
        let mut sampler = sampler(SamplingParams::default(), 9);
        let logits = [f32::NEG_INFINITY, 0.0, f32::NAN];
        assert!((0..1000).all(|_| sample(&mut sampler, &logits) == 1));
    }
}
