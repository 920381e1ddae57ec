//! [`ModelConfig`]: everything in which decoder families differ, as data.

use quire_kernels::Activation;

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
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// Longest context the checkpoint was made for, in tokens.
    pub max_position: usize,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// The MLP's non-linearity.
    pub activation: Activation,
    /// Query and key heads are RMS-normalised before rotation (Qwen3).
    pub qk_norm: bool,
    /// The query, key and value projections have biases (Qwen2).
    pub qkv_bias: bool,
    /// The attention output projection has a bias (Llama with `attention_bias`).
    pub output_bias: bool,
    /// The MLP projections have biases (Llama with `mlp_bias`).
    pub mlp_bias: bool,
    /// The output head is the embedding table.
    pub tied_head: bool,
}

/// Rotary position embedding (Su et al. 2021) and its context-extension rules.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric progression of wavelengths.
    pub theta: f64,
    /// How the frequencies are rescaled for longer contexts.
    pub scaling: RopeScaling,
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
    /// A divisor for each frequency, fastest first, as converters write them.
    Divisors(Vec<f32>),
}
