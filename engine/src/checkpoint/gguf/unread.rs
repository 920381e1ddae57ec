//! Tensors of a GGUF file that the decoder would not read: whoever made the file computes with them, so its answers would be others.

use super::{Gguf, Names};
use crate::checkpoint::CheckpointError;
use crate::model::{ModelConfig, NormPlacement, QkNorm};

/// What the names of tensors begin with that take part in every token. Others belong to encoders and classifiers, or are read with the metadata.
const COMPUTED: [&str; 4] = ["blk.", "output.", "output_norm.", "token_embd."];

/// Refuses a file with such tensors. `pairs`: rows of queries and keys are stored as pairs, which nobody sorts in a fused matrix.
pub(super) fn refuse(
    gguf: &Gguf,
    config: &ModelConfig,
    pairs: bool,
) -> Result<(), CheckpointError> {
    let names = Names::of(gguf.architecture());
    let tensors = gguf.headers.iter().flat_map(|header| &header.tensors);
    let unread: Vec<&str> = tensors
        .map(|tensor| tensor.name.as_str())
        .filter(|name| !is_read(config, &names.ours(name), pairs))
        .collect();
    let Some(first) = unread.first() else {
        return Ok(());
    };
    let problem = format!(
        "tensors that would not be read: {}, the first of them `{first}`; a model of architecture {} is supported without them",
        unread.len(),
        gguf.architecture(),
    );
    Err(CheckpointError::file(gguf.file(), problem))
}

/// Whether the decoder asks for the tensor that we call `name`, or has no need to.
fn is_read(config: &ModelConfig, name: &str, pairs: bool) -> bool {
    let Some(in_layers) = name.strip_prefix("model.layers.") else {
        return !COMPUTED.iter().any(|prefix| name.starts_with(prefix));
    };
    let Some((layer, rest)) = in_layers.split_once('.') else {
        return false;
    };
    let Some(layer) = layer
        .parse()
        .ok()
        .and_then(|at: usize| config.layers.get(at))
    else {
        return false;
    };
    let Some((module, kind)) = rest.rsplit_once('.') else {
        return false;
    };
    let mixture = config.experts.as_ref().filter(|_| layer.experts);
    let (weight, bias) = match module {
        "self_attn" => return kind == "sinks" && config.sinks,
        "input_layernorm" => (config.norms != NormPlacement::After, false),
        "post_attention_layernorm" => (true, false),
        "pre_feedforward_layernorm" => (config.norms == NormPlacement::Around, false),
        "post_feedforward_layernorm" => (config.norms != NormPlacement::Before, false),
        "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj" => (true, config.qkv_bias),
        "self_attn.qkv_proj" => (!pairs, config.qkv_bias),
        "self_attn.o_proj" => (true, config.output_bias),
        "self_attn.q_norm" | "self_attn.k_norm" => (config.qk_norm != QkNorm::None, false),
        "self_attn.attn_sub_norm" => (config.sub_norms, false),
        "mlp.ffn_sub_norm" => (config.sub_norms && mixture.is_none(), false),
        "mlp.gate_proj" | "mlp.up_proj" | "mlp.gate_up_proj" | "mlp.down_proj" => {
            (mixture.is_none(), config.mlp_bias)
        }
        "mlp.gate" | "mlp.experts.gate_proj" | "mlp.experts.up_proj" | "mlp.experts.down_proj" => {
            (mixture.is_some(), mixture.is_some_and(|of| of.bias))
        }
        _ => (false, false),
    };
    match kind {
        "weight" => weight,
        "bias" => weight && bias,
        _ => false,
    }
}
