"""A toy model, text and conversations, made on the spot: what `study --smoke` runs on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moefy.data.strategies import SLIMPAJAMA
from moefy.progress import ProgressFn
from moefy.storage import whole_folder, write_records
from moefy.studies.recipe import StudyRecipe
from moefy.training.run import train

_SHAPE = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
_TRAINED_TOKENS = 24_576
_DOCUMENTS, _LETTERS = 150, 400

SMOKE: dict[str, Any] = {
    "tokens": 512,
    "seeds": 2,
    "sequence_length": 64,
    "windows": 3,
    "evaluations": 2,
    "prompt_tokens": 16,
    "new_tokens": 4,
    "rounds": 1,
    "convert": {"calibration_tokens": 1024, "calibration_length": 64},
    "train": {"global_batch_size": 2, "micro_batch_size": 2, "precision": "float32"},
    "tune": {"epochs": 1, "sequence_length": 128, "global_batch_size": 4, "precision": "float32"},
}
"""Settings at which every ablation ends within minutes on two cores."""


def smoke_recipe(**choices: Any) -> StudyRecipe:
    """Return the recipe of a smoke run."""
    return StudyRecipe.build(**SMOKE | choices)


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


def make_toys(folder: Path, report: ProgressFn) -> None:
    """Write `text/`, `conversations.jsonl` and `model/`, whatever is not there yet.

    The model is trained for a moment, so that its conversions differ from it.
    """
    text, talks, model = folder / "text", folder / "conversations.jsonl", folder / "model"
    if not text.is_dir():
        with whole_folder(text) as partial:
            _write_text(partial)
    if not talks.is_file():
        write_records(talks, _conversations())
    if not (model / "config.json").is_file():
        with whole_folder(folder / "untrained") as partial:
            _write_model(partial)
        train(
            folder / "untrained",
            model,
            data=text,
            tokens=_TRAINED_TOKENS,
            sequence_length=64,
            global_batch_size=4,
            micro_batch_size=4,
            learning_rate=1e-2,
            precision="float32",
            report=report,
        )


def _write_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**_SHAPE)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _write_text(folder: Path) -> None:
    """Write SlimPajama's seven domains, each of a few letters of its own."""
    generator = np.random.default_rng(0)
    for place, domain in enumerate(SLIMPAJAMA):
        letters = list("abcdefghijklmnopqrstuvwxyz"[2 * place : 2 * place + 6] + " ")
        habits = generator.dirichlet(np.full(len(letters), 0.3), size=len(letters))
        lines = []
        for _ in range(_DOCUMENTS):
            letter, written = 0, []
            for _ in range(_LETTERS):
                letter = generator.choice(len(letters), p=habits[letter])
                written.append(letters[letter])
            lines.append(json.dumps({"text": "".join(written)}) + "\n")
        (folder / f"{domain}.jsonl").write_text("".join(lines))


def _conversations() -> list[dict[str, Any]]:
    """Return questions that have an answer; a few of them are held out by their content."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} + {b}?"},
                {"role": "assistant", "content": f"It is {a + b}."},
            ]
        }
        for a in range(8)
        for b in range(10)
    ]
