"""llama.cpp (xllamacpp) in a process of its own: speed, tokens and hidden states of a GGUF file.

It writes to stderr from C, and the memory of a model comes back when the process ends.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.request import ProxyHandler, Request, build_opener

import torch
from gguf.quants import dequantize
from jaxtyping import Int
from torch import Tensor

from moefy.checkpoint.cost import Cost
from moefy.checkpoint.gguf import own_settings, read_header
from moefy.checkpoint.gguf_export import last_line
from moefy.errors import ArchitectureError, CheckpointError, UsageError, reason
from moefy.evaluation.output_loss import LogitsInput
from moefy.hardware import device, fastest

# The server answers on this machine alone, until standard input ends.
_SERVE = """
import json, sys, xllamacpp
ask, params = json.loads(sys.argv[1]), xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = ask["file"], ask["context"], ask["parallel"]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = ask["threads"]
if ask["float32"]:
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
if ask["states"]:
    params.n_batch = params.n_ubatch = ask["context"]
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
Ask = Callable[[str, dict[str, Any]], Any]
"""Sends a JSON body to one of the server's paths, and returns the answer."""


@contextmanager
def server(
    file: Path, context: int, *, parallel: int = 1, **how: Any
) -> Iterator[tuple[str, IO[str]]]:
    """Run llama.cpp's server on the CPU; yield its address and what it says, a file.

    Args:
        file: GGUF file.
        context: tokens of all sequences that are answered at once together.
        parallel: number of those.
        **how: `float32` and `states`, see `serving`.

    Raises:
        UsageError: xllamacpp is not installed.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise UsageError("a GGUF file runs in llama.cpp: pip install 'moefy[gguf]'")
    asked = {"file": str(file), "context": context, "parallel": parallel, **how}
    asked = {"float32": False, "states": False, "threads": torch.get_num_threads()} | asked
    command = [sys.executable, "-c", _SERVE, json.dumps(asked)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdout
        try:
            yield (
                next((line.strip() for line in process.stdout if line.startswith("http")), ""),
                log,
            )
        finally:
            process.kill()


@contextmanager
def serving(
    file: Path, tokens: int, *, float32: bool = True, states: bool = False
) -> Iterator[Ask]:
    """Run llama.cpp's server for one sequence at a time.

    Args:
        file: GGUF file.
        tokens: of the longest sequence.
        float32: keep the cache in float32, as transformers does; llama.cpp's own choice is float16.
        states: answer `/embeddings` with the last hidden state of every token.

    Raises:
        UsageError: xllamacpp is not installed.
        CheckpointError: llama.cpp cannot run the file; its last words are in the message.
    """
    # llama.cpp pads the context to whole blocks of 256
    context = (tokens + 256) // 256 * 256
    opener = build_opener(ProxyHandler({}))
    with server(file, context, float32=float32, states=states) as (address, log):

        def ask(path: str, body: dict[str, Any]) -> Any:
            request = Request(address + path, json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            try:
                return json.load(opener.open(request))
            except (OSError, ValueError) as error:
                log.seek(0)
                said = last_line(log.read())
                raise CheckpointError(
                    f"llama.cpp cannot run {file.name}: {reason(said)}"
                ) from error

        yield ask


def llama_cpp_seconds(file: Path, ids: list[int], new_tokens: int, *, float32: bool) -> list[float]:
    """Return the seconds of the prompt's pass and of one decoded token; see `serving`."""
    body = {"prompt": ids, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True}

    def run() -> list[float]:
        timings = ask("/completion", {**body, "cache_prompt": False})["timings"]
        return [timings["prompt_ms"] / 1e3, timings["predicted_per_token_ms"] / 1e3]

    with serving(file, len(ids) + new_tokens, float32=float32) as ask:
        return fastest(run)


class _Encoding(NamedTuple):
    ids: list[int]


class GgufTokenizer:
    """llama.cpp's own tokenizer of a file, as `pack` wants one."""

    def __init__(self, file: Path) -> None:
        self.name_or_path, self.backend_tokenizer = str(file), self
        self.eos_token_id = read_header(file)[0].get("tokenizer.ggml.eos_token_id")

    def no_truncation(self) -> None:
        """Do nothing: llama.cpp never truncates."""

    no_padding = no_truncation

    def encode_batch_fast(self, documents: list[str], **_: bool) -> list[_Encoding]:
        """Return the ids of texts; special tokens that stand in them are read as text."""
        how = {"add_special": False, "parse_special": False}
        with serving(Path(self.name_or_path), 1) as ask:
            answers = [ask("/tokenize", {"content": text, **how}) for text in documents]
        return [_Encoding(answer["tokens"]) for answer in answers]


def gguf_cost(file: Path, context: int) -> Cost:
    """Count a GGUF file as `cost` counts a folder.

    Raises:
        ArchitectureError: the logits are more than a matrix product.
    """
    fields, tensors = read_header(file)
    own = own_settings(fields)
    if "output.bias" in tensors or own.get("final_logit_softcapping"):
        raise ArchitectureError(
            f"the logits of {file} have a bias or a soft cap: moefy measures GGUF files without"
        )
    experts, active = own.get("expert_count", 0), own.get("expert_used_count", 0)
    sizes = {name: int(each.n_elements) for name, each in tensors.items() if "rope_" not in name}
    routed = sum(size for name, size in sizes.items() if "_exps." in name)
    idle = routed // max(experts, 1) * (experts - active)
    looked_up = sizes["token_embd.weight"] * ("output.weight" in tensors)
    met = (
        sum(size for name, size in sizes.items() if len(tensors[name].shape) > 1) - looked_up - idle
    )
    heads = own["attention.head_count"]
    head_dim = own.get("attention.key_length") or own["embedding_length"] // heads
    attended = 2 * own["block_count"] * heads * head_dim * (context + 1)
    total = sum(sizes.values())
    return Cost(experts, active, total, total - idle, 2 * met + attended, context)


@contextmanager
def gguf_states(file: Path, tokens: int) -> Iterator[Callable[[Int[Tensor, "1 seq"]], LogitsInput]]:
    """Give a function that runs a file up to its output matrix, which is applied in float32."""
    fields, tensors = read_header(file)
    output = tensors.get("output.weight") or tensors["token_embd.weight"]
    weight = torch.from_numpy(dequantize(output.data, output.tensor_type)).to(device())
    scale = own_settings(fields).get("logit_scale") or 1.0  # Granite divides by it
    with serving(file, tokens, states=True) as ask:

        def states(ids: Int[Tensor, "1 seq"]) -> LogitsInput:
            (found,) = ask("/embeddings", {"content": ids[0].tolist()})
            hidden = torch.tensor(found["embedding"], device=ids.device)
            return LogitsInput(hidden[None] / scale, weight)

        yield states
