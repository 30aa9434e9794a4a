"""One of two data-parallel workers: python two_workers.py RANK FOLDER (see test_objective.py)."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from moefy.experts.balance import importance_and_load_loss, router_sums


def main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    logits = torch.load(f"{folder}/logits.pt")[:, rank::2].requires_grad_()
    top, chosen = logits.topk(2)
    sums = router_sums(logits, top.softmax(-1), chosen, score="softmax").over_workers()
    loss = importance_and_load_loss(sums)
    loss.backward()
    torch.save((loss.detach(), logits.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
