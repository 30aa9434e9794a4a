"""A toy model and text, made on the spot: what studies are tried on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moefy.data.strategies import SLIMPAJAMA
from moefy.training.run import train

SHAPE = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
SMOKE: dict[str, Any] = {
    "tokens": 512,
    "seeds": 2,
    "sequence_length": 64,
    "windows": 3,
    "convert": {"calibration_tokens": 1024, "calibration_length": 64},
    "train": {"global_batch_size": 2, "micro_batch_size": 2, "precision": "float32"},
}
"""Settings at which every ablation ends within a minute or two on two cores."""


def byte_tokenizer() -> Any:
    """Return a tokenizer of one token per byte, and one that ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def write_toy_llama(folder: Path, **settings: Any) -> Path:
    """Write a random LLaMA with grouped-query attention and a byte tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE | settings)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def make_toys(folder: Path) -> tuple[Path, Path]:
    """Write a model and text; return their paths."""
    model, text = folder / "model", folder / "text"
    text.mkdir(parents=True)
    _write_text(text)
    # The FFNs of a random model do little, so its splits would hardly differ from it.
    train(
        write_toy_llama(folder / "untrained"),
        model,
        data=text,
        tokens=24_576,
        sequence_length=64,
        global_batch_size=4,
        micro_batch_size=4,
        learning_rate=1e-2,
        precision="float32",
    )
    return model, text


def _write_text(folder: Path) -> None:
    """Write SlimPajama's seven domains, each of a few letters of its own."""
    generator = np.random.default_rng(0)
    for place, domain in enumerate(SLIMPAJAMA):
        letters = list("abcdefghijklmnopqrstuvwxyz"[2 * place : 2 * place + 6] + " ")
        # Some letters are frequent and some rare, so that there is something to learn.
        shares = generator.dirichlet(np.full(len(letters), 0.3))
        texts = ["".join(generator.choice(letters, size=400, p=shares)) for _ in range(150)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{domain}.jsonl").write_text(lines)
