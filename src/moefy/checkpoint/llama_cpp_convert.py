"""Run llama.cpp's convert_hf_to_gguf.py: `python -m … LLAMA_CPP_FOLDER ARGUMENTS…`.

Three things are changed. Where an architecture has its own tokenizer, the converter runs the code
that lies in the model's folder; here none is run. It gives every glm4_moe model the special tokens
of GLM's own tokenizer and stops where there are none; here such a model keeps the tokenizer that it
has. And it does not know that Granite's MoE can have Llama 3's rotary factors, which llama.cpp
reads there.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path


def main(root: Path, arguments: list[str]) -> None:
    """Convert; exits as the script does."""
    sys.path[:0] = [str(root / "gguf-py"), str(root)]
    tokenizers = import_module("transformers").AutoTokenizer
    load = tokenizers.from_pretrained
    tokenizers.from_pretrained = lambda *paths, **options: load(
        *paths, **options | {"trust_remote_code": False}
    )
    glm = import_module("conversion.glm").Glm4MoeModel
    with_own_tokens = glm.set_vocab

    def set_vocab(model: object) -> None:
        try:
            with_own_tokens(model)
        except KeyError:  # no [gMASK]: not GLM's tokenizer
            model._set_vocab_gpt2()  # type: ignore[attr-defined]

    glm.set_vocab = set_vocab
    gguf = import_module("gguf")
    for arch in (gguf.MODEL_ARCH.GRANITE_MOE, gguf.MODEL_ARCH.GRANITE_SWA):
        gguf.MODEL_TENSORS[arch].append(gguf.MODEL_TENSOR.ROPE_FREQS)
    script = str(root / "convert_hf_to_gguf.py")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
