"""The paper's eleven benchmarks: task, shots, metric and chance, as a table.

The tasks are lm-evaluation-harness's own; a row only says which, and how the paper used it. The
metric is acc_norm wherever the harness offers it: so the paper's rows for other models agree with
those that the harness publishes (OPT-2.7B: SciQ 78.9, PIQA 74.8, ARC-e 54.4, LogiQA 25.8 there, and
79.0, 74.8, 54.3, 26.0 as acc_norm in the harness's results/opt/opt-2.7b, 85.8, 73.9, 60.8, 21.0 as
acc).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A task and how it is used; of the paper's, one column of its table.

    Attributes:
        name: as shown.
        task: the harness's task or group of tasks.
        shots: examples before every question.
        metric: the harness's.
        chance: what guessing scores, as a share; None if not known.
        stock: the task's YAML file in the harness, a pattern for several; empty for a task that is
            not the paper's.
    """

    name: str
    task: str
    shots: int
    metric: str
    chance: float | None = None
    stock: str = ""


LLAMA_MOE = (
    Benchmark("SciQ", "sciq", 0, "acc_norm", 0.25, "sciq/sciq.yaml"),
    Benchmark("PIQA", "piqa", 0, "acc_norm", 0.5, "piqa/piqa.yaml"),
    Benchmark("WinoGrande", "winogrande", 0, "acc", 0.5, "winogrande/default.yaml"),
    Benchmark("ARC-e", "arc_easy", 0, "acc_norm", 0.25, "arc/arc_easy.yaml"),
    Benchmark("ARC-c", "arc_challenge", 25, "acc_norm", 0.25, "arc/arc_challenge.yaml"),
    Benchmark("HellaSwag", "hellaswag", 10, "acc_norm", 0.25, "hellaswag/hellaswag.yaml"),
    Benchmark("LogiQA", "logiqa", 0, "acc_norm", 0.25, "logiqa/logiqa.yaml"),
    Benchmark("BoolQ", "boolq", 32, "acc", 0.5, "super_glue/boolq/default.yaml"),
    Benchmark("LAMBADA", "lambada_openai", 0, "acc", 0.0, "lambada/lambada_openai.yaml"),
    Benchmark("NQ-open", "nq_open", 32, "exact_match", 0.0, "nq_open/nq_open.yaml"),
    Benchmark("MMLU", "mmlu", 5, "acc", 0.25, "mmlu/default/mmlu_*.yaml"),
)
