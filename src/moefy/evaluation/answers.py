"""The likelihood of several answers to one question, the question computed once.

The harness computes a question with its examples again for every answer, and the logits of all its
tokens. Here the question goes through the model once, and the answers follow on its keys and
values. With 25 examples before each question (ARC-c, SmolLM2-135M, one thread) that is twelve times
faster. The numbers are the harness's up to float rounding, as with another batch size.
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

    Question and answers have a token at least; `dtype` is the softmax's, None for the model's.
    """
    # The model reads the question's last token and all but the last of the answer's. Answers of one
    # token, as A to D, read the same and are one row.
    inputs = [(question[-1], *answer[:-1]) for answer in answers]
    rows = list(dict.fromkeys(inputs))
    rotary = str(getattr(network.config, "rope_parameters", None))
    if len(rows) == 1 or any(kind in rotary for kind in _LENGTH_DEPENDENT):
        whole = [(*question[:-1], *row) for row in rows]
        found = [_logits(network, [w], len(r))[0] for w, r in zip(whole, rows, strict=True)]
    else:
        cache = None
        if len(question) > 1:
            prefix = torch.tensor([question[:-1]], device=network.device)
            cache = network(prefix, use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(len(rows))
        longest = max(map(len, rows))
        # Zeros at the end need no mask: no token sees those behind it.
        padded = [(*row, *[0] * (longest - len(row))) for row in rows]
        found = list(_logits(network, padded, longest, cache))
    logits = dict(zip(rows, found, strict=True))
    scores = []
    for row, answer in zip(inputs, answers, strict=True):
        log_probs = F.log_softmax(logits[row][: len(row)], dim=-1, dtype=dtype)
        tokens = torch.tensor(answer, device=log_probs.device)
        greedy = bool((log_probs.argmax(-1) == tokens).all())
        scores.append((float(log_probs.gather(-1, tokens[:, None]).sum()), greedy))
    return scores


def _logits(network: Any, rows: Sequence[Sequence[int]], keep: int, cache: Any = None) -> Tensor:
    """Return the logits of the last `keep` tokens, [rows, keep, vocabulary]."""
    ids = torch.tensor(rows, device=network.device)
    cached = cache is not None
    return network(ids, past_key_values=cache, use_cache=cached, logits_to_keep=keep).logits
