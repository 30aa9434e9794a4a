"""Memory and time of the chunked output loss against all logits at once: docs/objective.md.

    python benchmarks/output_loss.py    # some minutes on one core; up to 2 GiB

Every row is a process of its own: forward and backward from hidden states to the gradients of
hidden states and output matrix, in float32. Memory is the peak above what the process held with its
inputs in place. Writes docs/training/output-loss.csv and the table on the page.
"""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from publish import replace_table

from moefy.evaluation.output_loss import LogitsInput, output_loss

RESULT = Path(__file__).parents[1] / "docs" / "training" / "output-loss.csv"
SIZES = {"SmolLM2-135M": (1024, 576, 49_152), "Llama-2-7B": (256, 4096, 32_000)}
REPEATS = 2


def main() -> None:
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    with RESULT.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(
            ["model", "tokens", "hidden", "vocabulary", "loss", "how", "peak_mib", "cpu_s"]
        )
        for model, size in SIZES.items():
            for loss in ("cross-entropy", "distillation"):
                for how in ("all at once", "chunked"):
                    command = [sys.executable, __file__, json.dumps([*size, loss, how])]
                    found = json.loads(subprocess.run(command, check=True, stdout=-1).stdout)
                    row = [model, *size, loss, how, f"{found[0]:.0f}", f"{found[1]:.2f}"]
                    table.writerow(row)
                    print(*row, flush=True)
    with RESULT.open() as file:
        replace_table(RESULT.parents[1] / "objective.md", "output-loss", list(csv.reader(file)))


def measure(tokens: int, hidden: int, vocab: int, loss: str, how: str) -> tuple[float, float]:
    """Return peak MiB above the inputs, and the CPU seconds of the faster of two passes."""
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, requires_grad=True)
    matrix = (0.02 * torch.randn(vocab, hidden)).requires_grad_()
    teacher_states = torch.randn(tokens, hidden) if loss == "distillation" else None
    teacher_matrix = 0.02 * torch.randn(vocab, hidden) if loss == "distillation" else None
    labels = torch.randint(vocab, (tokens,))

    def once() -> None:
        if how == "chunked":
            teacher = None
            if teacher_states is not None and teacher_matrix is not None:
                teacher = LogitsInput(teacher_states, teacher_matrix)
            share = 0.0 if teacher is None else 1.0
            output_loss(
                LogitsInput(states, matrix), labels, teacher=teacher, teacher_share=share
            ).loss.backward()
        elif teacher_states is not None and teacher_matrix is not None:
            with torch.no_grad():
                wanted = (teacher_states @ teacher_matrix.T).log_softmax(-1)
            given = (states @ matrix.T).log_softmax(-1)
            F.kl_div(given, wanted, log_target=True, reduction="batchmean").backward()
        else:
            F.cross_entropy(states @ matrix.T, labels).backward()

    small = torch.zeros(2, 2, requires_grad=True)
    (small @ small).sum().backward()  # loads what every product needs
    status = Path("/proc/self/status").read_text()
    held = int(status.partition("VmRSS:")[2].split()[0])
    seconds = []
    for _ in range(REPEATS):
        states.grad = matrix.grad = None
        started = time.process_time()
        once()
        seconds.append(time.process_time() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak - held) / 1024, min(seconds)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
    else:
        main()
