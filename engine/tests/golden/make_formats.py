"""Makes the checkpoints under `formats/`, and the logits transformers computes with the matrices they stand for.

    pip install torch==2.13.0 transformers==5.23.0 tokenizers safetensors mlx[cpu]==0.32.4 mlx-lm==0.32.2 compressed-tensors==0.20.0
    pip install --no-deps accelerate autoawq==0.2.9
    pip install --no-deps --no-build-isolation gptqmodel==7.7.0   # and of what it imports: pypcre logbar tokenicer device-smi threadpoolctl defuser pillow
    python engine/tests/golden/make_formats.py

Each is one or two layers of random weights. The files are packed by the code that packs them for real — mlx-lm's `convert`, GPTQModel's and AutoAWQ's linear
layers, compressed-tensors' compressors, transformers' `pack_weights` — and taken apart again by each format's own reference, with its scales widened to f32 so
that nothing is rounded. Only rounding to the grid is done here: no format's file depends on how that was chosen.

`golden.safetensors` has

    prompt   [p]           token ids
    logits   [p, vocab]    transformers' (f32, eager attention) with the matrices taken apart
    rounded  [p, vocab]    the same with what goes into those matrices rounded to 8 bits in blocks of 32, as quire does for integer formats; not for floats

and `matrices.json`, of each quantised matrix, the CRC-32 of its f32 values `[out, in]`, little-endian. `tests/formats.rs` compares.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import tempfile
import types
import zlib

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import mlx.core as mx
import numpy as np
import torch
from make import randomise
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitNetConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig

OUT = pathlib.Path(__file__).parent / "formats"
PROMPT = 32

SMALL = dict(
    vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    max_position_embeddings=512, bos_token_id=None, eos_token_id=256, pad_token_id=None, tie_word_embeddings=True,
)
WIDE = SMALL | dict(hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256)


def tokenizer():
    """Bytes and one special token."""
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def base(name, config, dtype):
    """A checkpoint of floats, in a directory of its own."""
    directory = OUT / name
    shutil.rmtree(directory, ignore_errors=True)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, torch.Generator().manual_seed(sum(name.encode())))
    # Logits of a real model's spread: what 8-bit activations cost is measured against it.
    model.get_output_embeddings().weight.data *= 0.4
    model.to(dtype).save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    tokenizer().save(str(directory / "tokenizer.json"), pretty=False)
    return directory


def linears(tensors):
    return [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]


def configure(directory, **fields):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | fields, indent=2) + "\n")


def rounded(x, order):
    """Rounded to 8 bits in blocks of 32, in the order of the matrix's columns; a block's scale is a multiple of its row's unit."""
    blocks = (x if order is None else x[..., order]).unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    units = (largest.amax(-2, keepdim=True) / (127 * 16383)).clamp(min=torch.finfo(torch.float32).tiny)
    multiples = (largest * (1.0 / (127.0 * units))).ceil().clamp(max=16383)
    scales = units * multiples
    inverse = torch.where(multiples == 0, 0.0, 1.0 / scales)
    blocks = ((blocks * inverse).round() * scales).flatten(-2)
    return blocks if order is None else torch.empty_like(blocks).index_copy_(-1, order, blocks)


def fused(state):
    """Experts as transformers has them: one parameter for the gates and inputs of all, one for the outputs."""
    state = dict(state)
    stacks = {}
    for name in [name for name in state if ".mlp.experts." in name or ".switch_mlp." in name]:
        layer, rest = name.replace("switch_mlp", "experts").split(".experts.")
        *expert, projection, _ = rest.split(".")
        stacks.setdefault((layer, projection), {})[int(expert[0]) if expert else 0] = state.pop(name)
    for layer in {layer for layer, _ in stacks}:
        gate, up, down = (
            torch.stack([value for _, value in sorted(stacks[layer, projection].items())]) for projection in ("gate_proj", "up_proj", "down_proj")
        )
        gate, up, down = (x[0] if x.dim() == 4 else x for x in (gate, up, down))
        state |= {f"{layer}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{layer}.experts.down_proj": down}
    return state


@contextlib.contextmanager
def rounding(model, matrices, orders):
    """Rounds what is multiplied with the matrices."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = {}
    for module in matrices:
        layer, _, rest = module.replace("switch_mlp", "experts").partition(".experts.")
        if not rest:
            weights[parameters[f"{module}.weight"].data_ptr()] = orders.get(module)
            continue
        *expert, projection = rest.split(".")
        stack = parameters[f"{layer}.experts.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"]
        for at in [int(expert[0])] if expert else range(len(stack)):
            weights[stack[at].data_ptr()] = orders.get(module)
    plain = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        if weight.data_ptr() in weights:
            x = rounded(x, weights[weight.data_ptr()])
        return plain(x, weight, bias)

    torch.nn.functional.linear = linear
    yield
    torch.nn.functional.linear = plain


def finish(directory, config, floats, matrices, orders={}, integers=True):
    """Logits of the model whose parameters are `floats` with `matrices` in their places."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").float().eval()
    state = {name: value.float() for name, value in floats.items()} | {f"{m}.weight": v.float() for m, v in matrices.items()}
    missing, unexpected = model.load_state_dict(fused(state), strict=False)
    assert not unexpected and all(name == "lm_head.weight" for name in missing), (missing, unexpected)
    model.tie_weights()
    ids = torch.randint(0, config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(5))
    golden = dict(prompt=ids.int())
    with torch.no_grad():
        golden["logits"] = model(ids[None], use_cache=False).logits[0].contiguous()
        if integers:
            with rounding(model, matrices, orders):
                golden["rounded"] = model(ids[None], use_cache=False).logits[0].contiguous()
    save_file(golden, directory / "golden.safetensors")
    crc = lambda m: zlib.crc32(m.float().contiguous().numpy().astype("<f4").tobytes())
    matrices = {f"{module.replace('switch_mlp', 'experts')}.weight": crc(value) for module, value in matrices.items()}
    (directory / "matrices.json").write_text(json.dumps(matrices, indent=1) + "\n")
    sizes = {f.name: f.stat().st_size >> 10 for f in directory.iterdir()}
    print(f"{directory.name}: {sizes}")


def replace(directory, name_of, config, orders={}, integers=True):
    """Puts what `name_of(module, weight)` returns — the tensors to store, and the matrix they stand for — in the place of each projection."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    matrices, stored = {}, {}
    for module in linears(tensors):
        parts, matrices[module] = name_of(module, tensors.pop(f"{module}.weight"))
        stored |= {f"{module}.{suffix}": value.contiguous() for suffix, value in parts.items()}
    save_file(tensors | stored, path, metadata=dict(format="pt"))
    finish(directory, config, tensors, matrices, orders, integers)


def grid(weight, bits, group, symmetric, kind=torch.float16, order=None):
    """Scales and zeros `[out, groups]` for rounding to the nearest. Some zeros lie at both ends of their range."""
    out, cols = weight.shape
    group = cols if group == -1 else min(group, cols)
    weight = weight.float() if order is None else weight.float()[:, order]
    groups = weight.reshape(out, -1, group)
    top = 2**bits - 1
    if symmetric:
        scales = groups.abs().amax(2) / (top // 2)
        return scales.to(kind), torch.full(scales.shape, 2 ** (bits - 1))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    # Now and then a group that is only used on one side of its zero.
    low[:, ::3] *= (torch.arange(out) % 5 != 0)[:, None]
    high[:, 1::3] *= (torch.arange(out) % 7 != 0)[:, None]
    scales = ((high - low) / top).clamp(min=1e-4).to(kind)
    return scales, (-low / scales.float()).round().clamp(0, top).int()


# MLX


def mlx(name, config, dtype, bits, group, predicate=None):
    from mlx_lm.convert import convert

    directory = base(name, config, dtype)
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        # mlx-lm wants a tokenizer that transformers can load.
        (directory / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast")))
        if hasattr(config, "num_experts"):
            # As transformers 4 spelt them.
            configure(directory, num_experts=config.num_experts, rope_theta=config.rope_parameters["rope_theta"])
        convert(str(directory), f"{temporary}/out", quantize=True, q_bits=bits, q_group_size=group, quant_predicate=predicate)
        for file in ["model.safetensors", "config.json"]:
            shutil.copy(f"{temporary}/out/{file}", directory / file)
        (directory / "tokenizer_config.json").unlink()
    quantisation = json.loads((directory / "config.json").read_text())["quantization"]
    tensors = mx.load(str(directory / "model.safetensors"))
    matrices, floats = {}, {}
    for key, value in tensors.items():
        module, suffix = key.rsplit(".", 1)
        if f"{module}.scales" not in tensors:
            floats[key] = torch.from_numpy(np.array(value.astype(mx.float32)))
        elif suffix == "weight":
            own = quantisation.get(module)
            own = own if isinstance(own, dict) else quantisation
            side = [tensors[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases")]
            wide = mx.dequantize(value, *side, group_size=own["group_size"], bits=own["bits"])
            matrices[module] = torch.from_numpy(np.array(wide))
    finish(directory, config, floats, matrices)


# GPTQ


def gptq(name, config, bits, group, symmetric, desc_act, version, dtype=torch.float16):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    directory = base(name, config, dtype)
    orders = {}

    def one(module, weight):
        out, cols = weight.shape
        size = cols if group == -1 else min(group, cols)
        # What is multiplied with the same features is sorted alike, since these decide the order; but attention's are kept apart here to see that they may be.
        seen = module.rpartition(".")[0] + str(cols) if "experts" in module else module
        generator = torch.Generator().manual_seed(zlib.crc32(seen.encode()))
        order = torch.randperm(cols, generator=generator) if desc_act else torch.arange(cols)
        g_idx = torch.empty(cols, dtype=torch.int32)
        g_idx[order] = torch.arange(cols, dtype=torch.int32) // size
        orders[module] = g_idx.long().argsort(stable=True)
        scales, zeros = grid(weight, bits, group, symmetric, order=order)
        linear = torch.nn.Linear(cols, out, bias=False)
        linear.weight.data = weight.float()
        # Codes that do not fit are clamped by the packer.
        packed = TorchLinear(bits=bits, group_size=size, sym=symmetric, desc_act=desc_act, in_features=cols, out_features=out, bias=False)
        packed.pack_original(linear, scales.float(), zeros.float(), g_idx)
        packed.post_init()
        wide = types.SimpleNamespace(scales=packed.scales)
        packed.scales = packed.scales.float()
        matrix = packed.dequantize_weight().T.float()
        packed.scales = wide.scales
        if version == "gptq":
            convert_gptq_v2_to_v1_format_module(packed, types.SimpleNamespace(bits=bits, pack_dtype=torch.int32))
        parts = dict(qweight=packed.qweight, qzeros=packed.qzeros, scales=packed.scales, g_idx=packed.g_idx)
        return {part: value.detach().clone() for part, value in parts.items()}, matrix

    replace(directory, one, config, orders)
    configure(directory, quantization_config=dict(
        quant_method="gptq", bits=bits, group_size=group, sym=symmetric, desc_act=desc_act, checkpoint_format=version, lm_head=False,
    ))


# AWQ


def import_awq():
    """Packages without their `__init__`, which imports model classes that transformers no longer has."""
    if "awq" not in sys.modules:
        root = pathlib.Path(importlib.util.find_spec("awq").origin).parent
        for package in ["awq", "awq.utils", "awq.modules", "awq.modules.linear"]:
            module = sys.modules[package] = types.ModuleType(package)
            module.__path__ = [str(root / pathlib.Path(*package.split(".")[1:]))]


def awq(name, config, group):
    import_awq()
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    directory = base(name, config, torch.float16)

    def one(module, weight):
        size = weight.shape[1] if group == -1 else min(group, weight.shape[1])
        scales, zeros = grid(weight, 4, group, False)
        # The packer does not clamp, so it is given weights that are on the grid.
        step, zero = (x.repeat_interleave(size, 1).float() for x in (scales, zeros))
        codes = (weight.float() / step + zero).round().clamp(0, 15)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = (codes - zero) * step
        packed = WQLinear_GEMM.from_linear(linear, 4, size, False, scales.T.contiguous().float(), zeros.T.contiguous().float())
        matrix = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, size).T
        assert torch.allclose(matrix, linear.weight.data, atol=1e-2)
        return dict(qweight=packed.qweight, qzeros=packed.qzeros, scales=packed.scales), matrix

    replace(directory, one, config)
    configure(directory, quantization_config=dict(quant_method="awq", bits=4, group_size=group, zero_point=True, version="gemm"))


# BitNet


def bitnet(name, config, linear_class):
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    directory = base(name, config, torch.bfloat16)

    def one(module, weight):
        weight = weight.float()
        scale = (1.0 / weight.abs().mean()).bfloat16()
        trits = (weight * scale.float()).round().clamp(-1, 1)
        packed = pack_weights(trits.clone())
        trits = unpack_weights(packed, torch.float32)
        if linear_class == "bitlinear":
            return dict(weight=packed, weight_scale=scale[None]), trits / scale.float()
        scale = (1.0 / scale.float()).bfloat16()
        return dict(weight=packed, weight_scale=scale[None]), trits * scale.float()

    replace(directory, one, config)
    mode = dict(linear_class=linear_class, quantization_mode="offline") if linear_class != "bitlinear" else {}
    configure(directory, quantization_config=dict(quant_method="bitnet", modules_to_not_convert=None, **mode))


def bitnet_online(name, config):
    from transformers.integrations.bitnet import WeightQuant

    directory = base(name, config, torch.bfloat16)
    replace(directory, lambda module, weight: (dict(weight=weight), WeightQuant.apply(weight).float() + 0.0), config)  # no negative zeros
    configure(directory, quantization_config=dict(quant_method="bitnet", linear_class="autobitlinear", quantization_mode="online"))


# FP8


def fp8(name, config, block):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    directory = base(name, config, torch.bfloat16)
    reference = Fp8Dequantize(None)

    def one(module, weight):
        out, cols = weight.shape
        # In blocks that the last row and column of them do not fill.
        rows, columns = (-(-out // block[0]), -(-cols // block[1])) if block else (1, 1)
        height, width = block or (out, cols)
        padded = torch.zeros(rows * height, columns * width)
        padded[:out, :cols] = weight.float()
        largest = padded.reshape(rows, height, columns, width).abs().amax((1, 3))
        scales = largest / 448.0
        wide = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)
        quants = (padded / wide).to(torch.float8_e4m3fn)
        matrix = reference._dequantize_one(quants, scales, torch.float32)[:out, :cols]
        if block:
            return dict(weight=quants[:out, :cols], weight_scale_inv=scales), matrix
        return dict(weight=quants, weight_scale=scales.reshape(())), matrix

    replace(directory, one, config, integers=False)
    configure(directory, quantization_config=dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=block))


# compressed-tensors


def compressed(name, config, form, weights, activations=None, kind=torch.bfloat16):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    directory = base(name, config, torch.bfloat16)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=activations and QuantizationArgs(**activations)
    )
    compressor = BaseCompressor.get_value_from_registry(form)

    def one(module, weight):
        out, cols = weight.shape
        strategy = scheme.weights.strategy
        size = scheme.weights.group_size if strategy == "group" else cols
        groups = weight.float().reshape(out, -1, size)
        low, high = groups.amin(2), groups.amax(2)
        if strategy == "tensor":
            low, high = low.amin().reshape(1), high.amax().reshape(1)
        scales, zeros = calculate_qparams(low, high, scheme.weights)
        scales = scales.to(kind)
        state = dict(weight=weight.float(), weight_scale=scales)
        if not scheme.weights.symmetric:
            state["weight_zero_point"] = zeros.to(torch.int8)
        parts = compressor.compress(state, scheme)
        matrix = compressor.decompress(parts | dict(weight_scale=scales.float()), scheme)["weight"]
        return parts, matrix.float()

    replace(directory, one, config, integers=weights["type"] == "int")
    section = dict(
        quant_method="compressed-tensors", format=form, ignore=["lm_head"], quantization_status="compressed",
        config_groups=dict(group_0=json.loads(scheme.model_dump_json())),
    )
    configure(directory, quantization_config=section)


if __name__ == "__main__":
    torch.set_num_threads(1)
    llama, qwen3, wide = LlamaConfig(**SMALL), Qwen3Config(**SMALL), LlamaConfig(**WIDE)
    untied = LlamaConfig(**SMALL | dict(tie_word_embeddings=False, num_hidden_layers=1))

    mlx("mlx-4bit", qwen3, torch.bfloat16, 4, 64)
    mlx("mlx-8bit-f16", llama, torch.float16, 8, 32)
    # Bits and groups of their own for some, one that is not quantised, and a head.
    own = lambda path, *_: "v_proj" not in path and (dict(bits=8, group_size=128, mode="affine") if "down_proj" in path else dict(bits=4, group_size=32, mode="affine"))
    mlx("mlx-mixed-f32", untied, torch.float32, 4, 64, own)

    experts = Qwen3MoeConfig(**SMALL | dict(num_hidden_layers=1), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True)
    mlx("mlx-experts", experts, torch.bfloat16, 4, 32)
    gptq("gptq-experts-desc-act", experts, 4, 32, False, True, "gptq_v2")
    gptq("gptq-4bit-g32-desc-act", qwen3, 4, 32, False, True, "gptq")
    gptq("gptq-4bit-g128", wide, 4, 128, True, False, "gptq")
    gptq("gptq-8bit-g64-v2", llama, 8, 64, False, False, "gptq_v2")
    gptq("gptq-8bit-row", llama, 8, -1, False, True, "gptq")

    awq("awq-g64", llama, 64)
    awq("awq-g128", wide, 128)
    awq("awq-row", qwen3, -1)

    bitnet("bitnet", llama, "bitlinear")
    bitnet("bitnet-auto", BitNetConfig(**SMALL), "autobitlinear")
    bitnet_online("bitnet-online", untied)

    fp8("fp8-blocks", LlamaConfig(**WIDE | dict(intermediate_size=136, num_attention_heads=2)), [128, 128])
    fp8("fp8-matrix", llama, None)

    floats, eight = dict(num_bits=8, type="float", symmetric=True), dict(num_bits=8, type="int")
    dynamic = dict(num_bits=8, type="float", symmetric=True, strategy="token", dynamic=True)
    compressed("compressed-fp8", llama, "float-quantized", floats | dict(strategy="channel"), dynamic)
    compressed("compressed-fp8-naive", llama, "naive-quantized", floats | dict(strategy="tensor"), kind=torch.float32)
    compressed("compressed-int8", llama, "int-quantized", eight | dict(strategy="channel", symmetric=True), dict(num_bits=8, type="int", strategy="token", dynamic=True))
    four = dict(num_bits=4, type="int", strategy="group")
    compressed("compressed-int4-g128", wide, "pack-quantized", four | dict(group_size=128, symmetric=True))
    compressed("compressed-int4-g32", qwen3, "pack-quantized", four | dict(group_size=32, symmetric=False), kind=torch.float16)
