//! What llama.cpp calls the tensors that the decoder asks for.

/// Outside the layers: ours, theirs.
const MODEL: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// In a layer, less `.weight` or `.bias`.
const LAYER: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Our name for a tensor of a GGUF file; its own where we have none.
pub(in crate::checkpoint) fn ours(theirs: &str) -> String {
    let model = MODEL.iter().find(|pair| pair.1 == theirs);
    let layer = || {
        let (layer, rest) = theirs.strip_prefix("blk.")?.split_once('.')?;
        let (name, kind) = rest.rsplit_once('.')?;
        let pair = LAYER.iter().find(|pair| pair.1 == name)?;
        Some(format!("model.layers.{layer}.{}.{kind}", pair.0))
    };
    model
        .map(|pair| pair.0.to_owned())
        .or_else(layer)
        .unwrap_or_else(|| theirs.to_owned())
}

/// A GGUF file's name for what the decoder calls `ours`.
pub(in crate::checkpoint) fn theirs(ours: &str) -> String {
    let model = MODEL.iter().find(|pair| pair.0 == ours);
    let layer = || {
        let (layer, rest) = ours.strip_prefix("model.layers.")?.split_once('.')?;
        let (name, kind) = rest.rsplit_once('.')?;
        let pair = LAYER.iter().find(|pair| pair.0 == name)?;
        Some(format!("blk.{layer}.{}.{kind}", pair.1))
    };
    model
        .map(|pair| pair.1.to_owned())
        .or_else(layer)
        .unwrap_or_else(|| ours.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_way_there_and_back() {
        for (ours_, theirs_) in MODEL {
            assert_eq!(
                (ours(theirs_).as_str(), theirs(ours_).as_str()),
                (ours_, theirs_)
            );
        }
        for (ours_, theirs_) in LAYER {
            let (ours_, theirs_) = (
                format!("model.layers.7.{ours_}.bias"),
                format!("blk.7.{theirs_}.bias"),
            );
            assert_eq!((ours(&theirs_), theirs(&ours_)), (ours_, theirs_));
        }
        assert_eq!(ours("rope_freqs.weight"), "rope_freqs.weight");
    }
}
