"""`moefy bench` on two tiny models: its numbers agree with each other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import write_tiny_llama, write_tiny_model
from transformers import AutoTokenizer

import moefy
from moefy.checkpoint.source import builtin
from moefy.cli import main
from moefy.recipe import LLAMA_MOE

MOEFY = str(Path(sys.executable).with_name("moefy"))
PLAIN: dict[str, Any] = LLAMA_MOE | {"repair": "none"}
PROMPT, NEW = 24, 6
DENSE = "dense (same active size)"


def eval_speed(*arguments: object) -> dict[str, Any]:
    counts = ("--prompt-tokens", PROMPT, "--new-tokens", NEW, "--rounds", 1)
    command = [MOEFY, "bench", *map(str, (*arguments, *counts)), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found: dict[str, Any], batches: list[int], moe: Path) -> None:
    """Recompute every number that others imply."""
    rows = {(row["phase"], row["batch"], row["model"]): row for row in found["speeds"]}
    assert len(rows) == len(found["speeds"])
    assert {key[:2] for key in rows} == {(p, b) for p in ("prefill", "decode") for b in batches}
    for (phase, batch, model), row in rows.items():
        same_size = rows[phase, batch, DENSE]
        size = row["tokens_per_s"] / same_size["tokens_per_s"]
        same = row["of_active_size"]
        assert same == pytest.approx(size) or (same == 1 and model != str(moe))
        assert row["spread"] == [row["of_dense"], row["of_dense"]]  # one round
        assert (row["bytes_per_s"] is None) == ((phase, batch) != ("decode", 1))
        if row["tried"]:
            assert model == str(moe)
            assert row["tried"][row["implementation"]] == max(row["tried"].values())
            assert row["tokens_per_s"] == row["tried"][row["implementation"]]
        else:
            assert row["implementation"] is None


def test_in_transformers(tmp_path: Path) -> None:
    dense, moe = write_tiny_llama(tmp_path / "dense"), tmp_path / "moe"
    moefy.convert(dense, moe, experts=6, active=3, **PLAIN)
    found = eval_speed(dense, moe, "--batch", "1,3")
    check(found, [1, 3], moe)
    for row in found["speeds"]:
        assert (row["implementation"] is not None) == (row["model"] == str(moe))
        if row["model"] == str(moe):
            assert set(row["tried"]) == {"eager", "grouped_mm", "lean"}


def test_in_llama_cpp(tmp_path: Path) -> None:
    """A MoE alone: the dense model beside it is made from its config."""
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    write_tiny_model(dense, "llama", vocab_size=49_152, hidden_size=64, intermediate_size=128)
    AutoTokenizer.from_pretrained(builtin()).save_pretrained(dense)
    moefy.convert(dense, moe, experts=4, active=2, **PLAIN)
    found = eval_speed(moe, "--runtime", "llama.cpp", "--dtype", "float32,q8_0")
    for dtype in ("float32", "q8_0"):
        speeds = [row for row in found["speeds"] if row["dtype"] == dtype]
        check({"speeds": speeds}, [1], moe)
        assert {row["model"] for row in speeds} == {DENSE, str(moe)}


def test_a_shape(tmp_path: Path) -> None:
    """No model is needed; splits are compared in both runtimes, and few layers stand for all."""
    shape = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 512, "vocab_size": 512}
    shape |= {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    splits = ["--splits", "speed,8/16,4/16+4"]
    found = eval_speed(tmp_path, *splits, "--layers", "2", "--runtime", "transformers,llama.cpp")
    assert found["layers"] == 2
    names = {(row["runtime"], row["phase"]): [] for row in found["speeds"]}
    for row in found["speeds"]:
        names[row["runtime"], row["phase"]].append(row["model"])
        assert row["of_dense"] == 1 or row["model"] != str(tmp_path)
    assert len(names) == 4
    half = ["dense (same active size)", "4/8, 2 shared", "8/16"]
    for each in names.values():
        assert each == [str(tmp_path), *half, "pruned to 4/16"]


def test_the_table_and_the_figure(
    make_llama: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A dense model alone: splits of it are compared."""
    counts = ["--prompt-tokens", "8", "--new-tokens", "2", "--rounds", "1", "--batch", "2"]
    command = ["moefy", "bench", str(make_llama()), *counts, "--dtype", "bfloat16"]
    command += ["--figure", str(tmp_path / "speed.png")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert "8 tokens of prompt and 2 decoded, medians of 1 round; " in printed
    assert "bfloat16" in printed
    assert "4/8" in printed
    assert "GFLOP/s" in printed
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--batch", "1,x", "write whole numbers"),
        ("--batch", "0", "at least 1"),
        ("--rounds", "0", "at least 1 for --batch"),
        ("--layers", "1", "and 2 for --layers"),
        ("--layers", "3", "is for random models of more layers"),
        ("--splits", "half", "write ACTIVE/ALL+SHARED, as in 8/16+4"),
        ("--splits", "5/7", "cannot be split into 7 equal experts"),
        ("--dtype", "int3", "allowed are float32, bfloat16 in transformers; float32, "),
        ("--runtime", "onnx", "allowed are transformers, llama.cpp, vllm, vllm=PYTHON"),
        ("--figure", "speed.txt", "name a .png, .svg or .pdf file"),
        ("--runtime", "vllm=/nowhere/python", "/nowhere/python has no vLLM: install vllm"),
        ("--prompt-tokens", "600", "has room for 512 tokens, not for 600 of prompt and 64 new"),
    ],
)
def test_bad_options(
    make_llama: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    message: str,
) -> None:
    command = ["moefy", "bench", str(make_llama()), option, value]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_llama_cpp_takes_one_sequence(make_llama: Callable[..., Path]) -> None:
    with pytest.raises(moefy.errors.UsageError, match="pass --batch 1"):
        moefy.measure_speed(make_llama(), batches=[2], runtime="llama.cpp")
