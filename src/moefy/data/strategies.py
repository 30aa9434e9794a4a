"""How much of each domain: the published mixtures, and how one may change while it is trained on.

Weights are float64 and sum to 1. A domain of weight 0 is left out and stays left out. A mixture
that follows the losses compares them with reference losses, nats per token on a domain's held-out
text. The best reference is the dense parent itself, which the trainer measures; this file has the
two others, a file and the published numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from jaxtyping import Float64

from moefy.errors import CorpusError, UsageError
from moefy.storage import load_yaml

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

# By SlimPajama's domains. LLaMA: the mixture it was trained on. Sheared: where Sheared-LLaMA's
# dynamic loading (arXiv 2310.06694) ended. 6.7: the losses of LLaMA-2-7B on SlimPajama's validation
# sets (LLaMA-MoE, arXiv 2406.16554, `LLAMA2_7B_SLIMPAJAMA_VAL_REF_LOSS` in its code). 1.3 and 2.7:
# what a LLaMA of so many billions would reach on RedPajama's, by Sheared-LLaMA's scaling law.
_PUBLISHED = {
    name: dict(zip(SLIMPAJAMA, row, strict=True))
    for name, row in {
        "LLaMA": (0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02),
        "Sheared": (0.361, 0.492, 0.008, 0.031, 0.091, 0.007, 0.01),
        "1.3": (1.9643, 2.1251, 0.7459, 1.7590, 2.1393, 1.4449, 1.6117),
        "2.7": (1.8712, 2.0328, 0.6883, 1.6297, 2.0325, 1.3560, 1.5353),
        "6.7": (1.6917, 2.0749, 0.6984, 1.5899, 1.9252, 1.2408, 1.4975),
    }.items()
}
_REFERENCE_SIZES = ("1.3", "2.7", "6.7")  # billions of parameters
_LLAMA_VOCAB_SIZE = 32_000
_LARGEST_RATIO = 1.6


class Strategy(NamedTuple):
    """A named way to mix domains, as in LLaMA-MoE (arXiv 2406.16554, section on data sampling)."""

    name: str
    weights: Mapping[str, float] | None  # None: the same for every domain of any corpus
    is_dynamic: bool  # the weights follow the losses (see `UPDATE_RULES`)


STRATEGIES = [
    Strategy(name, _PUBLISHED.get(name[len(kind) :]), is_dynamic=kind == "Dynamic")
    for kind, names in {
        "Static": ("StaticLLaMA", "StaticSheared", "Uniform"),
        "Dynamic": ("DynamicLLaMA", "DynamicSheared", "DynamicUniform"),
    }.items()
    for name in names
]


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


def published_reference(
    domains: Iterable[str], *, num_parameters: int, vocab_size: int
) -> dict[str, float]:
    """Return the published losses of the row that is nearest to the parent's size.

    Args:
        domains: the corpus's names.
        num_parameters: of the dense parent.
        vocab_size: of the dense parent. The losses are per token of LLaMA's 32,000.

    Returns:
        Nats per token by the corpus's names.

    Raises:
        UsageError: no row is near enough, or the tokenizer is another.
        CorpusError: the corpus does not have SlimPajama's seven domains.
    """
    billions = num_parameters / 1e9
    # Model sizes are compared by their ratio, as scaling laws do.
    size = min(_REFERENCE_SIZES, key=lambda size: abs(math.log(float(size) / billions)))
    ratio = float(size) / billions
    sizes = ", ".join(f"{size}B" for size in _REFERENCE_SIZES)
    instead = "take the dense model's own losses (reference_losses: dense) or a file"
    if max(ratio, 1 / ratio) > _LARGEST_RATIO:
        raise UsageError(
            f"no reference losses are published for {billions:.3g}B parameters, only for {sizes}: "
            f"{instead}"
        )
    if vocab_size != _LLAMA_VOCAB_SIZE:
        raise UsageError(
            f"the published reference losses are nats per token of LLaMA's {_LLAMA_VOCAB_SIZE:,} "
            f"tokens, and this model has {vocab_size:,}: {instead}"
        )
    return for_domains(_PUBLISHED[size], domains, what="the published reference losses")


def read_reference(file: str | Path, domains: Iterable[str]) -> dict[str, float]:
    """Read reference losses from a YAML or JSON file, as in `{wiki: 1.59, book: 1.93}`.

    Args:
        file: a mapping of domains to nats per token.
        domains: the corpus's names; the file may use other names of the same SlimPajama domains.

    Raises:
        UsageError: the file cannot be read, is no mapping, or holds something else than a positive
            number for a domain.
        CorpusError: a domain is missing, or one too many is there.
    """
    try:
        # JSON with tabs between its values is no YAML
        values = load_yaml(Path(file).read_text().replace("\t", " "))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"the reference losses {file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{file} must map domains to losses, as in {{wiki: 1.59, book: 1.93}}")
    for domain, loss in values.items():
        is_number = isinstance(loss, int | float) and not isinstance(loss, bool)
        if not (isinstance(domain, str) and is_number and 0 < loss < math.inf):
            raise UsageError(
                f"{file}, {domain!r}: {loss!r} is no loss: write nats per token, as in 1.59"
            )
    losses = {domain: float(loss) for domain, loss in values.items()}
    return for_domains(losses, domains, what=f"the reference losses in {file}")
