"""The likelihood of several answers to one question, the question computed once.

The harness computes a question with its examples again for every answer, and the logits of all its
tokens. Here the question goes through the model once and the answers follow on its keys and values;
logits are computed for the answers alone. The numbers are the harness's up to float rounding, as
those of another batch size are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary factors that change with the whole length


@torch.inference_mode()
def score_answers(
    network: Any,
    question: Sequence[int],
    answers: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype | None = None,
) -> list[tuple[float, bool]]:
    """Return log p of every answer after the question, nats, and whether it is the greedy one.

    Args:
        network: a causal language model.
        question: at least one token.
        answers: at least one token each.
        dtype: of the softmax; None for the model's.
    """
    inputs = [(question[-1], *answer[:-1]) for answer in answers]
    rows = list(dict.fromkeys(inputs))  # answers of one token, as A to D, are one row
    if len(rows) == 1 or not _can_share(network.config):
        found = [_forward(network, [(*question[:-1], *row)], len(row))[0] for row in rows]
    else:
        cache = None
        if len(question) > 1:
            prefix = _ids(network, [question[:-1]])
            cache = network(prefix, use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(len(rows))
        longest = max(map(len, rows))
        padded = [(*row, *[0] * (longest - len(row))) for row in rows]  # nothing looks ahead
        found = list(_forward(network, padded, longest, cache))
    logits = dict(zip(rows, found, strict=True))
    return [
        _score(logits[row][: len(row)], answer, dtype)
        for row, answer in zip(inputs, answers, strict=True)
    ]


def _can_share(config: Any) -> bool:
    rotary = str(getattr(config, "rope_parameters", None))
    return not any(kind in rotary for kind in _LENGTH_DEPENDENT)


def _ids(network: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=network.device)


def _forward(network: Any, rows: Sequence[Sequence[int]], keep: int, cache: Any = None) -> Tensor:
    return network(
        _ids(network, rows),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=keep,
    ).logits


def _score(logits: Tensor, answer: Sequence[int], dtype: torch.dtype | None) -> tuple[float, bool]:
    log_probs = F.log_softmax(logits, dim=-1, dtype=dtype)
    tokens = torch.tensor(answer, device=logits.device)
    greedy = bool((log_probs.argmax(-1) == tokens).all())
    return float(log_probs.gather(-1, tokens[:, None]).sum()), greedy
