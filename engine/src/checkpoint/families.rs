//! The families, as data: what a `config.json` of each means beside what it says.
//!
//! Adding a family is adding an entry: its name, what differs from Llama, and the values its authors leave out of their files.

use quire_kernels::Activation;

use crate::model::{NormPlacement, QkNorm};

/// An activation and its names in `hidden_act`.
pub(super) type Named = (Activation, &'static [&'static str]);

/// What a family has that its `config.json` does not say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    /// `model_type`.
    pub name: &'static str,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// Biases of the query, key and value projections: always, or as `attention_bias` says.
    pub qkv_bias: Option<bool>,
    /// Whether `attention_bias` puts a bias on the attention output as well.
    pub output_bias: bool,
    /// Whether `mlp_bias` is read.
    pub mlp_bias: bool,
    /// Where the norms are.
    pub norms: NormPlacement,
    /// Norms are stored less 1.
    pub norm_offset: f32,
    /// Norms before the attention output and the MLP's output projection.
    pub sub_norms: bool,
    /// The activations its weights can have been trained with, and their names in `hidden_act`; the first where a file does not say.
    pub activations: &'static [Named],
    /// Which layers have the sliding window.
    pub windows: Windows,
    /// Embeddings are multiplied with the square root of the width.
    pub scaled_embeddings: bool,
    /// Attention sinks.
    pub sinks: bool,
    /// Its mixture of experts, if it has one.
    pub experts: Option<Mixture>,
    /// Some layers have no rotary embedding.
    pub skips_rope: bool,
    /// Granite's multipliers are read.
    pub multipliers: bool,
    /// Whole-numbered fields that files leave out, as transformers fills them in.
    pub defaults: &'static [(&'static str, f64)],
    /// The output head is the embedding table unless the file says otherwise.
    pub tied_head: bool,
}

/// Which layers have a sliding window, where `layer_types` does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Windows {
    /// All, if there is a `sliding_window`.
    All,
    /// Those from `max_window_layers` on, if `use_sliding_window`.
    Late,
    /// All but every so manieth, or what `sliding_window_pattern` says.
    AllBut(usize),
    /// The layers without rotary embedding, if `use_sliding_window`.
    WithoutRope,
    /// None has; the family knows no windows.
    None,
}

/// How a family's mixture of experts is described.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mixture {
    /// The field with the width of an expert.
    pub width: &'static str,
    /// Weights of the chosen experts are a softmax over them: always, or as `norm_topk_prob` says.
    pub normalised: Option<bool>,
    /// Router and experts have biases.
    pub bias: bool,
    /// Stored as gpt-oss does.
    pub interleaved: bool,
}

const SILU: Named = (Activation::Silu, &["silu", "swish"]);
const GELU: Named = (
    Activation::GeluTanh,
    &["gelu_pytorch_tanh", "gelu_new", "gelu"],
);

const LLAMA: Family = Family {
    name: "llama",
    qk_norm: QkNorm::None,
    qkv_bias: None,
    output_bias: true,
    mlp_bias: true,
    norms: NormPlacement::Before,
    norm_offset: 0.0,
    sub_norms: false,
    activations: &[SILU],
    windows: Windows::None,
    scaled_embeddings: false,
    sinks: false,
    experts: None,
    skips_rope: false,
    multipliers: false,
    defaults: &[],
    tied_head: false,
};

/// Qwen's windows, which few files use.
const LATE_WINDOWS: &[(&str, f64)] = &[("sliding_window", 4096.0), ("max_window_layers", 28.0)];

const QWEN3: Family = Family {
    name: "qwen3",
    qk_norm: QkNorm::Heads,
    mlp_bias: false,
    windows: Windows::Late,
    defaults: LATE_WINDOWS,
    ..LLAMA
};

const GEMMA2: Family = Family {
    name: "gemma2",
    mlp_bias: false,
    norms: NormPlacement::Around,
    norm_offset: 1.0,
    activations: &[GELU],
    windows: Windows::AllBut(2),
    scaled_embeddings: true,
    defaults: &[
        ("num_attention_heads", 8.0),
        ("num_key_value_heads", 4.0),
        ("head_dim", 256.0),
        ("max_position_embeddings", 8192.0),
        ("sliding_window", 4096.0),
        ("query_pre_attn_scalar", 256.0),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
    ],
    tied_head: true,
    ..LLAMA
};

pub(super) const FAMILIES: [Family; 14] = [
    QWEN3,
    Family {
        name: "qwen3_moe",
        experts: Some(Mixture {
            width: "moe_intermediate_size",
            normalised: None,
            bias: false,
            interleaved: false,
        }),
        defaults: &[("sliding_window", 4096.0)],
        ..QWEN3
    },
    Family {
        name: "qwen2",
        qkv_bias: Some(true),
        output_bias: false,
        mlp_bias: false,
        windows: Windows::Late,
        defaults: LATE_WINDOWS,
        ..LLAMA
    },
    LLAMA,
    Family {
        name: "mistral",
        qkv_bias: Some(false),
        output_bias: false,
        mlp_bias: false,
        windows: Windows::All,
        defaults: &[("sliding_window", 4096.0)],
        ..LLAMA
    },
    Family {
        name: "ministral",
        qkv_bias: Some(false),
        output_bias: false,
        mlp_bias: false,
        windows: Windows::All,
        defaults: &[("sliding_window", 4096.0)],
        ..LLAMA
    },
    // Phi-3, Phi-3.5 and Phi-4-mini.
    Family {
        name: "phi3",
        qkv_bias: Some(false),
        output_bias: false,
        mlp_bias: false,
        windows: Windows::All,
        defaults: &[("rms_norm_eps", 1e-5)],
        ..LLAMA
    },
    GEMMA2,
    Family {
        name: "gemma3_text",
        qk_norm: QkNorm::Heads,
        windows: Windows::AllBut(6),
        defaults: &[
            ("vocab_size", 262_208.0),
            ("num_attention_heads", 8.0),
            ("num_key_value_heads", 4.0),
            ("head_dim", 256.0),
            ("max_position_embeddings", 131_072.0),
            ("sliding_window", 4096.0),
            ("query_pre_attn_scalar", 256.0),
            ("rope_theta", 1e6),
            ("rope_local_base_freq", 1e4),
        ],
        ..GEMMA2
    },
    Family {
        name: "bitnet",
        mlp_bias: false,
        sub_norms: true,
        activations: &[(Activation::Relu2, &["relu2"]), SILU],
        defaults: &[("rope_theta", 5e5), ("rms_norm_eps", 1e-5)],
        ..LLAMA
    },
    Family {
        name: "gpt_oss",
        mlp_bias: false,
        activations: &[(
            Activation::ClampedSwiglu {
                alpha: 1.702,
                limit: 7.0,
            },
            &["silu"],
        )],
        windows: Windows::AllBut(2),
        sinks: true,
        experts: Some(Mixture {
            width: "intermediate_size",
            normalised: Some(true),
            bias: true,
            interleaved: true,
        }),
        defaults: &[
            ("rope_theta", 150_000.0),
            ("rms_norm_eps", 1e-5),
            ("sliding_window", 128.0),
            ("attention_bias", 1.0),
        ],
        ..LLAMA
    },
    Family {
        name: "smollm3",
        windows: Windows::WithoutRope,
        skips_rope: true,
        defaults: &[("rope_theta", 2e6)],
        tied_head: true,
        ..LLAMA
    },
    Family {
        name: "granite",
        multipliers: true,
        ..LLAMA
    },
    Family {
        name: "olmo2",
        qk_norm: QkNorm::Together,
        mlp_bias: false,
        norms: NormPlacement::After,
        defaults: &[("rms_norm_eps", 1e-5)],
        ..LLAMA
    },
];
