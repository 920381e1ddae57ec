//! [`Summary`]: what a checkpoint is, for people and for scripts.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Checkpoint;

/// What a checkpoint is and how it is stored.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Its name.
    pub name: String,
    /// The family, for example `qwen3`.
    pub family: String,
    /// Weights, those of an output head that is the embedding table counted once.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bits of a weight, on average.
    pub bits_per_weight: f64,
    /// The tensors by what they are for, each kind once.
    pub tensors: Vec<KindSummary>,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Longest context it was made for, in tokens.
    pub context: usize,
    /// Bytes of the KV cache for one token, in f16.
    pub kv_bytes_per_token: u64,
    /// How the vocabulary spells text.
    pub tokenizer: &'static str,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Whether there is a chat template.
    pub chat_template: bool,
    /// The licence it says it is under.
    pub license: Option<String>,
}

/// The tensors of one kind.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KindSummary {
    /// What they are for.
    pub kind: &'static str,
    /// Their weights.
    pub parameters: u64,
    /// Bits of a weight, on average.
    pub bits_per_weight: f64,
    /// The formats, and how many tensors are stored in each.
    pub formats: BTreeMap<String, usize>,
}

/// The kinds in the order they are shown: what names of their tensors contain.
const KINDS: [(&str, &[&str]); 5] = [
    ("embedding", &["model.embed_tokens."]),
    (
        "attention",
        &[
            "self_attn.q_proj.",
            "self_attn.k_proj.",
            "self_attn.v_proj.",
            "self_attn.o_proj.",
        ],
    ),
    ("mlp", &["mlp."]),
    ("norms", &["norm."]),
    ("head", &["lm_head."]),
];
const OTHER: &str = "other";

impl Summary {
    /// Of an opened checkpoint; no weight is read.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let config = &checkpoint.config;
        let tensors = &checkpoint.tensors;
        let mut kinds: BTreeMap<usize, (KindSummary, u64)> = BTreeMap::new();
        for name in tensors.names() {
            let (Some(shape), Some((bytes, format))) = (tensors.shape(name), tensors.stored(name))
            else {
                continue;
            };
            let of_kind = |kind: &(&str, &[&str])| kind.1.iter().any(|part| name.contains(part));
            let at = KINDS.iter().position(of_kind).unwrap_or(KINDS.len());
            let (kind, total) = kinds.entry(at).or_insert_with(|| {
                let kind = KindSummary {
                    kind: KINDS.get(at).map_or(OTHER, |kind| kind.0),
                    parameters: 0,
                    bits_per_weight: 0.0,
                    formats: BTreeMap::new(),
                };
                (kind, 0)
            });
            let elements = shape
                .iter()
                .fold(1_u64, |n, &size| n.saturating_mul(size as u64));
            kind.parameters = kind.parameters.saturating_add(elements);
            *total += bytes as u64;
            *kind.formats.entry(format.to_owned()).or_default() += 1;
        }
        let parameters = kinds.values().map(|(kind, _)| kind.parameters).sum();
        let bytes = kinds.values().map(|(_, bytes)| bytes).sum();
        let kv = 2 * config.layers.len() as u64 * config.kv_heads as u64 * config.head_dim as u64;
        Self {
            name: checkpoint.name.clone(),
            family: config.family.clone(),
            parameters,
            bytes,
            bits_per_weight: bits(bytes, parameters),
            tensors: kinds
                .into_values()
                .map(|(kind, bytes)| KindSummary {
                    bits_per_weight: bits(bytes, kind.parameters),
                    ..kind
                })
                .collect(),
            layers: config.layers.len(),
            hidden_size: config.hidden_size,
            context: config.max_position,
            kv_bytes_per_token: 2 * kv,
            tokenizer: checkpoint.tokenizer.kind(),
            vocabulary: checkpoint.tokenizer.vocab_size(),
            chat_template: checkpoint.chat_template.is_some(),
            license: checkpoint.license.clone(),
        }
    }
}

fn bits(bytes: u64, parameters: u64) -> f64 {
    let bits = 8.0 * bytes as f64 / parameters.max(1) as f64;
    (bits * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::ModelSource;

    #[test]
    fn the_demo_model_is_counted_to_the_last_weight() {
        let demo = Checkpoint::open(&ModelSource::Demo).expect("it is part of the binary");
        let summary = Summary::of(&demo);
        assert_eq!(summary.bytes, demo.tensors.total_bytes());
        assert_eq!(2 * summary.parameters, summary.bytes);
        assert_eq!(summary.bits_per_weight, 16.0);
        // Keys and values of 5 layers with one head of 64, two bytes each.
        assert_eq!(summary.kv_bytes_per_token, 2 * 5 * 64 * 2);
        let kinds: Vec<&str> = summary.tensors.iter().map(|kind| kind.kind).collect();
        assert_eq!(kinds, ["embedding", "attention", "mlp", "norms"]);
    }
}
