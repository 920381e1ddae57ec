"""Writes a GGUF file of the shape of Qwen3-4B in Q4_K_M, its weights random blocks: as large and as much work as the real one.

    pip install gguf==0.19.0 numpy
    python benches/random_gguf.py OUT.gguf --vocab ggml-vocab-qwen2.gguf

The vocabulary is a real one (llama.cpp has it in `models/`), because reading it is part of a start. Scales are such that weights are about
as large as trained ones; what the model says is noise.
"""

import argparse

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

SHAPES = {
    "4b": dict(hidden=2560, layers=36, heads=32, kv_heads=8, head=128, inner=9728),
    "0.6b": dict(hidden=1024, layers=28, heads=16, kv_heads=8, head=128, inner=3072),
}
VOCABULARY = 151936


def blocks(kind, rows, cols, random):
    """Random blocks of a matrix; their scales are where the format has them."""
    per_block, size = GGML_QUANT_SIZES[kind]
    out = random.integers(0, 256, (rows * cols // per_block, size), dtype=np.uint8)
    put = lambda at, value: out.__setitem__((slice(None), slice(at, at + 2)), np.frombuffer(np.float16(value).tobytes(), np.uint8))
    if kind == Type.Q4_K:
        put(0, 1e-4)
        put(2, 7.5e-4)
    else:
        assert kind == Type.Q6_K
        put(208, 1.5e-5)
    return out.reshape(rows, cols // per_block * size)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--vocab", required=True)
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    args = parser.parse_args()
    shape = argparse.Namespace(**SHAPES[args.shape])
    random = np.random.default_rng(1)

    writer = GGUFWriter(args.out, "qwen3", use_temp_file=False)
    writer.add_name(f"random-qwen3-{args.shape}")
    writer.add_context_length(40960)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_file_type(15)

    vocabulary = GGUFReader(args.vocab)
    field = lambda name: vocabulary.fields[f"tokenizer.ggml.{name}"].contents()
    tokens, kinds = field("tokens"), field("token_type")
    tokens += [f"[PAD{id}]" for id in range(len(tokens), VOCABULARY)]
    kinds += [5] * (VOCABULARY - len(kinds))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(field("merges"))
    writer.add_eos_token_id(field("eos_token_id"))
    writer.add_add_bos_token(False)

    tensors = [("token_embd.weight", Type.Q6_K, VOCABULARY, shape.hidden), ("output_norm.weight", Type.F32, 1, shape.hidden)]
    for layer in range(shape.layers):
        # As llama.cpp's quantiser chooses for Q4_K_M.
        eighth = shape.layers // 8
        more = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
        better = Type.Q6_K if more else Type.Q4_K
        q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
        tensors += [(f"blk.{layer}.{name}.weight", *rest) for name, *rest in (
            ("attn_norm", Type.F32, 1, shape.hidden), ("ffn_norm", Type.F32, 1, shape.hidden),
            ("attn_q_norm", Type.F32, 1, shape.head), ("attn_k_norm", Type.F32, 1, shape.head),
            ("attn_q", Type.Q4_K, q, shape.hidden), ("attn_k", Type.Q4_K, kv, shape.hidden), ("attn_v", better, kv, shape.hidden),
            ("attn_output", Type.Q4_K, shape.hidden, q), ("ffn_gate", Type.Q4_K, shape.inner, shape.hidden),
            ("ffn_up", Type.Q4_K, shape.inner, shape.hidden), ("ffn_down", better, shape.hidden, shape.inner),
        )]
    for name, kind, rows, cols in tensors:
        if kind == Type.F32:
            writer.add_tensor_info(name, (cols,), np.dtype(np.float32), cols * 4)
        else:
            per_block, size = GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(name, (rows, cols // per_block * size), np.dtype(np.uint8), rows * cols // per_block * size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind, rows, cols in tensors:
        writer.write_tensor_data(np.ones(cols, np.float32) if kind == Type.F32 else blocks(kind, rows, cols, random))
    writer.close()


if __name__ == "__main__":
    main()
