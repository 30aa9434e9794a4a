"""Exported GGUF files in llama.cpp (xllamacpp), against transformers."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import moefy
from moefy.checkpoint.cost import cost
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.source import builtin
from moefy.errors import MoefyError
from moefy.evaluation.llama_cpp import gguf_cost, server
from moefy.progress import Progress
from moefy.recipe import LLAMA_MOE

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none"}
NUM_TOKENS = 24
CLIENT = Path(__file__).parents[2] / "benchmarks/clients/ask_llama_cpp.py"


def llama_cpp(file: Path, ids: list[int]) -> tuple[list[int], list[float]]:
    """Return the greedy tokens and their log-probabilities."""
    request = json.dumps({"model": str(file), "ids": ids, "count": NUM_TOKENS})
    done = subprocess.run(
        [sys.executable, CLIENT], input=request, capture_output=True, text=True, check=True
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["tokens"], answer["logprobs"]


def transformers_(folder: Path, ids: list[int]) -> tuple[list[int], list[float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    new = out.sequences[0, len(ids) :].tolist()
    probs = [
        float(row[0].log_softmax(-1)[token]) for row, token in zip(out.logits, new, strict=True)
    ]
    return new, probs


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_parameters": LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 64}
    },
    "llama3.1": {"rope_parameters": LLAMA3, "max_position_embeddings": 131_072},
    "mistral": {"sliding_window": None},
    "window": {"sliding_window": 32},
    "partial": {"partial_rotary_factor": 0.75},
    "smollm3": {"no_rope_layers": [1, 0]},
    "qwen3": {"head_dim": 128},  # transformers reads no other from GGUF
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
}


def write_small_model(folder: Path, family: str) -> None:
    """Write a random model with SmolLM2's tokenizer, which llama.cpp knows."""
    shape = {"vocab_size": 49_152, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    families = {"llama3": "llama", "llama3.1": "llama", "window": "mistral", "partial": "phi3"}
    model_type = families.get(family, family)
    write_tiny_model(folder, model_type, initializer_range=0.1, **shape | SETTINGS.get(family, {}))
    AutoTokenizer.from_pretrained(builtin()).save_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "choices", "target"),
    [
        ("smollm2", {"shared": 0}, "mixtral"),
        ("smollm2", {"shared": 8, "experts": 24, "active": 24}, "granitemoeshared"),
        ("smollm2", {"shared": 4, "target": "glm4_moe"}, "glm4_moe"),
        ("llama", {"shared": 0, "target": "granitemoe"}, "granitemoe"),
        ("llama3", {"shared": 4}, "granitemoeshared"),
        ("mistral", {"shared": 0}, "mixtral"),
        ("window", {"shared": 4}, "granitemoe_swa"),
        ("partial", {"shared": 4}, "glm4_moe"),
        ("qwen2", {"shared": 4}, "glm4_moe"),
        ("qwen2", {"shared": 4, "target": "granitemoeshared"}, "granitemoeshared"),
        ("smollm3", {"shared": 4}, "granitemoe_swa"),
        ("qwen3", {"shared": 0}, "qwen3_moe"),
        ("qwen3", {"shared": 4}, "glm4_moe"),
        ("granite", {"shared": 4}, "granitemoeshared"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_llama_cpp_decodes_the_same(
    tmp_path: Path, family: str, choices: dict[str, Any], target: str
) -> None:
    """All experts active, float32 weights and cache: the same greedy tokens."""
    dense = builtin() if family == "smollm2" else tmp_path / "dense"
    if family != "smollm2":
        write_small_model(dense, family)
    moe = tmp_path / "moe"
    moefy.convert(dense, moe, **EXACT | {"experts": 16, "active": 16} | choices)
    assert json.loads((moe / "config.json").read_text())["model_type"] == target
    file = moefy.export_gguf(moe, tmp_path / "moe.gguf", dtype="f32")
    times = 12 if family in ("llama3", "window") else 1  # past Llama 3's short part, and the window
    text = "The history of the city begins" * times
    ids = AutoTokenizer.from_pretrained(moe)(text)["input_ids"]
    expected, probs = transformers_(moe, ids)
    found, their_probs = llama_cpp(file, ids)
    assert found == expected
    assert max(abs(a - b) for a, b in zip(probs, their_probs, strict=True)) < 0.02
    assert len(set(found)) > 1


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_eval_runs_a_gguf_file_in_llama_cpp(tmp_path: Path, family: str) -> None:
    """Alone and beside its folder: the same tokens, cost and, but for float16, loss."""
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    write_small_model(dense, family)
    moefy.convert(dense, moe, **EXACT | {"experts": 16, "active": 16, "shared": 4})
    file = moefy.export_gguf(moe, tmp_path / "moe.gguf")
    text: dict[str, Any] = {"windows": 1, "sequence_length": 96}
    folder, beside = moefy.evaluate([moe, file], **text).results
    alone = moefy.evaluate(file, decode=False, **text).results[0]
    assert beside.perplexity == alone.perplexity
    assert math.log(beside.perplexity / folder.perplexity) == pytest.approx(0, abs=1e-3)
    assert beside.perplexity != folder.perplexity
    assert beside.cost == folder.cost
    assert beside.decode_tokens_per_s > 0


def test_a_quantised_split_is_served_to_eight_clients_at_once(tmp_path: Path) -> None:
    """Converted, quantised, served, and asked through OpenAI's protocol, streamed."""
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    write_small_model(dense, "llama")
    moefy.convert(dense, moe, **EXACT | {"experts": 4, "active": 2})
    file = moefy.export_gguf(moe, tmp_path / "moe.gguf", dtype="q8_0")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(CLIENT.parents[1]))
        serving = importlib.import_module("serving")
    slots = {"context": 8 * serving.SLOT, "parallel": 8}
    with server(file, **slots) as (address, _), ThreadPoolExecutor(8) as clients:
        told = [f"Tell me about {i % 4}." for i in range(16)]
        answers = list(clients.map(lambda question: serving.ask(address, question, 12), told))
        alone = serving.ask(address, told[0], 12)
    assert [answer.tokens for answer in answers] == [12] * 16
    assert all(0 < answer.first_s <= answer.total_s < 60 for answer in answers)
    # no client gets another's answer; sums in batches may round the later tokens differently
    assert answers[0].text[:4] == answers[4].text[:4] == alone.text[:4]
    assert len({answer.text for answer in answers}) > 1


@pytest.mark.parametrize("choices", [{"shared": 0}, {"shared": 2}], ids=str)
def test_the_cost_of_a_gguf_file(tmp_path: Path, choices: dict[str, Any]) -> None:
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    write_small_model(dense, "llama")
    moefy.convert(dense, moe, **EXACT | {"experts": 16, "active": 4} | choices)
    told: list[Progress] = []
    file = moefy.export_gguf(moe, tmp_path / "moe.gguf", report=told.append)
    assert gguf_cost(file, 512) == cost(read_config(moe))
    assert told[-1].done == told[-1].total == pytest.approx(file.stat().st_size / 1e6, rel=0.4)
    assert [each.done for each in told] == sorted(each.done for each in told)


@pytest.mark.slow
def test_the_loss_of_quantisation(tmp_path: Path) -> None:
    """Measured in llama.cpp: Q8_0 costs 0.01 nats over F16 at most, Q4_K_M some more."""
    moefy.convert("smollm2-135m", tmp_path / "moe", **EXACT | {"experts": 16, "active": 16})
    files = [
        moefy.export_gguf(tmp_path / "moe", tmp_path / f"{dtype}.gguf", dtype=dtype)
        for dtype in ("f16", "q8_0", "q4_k_m")
    ]
    found = moefy.evaluate(files, windows=1, sequence_length=256, decode=False).results
    half, eight, four = (math.log(each.perplexity) for each in found)
    assert abs(eight - half) < 0.01
    assert 0.01 < four - half < 0.5


@pytest.mark.parametrize("family", ["llama", "llama3.1", "qwen3"])
def test_a_gguf_file_is_a_source(tmp_path: Path, family: str) -> None:
    """Dense folder to GGUF, GGUF to MoE: all experts active is the dense model."""
    dense, out = tmp_path / "dense", tmp_path / "moe"
    write_small_model(dense, family)
    file = moefy.export_gguf(dense, tmp_path / "dense.gguf", dtype="f32")
    moefy.convert(file, out, **EXACT | {"experts": 16, "active": 16, "shared": 4})
    ids = torch.randint(0, 49_000, (1, 600), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = (
            AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits
            for f in (dense, out)
        )
    assert (expected - found).abs().max() < 1e-4


def test_no_code_of_the_models_folder_is_run(tmp_path: Path) -> None:
    """The converter would run it for an architecture that has a tokenizer of its own."""
    folder = write_tiny_model(tmp_path / "model", "qwen3", head_dim=8)
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast as Evil\n"
    )
    for name, changes in {
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
            "tokenizer_class": "Evil",
        },
        "config.json": {
            "architectures": ["InternS1ForConditionalGeneration"],
            "text_config": {"architectures": ["Qwen3ForCausalLM"]},
        },
    }.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with suppress(MoefyError):
        moefy.export_gguf(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "ran").exists()
