"""Numbers about which experts were chosen, from counts alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

_CUTS = 64  # of every domain's windows into halves

Counts = Float[np.ndarray, "layers experts"]


def load_shares(choices: Counts) -> Counts:
    """Return each expert's share of its layer's choices; they sum to 1.

    Args:
        choices: how often each expert was chosen.
    """
    return choices / choices.sum(-1, keepdims=True)


def relative_entropy(load: Counts) -> Float[np.ndarray, " layers"]:
    """Return −Σ_e p_e·log p_e / log E: 1 for even use, 0 where one expert takes everything.

    Args:
        load: p, sums to 1 over the experts. A single expert is used evenly.
    """
    num_experts = load.shape[-1]
    return _entropy_bits(load) / np.log2(num_experts) if num_experts > 1 else np.ones(len(load))


def dead_experts(choices: Counts) -> list[list[int]]:
    """Return, by layer, the experts that were never chosen."""
    return [np.flatnonzero(layer == 0).tolist() for layer in choices]


def coactivation(
    pairs: Float[np.ndarray, "layers experts experts"],
) -> Float[np.ndarray, "layers experts experts"]:
    """Return P(f chosen | e chosen) at [e][f], rows of 0 for experts that were never chosen.

    Args:
        pairs: tokens that chose both experts; on the diagonal, tokens that chose the expert.
    """
    choices = np.diagonal(pairs, axis1=-2, axis2=-1)[..., None]
    return np.divide(pairs, choices, out=np.zeros_like(pairs), where=choices > 0)


def divergence(
    loads: Float[np.ndarray, "domains layers experts"],
) -> Float[np.ndarray, " layers"]:
    """Return the Jensen–Shannon divergence of the domains' loads, in bits.

    JSD = 1/D·Σ_d KL(p_d ‖ m) = H(m) − 1/D·Σ_d H(p_d), with p_d the load of domain d, m their mean
    and H the entropy (Lin 1991, "Divergence measures based on the Shannon entropy", section V,
    with equal weights): the bits that one choice tells about the domain, 0 to log2 D.

    Args:
        loads: p, sums to 1 over the experts.
    """
    mixed: Float[np.ndarray, " layers"] = _entropy_bits(loads.mean(0))
    # rounding may leave a negative number where all domains are alike
    return np.maximum(mixed - _entropy_bits(loads).mean(0), 0)


def expected_divergence(
    windows: Sequence[Float[np.ndarray, "_windows layers experts"]], *, seed: int = 0
) -> Float[np.ndarray, " layers"] | None:
    """Return the divergence to expect of domains that do not differ, from windows of the same size.

    Each domain's n windows are cut at random into halves of a and b windows, 64 times. To first
    order the divergence of two halves is v/8·(1/a + 1/b), and that of D domains v/2·(D − 1)/(D·n),
    with the same v, so each of the former is multiplied by 4·(D − 1)/(D·n·(1/a + 1/b)); the mean
    over cuts and domains is returned. It is too small where documents are longer than a window,
    because their windows are then alike.

    Args:
        windows: of every domain, how often each expert was chosen in each window.
        seed: of the cuts.

    Returns:
        By layer, bits; None where a domain has one window, which has no halves.
    """
    if min(map(len, windows)) < 2:
        return None
    generator = np.random.default_rng(seed)
    found = [
        np.mean([_scaled_halves(domain, generator) for _ in range(_CUTS)], axis=0)
        for domain in windows
    ]
    share: Float[np.ndarray, " layers"] = np.mean(found, axis=0)
    # the rest of the factor, 4/(n·(1/a + 1/b)), depends on the cut: `_scaled_halves` has it
    return share * (len(windows) - 1) / len(windows)


def _scaled_halves(
    windows: Float[np.ndarray, "_windows layers experts"], generator: np.random.Generator
) -> Float[np.ndarray, " layers"]:
    number = len(windows)
    first: Bool[np.ndarray, " _windows"] = generator.permutation(number) < number // 2
    halves = [load_shares(windows[chosen].sum(0)) for chosen in (first, ~first)]
    inverse_sizes = 1 / first.sum() + 1 / (~first).sum()
    return divergence(np.stack(halves)) * 4 / (number * inverse_sizes)


def _entropy_bits(load: Float[np.ndarray, "*any experts"]) -> Float[np.ndarray, "*any"]:
    # 0·log 0 is 0
    logs = np.log2(load, out=np.zeros_like(load), where=load > 0)
    return -(load * logs).sum(-1)
