"""How much of each domain: the published mixtures, and weights that follow the losses.

Weights are float64 and sum to 1. A domain of weight 0 is left out and stays left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float64

from moefy.errors import CorpusError

# LLaMA: the mixture it was trained on. Sheared: where Sheared-LLaMA's dynamic loading (arXiv
# 2310.06694) ended. Both by SlimPajama's seven domains, as in LLaMA-MoE (arXiv 2406.16554).
SLIMPAJAMA = ("cc", "c4", "github", "wikipedia", "book", "arxiv", "stackexchange")
PUBLISHED = {
    "LLaMA": dict(zip(SLIMPAJAMA, (0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02), strict=True)),
    "Sheared": dict(zip(SLIMPAJAMA, (0.361, 0.492, 0.008, 0.031, 0.091, 0.007, 0.01), strict=True)),
}
_SUM_TOLERANCE = 1e-6
_FLOOR = 1e-4


def for_domains(values: Mapping[str, float], domains: Iterable[str], what: str) -> dict[str, float]:
    """Return values in a corpus's order; CorpusError says that they are for other domains."""
    domains = list(domains)
    if set(domains) != set(values):
        raise CorpusError(
            f"{what} are for {', '.join(values)}, and the corpus has {', '.join(domains)}: give "
            "each domain of the corpus one value, name the files by these domains, or use Uniform"
        )
    return {domain: values[domain] for domain in domains}


def initial_weights(mixture: str | Mapping[str, float], domains: Iterable[str]) -> dict[str, float]:
    """Return the weights that a run starts with, by domain, for a recipe's `mixture`.

    CorpusError says that they are for other domains than the corpus's, or do not sum to 1.
    """
    domains = list(domains)
    if isinstance(mixture, str):
        row = mixture.removeprefix("Static").removeprefix("Dynamic")
        if row == "Uniform":
            return dict.fromkeys(domains, 1 / len(domains))
        return for_domains(PUBLISHED[row], domains, f"the weights of {mixture}")
    weights = for_domains(mixture, domains, "the weights")
    total = math.fsum(weights.values())  # exact, so that 0.1 ten times over is 1
    if abs(total - 1) > _SUM_TOLERANCE:
        raise CorpusError(f"the domain weights sum to {total:.6g}: make them sum to 1")
    return weights


Weights = Float64[np.ndarray, " domains"]


def updated_weights(weights: Weights, excess: Weights) -> Weights:
    """Move weight to where the loss is still far above the reference, with a floor.

    w <- softmax(log w + excess), then w <- (1 - c) w + c/n with c = 1e-4, as LLaMA-MoE's code does
    (`update_weight_sheared_llama`) after Sheared-LLaMA's, which took c from DoReMi (arXiv
    2305.10429). No deviation, but float64 where the original computes in float32.

    Args:
        weights: w, positive, summing to 1.
        excess: loss minus reference loss, nats per token.
    """
    grown = weights * np.exp(excess - excess.max())  # the largest factor is 1: nothing overflows
    return (1 - _FLOOR) * (grown / grown.sum()) + _FLOOR / len(weights)
