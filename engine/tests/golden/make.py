"""Makes the checkpoints beside this file and the logits transformers computes from them.

    pip install torch==2.13.0 transformers==5.23.0 tokenizers safetensors
    python engine/tests/golden/make.py [NAME ...]

Each checkpoint is a few layers of random weights in one family's architecture, as `save_pretrained` writes it, with a byte-level
tokenizer. `golden.safetensors` in its directory holds what transformers (f32, eager attention, weights widened to f32, one thread,
no KV cache) makes of it:

    prompt  [p]            token ids
    tokens  [33]           the greedy continuation: tokens[i] is the argmax of logits[i]
    logits  [33, vocab]    row 0 follows the prompt, row i follows tokens[i - 1]

`tests/golden_logits.rs` compares. The seeds are fixed: running this again gives the same files (with the same version of torch).
"""

import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM, BitNetConfig, Gemma2Config, Gemma3TextConfig, GptOssConfig, GraniteConfig, LlamaConfig, MinistralConfig,
    MistralConfig, Olmo2Config, Phi3Config, Qwen2Config, Qwen3Config, Qwen3MoeConfig, SmolLM3Config,
)

HERE = pathlib.Path(__file__).parent
STEPS = 32
# Greedy choices must be clear: prompts are drawn until every runner-up is this much of its row's largest magnitude below the first. The
# tests allow errors of 1e-4.
CLEAR = 1e-3

# What the configurations have in common. `vocab_size` is no multiple of anything a kernel may like.
COMMON = dict(vocab_size=301, hidden_size=64, max_position_embeddings=512, bos_token_id=None, eos_token_id=300, pad_token_id=None)

# The later ones are smaller still: they are many.
SMALL = dict(hidden_size=48)
PHI = dict(bos_token_id=1, pad_token_id=2)

CHECKPOINTS = {
    # QK-norm, tied head, heads wider than hidden / heads, two shards and an index.
    "qwen3": dict(
        config=Qwen3Config(
            **COMMON, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
            tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6),
        ),
        dtype=torch.float32, shard="200KB", prompt=41,
    ),
    # Biases of q, k and v, one KV head, a head of its own; bf16.
    "qwen2": dict(
        config=Qwen2Config(
            **COMMON, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1,
            tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=1e4),
        ),
        dtype=torch.bfloat16, prompt=43,
    ),
    # Biases everywhere, Llama 3's RoPE: of the eight wavelengths some are kept, some divided, some between, and most positions lie beyond
    # the original context; f16.
    "llama3-rope": dict(
        config=LlamaConfig(
            **COMMON, intermediate_size=88, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
            attention_bias=True, mlp_bias=True, tie_word_embeddings=False, rms_norm_eps=1e-5,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=48,
            ),
        ),
        dtype=torch.float16, prompt=101,
    ),
    # No GQA, a tied head, linear RoPE in the spelling of transformers 4, a width that fills no vector register.
    "llama-linear-rope": dict(
        config=LlamaConfig(
            **COMMON | dict(hidden_size=40), intermediate_size=72, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=5,
            tie_word_embeddings=True, rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type="linear", rope_theta=5e3, factor=4.0),
        ),
        dtype=torch.float32, prompt=37, old_spelling=True,
    ),
    # More experts than a row uses, and some that no row does.
    "qwen3-moe": dict(
        config=Qwen3MoeConfig(
            **COMMON | SMALL, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, num_experts=7, num_experts_per_tok=3, norm_topk_prob=True,
            tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=1e6),
        ),
        dtype=torch.bfloat16, prompt=41,
    ),
    # A window that the prompt leaves behind, in every layer.
    "mistral": dict(
        config=MistralConfig(
            **COMMON | SMALL, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            sliding_window=21, tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=1e4),
        ),
        dtype=torch.bfloat16, prompt=90,
    ),
    # Windows in some layers.
    "ministral": dict(
        config=MinistralConfig(
            **COMMON | SMALL, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            sliding_window=40, layer_types=["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"],
            tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=1e4),
        ),
        dtype=torch.bfloat16, prompt=70,
    ),
    # Fused projections and a window one short of a power of two, as Phi-3-mini has.
    "phi3": dict(
        config=Phi3Config(
            **COMMON | SMALL | PHI, intermediate_size=56, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
            sliding_window=31, tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=1e4),
        ),
        dtype=torch.float32, prompt=60,
    ),
    # Phi-4-mini: three quarters of a head rotated, LongRoPE whose switch lies within the answer, a tied head.
    "phi4-longrope": dict(
        config=Phi3Config(
            **COMMON | SMALL | PHI, intermediate_size=56, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
            sliding_window=None, tie_word_embeddings=True, original_max_position_embeddings=64,
            rope_parameters=dict(
                rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75, original_max_position_embeddings=64,
                short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.6], long_factor=[1.0, 1.5, 2.0, 4.0, 6.0, 9.0],
            ),
        ),
        dtype=torch.float32, prompt=52,
    ),
    # Soft caps that bite, windows in every other layer, norms before and after, wide heads with a scale of their own.
    "gemma2": dict(
        config=Gemma2Config(
            **COMMON | SMALL, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
            sliding_window=25, query_pre_attn_scalar=20, attn_logit_softcapping=3.0, final_logit_softcapping=0.5,
            hidden_activation="gelu_pytorch_tanh", rope_parameters=dict(rope_type="default", rope_theta=1e4),
        ),
        dtype=torch.float32, prompt=61,
    ),
    # Two rotary embeddings, one of them rescaled, five local layers to a global one.
    "gemma3": dict(
        config=Gemma3TextConfig(
            **COMMON | SMALL, intermediate_size=40, num_hidden_layers=7, num_attention_heads=2, num_key_value_heads=1, head_dim=24,
            sliding_window=30, query_pre_attn_scalar=20, hidden_activation="gelu_pytorch_tanh",
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
        ),
        dtype=torch.float32, prompt=61,
    ),
    # Norms within attention and MLP, squared ReLU. (Here its weights are floats; tests of formats have ternary ones.)
    "bitnet": dict(
        config=BitNetConfig(
            **COMMON | SMALL, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=5e5),
        ),
        dtype=torch.float32, prompt=41,
    ),
    # Experts with biases and a clamped SwiGLU, attention sinks, YaRN, windows in every other layer; bf16 experts are stored transposed.
    "gpt-oss": dict(
        config=GptOssConfig(
            **COMMON | SMALL, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            num_local_experts=5, num_experts_per_tok=2, sliding_window=20, layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=False, swiglu_limit=1.5,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=1.5e5, factor=4.0, beta_fast=8.0, beta_slow=1.0, truncate=False,
                original_max_position_embeddings=128,
            ),
        ),
        dtype=torch.bfloat16, prompt=61,
    ),
    # Every fourth layer does not encode positions.
    "smollm3": dict(
        config=SmolLM3Config(
            **COMMON | SMALL, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1,
            tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=2e6),
        ),
        dtype=torch.float32, prompt=41,
    ),
    # Four multipliers.
    "granite": dict(
        config=GraniteConfig(
            **COMMON | SMALL, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            embedding_multiplier=0.7, attention_multiplier=0.4, residual_multiplier=0.6, logits_scaling=2.5, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1e4),
        ),
        dtype=torch.float32, prompt=41,
    ),
    # Norms only after attention and MLP; those of queries and keys over all heads together.
    "olmo2": dict(
        config=Olmo2Config(
            **COMMON | SMALL, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=5e5),
        ),
        dtype=torch.bfloat16, prompt=41,
    ),
}


def tokenizer():
    """Byte-level BPE with a few merges and one special token, `<|end|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([__doc__] * 4, trainer)
    tokenizer.add_special_tokens(["<|end|>"])
    assert tokenizer.token_to_id("<|end|>") == 300
    return tokenizer


def randomise(model, generator):
    """Weights large enough that attention is sharp and every norm weight and bias shows in the logits."""
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                # Gemma stores its norms' weights less 1.
                p.copy_((0.0 if "Gemma" in type(model).__name__ else 1.0) + 0.4 * noise)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif name.endswith("sinks"):
                p.copy_(noise)
            elif ".experts." in name:
                # [experts, out, in], or [experts, in, out]: near enough.
                p.copy_(1.4 * noise / min(p.shape[1:]) ** 0.5)
            elif "embed_tokens" in name:
                # What scales embeddings up would otherwise answer with the token it read last.
                p.copy_((0.05 if "Gemma" in type(model).__name__ else 0.3) * noise)
            else:
                p.copy_(1.4 * noise / p.shape[1] ** 0.5)


def spell_as_transformers_4(path):
    """`rope_theta` and `rope_scaling` instead of `rope_parameters`, `torch_dtype` instead of `dtype`."""
    config = json.loads(path.read_text())
    rules = config.pop("rope_parameters")
    config["rope_theta"] = rules.pop("rope_theta")
    config["rope_scaling"] = rules
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2) + "\n")


def make(name, config, dtype, prompt, shard="1GB", old_spelling=False):
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, generator)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    (directory / "generation_config.json").unlink(missing_ok=True)
    tokenizer().save(str(directory / "tokenizer.json"), pretty=False)
    if old_spelling:
        spell_as_transformers_4(directory / "config.json")

    # The golden comes from the files, not from the model in memory.
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    gap = 0.0
    while gap < CLEAR:
        ids = torch.randint(0, config.vocab_size, (prompt,), generator=generator)
        tokens, logits = greedy(model, ids)
        best = logits.topk(2).values
        gap = ((best[:, 0] - best[:, 1]) / logits.abs().amax(1)).min().item()
    save_file(dict(prompt=ids.int(), tokens=tokens.int(), logits=logits), directory / "golden.safetensors")

    size = sum(f.stat().st_size for f in directory.iterdir()) >> 10
    print(f"{name}: {size} KiB, {len(tokens.unique())} distinct tokens, closest greedy choice {gap:.1e}")


def greedy(model, ids):
    """The continuation of `ids` and the logits it was chosen by; the whole sequence is computed anew for every token."""
    known, rows = ids, []
    with torch.no_grad():
        for _ in range(STEPS + 1):
            rows.append(model(known[None], use_cache=False).logits[0, -1].float())
            known = torch.cat([known, rows[-1].argmax()[None]])
    return known[len(ids):], torch.stack(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CHECKPOINTS:
        make(name, **CHECKPOINTS[name])
