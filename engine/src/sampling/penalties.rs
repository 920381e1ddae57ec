//! Changes to the logits that depend on the tokens so far: bias, repetition, presence and frequency penalties, forbidden ends.

use std::collections::HashMap;
use std::sync::Arc;

use quire_kernels::{Change, ChangeKind};
use quire_scheduler::TokenId;

use super::SamplingParams;

/// The tokens a sample has seen, as far as its parameters need them.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// Distinct tokens of the prompt; empty unless repetition is penalised.
    prompt: Arc<[TokenId]>,
    /// How often each token was generated; empty unless something is penalised.
    generated: HashMap<TokenId, u32>,
}

impl Seen {
    pub fn new(params: &SamplingParams, prompt: &[TokenId]) -> Self {
        let mut distinct = Vec::new();
        if params.repetition_penalty != 1.0 {
            distinct.extend_from_slice(prompt);
            distinct.sort_unstable();
            distinct.dedup();
        }
        Self {
            prompt: distinct.into(),
            generated: HashMap::new(),
        }
    }

    /// Whether [`Seen::apply`] changes rows under these parameters.
    pub fn changes(params: &SamplingParams) -> bool {
        Self::penalises(params) || !params.logit_bias.is_empty()
    }

    /// Whether the tokens so far change rows.
    pub fn penalises(params: &SamplingParams) -> bool {
        params.repetition_penalty != 1.0
            || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0
    }

    pub fn record(&mut self, params: &SamplingParams, token: TokenId) {
        if Self::penalises(params) {
            *self.generated.entry(token).or_insert(0) += 1;
        }
    }

    /// Applies bias and penalties to a row. Each token's logit is changed by itself, so the map's order has no influence.
    pub fn apply(&self, params: &SamplingParams, logits: &mut [f32]) {
        let repetition = params.repetition_penalty;
        if repetition != 1.0 {
            let mut penalise = |token: TokenId| {
                if let Some(logit) = logits.get_mut(token.0 as usize) {
                    *logit = if *logit > 0.0 {
                        *logit / repetition
                    } else {
                        *logit * repetition
                    };
                }
            };
            self.prompt.iter().copied().for_each(&mut penalise);
            self.generated
                .keys()
                .copied()
                .filter(|token| self.prompt.binary_search(token).is_err())
                .for_each(&mut penalise);
        }
        if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
            for (token, &count) in &self.generated {
                if let Some(logit) = logits.get_mut(token.0 as usize) {
                    *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
                }
            }
        }
        for &(token, bias) in &params.logit_bias {
            if let Some(logit) = logits.get_mut(token.0 as usize) {
                *logit += bias;
            }
        }
    }
}

/// What [`Seen::apply`] and [`forbid`] do to a row, for a device that does it: appended to `changes`, and how many there are of each kind. `None`, and
/// nothing appended, if they are more than `most`, or one token has two changes of one kind.
pub(super) fn changes(
    seen: &Seen,
    params: &SamplingParams,
    forbidden: &[TokenId],
    most: usize,
    changes: &mut Vec<Change>,
) -> Option<[u32; ChangeKind::COUNT]> {
    let first = changes.len();
    let repeated = if params.repetition_penalty == 1.0 {
        0
    } else {
        seen.prompt.len() + seen.generated.len()
    };
    // As many as there may be: what is seen twice is counted twice.
    let all = repeated + seen.generated.len() + params.logit_bias.len() + forbidden.len();
    let unique = |mut tokens: Vec<TokenId>| {
        tokens.sort_unstable();
        tokens.windows(2).all(|two| two[0] != two[1])
    };
    if all > most || !unique(params.logit_bias.iter().map(|bias| bias.0).collect()) {
        return None;
    }
    let mut counts = [0; ChangeKind::COUNT];
    let mut begin = first;
    let mut end_of = |kind: ChangeKind, changes: &Vec<Change>| {
        counts[kind as usize] = (changes.len() - begin) as u32;
        begin = changes.len();
    };
    let change = |token: TokenId, amount| Change {
        token: token.0,
        amount,
    };
    if repeated > 0 {
        let amount = params.repetition_penalty;
        changes.extend(seen.prompt.iter().map(|&token| change(token, amount)));
        let generated = seen.generated.keys().copied();
        let new = generated.filter(|token| seen.prompt.binary_search(token).is_err());
        changes.extend(new.map(|token| change(token, amount)));
    }
    end_of(ChangeKind::Repeated, changes);
    if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        changes.extend(seen.generated.iter().map(|(&token, &count)| {
            change(
                token,
                params.frequency_penalty * count as f32 + params.presence_penalty,
            )
        }));
    }
    end_of(ChangeKind::Lowered, changes);
    changes.extend(
        params
            .logit_bias
            .iter()
            .map(|&(token, bias)| change(token, bias)),
    );
    end_of(ChangeKind::Biased, changes);
    // Forbidding a token twice forbids it.
    changes.extend(forbidden.iter().map(|&token| change(token, 0.0)));
    end_of(ChangeKind::Forbidden, changes);
    Some(counts)
}

/// Makes tokens impossible.
pub(super) fn forbid(logits: &mut [f32], tokens: &[TokenId]) {
    for token in tokens {
        if let Some(logit) = logits.get_mut(token.0 as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn penalties_follow_their_formulas() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            logit_bias: vec![(TokenId(4), -3.0), (TokenId(99), 1.0)],
            ..SamplingParams::default()
        };
        let mut seen = Seen::new(&params, &[TokenId(0), TokenId(1), TokenId(0)]);
        seen.record(&params, TokenId(1));
        seen.record(&params, TokenId(2));
        seen.record(&params, TokenId(2));
        let mut logits = [4.0, -4.0, 8.0, 1.0, 1.0];
        seen.apply(&params, &mut logits);
        assert_eq!(logits, [2.0, -8.75, 3.0, 1.0, -2.0]);
    }

    #[test]
    fn nothing_is_counted_when_nothing_is_penalised() {
        let params = SamplingParams::default();
        let mut seen = Seen::new(&params, &[TokenId(1)]);
        seen.record(&params, TokenId(1));
        assert!(seen.prompt.is_empty() && seen.generated.is_empty());
    }
}
