"""A shuffled order of any length in constant memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt64

_NUM_ROUNDS = 12  # with 8, orders of 5 to 16 places are measurably uneven


def permuted(
    places: Int[np.ndarray, " places"], length: int, key: Sequence[int]
) -> Int[np.ndarray, " places"]:
    """Return what stands at some places of a pseudo-random permutation of 0 … length - 1.

    A Feistel network permutes the smallest 4^b >= length numbers: a number is two halves (L, R) of
    b bits, and each of twelve rounds maps them to (R, L xor hash(R xor round key)). A result
    outside the range is put through again until it is inside ("cycle walking", Black and Rogaway
    2002), which keeps it a permutation and takes less than four turns on average.

    Args:
        places: each from 0 to length - 1, in any order, repeated or not.
        length: length of the permutation, 1 to 2^62.
        key: non-negative integers that choose the permutation.
    """
    half_bits = max(1, -(-(length - 1).bit_length() // 2))
    round_keys = np.random.SeedSequence(list(key)).generate_state(_NUM_ROUNDS, np.uint64)
    values = _feistel(places.astype(np.uint64), half_bits, round_keys)
    while (outside := np.flatnonzero(values >= length)).size:
        values[outside] = _feistel(values[outside], half_bits, round_keys)
    return values.astype(np.int64)


def _feistel(
    values: UInt64[np.ndarray, " values"],
    half_bits: int,
    round_keys: UInt64[np.ndarray, " rounds"],
) -> UInt64[np.ndarray, " values"]:
    bits = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for round_key in round_keys:
        mixed = right ^ round_key
        # MurmurHash3's 64-bit finaliser spreads every bit over all of the others
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(33)
        left, right = right, left ^ (mixed & mask)
    return (left << bits) | right
