"""Makes the checkpoints beside this file and the logits transformers computes from them.

    pip install torch==2.13.0 transformers==5.23.0 tokenizers safetensors
    python engine/tests/golden/make.py

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

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

HERE = pathlib.Path(__file__).parent
STEPS = 32
# Greedy choices must be clear: prompts are drawn until every runner-up is this much of its row's largest magnitude below the first. The
# tests allow errors of 1e-4.
CLEAR = 1e-3

# What the configurations have in common. `vocab_size` is no multiple of anything a kernel may like.
COMMON = dict(vocab_size=301, hidden_size=64, max_position_embeddings=512, bos_token_id=None, eos_token_id=300, pad_token_id=None)

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
                p.copy_(1.0 + 0.4 * noise)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                p.copy_(0.3 * noise)
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
    for name, checkpoint in CHECKPOINTS.items():
        make(name, **checkpoint)
