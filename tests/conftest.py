"""Tiny real models, text and a tokenizer, built on the fly."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moefy
from moefy.checkpoint.source import builtin
from moefy.recipe import LLAMA_MOE
from moefy.storage import cache_folder
from tests.kills import Server
from tests.toys import byte_tokenizer

settings.register_profile("moefy", deadline=None)  # a busy machine is no failure
settings.load_profile("moefy")
VOCAB_SIZE = 257
torch.set_num_threads(1)  # tiny models are slower on more
# pytest loads readline, which writes the terminal's width into the environment of every child
# behind Python's back: tables would be cut to it
os.environ.pop("COLUMNS", None)
os.unsetenv("COLUMNS")
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
# of families whose own defaults are too large, or that have layers of several kinds
_SHAPES: dict[str, dict[str, Any]] = {
    **{
        name: {"head_dim": 8}
        for name in ("ministral", "ministral3", "hunyuan_v1_dense", "ernie4_5", "seed_oss")
    },
    "cwm": {"head_dim": 8, "sliding_window": 16, "rope_parameters": {"rope_type": "default"}},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 48},
    "cohere2": {"sliding_window": 16, "sliding_window_pattern": 2, "logit_scale": 2.0},
    "qwen3_5_text": {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}

# Of the tests that use the product as a user does, these stay in `make test`.
_QUICK = {"test_errors.py", "test_readme.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave whole commands, kills and other programs to `make test-slow`."""
    for item in items:
        if item.path.parent.name == "e2e" and item.path.name not in _QUICK:
            item.add_marker(pytest.mark.slow)


def tiny_config(model_type: str, **settings: Any) -> dict[str, Any]:
    """Return the config.json of a small model of any family."""
    made = _SHAPE | {"pad_token_id": None} | _SHAPES.get(model_type, {}) | settings
    config: dict[str, Any] = AutoConfig.for_model(model_type, **made).to_dict()
    return config


def write_tiny_model(folder: Path, model_type: str, **settings: Any) -> Path:
    """Write a random model of any family, every bias and norm random too, and a byte tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**tiny_config(model_type, **settings))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    ids = torch.randint(0, 257, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found: torch.Tensor = model(ids).logits
    return found


def write_tiny_llama(folder: Path, **settings: Any) -> Path:
    """Write a random LLaMA with grouped-query attention and a byte tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**_SHAPE | settings)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_small_llama(folder: Path) -> Path:
    """Write a random LLaMA with SmolLM2's tokenizer, which every command takes in seconds."""
    shape = {"vocab_size": 49_152, "hidden_size": 64, "intermediate_size": 512}
    shape["max_position_embeddings"] = 2048
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**_SHAPE | shape)).save_pretrained(folder)
    for file in builtin().glob("*token*"):
        shutil.copy(file, folder)
    return folder


def make_place(folder: Path) -> Path:
    """Write one tiny input of each kind: a dense model, its split, text, talks, questions."""
    write_tiny_llama(folder / "dense")
    recipe = LLAMA_MOE | {"partition": "random", "router": "random", "repair": "none"}
    moefy.convert(folder / "dense", folder / "moe", experts=4, active=2, **recipe)
    (folder / "text").mkdir()
    for name in ("ab", "xyz"):
        lines = (json.dumps({"text": f"{name} {i} " * 20}) + "\n" for i in range(40))
        (folder / "text" / f"{name}.jsonl").write_text("".join(lines))
    talks = (
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(40)
    )
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    questions = ({"question_id": i, "category": "math", "turns": ["1", "2"]} for i in range(3))
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A warm process that runs commands in forks of itself."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(params=["tied", "untied"])
def tiny_llama(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "dense", tie_word_embeddings=request.param == "tied")


@pytest.fixture
def make_llama(tmp_path: Path) -> Callable[..., Path]:
    return lambda name="dense", **settings: write_tiny_llama(tmp_path / name, **settings)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two domains that differ in their letters, one of them compressed."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, letters in {"ab": "aabb ", "xyz": "xyz xz "}.items():
        texts = ["".join(generator.choice(list(letters), 300)) for _ in range(80)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        if name == "ab":
            (folder / "ab.jsonl").write_bytes(lines)
        else:
            (folder / "xyz.jsonl.gz").write_bytes(gzip.compress(lines))
    return folder


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of this test's own; the archives and what is unpacked of them are the machine's."""
    machine, own = cache_folder(), tmp_path / "cache"
    own.mkdir()
    for name in ("archives", "benchmarks"):
        (machine / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(machine / name)
    monkeypatch.setenv("MOEFY_CACHE", str(own))
    return own


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer requests on a free port of this machine; give the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
