"""What the noisy gate does to a fitted router, before any training: docs/objective.md.

    python benchmarks/router_noise.py MOE ../shared/data/pretrain

Cross-entropy of a converted model on held-out text with noise of several scales, and the balance
losses of the same pass. Writes docs/training/router-noise.csv and the table on the page.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from publish import replace_table

from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.data.records import open_domains
from moefy.data.tokenise import pack
from moefy.evaluation.output_loss import LogitsInput, output_loss
from moefy.experts.balance import importance_and_load_loss, switch_loss
from moefy.experts.noisy_gate import NoisyGate
from moefy.experts.routers import RouterTrace, routers_of

DOCS = Path(__file__).parents[1] / "docs"
SCALES = (0.0, 0.01, 0.1, 1.0)


@torch.no_grad()
def main(moe: Path, data: str) -> None:
    model = load_model(moe, dtype=torch.float32).train()
    windows = [
        pack(
            domain.documents("heldout"),
            load_tokenizer(moe),
            sequence_length=256,
            max_windows=1,
        )
        for domain in open_domains(data)
    ]
    tokens = torch.from_numpy(np.concatenate(windows))
    rows = [["noise scale", "nats", "busiest expert", "switch", "importance + load"]]
    for scale in SCALES:
        torch.manual_seed(0)
        gate = NoisyGate(routers_of(model), scale=scale) if scale else None
        with RouterTrace(model, noise=gate) as trace:
            out = output_loss(LogitsInput.of(model, tokens).predicting(), tokens[:, 1:])
            sums = trace.sums()
        assert sums is not None
        # 1 is even use; E / k is an expert that every token chooses
        often = (sums.shares().max(-1).values * sums.shares().shape[-1]).mean()
        balance = importance_and_load_loss(sums) / len(sums.choices)
        numbers = [float(out.loss), float(often), float(switch_loss(sums)), float(balance)]
        rows.append([f"{scale:g}", *(f"{number:.3f}" for number in numbers)])
        print(rows[-1], flush=True)
    with (DOCS / "training" / "router-noise.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    replace_table(DOCS / "objective.md", "router-noise", rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
