"""Tasks of lm-evaluation-harness on a model in memory; every finished task is kept in the cache.

Tasks, prompts, requests and metrics are the harness's own. Two things differ: where the data lies,
and that a question is computed once for all of its answers.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import torch
import torch.nn.functional as F
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import tqdm

from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.errors import EvaluationError
from moefy.evaluation.suite import Benchmark
from moefy.evaluation.suite_data import archive_files, data_version
from moefy.hardware import device
from moefy.progress import Progress, ProgressFn
from moefy.storage import cache_folder, digest, read_json, storage_errors, write_records

_FEWSHOT_SEED = 1234  # the harness's own default
_LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary factors that change with the whole length
_FORMAT = 4  # raise it when what is kept of a task changes, or how it is computed


@dataclass(frozen=True)
class ItemScores:
    """What one task gave, item by item in the data's order."""

    values: list[float]  # of the metric; their mean is the score
    truncated: int  # answers whose question was cut from the left to fit into the model's context
    elapsed_s: float


def stock_tasks(benchmark: Benchmark) -> dict[str, Path]:
    """Return the harness's YAML files of one of the paper's benchmarks, by task."""
    files = sorted((Path(lm_eval.__file__).parent / "tasks").glob(benchmark.stock))
    return {benchmark.task if len(files) == 1 else file.stem: file for file in files}


def task_config(benchmark: Benchmark, task: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """Return the harness's configuration of one of the benchmark's `stock_tasks`.

    `files` is the Parquet file of each split.
    """
    config = {**load_yaml(stock_tasks(benchmark)[task])}
    # Splits that the archive does not have must not be asked of the hub.
    for key, split in (("training", "train"), ("validation",) * 2, ("test",) * 2):
        config[f"{key}_split"] = split if split in files else None
    # `datasets` copies Parquet into Arrow files; they belong to our cache and not to the hub's.
    copies = cache_folder() / "benchmarks" / "datasets"
    splits = {split: str(file) for split, file in files.items()}
    return config | {
        "task": task,
        "num_fewshot": benchmark.shots,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits, "cache_dir": str(copies)},
        **benchmark.settings,
    }


def load_task(config: dict[str, Any]) -> Any:
    """Return the task of a `task_config`, with its data."""
    _quiet()
    with storage_errors(cache_folder()):
        loaded = TaskManager(include_defaults=False).load([config])["tasks"]
    task = loaded[config["task"]]
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # as the harness's own command line does
    return task


def task_configs(benchmark: Benchmark, *, report: ProgressFn) -> dict[str, dict[str, Any]]:
    """Return the configurations of a benchmark's tasks by name, their data unpacked.

    Raises:
        AssetError: an archive cannot be fetched.
    """
    return {
        task: task_config(benchmark, task, archive_files(benchmark, task, report=report))
        for task in stock_tasks(benchmark)
    }


def open_model(folder: Path, dtype: str) -> HarnessModel:
    """Return the model of a folder, loaded in "float32" or "bfloat16"."""
    network = load_model(folder, dtype=getattr(torch, dtype)).to(device())
    return HarnessModel(network, load_tokenizer(folder))


@torch.inference_mode()
def score_answers(
    network: Any, question: Sequence[int], answers: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """Return log p of every answer after the question, nats, and whether it is the greedy one.

    The question goes through the model once, and the answers follow on its keys and values. The
    harness computes it again for every answer: with 25 examples before each question (ARC-c,
    SmolLM2-135M, one thread) that takes twelve times as long. The numbers are the same up to float
    rounding. Question and answers have a token at least.
    """
    # The model reads the question's last token and all but the last of the answer's. Answers of one
    # token, as A to D, read the same and are one row.
    inputs = [(question[-1], *answer[:-1]) for answer in answers]
    rows = list(dict.fromkeys(inputs))
    cache = None
    if len(question) > 1:
        prefix = torch.tensor([question[:-1]], device=network.device)
        cache = network(prefix, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(rows))
    longest = max(map(len, rows))
    # Zeros at the end need no mask: no token sees those behind it.
    padded = [(*row, *[0] * (longest - len(row))) for row in rows]
    ids, cached = torch.tensor(padded, device=network.device), cache is not None
    # [rows, longest, vocabulary]
    found = network(ids, past_key_values=cache, use_cache=cached, logits_to_keep=longest).logits
    logits = dict(zip(rows, found, strict=True))
    scores = []
    for row, answer in zip(inputs, answers, strict=True):
        log_probs = F.log_softmax(logits[row][: len(row)], dim=-1)
        tokens = torch.tensor(answer, device=log_probs.device)
        greedy = bool((log_probs.argmax(-1) == tokens).all())
        scores.append((float(log_probs.gather(-1, tokens[:, None]).sum()), greedy))
    return scores


class HarnessModel(HFLM):  # type: ignore[misc]
    """A model in memory, on its device, as the harness sees it."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        _quiet()
        place = network.device
        size = 1 if place.type == "cpu" else 8
        super().__init__(network, tokenizer=tokenizer, batch_size=size, device=str(place))
        # Told how much of the present task is done, from 0 to 1.
        self.share: Callable[[float], None] = lambda _: None
        self.truncated = 0  # see `ItemScores`

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score requests (text, question, answer), those with the same question together."""
        groups: dict[tuple[int, ...], list[int]] = {}  # places of the requests, by question
        for place, (_, question, answer) in enumerate(requests):
            # The last token of an answer is never read, hence the + 1; the harness cuts as well.
            room = max(1, self.max_length + 1 - len(answer))
            self.truncated += len(question) > room
            groups.setdefault(tuple(question[-room:]), []).append(place)
        rotary = str(getattr(self.model.config, "rope_parameters", None))
        if any(kind in rotary for kind in _LENGTH_DEPENDENT):
            return super()._loglikelihood_tokens(requests, disable_tqdm)
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        # The longest question comes first: what does not fit into memory fails at once.
        for done, question in enumerate(sorted(groups, key=len, reverse=True), start=1):
            answers = [requests[place][2] for place in groups[question]]
            found = score_answers(self.model, question, answers)
            for place, score in zip(groups[question], found, strict=True):
                scores[place] = score
            self.share(done / len(groups))
        return scores


def run_task(model: HarnessModel, task: Any, *, metric: str, limit: int | None) -> ItemScores:
    """Ask a model the first `limit` items of a task, or all.

    Raises:
        EvaluationError: it does not fit into the accelerator's memory.
    """
    name = task.config.task
    model.truncated = 0
    started_s = time.monotonic()
    try:
        # No bootstrap: standard errors are computed from the items.
        results = lm_eval.evaluate(model, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    except torch.OutOfMemoryError as error:
        raise EvaluationError(f"the memory is not enough for {name}") from error
    samples = results["samples"][name]
    # A task may filter an answer in several ways and then has a sample for each; the first counts.
    kept = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    kept.sort(key=lambda sample: sample["doc_id"])
    values = [float(sample[metric]) for sample in kept]
    return ItemScores(values, model.truncated, time.monotonic() - started_s)


def run_benchmark(
    benchmark: Benchmark,
    tasks: Mapping[str, dict[str, Any]],
    model: Callable[[], HarnessModel],
    kept: Path,
    stage: str,
    *,
    limit: int | None,
    dtype: str,
    report: ProgressFn,
) -> list[ItemScores]:
    """Return the result of each task, out of the cache's folder of this model if it is there."""
    parts = list[ItemScores]()
    # All that decides a result, besides the model.
    used = [benchmark.shots, benchmark.metric, data_version(benchmark)]
    settings = [limit, dtype, device().type]
    versions = [lm_eval.__version__, torch.__version__, transformers.__version__, _FORMAT]
    key = digest([used, settings, versions])
    # MMLU's limit is spread over its 57 subjects, at least one item of each.
    count = None if limit is None else -(-limit // len(tasks))

    def share(part: float) -> None:
        report(Progress(stage, int(100 * (len(parts) + part)), 100 * len(tasks)))

    for task, config in tasks.items():
        file = kept / f"{task}-{key}.json"
        if not file.is_file():
            loaded = load_task(config)
            model().share = share
            found = run_task(model(), loaded, metric=benchmark.metric, limit=count)
            write_records(file, [asdict(found)])
        # A result is always read from the file: the second run gives what the first gave.
        remedy = "delete it, and the benchmark is measured again"
        parts.append(read_json(file, ItemScores, remedy, error=EvaluationError))
        share(0.0)
    return parts


@functools.cache
def _quiet() -> None:
    """Leave progress and warnings to us: the harness has no switch for all of its bars."""
    for library in ("lm_eval", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
        # Some callers pass `disable` themselves.
        module.tqdm = lambda *args, **options: tqdm(*args, **options | {"disable": True})
