"""Compares quire with llama.cpp on the same files.

    cargo build --release --bin quire --example logits
    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    pip install ./llama_cpp_python-0.3.36 torch transformers gguf sentencepiece
    python engine/tests/llama_cpp/compare.py llama_cpp_python-0.3.36/vendor/llama.cpp

Converts the demo model with llama.cpp's converter, quantises it with llama.cpp's quantiser, and asks both engines for the logits after every
token of some text. The demo model is narrower than a block of 256 weights, so the files are of the same model made wider with zeros (`widen`),
which computes the same. A ternary model it is not: for TQ1_0 and TQ2_0 it is trained to be one first, which takes some minutes and is kept in
`target/llama_cpp/`. README.md has the tables of the last run.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import llama_cpp
import numpy as np
import torch
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
DEMO = ROOT / "engine/demo-model"
# Where llama.cpp computes another function than the families' authors. (Of the first three, transformers was made to do the same.)
KNOWN = {
    "bitnet": "llama.cpp's graph has SiLU; with `hidden_act: silu` transformers computes what it does (4e-6)",
    "gpt-oss": "llama.cpp rounds YaRN's range to whole dimensions; with `truncate: true` transformers computes what it does (4e-6)",
    "phi3": "llama.cpp has no window in Phi-3; without one transformers computes what it does (5e-6)",
    "gemma2": "llama.cpp looks GELU up in a table of f16 (`GGML_GELU_FP16`)", "gemma3": "llama.cpp looks GELU up in a table of f16 (`GGML_GELU_FP16`)",
}
GOLDEN = ROOT / "engine/tests/golden"
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"

KINDS = {"F32": 0, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18,
         "IQ4_NL": 25, "IQ4_XS": 30, "TQ1_0": 36, "TQ2_0": 37}
TERNARY = {"TQ1_0", "TQ2_0"}
STEPS = 70
F16, F32 = 1, 0  # ggml's numbers
QUESTIONS, TEXTS, THREADS = 50, 60, 2


# ---- files

def convert(converter, directory, out, kind, pre="qwen2"):
    code = f"""
import sys
sys.path[:0] = [{str(converter)!r}, {str(converter / 'gguf-py')!r}]
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre!r}
sys.argv = ["convert", {str(directory)!r}, "--outfile", {str(out)!r}, "--outtype", {kind!r}]
convert_hf_to_gguf.main()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def ternary_weights(weight):
    """-1, 0 and 1 times the mean magnitude, which TQ1_0 and TQ2_0 hold exactly."""
    scale = weight.abs().mean().half().float()
    return (weight / scale).round().clamp(-1, 1) * scale


class Ternary(torch.nn.Module):
    """Ternary on the way forward, itself on the way back (Ma et al. 2024)."""

    def forward(self, weight):
        return weight + (ternary_weights(weight) - weight).detach()

    def right_inverse(self, weight):
        return weight


def ternary_demo():
    """The demo model's tensors after some training with ternary matrices, on its own questions and answers."""
    kept = TARGET.parent / "llama_cpp/ternary.safetensors"
    if not kept.exists():
        from torch.nn.utils import parametrize
        from transformers import AutoModelForCausalLM
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
        matrices = [module for name, module in model.named_modules() if name.endswith("proj")]
        for matrix in matrices:
            parametrize.register_parametrization(matrix, "weight", Ternary())
        sequences = [torch.tensor(ids[:192]) for ids in texts(84)]
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, step / 8) * (1 - step / STEPS)
            chosen = [sequences[at] for at in torch.randperm(len(sequences))[:8]]
            batch = torch.stack([ids[:min(map(len, chosen))] for ids in chosen])
            loss = model(batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        print(f"trained the ternary model to a loss of {loss.item():.2f}", flush=True)
        for matrix in matrices:
            parametrize.remove_parametrizations(matrix, "weight")
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, kept)
    return {name: ternary_weights(tensor) if "proj" in name else tensor for name, tensor in load_file(kept).items()}


def widen(tensors, out):
    """A model of the demo model's shape with hidden and inner sizes filled up with zeros to multiples of 256, and a fourth head of zeros.

    A norm divides by the root of the mean over 256 instead of 192 squares: its weights and epsilon make up for it. All that the fourth head
    adds is multiplied by zeros of the output projection.
    """
    config = json.loads((DEMO / "config.json").read_text())
    hidden, inner, heads, head = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim"))
    sizes = {hidden: 256, inner: 768}
    assert heads * head == hidden
    wider = {}
    for name, tensor in tensors.items():
        tensor = tensor.float()
        if name.endswith("norm.weight") and tensor.shape == (hidden,):
            tensor = tensor * (hidden / 256) ** 0.5
        shape = [size if "embed" in name and axis == 0 else sizes.get(size, size) for axis, size in enumerate(tensor.shape)]
        wide = torch.zeros(shape)
        wide[tuple(slice(size) for size in tensor.shape)] = tensor
        wider[name] = wide
    config |= {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "dtype": "float32"}
    config["rms_norm_eps"] *= hidden / 256
    out.mkdir()
    for file in DEMO.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, out)
    (out / "config.json").write_text(json.dumps(config))
    save_file(wider, out / "model.safetensors", metadata={"format": "pt"})


def quantise(source, out, kind):
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = KINDS[kind], THREADS, True
    with quiet():
        assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters)) == 0, kind


@contextlib.contextmanager
def quiet():
    """llama.cpp's own words go to /dev/null."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(null)
        os.close(saved)


# ---- engines

def llama(path, sequences, kv):
    with quiet():
        model = llama_cpp.Llama(str(path), n_ctx=max(map(len, sequences)) + 1, logits_all=True, n_threads=THREADS, n_threads_batch=THREADS,
                                type_k=kv, type_v=kv, verbose=False, kv_overrides={"general.name": "model"},
                                # Negative: what the file says, where the binding's defaults would say something else.
                                yarn_beta_fast=-1.0, yarn_beta_slow=-1.0, yarn_attn_factor=-1.0)
        rows = []
        for tokens in sequences:
            model.reset()
            model.eval(tokens)
            rows.append(model.scores[:len(tokens)].copy())
        vocabulary = model.n_vocab()
        model.close()
    return np.concatenate(rows)[:, :vocabulary]


def quire(path, sequences, kv):
    lines = "\n".join(" ".join(map(str, tokens)) for tokens in sequences) + "\n"
    command = [TARGET / "examples/logits", path, "--kv", {F16: "f16", F32: "f32"}[kv], "--threads", str(THREADS)]
    run = subprocess.run(command, input=lines.encode(), capture_output=True, check=True)
    return np.frombuffer(run.stdout, "<f4").reshape(sum(map(len, sequences)), -1)


def divergence(p, q):
    """KL(p ‖ q) of each row's softmax."""
    log = lambda x: (x := x.astype(np.float64) - x.max(1, keepdims=True)) - np.log(np.exp(x).sum(1, keepdims=True))
    p, q = log(p), log(q)
    return (np.exp(p) * (p - q)).sum(1)


# ---- comparisons

def texts(count=TEXTS):
    """Conversations of several questions and answers, as ids."""
    answers = [json.loads(line) for line in (DEMO / "answers.jsonl").read_text().splitlines()]
    say = lambda a: f"<|im_start|>user\n{a['question']}<|im_end|>\n<|im_start|>assistant\n{a['greedy_answer']}<|im_end|>\n"
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return [tokenizer.encode("".join(map(say, answers[i * 5:i * 5 + 5]))).ids for i in range(count)]


def formats(converter, work):
    sequences = texts()
    print(f"\n{sum(map(len, sequences))} positions of {len(sequences)} texts, KV cache f16; KL in nats, mean\n")
    print("| format | KL(f32‖quire) | KL(f32‖llama.cpp) | ours / theirs (± standard error) | KL(llama.cpp‖quire) | largest | same first choice |")
    print("|---|---|---|---|---|---|---|")
    reference = {}
    failed = []
    for ternary in (False, True):
        directory, base = work / f"wide-{ternary}", work / f"wide-{ternary}.gguf"
        widen(ternary_demo() if ternary else load_file(DEMO / "model.safetensors"), directory)
        convert(converter, directory, base, "f32")
        reference[ternary] = llama(base, sequences, F32)
        alike = divergence(reference[ternary], quire(base, sequences, F32)).mean()
        print(f"| F32{', ternary' * ternary} | {alike:.1e} | – | – | {alike:.1e} | | |")
        if not ternary:
            narrow = work / "demo-f32.gguf"
            convert(converter, DEMO, narrow, "f32")
            same = divergence(llama(narrow, sequences, F32), reference[False]).mean()
            assert same < 1e-9, f"the wider model is another one: {same}"
    for kind in list(KINDS)[1:]:
        path = work / f"{kind}.gguf"
        quantise(work / f"wide-{kind in TERNARY}.gguf", path, kind)
        truth, theirs, ours = reference[kind in TERNARY], llama(path, sequences, F16), quire(path, sequences, F16)
        of_ours, of_theirs, between = divergence(truth, ours), divergence(truth, theirs), divergence(theirs, ours)
        q, l = of_ours.mean(), of_theirs.mean()
        error = (of_ours - of_theirs * q / l).std() / len(of_ours) ** 0.5 / l
        same = (theirs.argmax(1) == ours.argmax(1)).mean()
        print(f"| {kind} | {q:.3e} | {l:.3e} | {q / l:.3f} ± {error:.3f} | {between.mean():.1e} | {between.max():.1e} | {same:.2%} |", flush=True)
        if between.mean() > 1e-3 or q > 1.05 * l:
            failed.append(kind)
    return failed


def greedy(converter, work):
    questions = [json.loads(line)["question"] for line in (DEMO / "answers.jsonl").read_text().splitlines()][:QUESTIONS]
    failed = []
    print("\n| demo model as | greedy answers alike |\n|---|---|")
    for kind in ("f32", "f16", "bf16"):
        path = work / f"demo-{kind}.gguf"
        convert(converter, DEMO, path, kind)
        with quiet():
            model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=THREADS, type_k=F32, type_v=F32, verbose=False)
        same = 0
        for question in questions:
            # llama.cpp's chat functions put their own idea of ChatML around it; this is what the model's template makes.
            prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            answer = []
            model.reset()
            for token in model.generate(model.tokenize(prompt.encode(), special=True), top_k=1, temp=0.0, repeat_penalty=1.0):
                if token == model.token_eos() or len(answer) == 100:
                    break
                answer.append(token)
            theirs = model.detokenize(answer).decode()
            ours = subprocess.run([TARGET / "quire", "run", "--model", path, "--temperature", "0", "--max-tokens", "100",
                                   "--kv-cache-dtype", "f32", question],
                                  stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
            if ours.strip() == theirs.strip():
                same += 1
            else:
                print(f"{question}\n  llama.cpp: {theirs!r}\n  quire:     {ours!r}")
        print(f"| {kind} | {same} of {len(questions)} |", flush=True)
        if same != len(questions):
            failed.append(f"greedy {kind}")
    return failed


def families(work):
    """The golden files of every family: what llama.cpp computes of them, where it can."""
    failed = []
    print("\nFiles with 16-bit weights are widened to f32 first: llama.cpp rounds activations to the weights' type, quire does not.\n")
    print("| golden file | largest relative difference of logits | mean KL(llama.cpp‖quire) | |\n|---|---|---|---|")
    for path in sorted((GOLDEN / "gguf").glob("*.gguf")):
        golden = GOLDEN / path.stem / "golden.safetensors"
        if golden.exists():
            file = load_file(golden)
            tokens = torch.cat([file["prompt"], file["tokens"][:-1]]).tolist()
        else:
            tokens = list(range(1, 120, 2))
        try:
            wide = work / path.name
            # Those with quantised matrices stay what they are.
            if path.stem.startswith(("wide", "llama3-rope-")):
                shutil.copy(path, wide)
            else:
                quantise(path, wide, "F32")
            path = wide
            theirs = llama(path, [tokens], F32)
        except Exception as error:
            print(f"| {path.stem} | llama.cpp: {error} | | |", flush=True)
            continue
        ours = quire(path, [tokens], F32)
        difference = (np.abs(ours - theirs).max(1) / np.abs(theirs).max(1)).max()
        if difference > 1e-4 and path.stem not in KNOWN and not path.stem.startswith(("wide", "llama3-rope-")):
            failed.append(path.stem)
        print(f"| {path.stem} | {difference:.1e} | {divergence(theirs, ours).mean():.1e} | {KNOWN.get(path.stem, '')} |", flush=True)
    return failed


def main():
    converter = pathlib.Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as directory:
        work = pathlib.Path(directory)
        failed = formats(converter, work) + greedy(converter, work) + families(work)
    sys.exit(f"failed: {', '.join(failed)}" if failed else None)


if __name__ == "__main__":
    main()
