"""Makes GGUF files of the checkpoints beside this file, and of one more that is wide enough for blocks of 256.

    pip install gguf==0.19.0 numpy safetensors
    python engine/tests/golden/make_gguf.py

`gguf/NAME.gguf` holds what llama.cpp's converter would write for `NAME/`, in the precision it has: its tensor names, its metadata, and for the
llama architecture its order of the rows of queries and keys and its table of RoPE divisors. `gguf/llama3-rope-KIND.gguf` is quantised by the
package. Of the formats it does not quantise to, `gguf/wide-*.gguf` hold one layer of random blocks. `tests/golden_logits.rs` compares with the
goldens, `tests/gguf.rs` with the same weights widened to f32.
"""

import json
import pathlib

import numpy
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from gguf.constants import GGML_QUANT_SIZES
from safetensors import safe_open

HERE = pathlib.Path(__file__).parent
OUT = HERE / "gguf"
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
MODEL = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def name_of(name):
    if name in MODEL:
        return MODEL[name]
    _, _, layer, rest = name.split(".", 3)
    rest, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER[rest]}.{kind}"


def interleave(rows, heads):
    """The converter's `permute`: the two halves of a head side by side."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tensors_of(directory):
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name).float().numpy()


def tokenizer(writer, directory):
    model = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = sorted(model["model"]["vocab"].items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    kinds = [1] * len(tokens)
    for token in model["added_tokens"]:
        assert token["id"] == len(tokens) or tokens[token["id"]] == token["content"]
        if token["id"] == len(tokens):
            tokens.append(token["content"])
            kinds.append(3)
        else:
            kinds[token["id"]] = 3
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)


def metadata(writer, config, divisors):
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    head = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config["rope_theta"]
    writer.add_rope_freq_base(theta)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_float32(f"{writer.arch}.rope.scaling.factor", rope["factor"])
    if kind == "llama3":
        divisors.append(llama3(rope, theta, head))
    if isinstance(config.get("eos_token_id"), int):
        writer.add_eos_token_id(config["eos_token_id"])


def llama3(rope, theta, head):
    """The converter's `rope_freqs.weight`."""
    original, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for frequency in theta ** -(numpy.arange(0, head, 2) / head):
        wavelength = 2 * numpy.pi / frequency
        if wavelength < original / high:
            divisors.append(1)
        elif wavelength > original / low:
            divisors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return numpy.array(divisors, dtype=numpy.float32)


def write(name, directory, tensors, kind, config=None):
    config = config or json.loads((directory / "config.json").read_text())
    writer = GGUFWriter(OUT / f"{name}.gguf", config["model_type"])
    divisors = []
    metadata(writer, config, divisors)
    tokenizer(writer, directory)
    for values in divisors:
        writer.add_tensor("rope_freqs.weight", values)
    for tensor, values in tensors:
        if config["model_type"] == "llama" and (".q_proj." in tensor or ".k_proj." in tensor):
            heads = config["num_attention_heads" if ".q_proj." in tensor else "num_key_value_heads"]
            values = interleave(values, heads)
        stored = kind(tensor, values)
        if isinstance(stored, tuple):
            writer.add_tensor(name_of(tensor), stored[0], raw_dtype=stored[1])
        else:
            writer.add_tensor(name_of(tensor), numpy.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(name, (OUT / f"{name}.gguf").stat().st_size >> 10, "KiB")


def floats(kind):
    return lambda name, values: values.astype(kind) if values.ndim > 1 else values


def quantised(kind):
    """Matrices in `kind` where their rows have whole blocks, others in f16."""
    def of(name, values):
        if values.ndim == 1:
            return values
        if kind != GGMLQuantizationType.BF16:
            values = 0.5 * values  # The goldens' weights are louder than trained ones, and every error with them.
        if values.shape[-1] % GGML_QUANT_SIZES[kind][0]:
            return values.astype(numpy.float16)
        return quantize(values, kind), kind
    return of


# Where the 16-bit floats of a block are, and what they should be for weights of a sensible size.
SCALES = {
    "Q2_K": {80: 0.004, 82: 0.006}, "Q3_K": {108: 0.001}, "Q4_K": {0: 0.0005, 2: 0.0035}, "Q5_K": {0: 0.00025, 2: 0.0035},
    "Q6_K": {208: 0.00005}, "IQ4_XS": {0: 0.00007}, "TQ1_0": {52: 0.08}, "TQ2_0": {64: 0.08},
    "IQ4_NL": {0: 0.0007}, "MXFP4": {},
}


def random_blocks(random, rows, cols, name):
    kind = GGMLQuantizationType[name]
    size, length = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows * cols // size, length), dtype=numpy.uint8)
    if name == "TQ2_0":  # No block has a 3.
        blocks[:, :64] &= ~((blocks[:, :64] & 0xAA) >> 1)
    if name == "MXFP4":  # A power of two, up to 2^-5.
        blocks[:, 0] = random.integers(120, 123, len(blocks))
    for place, scale in SCALES[name].items():
        halves = (scale * random.uniform(0.5, 1.5, len(blocks))).astype(numpy.float16)
        blocks[:, place : place + 2] = halves.view(numpy.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1), kind


def wide(name, kinds):
    """One layer of a Qwen3 with 256 columns; `kinds` are taken in turn, as one file may hold several."""
    random = numpy.random.default_rng(sum(name.encode()))
    config = dict(
        model_type="qwen3", max_position_embeddings=512, hidden_size=256, num_hidden_layers=1, intermediate_size=256, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, rms_norm_eps=1e-6, rope_parameters=dict(rope_type="default", rope_theta=1e6), eos_token_id=300,
    )
    matrices = {"self_attn.q_proj": 256, "self_attn.k_proj": 128, "self_attn.v_proj": 128, "self_attn.o_proj": 256, "mlp.gate_proj": 256,
                "mlp.up_proj": 256, "mlp.down_proj": 256}
    norms = {"input_layernorm": 256, "post_attention_layernorm": 256, "self_attn.q_norm": 64, "self_attn.k_norm": 64}
    tensors = [(f"model.layers.0.{n}.weight", rows) for n, rows in matrices.items()] + [("model.embed_tokens.weight", 301)]
    stored = {n: random_blocks(random, rows, 256, kinds[i % len(kinds)]) for i, (n, rows) in enumerate(tensors)}
    for n, size in [*((f"model.layers.0.{n}.weight", size) for n, size in norms.items()), ("model.norm.weight", 256)]:
        stored[n] = (1 + 0.2 * random.standard_normal(size)).astype(numpy.float32)
    write(name, HERE / "qwen3", [(n, None) for n in stored], lambda tensor, _: stored[tensor], config)


OUT.mkdir(exist_ok=True)
for name in ["qwen3", "qwen2", "llama3-rope", "llama-linear-rope"]:
    kinds = {"qwen2": quantised(GGMLQuantizationType.BF16), "llama3-rope": floats(numpy.float16)}
    write(name, HERE / name, tensors_of(HERE / name), kinds.get(name, floats(numpy.float32)))
for kind in ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]:
    tensors = tensors_of(HERE / "llama3-rope")
    write(f"llama3-rope-{kind.lower()}", HERE / "llama3-rope", tensors,
          quantised(GGMLQuantizationType[kind]))
wide("wide-q4_k_m", ["Q4_K", "Q4_K", "Q6_K", "Q5_K"])
wide("wide-low", ["Q2_K", "Q3_K", "IQ4_XS", "Q3_K"])
wide("wide-ternary", ["TQ1_0", "TQ2_0", "TQ2_0"])
wide("wide-uneven", ["IQ4_NL", "MXFP4", "MXFP4"])
