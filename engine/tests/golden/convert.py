"""Converts the checkpoints beside this file with llama.cpp's own converter.

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    pip install torch transformers gguf sentencepiece
    python engine/tests/golden/convert.py llama_cpp_python-0.3.36/vendor/llama.cpp

`gguf/NAME.gguf` is what it writes for `NAME/`, in f32 or the precision of the checkpoint. Only the tokenizer is told to it: the converter
knows pre-tokenizers by a hash of what they do to a text, and those of made-up models it does not know. `tests/golden_logits.rs` compares
with the goldens.
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
NAMES = {
    "qwen3-moe": "bf16", "ministral": None, "mistral": None, "phi3": "f32", "phi4-longrope": "f32", "gemma2": "f32", "gemma3": "f32",
    "bitnet": "f32", "gpt-oss": "bf16", "smollm3": "f32", "granite": "f32", "olmo2": "bf16",
}


def main(converter):
    sys.path[:0] = [str(converter), str(converter / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    # As it stands in the file; the classes of some families would add tokens of their own.
    import transformers
    transformers.AutoTokenizer.from_pretrained = lambda path, **_: transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(pathlib.Path(path) / "tokenizer.json"))
    # Those of Gemma 2 and Phi-3 want a SentencePiece model, which these checkpoints have not.
    TextModel._set_vocab_sentencepiece = TextModel._set_vocab_gpt2
    from conversion.phi import Phi3MiniModel
    Phi3MiniModel.set_vocab = TextModel._set_vocab_gpt2
    from conversion.bitnet import BitnetModel
    BitnetModel.set_vocab = TextModel._set_vocab_gpt2
    # It makes BitNet's weights ternary, which here are not.
    BitnetModel.weight_quant = lambda self, weight: weight
    # It knows the norms inside by the names of the first BitNets.
    old = {"self_attn.attn_sub_norm": "self_attn.inner_attn_ln", "mlp.ffn_sub_norm": "mlp.ffn_layernorm"}
    modify = BitnetModel.modify_tensors

    def renamed(self, data, name, layer):
        for ours, theirs in old.items():
            name = name.replace(ours, theirs)
        return modify(self, data, name, layer)

    BitnetModel.modify_tensors = renamed
    for name, kind in NAMES.items():
        if kind:
            out = HERE / "gguf" / f"{name}.gguf"
            sys.argv = ["convert", str(HERE / name), "--outfile", str(out), "--outtype", kind]
            convert_hf_to_gguf.main()
            print(name, out.stat().st_size >> 10, "KiB")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve())
