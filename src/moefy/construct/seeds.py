"""Random streams that depend on nothing but what they are for."""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, purpose: str, layer_idx: int) -> np.random.Generator:
    """Return the random stream of one purpose in one layer.

    Streams are keyed, not drawn from one another, so the result does not depend on the order of
    layers or shards, nor on the number of threads.
    """
    key = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), layer_idx])
    return np.random.Generator(np.random.Philox(key))
