"""Models side by side: perplexity, distance from the dense model, cost and measured speed."""

from __future__ import annotations

import filecmp
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from moefy.checkpoint.cost import Cost, cost
from moefy.checkpoint.gguf import is_gguf, read_header
from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.source import resolve
from moefy.checkpoint.targets import check_known
from moefy.data.records import Side
from moefy.errors import UsageError
from moefy.evaluation.heldout import Windows, evaluation_windows, perplexity
from moefy.evaluation.llama_cpp import gguf_cost, gguf_states, llama_cpp_seconds
from moefy.evaluation.output_loss import IGNORED, LogitsInput, output_loss
from moefy.evaluation.paired import Interval, paired_difference
from moefy.evaluation.speed import decode, prefill
from moefy.hardware import device, synchronise
from moefy.progress import Progress, ProgressFn, silent

_DECODE_PROMPT, _DECODE_TOKENS, _DECODE_ROUNDS = 32, 24, 3


@dataclass(frozen=True)
class Result:
    """One model's row."""

    name: str
    perplexity: float  # over all tokens of all domains
    domain_perplexity: dict[str, float]
    # mean loss minus the reference's on the same windows, nats per token, with its 95 % interval
    # over windows; None for the reference and without one
    excess_loss: Interval | None
    kl_to_reference: float | None  # mean over tokens of KL(reference ‖ model), nats
    top1_agreement: float | None  # share of positions with the reference's likeliest token
    cost: Cost
    prefill_tokens_per_s: float  # median over the windows, without the output matrix
    decode_tokens_per_s: float | None  # median of greedy generation, batch 1; None if not measured


@dataclass(frozen=True)
class Comparison:
    """What `evaluate` measured."""

    reference: str | None  # name of the dense model that the others are compared with
    tokens: int  # predicted tokens per model
    sequence_length: int  # tokens per window
    results: list[Result]  # in the order given


@dataclass(frozen=True)
class ComparedModel:
    """One of several models with the same tokenizer."""

    name: str  # shown in tables
    folder: Path  # for `evaluate` also a GGUF file
    config: dict[str, Any]  # of config.json; a GGUF file's vocab_size

    def load(self, report: ProgressFn) -> Any:
        """Return the model in float32 on the device."""
        report(Progress("load", 0, 1, self.name))
        network = load_model(self.folder, dtype=torch.float32).to(device())
        report(Progress("load", 1, 1, self.name))
        return network


def compared_models(
    models: str | Path | Sequence[str | Path],
    names: Sequence[str] | None = None,
    report: ProgressFn = silent,
    *,
    gguf: bool = False,
) -> list[ComparedModel]:
    """Find models that read the same tokens.

    Args:
        models: model folders, or anything `convert` takes as a source.
        names: shown instead of `models`.
        report: told about progress.
        gguf: leave GGUF files as they are, for llama.cpp.

    Raises:
        UsageError: there is none, a model is not usable, or their tokenizers differ.
        ArchitectureError: a model that moefy neither converts nor writes.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    if not given:
        raise UsageError("name at least one model")
    shown = list(names) if names else [str(model) for model in given]
    folders = [
        Path(model).expanduser() if gguf and is_gguf(model) else resolve(model, report=report)
        for model in given
    ]
    configs = []
    for folder in folders:
        if folder.is_file():
            configs.append(
                {"vocab_size": int(read_header(folder)[1]["token_embd.weight"].shape[-1])}
            )
        else:
            configs.append(read_config(folder))
            check_known(configs[-1].get("model_type"), folder)
    vocabs = {config["vocab_size"] for config in configs}
    if len(vocabs) > 1:
        raise UsageError(
            f"the models' vocabularies have {', '.join(map(str, sorted(vocabs)))} tokens: only "
            "models with the same tokenizer can be compared"
        )
    # a GGUF file's tokens are taken to be those of the folder that it stands beside
    first, *others = [folder for folder in folders if folder.is_dir()] or folders[:1]
    for folder in others:
        one, other = first / "tokenizer.json", folder / "tokenizer.json"
        # what transformers makes of one file may depend on the architecture beside it
        if one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False):
            continue
        if load_tokenizer(first).get_vocab() != load_tokenizer(folder).get_vocab():
            raise UsageError(
                f"{first} and {folder} have different tokens: only models with the same "
                "tokenizer can be compared"
            )
    return [ComparedModel(*each) for each in zip(shown, folders, configs, strict=True)]


@torch.inference_mode()
def evaluate(
    models: str | Path | Sequence[str | Path],
    *,
    data: str | Path = "demo",
    split: Side = "heldout",
    windows: int = 8,
    sequence_length: int = 512,
    decode: bool = True,
    names: Sequence[str] | None = None,
    report: ProgressFn = silent,
) -> Comparison:
    """Measure models on the same windows of held-out text, in one run.

    A GGUF file runs in llama.cpp on the CPU, with a float32 cache; its output matrix is applied in
    float32. Its tokenizer counts where no folder stands beside it.

    One model at a time is in memory, in float32; of the first dense model, the reference of the
    KL, the last hidden states and the output matrix stay. The models are measured one after
    another: `measure_speed` lets them take turns.

    Args:
        models: model folders, or anything `convert` takes as a source.
        data: a folder of `<domain>.jsonl(.gz)` files, or `demo`.
        split: `heldout` (the documents `train` leaves out), `train`, or `all`.
        windows: per domain; fewer where a domain has less text.
        sequence_length: tokens per window.
        decode: measure generation too.
        names: shown instead of `models`.
        report: told about progress.

    Raises:
        UsageError: a model or the text is not usable, or the models' vocabularies differ.
    """
    compared = compared_models(models, names, report, gguf=True)
    costs = [
        gguf_cost(each.folder, sequence_length)
        if each.folder.is_file()
        else cost(each.config, context=sequence_length)
        for each in compared
    ]
    folders = [each.folder for each in compared]
    folder = next(filter(Path.is_dir, folders), folders[0])
    text = evaluation_windows(data, folder, windows, sequence_length, split, report=report)
    found: dict[int, Result] = {}
    reference: _Reference | None = None
    # dense models first: the others are compared with the first of them
    for i in sorted(range(len(compared)), key=lambda i: costs[i].experts > 0):
        found[i], itself = _measure(compared[i], costs[i], text, reference, decode, report)
        if reference is None and costs[i].experts == 0:
            reference = itself
            found[i] = replace(found[i], kl_to_reference=0.0, top1_agreement=1.0)
    return Comparison(
        reference=reference.name if reference else None,
        tokens=sum(map(len, text.values())) * (sequence_length - 1),
        sequence_length=sequence_length,
        results=[found[i] for i in range(len(compared))],
    )


class _Reference(NamedTuple):
    """What is needed of the dense model once its layers are gone."""

    name: str
    states: list[LogitsInput]  # of every window
    losses: list[list[float]]  # by domain and window


def _measure(
    model: ComparedModel,
    counted: Cost,
    text: Windows,
    reference: _Reference | None,
    decode: bool,
    report: ProgressFn,
) -> tuple[Result, _Reference]:
    """Return a model's row, and the model as a reference for others."""
    losses: dict[str, list[float]] = {domain: [] for domain in text}  # of windows
    divergences, agreements, speeds = list[float](), list[float](), list[float]()
    states: list[LogitsInput] = []
    rows = [(domain, row) for domain, several in text.items() for row in several]
    with _running(model, text, decode, report) as (run, decode_tokens_per_s):
        for idx, (domain, row) in enumerate(rows):
            ids = torch.from_numpy(row)[None].to(device())
            synchronise()  # the clock must not count what is still running on an accelerator
            started = time.perf_counter()
            state = run(ids)
            synchronise()
            speeds.append(ids.shape[1] / (time.perf_counter() - started))
            found = window_quality(state, ids, reference.states[idx] if reference else None)
            losses[domain] += found[0]
            divergences += found[1]
            agreements += found[2]
            if reference is None and counted.experts == 0:
                states.append(state)
            report(Progress("evaluate", idx + 1, len(rows), domain))
    windows = list(losses.values())
    result = Result(
        name=model.name,
        perplexity=perplexity(fmean(loss for several in windows for loss in several)),
        domain_perplexity={name: perplexity(fmean(each)) for name, each in losses.items()},
        excess_loss=paired_difference(reference.losses, windows) if reference else None,
        kl_to_reference=fmean(divergences) if divergences else None,
        top1_agreement=fmean(agreements) if agreements else None,
        cost=counted,
        prefill_tokens_per_s=median(speeds),
        decode_tokens_per_s=decode_tokens_per_s,
    )
    return result, _Reference(model.name, states, windows)


def window_quality(
    model: LogitsInput, ids: Int[Tensor, "windows sequence"], reference: LogitsInput | None
) -> tuple[list[float], list[float], list[float]]:
    """Return, of every window, its mean loss, KL(reference ‖ model) and share of equal top tokens.

    Nats per token; the last two are empty without a reference.
    """
    # the last position has nothing to predict, but its distribution is compared like the others
    labels = F.pad(ids[:, 1:], (0, 1), value=IGNORED if reference is None else 0)
    out = output_loss(model, labels, teacher=reference)
    compared = [
        [] if each is None else each.double().mean(1).tolist()
        for each in (out.divergence, out.agreement)
    ]
    return out.cross_entropy[:, :-1].double().mean(1).tolist(), compared[0], compared[1]


@contextmanager
def _running(
    model: ComparedModel, text: Windows, decode: bool, report: ProgressFn
) -> Iterator[tuple[Callable[[Tensor], LogitsInput], float | None]]:
    """Give what runs a model up to its output matrix, and its decoding speed where asked for."""
    window = next(iter(text.values()))[0]
    prompt = torch.from_numpy(window[:_DECODE_PROMPT])[None].to(device())
    if model.folder.is_dir():
        network = model.load(report)
        speed = _decode_tokens_per_s(network, prompt, report) if decode else None
        yield partial(LogitsInput.of, network), speed
        return
    speed = None
    if decode:
        ids, file = prompt[0].tolist(), model.folder
        speed = 1 / llama_cpp_seconds(file, ids, _DECODE_TOKENS, float32=True)[1]
    with gguf_states(model.folder, len(window)) as run:
        yield run, speed


def _decode_tokens_per_s(
    network: Any, prompt: Int[Tensor, "1 sequence"], report: ProgressFn
) -> float:
    """Time greedy generation; the prompt's pass is not counted."""
    seconds = []
    for done in range(_DECODE_ROUNDS):
        report(Progress("time decoding", done, _DECODE_ROUNDS))
        cache, token, _ = prefill(network, prompt)
        seconds.append(decode(network, cache, token, _DECODE_TOKENS))
    report(Progress("time decoding", _DECODE_ROUNDS, _DECODE_ROUNDS))
    return _DECODE_TOKENS / median(seconds)
