"""A layer's tensors as a dense family stores them: some are one, as Phi-3's q, k and v."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moefy.checkpoint.families import DenseFamily


def stored_form(family: DenseFamily, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's tensors by stored name, the parts of fused ones below each other.

    Args:
        family: of the layer.
        tensors: by their name behind the layer prefix, parts apart.
    """
    stored = dict(tensors)
    for fused in family.fused:
        stored[fused.stored] = torch.cat([stored.pop(part) for part in fused.parts])
    return stored
