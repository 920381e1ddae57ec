//! [`ModelConfig`]: everything in which decoder families differ, as data.

use quire_kernels::{Activation, LogitsRule};

/// The shape and arithmetic of a decoder.
///
/// Read from a checkpoint's metadata by [`crate::checkpoint`]; every field is validated there, so that the decoder can rely on
/// it (no zero sizes, `heads % kv_heads == 0`, sizes that fit the memory arithmetic).
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family's name as the checkpoint spells it, for example `qwen3`.
    pub family: String,
    /// Rows of the embedding table and of the output head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP, where it is not a mixture of experts.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: Vec<LayerConfig>,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// What is added to the norms' weights as they are stored (1 for Gemma's safetensors).
    pub norm_offset: f32,
    /// Where a layer's norms are.
    pub norms: NormPlacement,
    /// Further norms, before the attention output and the MLP's output projection (BitNet).
    pub sub_norms: bool,
    /// Longest context the checkpoint was made for, in tokens.
    pub max_position: usize,
    /// Rotary position embeddings that the layers choose from.
    pub ropes: Vec<RopeConfig>,
    /// The MLP's non-linearity.
    pub activation: Activation,
    /// Norms of queries and keys before rotation.
    pub qk_norm: QkNorm,
    /// The query, key and value projections have biases (Qwen2).
    pub qkv_bias: bool,
    /// The attention output projection has a bias (Llama with `attention_bias`).
    pub output_bias: bool,
    /// The MLP projections have biases (Llama with `mlp_bias`).
    pub mlp_bias: bool,
    /// Every head has an attention sink (gpt-oss).
    pub sinks: bool,
    /// The mixture of experts of the layers that have one.
    pub experts: Option<ExpertsConfig>,
    /// The output head is the embedding table.
    pub tied_head: bool,
    /// What embeddings are multiplied with.
    pub embedding_scale: f32,
    /// What attention scores are multiplied with.
    pub attention_scale: f32,
    /// Bound of attention scores (Gemma 2).
    pub attention_softcap: Option<f32>,
    /// What attention and MLP are multiplied with before they join the residual stream (Granite).
    pub residual_scale: f32,
    /// What is done to the logits.
    pub logits: LogitsRule,
}

/// In what layers of one model differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// Sliding window: how many positions a query sees, its own included. `None`: all before it.
    pub window: Option<u32>,
    /// Which of [`ModelConfig::ropes`] it has; `None`: positions are not encoded.
    pub rope: Option<usize>,
    /// Its MLP is a mixture of experts.
    pub experts: bool,
}

/// Where the RMS norms of a layer are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before attention and before the MLP.
    Before,
    /// Before and after each (Gemma 2 and 3).
    Around,
    /// After each, before it joins the residual stream (OLMo 2).
    After,
}

/// RMS norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Each head by itself, all with the same weights (Qwen3, Gemma 3).
    Heads,
    /// All heads of a token together (OLMo 2).
    Together,
}

/// A mixture of experts.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsConfig {
    /// How many there are.
    pub count: usize,
    /// How many a token uses.
    pub top_k: usize,
    /// Width of an expert.
    pub intermediate_size: usize,
    /// The chosen experts' weights are a softmax over them alone.
    pub normalised: bool,
    /// Router and experts have biases.
    pub bias: bool,
    /// Stored as gpt-oss does: gate and input rows in turn, float matrices transposed.
    pub interleaved: bool,
}

/// Rotary position embedding (Su et al. 2021) and its context-extension rules.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric progression of wavelengths.
    pub theta: f64,
    /// How many elements of a head are rotated: the first ones. Even.
    pub rotated: usize,
    /// How the frequencies are rescaled for longer contexts.
    pub scaling: RopeScaling,
    /// What cosines and sines are multiplied with.
    pub scale: f32,
}

/// How rotary frequencies are rescaled for contexts longer than those trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions divided by a factor (Chen et al. 2023).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3's rule: long wavelengths divided by `factor`, short ones kept, a linear ramp between.
    Llama3 {
        /// The divisor for long wavelengths.
        factor: f64,
        /// Wavelengths above `original_max_position / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context the checkpoint was first trained with.
        original_max_position: f64,
    },
    /// YaRN (Peng et al. 2023): slow frequencies divided by `factor`, fast ones kept, a linear ramp between.
    Yarn {
        /// The divisor.
        factor: f64,
        /// Frequencies that turn more often than this in the original context are kept.
        beta_fast: f64,
        /// Frequencies that turn less often than this are divided.
        beta_slow: f64,
        /// The context the checkpoint was first trained with.
        original_max_position: f64,
        /// The ends of the ramp are whole indices of frequencies.
        truncate: bool,
    },
    /// LongRoPE (Ding et al. 2024): a divisor for each frequency, others for sequences longer than the original context.
    LongRope {
        /// Divisors within the original context, fastest frequency first.
        short: Vec<f32>,
        /// Divisors beyond it.
        long: Vec<f32>,
        /// The context the checkpoint was first trained with, in tokens.
        original_max_position: u32,
    },
    /// A divisor for each frequency, fastest first, as converters write them.
    Divisors(Vec<f32>),
}

impl ModelConfig {
    /// The length beyond which a sequence's keys are rotated in another way than up to it, in tokens.
    pub fn rope_switch(&self) -> Option<u32> {
        self.ropes.iter().find_map(|rope| match rope.scaling {
            RopeScaling::LongRope {
                original_max_position,
                ..
            } => Some(original_max_position),
            _ => None,
        })
    }
}
