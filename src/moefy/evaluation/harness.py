"""One task of lm-evaluation-harness on one model in memory.

Task, prompts, requests and metrics are the harness's own. Ours is where the data lies, how progress
is reported, and the refusal of what does not fit into memory.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from moefy.errors import EvaluationError
from moefy.evaluation.answers import score_answers
from moefy.evaluation.suite_data import TaskData
from moefy.hardware import available_bytes
from moefy.storage import cache_folder

VERSION: str = lm_eval.__version__
STOCK = Path(lm_eval.__file__).parent / "tasks"
_FEWSHOT_SEED = 1234  # the harness's own default

ShareFn = Callable[[float], None]


@dataclass(frozen=True)
class TaskSpec:
    """A task of the harness, with data of our own if the hub's is not used.

    Attributes:
        name: the harness's.
        stock: its YAML file in the harness.
        shots: examples before every question.
        data: on this machine; None for the hub's.
    """

    name: str
    stock: Path
    shots: int
    data: TaskData | None


@dataclass(frozen=True)
class ItemScores:
    """What one task gave, item by item in the data's order.

    Attributes:
        metric: whose mean is the score.
        values: of the metric.
        nll: −log p of the right answer after its question, nats; None where no answer is scored.
        truncated: requests cut from the left to fit into the model's context.
        elapsed_s: it took.
    """

    metric: str
    values: list[float]
    nll: list[float] | None
    truncated: int
    elapsed_s: float


def task_manager(specs: Iterable[TaskSpec], folder: Path) -> TaskManager:
    """Return a manager of these tasks alone (one of all tasks takes seconds to build).

    Args:
        specs: the tasks.
        folder: for a YAML file per task, which must stay.
    """
    for spec in specs:
        settings: dict[str, Any] = {"include": str(spec.stock), "task": spec.name}
        settings["num_fewshot"] = spec.shots
        if spec.data is not None:
            files = {split: str(file) for split, file in spec.data.files.items()}
            splits = {"training_split": "train", "validation_split": "validation"}
            splits["test_split"] = "test"
            settings |= {key: name if name in files else None for key, name in splits.items()}
            settings |= {"dataset_path": "parquet", "dataset_name": None, **spec.data.settings}
            copies = str(cache_folder() / "benchmarks" / "datasets")
            settings["dataset_kwargs"] = {"data_files": files, "cache_dir": copies}
        (folder / f"{spec.name}.yaml").write_text(yaml.safe_dump(settings))
    return TaskManager(include_path=str(folder), include_defaults=False)


def load_tasks(manager: TaskManager, name: str) -> dict[str, Any]:
    """Return the harness's task of that name, or all of a group's, with their data.

    Raises:
        EvaluationError: the data cannot be had.
    """
    _quiet()
    try:
        tasks = manager.load([name])["tasks"]
    except Exception as error:  # datasets, the hub's client and the network have no common type
        raise EvaluationError(
            f"the data of {name} cannot be loaded ({_first_line(error)}): it lies on the hub, "
            "which must answer or have been read before (the paper's eleven need no hub: --no-hub)"
        ) from error
    for task in tasks.values():
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
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
        super().__init__(
            pretrained=network,
            tokenizer=tokenizer,
            batch_size=1 if place.type == "cpu" else 8,
            device=str(place),
        )
        self.share: ShareFn = lambda _: None
        self.truncated = 0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """See the harness; without its progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score requests (its text, question, answer), those with the same question together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, (_, question, answer) in enumerate(requests):
            room = max(1, self.max_length + 1 - len(answer))
            self.truncated += len(question) > room
            groups.setdefault(tuple(question[-room:]), []).append(place)
        order = sorted(groups, key=len, reverse=True)  # what does not fit fails at once
        total = done = 0
        costs = {}
        for question in order:
            costs[question] = len(question) + sum(len(requests[i][2]) for i in groups[question])
            total += costs[question]
        self._check_memory(max(costs.values()))
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for question in order:
            answers = [requests[place][2] for place in groups[question]]
            found = score_answers(self.model, question, answers, dtype=self.softmax_dtype)
            for place, score in zip(groups[question], found, strict=True):
                scores[place] = score
            done += costs[question]
            self.share(done / total)
        return scores

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """See the harness; without its progress bar."""
        costs = {request.args[0]: len(self.tok_encode(request.args[0])) for request in requests}
        room = self.max_length - self.max_gen_toks
        self.truncated += sum(length > room for length in costs.values())
        longest = min(max(costs.values()), room) + self.max_gen_toks
        self._check_memory(self.batch_size * longest)
        self.set_cache_hook(_Watch(costs, self.share))
        return super().generate_until(requests, disable_tqdm=True)

    def _check_memory(self, tokens: int) -> None:
        """Refuse a pass whose keys and values cannot fit, before the machine starts to swap."""
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        per_token = 2 * config.num_hidden_layers * heads * width * self.model.dtype.itemsize
        needed, free = tokens * per_token, available_bytes()
        if free and needed > free:
            raise EvaluationError(
                f"{tokens:,} tokens at once need {needed / 2**30:.2f} GiB beside the model, and "
                f"{free / 2**30:.2f} GiB are free: free memory and run the command again"
            )


class _Watch:
    """Takes the place of the harness's cache, which is told of every answer.

    Args:
        costs: tokens by request.
        share: see `HarnessModel`.
    """

    def __init__(self, costs: dict[str, int], share: ShareFn) -> None:
        self._costs, self._share = costs, share
        self._total, self._done = sum(costs.values()), 0

    def add_partial(self, method: str, request: Any, answer: Any) -> None:
        """Count what an answer cost."""
        self._done += self._costs[request[0]]
        self._share(min(1.0, self._done / self._total))


def run_task(
    model: HarnessModel,
    task: Any,
    *,
    metric: str,
    limit: int | None = None,
    share: ShareFn = lambda _: None,
) -> ItemScores:
    """Ask a model every item of a task.

    Args:
        model: whom to ask.
        task: from `load_tasks`.
        metric: of the harness.
        limit: items from the start of the data; None for all.
        share: told how much of the work is done, from 0 to 1.

    Raises:
        EvaluationError: it does not fit into memory, or its metric is no mean over items.
    """
    name = task.config.task
    model.share, model.truncated = share, 0
    started_s = time.monotonic()
    try:
        # no bootstrap: standard errors are computed from the items
        results = lm_eval.evaluate(model, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise EvaluationError(
            f"the memory was not enough for {name}: free memory and run the command again"
        ) from error
    samples = results["samples"][name]
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
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    if isinstance(gold, str):
        gold = task.doc_to_choice(sample["doc"]).index(gold)
    return -float(sample["resps"][gold][0][0]) if isinstance(gold, int) else None


def _first_line(error: Exception) -> str:
    return f"{error}".strip().partition("\n")[0] or type(error).__name__


@functools.cache
def _quiet() -> None:
    """Leave progress and warnings to us; the harness has no switch for its bar over prompts."""
    for library in ("lm_eval", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)
