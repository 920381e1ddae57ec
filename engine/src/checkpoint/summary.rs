//! [`Summary`]: what a checkpoint is, for people and for scripts.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{Checkpoint, CheckpointError};
use crate::model::{LayerConfig, ModelConfig, RopeScaling};

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
    /// Experts of a layer and how many of them a token uses, in a mixture of experts.
    pub experts: Option<ExpertsSummary>,
    /// How positions are encoded: each rotary embedding once.
    pub rope: Vec<RopeSummary>,
    /// Layers that do not encode positions.
    pub layers_without_rope: usize,
    /// Bytes of the KV cache for one token in f16, in the layers that see everything. Those with a window are in `windows`.
    pub kv_bytes_per_token: u64,
    /// The layers that see a window only.
    pub windows: Vec<WindowSummary>,
    /// How the vocabulary spells text.
    pub tokenizer: &'static str,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Whether there is a chat template.
    pub chat_template: bool,
    /// The licence it says it is under.
    pub license: Option<String>,
}

/// A mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ExpertsSummary {
    /// Layers that have one.
    pub layers: usize,
    /// Experts of a layer.
    pub count: usize,
    /// Experts a token uses.
    pub used: usize,
}

/// A rotary embedding.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RopeSummary {
    /// Layers that use it.
    pub layers: usize,
    /// Base of its wavelengths.
    pub theta: f64,
    /// Elements of a head that are rotated.
    pub rotated: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// How it is rescaled for longer contexts: `none`, `linear`, `llama3`, `yarn`, `longrope`, `divisors`.
    pub scaling: &'static str,
    /// What long wavelengths are multiplied with, where it is one number.
    pub factor: Option<f64>,
    /// The context before it was rescaled, where the checkpoint says so.
    pub original_context: Option<u64>,
}

/// Layers with a sliding window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct WindowSummary {
    /// Positions a query sees.
    pub tokens: u32,
    /// Layers with this window.
    pub layers: usize,
    /// Bytes of the KV cache a full window occupies in f16, in all of them.
    pub kv_bytes: u64,
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

/// The kinds in the order they are looked for and shown: what names of their tensors contain.
const KINDS: [(&str, &[&str]); 7] = [
    ("embedding", &["model.embed_tokens."]),
    ("norms", &["norm."]),
    ("attention", &["self_attn."]),
    ("experts", &[".experts."]),
    ("router", &["mlp.gate.", "mlp.router."]),
    ("mlp", &["mlp."]),
    ("head", &["lm_head."]),
];
const OTHER: &str = "other";

impl Summary {
    /// Of an opened checkpoint; no weight is read.
    ///
    /// # Errors
    /// The checkpoint was only [begun](Checkpoint::begin), and its vocabulary makes no tokenizer.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let tokenizer = checkpoint.tokenizer()?;
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
            let elements = elements(name, shape);
            kind.parameters = kind.parameters.saturating_add(elements);
            *total += bytes as u64;
            *kind.formats.entry(format.to_owned()).or_default() += 1;
        }
        let parameters = kinds.values().map(|(kind, _)| kind.parameters).sum();
        let bytes = kinds.values().map(|(_, bytes)| bytes).sum();
        // Keys and values, two bytes each.
        let kv_of_layer = 2 * 2 * config.kv_heads as u64 * config.head_dim as u64;
        let layers = |of: &dyn Fn(&LayerConfig) -> bool| {
            config.layers.iter().filter(|&layer| of(layer)).count()
        };
        let windows: BTreeSet<u32> = config.layers.iter().filter_map(|l| l.window).collect();
        Ok(Self {
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
            experts: config.experts.as_ref().map(|experts| ExpertsSummary {
                layers: layers(&|layer| layer.experts),
                count: experts.count,
                used: experts.top_k,
            }),
            rope: (0..config.ropes.len())
                .map(|at| rope(config, at, layers(&|layer| layer.rope == Some(at))))
                .collect(),
            layers_without_rope: layers(&|layer| layer.rope.is_none()),
            kv_bytes_per_token: kv_of_layer * layers(&|layer| layer.window.is_none()) as u64,
            windows: windows
                .into_iter()
                .map(|tokens| {
                    let layers = layers(&|layer| layer.window == Some(tokens));
                    WindowSummary {
                        tokens,
                        layers,
                        kv_bytes: kv_of_layer * layers as u64 * u64::from(tokens),
                    }
                })
                .collect(),
            tokenizer: tokenizer.kind(),
            vocabulary: tokenizer.vocab_size(),
            chat_template: checkpoint.chat_template.is_some(),
            license: checkpoint.license.clone(),
        })
    }
}

/// Weights of a tensor.
fn elements(name: &str, shape: &[usize]) -> u64 {
    let stored = shape
        .iter()
        .fold(1_u64, |n, &size| n.saturating_mul(size as u64));
    // gpt-oss stores MXFP4 as two tensors: bytes of two elements, and their scales.
    match name.rsplit('_').next() {
        Some("blocks") => stored.saturating_mul(2),
        Some("scales") => 0,
        _ => stored,
    }
}

fn rope(config: &ModelConfig, at: usize, layers: usize) -> RopeSummary {
    let rope = &config.ropes[at];
    let (scaling, factor, original_context) = match &rope.scaling {
        RopeScaling::None => ("none", None, None),
        RopeScaling::Linear { factor } => ("linear", Some(*factor), None),
        RopeScaling::Llama3 {
            factor,
            original_max_position,
            ..
        } => ("llama3", Some(*factor), Some(*original_max_position as u64)),
        RopeScaling::Yarn {
            factor,
            original_max_position,
            ..
        } => ("yarn", Some(*factor), Some(*original_max_position as u64)),
        RopeScaling::LongRope {
            original_max_position,
            ..
        } => ("longrope", None, Some(u64::from(*original_max_position))),
        RopeScaling::Divisors(_) => ("divisors", None, None),
    };
    RopeSummary {
        layers,
        theta: rope.theta,
        rotated: rope.rotated,
        head_dim: config.head_dim,
        scaling,
        factor,
        original_context,
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
        let summary = Summary::of(&demo).expect("it was opened");
        assert_eq!(summary.bytes, demo.tensors.total_bytes());
        assert_eq!(2 * summary.parameters, summary.bytes);
        assert_eq!(summary.bits_per_weight, 16.0);
        // Keys and values of 5 layers with one head of 64, two bytes each.
        assert_eq!(summary.kv_bytes_per_token, 2 * 5 * 64 * 2);
        let kinds: Vec<&str> = summary.tensors.iter().map(|kind| kind.kind).collect();
        assert_eq!(kinds, ["embedding", "norms", "attention", "mlp"]);
        assert_eq!(summary.windows, []);
        let rope: Vec<&str> = summary.rope.iter().map(|rope| rope.scaling).collect();
        assert_eq!((rope, summary.rope[0].layers), (vec!["none"], 5));
    }

    fn golden(name: &str) -> Summary {
        let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
        let opened = Checkpoint::open(&ModelSource::Path(path.into()));
        Summary::of(&opened.expect("it is part of the tests")).expect("it was opened")
    }

    fn kinds(summary: &Summary) -> Vec<&str> {
        summary.tensors.iter().map(|kind| kind.kind).collect()
    }

    #[test]
    fn every_tensor_of_every_family_is_of_a_kind() {
        for family in [
            "qwen3-moe",
            "mistral",
            "ministral",
            "phi3",
            "phi4-longrope",
            "gemma2",
            "gemma3",
            "bitnet",
            "gpt-oss",
            "smollm3",
            "granite",
            "olmo2",
        ] {
            for name in [family.to_owned(), format!("gguf/{family}.gguf")] {
                let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
                if std::path::Path::new(&path).exists() {
                    let summary = golden(&name);
                    assert!(
                        !kinds(&summary).contains(&OTHER),
                        "{name}: {:?}",
                        kinds(&summary)
                    );
                }
            }
        }
    }

    #[test]
    fn experts_and_routers_are_kinds_of_their_own() {
        let summary = golden("qwen3-moe");
        assert_eq!(
            kinds(&summary),
            [
                "embedding",
                "norms",
                "attention",
                "experts",
                "router",
                "head"
            ]
        );
        let experts = summary.experts.expect("it has some");
        assert_eq!((experts.layers, experts.count, experts.used), (2, 7, 3));
    }

    #[test]
    fn windows_are_counted_apart_from_layers_that_see_everything() {
        // Seven layers of one KV head of 24; every sixth sees everything, the others 30 positions.
        let gemma = golden("gemma3");
        assert_eq!(gemma.kv_bytes_per_token, 2 * 24 * 2);
        let window = WindowSummary {
            tokens: 30,
            layers: 6,
            kv_bytes: 6 * 30 * 2 * 24 * 2,
        };
        assert_eq!(gemma.windows, [window]);
        assert_eq!(gemma.rope.len(), 2);
        // All layers have a window: nothing grows with the context.
        assert_eq!(golden("mistral").kv_bytes_per_token, 0);
        assert_eq!(golden("smollm3").layers_without_rope, 1);
        assert_eq!(golden("phi4-longrope").rope[0].rotated, 12);
    }
}
