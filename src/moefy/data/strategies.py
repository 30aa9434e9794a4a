"""How much of each domain: the published mixtures, and how one may change while it is trained on.

Weights are float64 and sum to 1. A domain of weight 0 is left out and stays left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from moefy.errors import CorpusError, UsageError

UPDATE_INTERVAL_STEPS = 170
"""Steps between two updates in LLaMA-MoE's dynamic runs: 2.5B tokens of 14.7M a step."""

SLIMPAJAMA = ("cc", "c4", "github", "wiki", "book", "arxiv", "stackexchange")
_OTHER_SPELLINGS = {
    "commoncrawl": "cc",
    "c4rp": "c4",
    "code": "github",
    "wikipedia": "wiki",
    "books": "book",
    "stack": "stackexchange",
}
_SUM_TOLERANCE = 1e-6
_FLOOR = 1e-4

_LLAMA = dict(zip(SLIMPAJAMA, (0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02), strict=True))
_SHEARED = dict(zip(SLIMPAJAMA, (0.361, 0.492, 0.008, 0.031, 0.091, 0.007, 0.01), strict=True))


class Strategy(NamedTuple):
    """A named way to mix domains, as in LLaMA-MoE (arXiv 2406.16554, section on data sampling).

    LLaMA's weights are the mixture LLaMA was trained on; Sheared's are where Sheared-LLaMA's
    dynamic loading (arXiv 2310.06694) ended.
    """

    name: str
    weights: Mapping[str, float] | None  # None: the same for every domain of any corpus
    is_dynamic: bool  # the weights follow the losses (see `UPDATE_RULES`)


STRATEGIES = (
    Strategy("StaticLLaMA", _LLAMA, is_dynamic=False),
    Strategy("StaticSheared", _SHEARED, is_dynamic=False),
    Strategy("Uniform", None, is_dynamic=False),
    Strategy("DynamicLLaMA", _LLAMA, is_dynamic=True),
    Strategy("DynamicSheared", _SHEARED, is_dynamic=True),
    Strategy("DynamicUniform", None, is_dynamic=True),
)


def find_strategy(name: str) -> Strategy:
    """Return a strategy by its name, in any case.

    Raises:
        UsageError: no such strategy.
    """
    for strategy in STRATEGIES:
        if strategy.name.casefold() == name.casefold():
            return strategy
    names = ", ".join(strategy.name for strategy in STRATEGIES)
    raise UsageError(f"unknown mixture {name!r}: write one of {names}, or a weight for each domain")


def slimpajama_name(domain: str) -> str | None:
    """Return which of SlimPajama's seven domains a name means, or None.

    `cc`, `common_crawl`, `en_cc` and `RedPajamaCommonCrawl` are all `cc`.
    """
    # RedPajama's own names, the original code's (en_cc) and everyday spellings.
    plain = domain.casefold().removeprefix("redpajama").removeprefix("en_")
    plain = plain.replace("_", "").replace("-", "")
    plain = _OTHER_SPELLINGS.get(plain, plain)
    return plain if plain in SLIMPAJAMA else None


def for_domains(
    values: Mapping[str, float],
    domains: Iterable[str],
    *,
    what: str,
    fix: str = "give every domain of the corpus one value and no other",
) -> dict[str, float]:
    """Return values by the names of a corpus, in its order, whichever names they were given by.

    Args:
        values: by domain: the corpus's own name, or another name of the same SlimPajama domain.
        domains: the corpus's names.
        what: begins the error, as in "the weights".
        fix: ends the error.

    Raises:
        CorpusError: a domain has no value or two, or a value belongs to no domain.
    """
    domains = list(domains)
    found = {domain: _key_of(domain, values, domains) for domain in domains}
    missing = [domain for domain, key in found.items() if key is None]
    extra = [key for key in values if key not in found.values()]
    if missing or extra:
        wrong = [f"lack {', '.join(missing)}"] if missing else []
        wrong += [f"name {', '.join(extra)} besides"] if extra else []
        raise CorpusError(
            f"{what} {' and '.join(wrong)}; the corpus has {', '.join(domains)}: {fix}"
        )
    return {domain: values[key] for domain, key in found.items() if key is not None}


def _key_of(domain: str, values: Mapping[str, float], domains: list[str]) -> str | None:
    """Return the only key that can mean this domain, and no other domain of the corpus."""
    if domain in values:
        return domain
    same = slimpajama_name(domain)
    if same is None or sum(slimpajama_name(other) == same for other in domains) > 1:
        return None
    # Two names of one domain (code, github) would leave it open which of the values counts.
    keys = [key for key in values if slimpajama_name(key) == same]
    return keys[0] if len(keys) == 1 else None


def initial_weights(
    mixture: str | Mapping[str, float], domains: Iterable[str], *, normalise: bool = False
) -> dict[str, float]:
    """Return the weights that a run starts with, by domain, summing to 1.

    Args:
        mixture: a strategy's name, or weights by domain; 0 leaves a domain out.
        domains: the corpus's names.
        normalise: divide weights by their sum instead of refusing them when it is not 1.

    Raises:
        UsageError: no such strategy.
        CorpusError: weights and corpus name different domains, a weight is negative or not finite,
            or they do not sum to 1.
    """
    domains = list(domains)
    if isinstance(mixture, str):
        strategy = find_strategy(mixture)
        if strategy.weights is None:
            return dict.fromkeys(domains, 1 / len(domains))
        other = "DynamicUniform" if strategy.is_dynamic else "Uniform"
        return for_domains(
            strategy.weights,
            domains,
            what=f"the weights of {strategy.name}, a mixture of SlimPajama's seven domains,",
            fix=f"use {other}, or give a weight for each domain",
        )
    weights = for_domains(mixture, domains, what="the weights")
    for domain, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise CorpusError(f"the weight of {domain!r} is {weight}: give 0 or more")
    total = math.fsum(weights.values())  # exact, so that 0.1 ten times over is 1
    if total <= 0:
        raise CorpusError("the domain weights sum to 0: at least one must be positive")
    if normalise:
        return {domain: weight / total for domain, weight in weights.items()}
    if abs(total - 1) > _SUM_TOLERANCE:
        raise CorpusError(
            f"the domain weights sum to {total:.6g}: make them sum to 1, or set normalise_weights "
            "to have them divided by their sum"
        )
    return weights


Weights = Float64[np.ndarray, " domains"]
UpdateRule = Callable[[Weights, Weights], Weights]
"""Takes weights w (positive, summing to 1) and the excess (loss minus reference loss, nats per
token) by domain, and returns the new weights."""


def llama_moe_update(weights: Weights, excess: Weights) -> Weights:
    """Move weight to where the loss is still far above the reference, with a floor.

    w <- softmax(log w + excess), then w <- (1 - c) w + c/n with c = 1e-4, as LLaMA-MoE's code does
    (`update_weight_sheared_llama`) after Sheared-LLaMA's, which took c from DoReMi (arXiv
    2305.10429). No deviation, but float64 where the original computes in float32.
    """
    return (1 - _FLOOR) * _grown(weights, excess) + _FLOOR / len(weights)


def sheared_llama_update(weights: Weights, excess: Weights) -> Weights:
    """Move weight to where the loss is above the reference; below it nothing is taken away.

    alpha = w · exp(max(0, excess)), w <- alpha / sum(alpha): algorithm 1 of Sheared-LLaMA (arXiv
    2310.06694). No smoothing; a weight gets smaller only because others grow.
    """
    return _grown(weights, np.maximum(0.0, excess))


UPDATE_RULES: Mapping[str, UpdateRule] = {
    "llama-moe": llama_moe_update,
    "sheared-llama": sheared_llama_update,
}


def _grown(weights: Weights, growth: Weights) -> Weights:
    grown = weights * np.exp(growth - growth.max())  # the largest factor is 1: nothing overflows
    return grown / grown.sum()
