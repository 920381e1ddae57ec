//! What llama.cpp calls the tensors that the decoder asks for.

/// Outside the layers: ours, theirs.
const MODEL: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// In a layer, less `.weight` or `.bias`; the first that fits is meant.
const LAYER: [(&str, &str); 22] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.attn_sub_norm", "attn_sub_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.ffn_sub_norm", "ffn_sub_norm"),
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.experts.gate_proj", "ffn_gate_exps"),
    ("mlp.experts.up_proj", "ffn_up_exps"),
    ("mlp.experts.down_proj", "ffn_down_exps"),
];
/// A tensor without a suffix among ours.
const SINKS: (&str, &str) = ("self_attn.sinks", "attn_sinks.weight");

/// Which of the names in [`LAYER`] an architecture uses, where two would fit.
#[derive(Debug, Clone, Copy)]
pub(in crate::checkpoint) struct Names {
    /// `ffn_norm` is the norm before the MLP, `post_attention_norm` another one.
    around: bool,
    /// `post_attention_norm` is the norm before the MLP.
    post_attention: bool,
    /// `ffn_up` is gate and input together.
    fused: bool,
}

impl Names {
    pub fn of(architecture: &str) -> Self {
        Self {
            around: architecture.starts_with("gemma"),
            post_attention: matches!(architecture, "gpt-oss" | "olmo2"),
            fused: architecture == "phi3",
        }
    }

    /// Whether the architecture means `ours` by `theirs`.
    fn uses(self, (ours, theirs): (&str, &str)) -> bool {
        match (ours, theirs) {
            ("post_attention_layernorm", "ffn_norm") => !self.around && !self.post_attention,
            ("post_attention_layernorm", _) => self.around || self.post_attention,
            ("pre_feedforward_layernorm", _) => self.around,
            ("mlp.gate_up_proj", _) => self.fused,
            ("mlp.up_proj", _) => !self.fused,
            _ => true,
        }
    }

    /// Our name for a tensor of a GGUF file; its own where we have none.
    pub fn ours(self, theirs: &str) -> String {
        let model = MODEL.iter().find(|pair| pair.1 == theirs);
        let layer = || {
            let (layer, rest) = theirs.strip_prefix("blk.")?.split_once('.')?;
            if rest == SINKS.1 {
                return Some(format!("model.layers.{layer}.{}", SINKS.0));
            }
            let (name, kind) = rest.rsplit_once('.')?;
            let fits = |pair: &&(&str, &str)| pair.1 == name && self.uses(**pair);
            let pair = LAYER.iter().find(fits)?;
            Some(format!("model.layers.{layer}.{}.{kind}", pair.0))
        };
        model
            .map(|pair| pair.0.to_owned())
            .or_else(layer)
            .unwrap_or_else(|| theirs.to_owned())
    }

    /// A GGUF file's name for what the decoder calls `ours`.
    pub fn theirs(self, ours: &str) -> String {
        let model = MODEL.iter().find(|pair| pair.0 == ours);
        let layer = || {
            let (layer, rest) = ours.strip_prefix("model.layers.")?.split_once('.')?;
            if rest == SINKS.0 {
                return Some(format!("blk.{layer}.{}", SINKS.1));
            }
            let (name, kind) = rest.rsplit_once('.')?;
            let fits = |pair: &&(&str, &str)| pair.0 == name && self.uses(**pair);
            let pair = LAYER.iter().find(fits)?;
            Some(format!("blk.{layer}.{}.{kind}", pair.1))
        };
        model
            .map(|pair| pair.1.to_owned())
            .or_else(layer)
            .unwrap_or_else(|| ours.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_way_there_and_back_in_every_architecture() {
        for architecture in ["llama", "gemma3", "gpt-oss", "olmo2", "phi3"] {
            let names = Names::of(architecture);
            for (ours, theirs) in MODEL {
                assert_eq!(names.ours(theirs), ours);
                assert_eq!(names.theirs(ours), theirs);
            }
            for pair in LAYER.into_iter().filter(|pair| names.uses(*pair)) {
                let ours = format!("model.layers.7.{}.bias", pair.0);
                let theirs = format!("blk.7.{}.bias", pair.1);
                assert_eq!(names.ours(&theirs), ours, "{architecture}");
                assert_eq!(names.theirs(&ours), theirs, "{architecture}");
            }
            let sinks = "model.layers.3.self_attn.sinks";
            assert_eq!(names.ours("blk.3.attn_sinks.weight"), sinks);
            assert_eq!(names.theirs(sinks), "blk.3.attn_sinks.weight");
            assert_eq!(names.ours("rope_freqs.weight"), "rope_freqs.weight");
        }
    }
}
