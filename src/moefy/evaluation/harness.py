"""Tasks of lm-evaluation-harness on a model in memory.

Tasks, prompts, requests and metrics are the harness's own. Three things differ: where the data
lies, that a question is computed once for all of its answers, and that work which does not fit into
memory is refused before the machine starts to swap.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lm_eval
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import tqdm

from moefy.errors import EvaluationError
from moefy.evaluation.answers import score_answers
from moefy.evaluation.benchmarks import Benchmark
from moefy.hardware import available_bytes
from moefy.storage import cache_folder

VERSION: str = lm_eval.__version__
_FEWSHOT_SEED = 1234  # the harness's own default

ShareFn = Callable[[float], None]


@dataclass(frozen=True)
class ItemScores:
    """What one task gave, item by item in the data's order."""

    metric: str
    values: list[float]  # of the metric; their mean is the score
    nll: list[float] | None  # −log p of the right answer, nats; None where no answer is scored
    truncated: int  # requests cut from the left to fit into the model's context
    elapsed_s: float


def stock_tasks(benchmark: Benchmark) -> dict[str, Path]:
    """Return the harness's YAML files of one of the paper's benchmarks, by task."""
    files = sorted((Path(lm_eval.__file__).parent / "tasks").glob(benchmark.stock))
    return {benchmark.task if len(files) == 1 else file.stem: file for file in files}


def task_config(benchmark: Benchmark, task: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """Return the harness's configuration of a benchmark's task.

    Args:
        benchmark: one of the paper's.
        task: a key of its `stock_tasks`.
        files: Parquet file of each split; empty for the hub's data.
    """
    config = {**load_yaml(stock_tasks(benchmark)[task])}
    config |= {"task": task, "num_fewshot": benchmark.shots}
    if files:
        # Splits that the archive does not have must not be asked of the hub.
        for key, split in (("training", "train"), ("validation",) * 2, ("test",) * 2):
            config[f"{key}_split"] = split if split in files else None
        # `datasets` copies Parquet into Arrow files; they belong to our cache and not to the hub's.
        copies = cache_folder() / "benchmarks" / "datasets"
        splits = {split: str(file) for split, file in files.items()}
        config |= {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": splits, "cache_dir": str(copies)},
            **benchmark.settings,
        }
    return config


@functools.cache
def all_tasks() -> TaskManager:
    """Return the index of all tasks of the harness, which takes seconds to build."""
    return TaskManager()


def load_tasks(task: str | dict[str, Any]) -> dict[str, Any]:
    """Return the tasks of a name in `all_tasks`, or the one of a `task_config`, with their data.

    Raises:
        EvaluationError: the data cannot be had.
    """
    _quiet()
    manager = all_tasks() if isinstance(task, str) else TaskManager(include_defaults=False)
    try:
        tasks: dict[str, Any] = manager.load([task])["tasks"]
    except Exception as error:  # datasets, the hub's client and the network have no common type
        name = task if isinstance(task, str) else task["task"]
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EvaluationError(
            f"the data of {name} cannot be loaded ({reason}): it lies on the hub, which must "
            "answer or have been read before (the paper's eleven need no hub: --no-hub)"
        ) from error
    for each in tasks.values():
        # As the harness's own command line does.
        if each.config.num_fewshot is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return tasks


class HarnessModel(HFLM):  # type: ignore[misc]
    """A model in memory as the harness sees it, which says how far it is.

    Args:
        network: the model, on its device.
        tokenizer: its tokenizer.

    Attributes:
        share: told how much of the present task is done, from 0 to 1.
        truncated: requests that were cut from the left to fit into the model's context.
    """

    def __init__(self, network: Any, tokenizer: Any) -> None:
        _quiet()
        place = network.device
        size = 1 if place.type == "cpu" else 8
        super().__init__(network, tokenizer=tokenizer, batch_size=size, device=str(place))
        self.share: ShareFn = lambda _: None
        self.truncated = 0

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
        tokens = (len(q) + sum(len(requests[i][2]) for i in group) for q, group in groups.items())
        self._check_memory(max(tokens))
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        # The longest question comes first: what does not fit into memory fails at once.
        for done, question in enumerate(sorted(groups, key=len, reverse=True), start=1):
            answers = [requests[place][2] for place in groups[question]]
            found = score_answers(self.model, question, answers, dtype=self.softmax_dtype)
            for place, score in zip(groups[question], found, strict=True):
                scores[place] = score
            self.share(done / len(groups))
        return scores

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """See the harness."""
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        room = self.max_length - self.max_gen_toks
        self.truncated += sum(length > room for length in lengths)
        self._check_memory(self.batch_size * (min(max(lengths), room) + self.max_gen_toks))
        # The harness tells its cache of every answer; this one only counts them.
        count = itertools.count(1)
        counter = SimpleNamespace(add_partial=lambda *_: self.share(next(count) / len(requests)))
        self.set_cache_hook(counter)
        return super().generate_until(requests)

    def _check_memory(self, tokens: int) -> None:
        """Refuse a pass whose keys and values cannot fit, before the machine starts to swap."""
        config = self.model.config
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        # Keys and values, [layers, tokens, heads, width] each.
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width
        needed, free = tokens * per_token * self.model.dtype.itemsize, available_bytes()
        if free and needed > free:
            raise EvaluationError(
                f"{tokens:,} tokens at once need {needed / 2**30:.2f} GiB beside the model, and "
                f"{free / 2**30:.2f} GiB are free: free memory and run the command again"
            )


def run_task(
    model: HarnessModel,
    task: Any,
    *,
    metric: str,
    limit: int | None = None,
    share: ShareFn = lambda _: None,
) -> ItemScores:
    """Ask a model the first `limit` items of a task, or all; `share` is told how much is done.

    Raises:
        EvaluationError: it does not fit into memory, or its metric is no mean over items.
    """
    name = task.config.task
    model.share, model.truncated = share, 0
    started_s = time.monotonic()
    try:
        # No bootstrap: standard errors are computed from the items.
        results = lm_eval.evaluate(model, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    except (MemoryError, RuntimeError) as error:
        # torch says it in RuntimeErrors: "CUDA out of memory", "can't allocate memory".
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise EvaluationError(
            f"the memory was not enough for {name}: free memory and run the command again"
        ) from error
    samples = results["samples"][name]
    # A task may filter an answer in several ways and then has a sample for each; the first counts.
    kept = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    kept.sort(key=lambda sample: sample["doc_id"])
    values = [sample.get(metric) for sample in kept]
    if not all(isinstance(value, int | float) for value in values):
        raise EvaluationError(f"{name} has no score per item: its metric {metric} is no mean")
    nll = [_gold_nll(task, sample) for sample in kept]
    return ItemScores(
        metric,
        [float(value) for value in values],
        None if None in nll else nll,  # type: ignore[arg-type]
        model.truncated,
        time.monotonic() - started_s,
    )


def _gold_nll(task: Any, sample: dict[str, Any]) -> float | None:
    """Return −log p of an item's right answer, or None if the harness does not ask for it."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return -float(sample["resps"][0][0][0])
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    # WinoGrande's choices are questions with one answer: there the right one is in the "text".
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    if isinstance(gold, str):
        gold = task.doc_to_choice(sample["doc"]).index(gold)
    return -float(sample["resps"][gold][0][0]) if isinstance(gold, int) else None


@functools.cache
def _quiet() -> None:
    """Leave progress and warnings to us: the harness has no switch for all of its bars."""
    for library in ("lm_eval", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
        module.tqdm = functools.partial(tqdm, disable=True)
