"""First-order importance of neurons, by clusters of the text, with one layer in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.replay import ModelReplay
from moefy.calibrate.sample import swiglu
from moefy.errors import CorpusError
from moefy.progress import Progress, ProgressFn, silent

_WINDOWS_AT_ONCE = 8
_SEGMENT_TOKENS = 128
"""Texts are clustered in pieces of this length, so that a few windows make many clusters."""


@dataclass(frozen=True)
class SegmentImportance:
    """Importance of every neuron in every segment of text, and the segment's mean final state."""

    scores: Float[Tensor, "segments layers neurons"]
    features: Float[Tensor, "segments hidden"]


def window_importance(
    replay: ModelReplay,
    windows: Int[np.ndarray, "windows sequence"],
    num_clusters: int,
    *,
    report: ProgressFn = silent,
) -> SegmentImportance:
    """Return v = Σ_tokens |h ⊙ ∂L/∂h| / tokens for every layer and segment of the windows.

    h is the input of `down_proj`, L the next-token loss summed over tokens: |h·∂L/∂h| is the
    first-order Taylor estimate of what removing the neuron at that token changes. Memory is one
    layer, the hidden states of eight windows at every layer, and the logits of one window.

    Source: LLaMA-MoE (arXiv 2406.16554), section 3.1, "Sharing". Deviation: the texts that are
    clustered are segments of 128 tokens by this model's hidden states, the paper's are documents
    by an embedding model.

    Raises:
        CorpusError: there are fewer segments than `num_clusters`.
    """
    segments = max(1, windows.shape[1] // _SEGMENT_TOKENS)
    check_segments(len(windows) * segments, num_clusters)
    head = replay.head()
    features, parts = [], []
    batches = torch.from_numpy(windows).split(_WINDOWS_AT_ONCE)
    for done, ids in enumerate(batches):  # [windows, sequence]
        hidden = replay.embed(ids)
        inputs = []
        for layer_idx in range(replay.num_layers):
            layer = replay.layer(layer_idx)
            inputs.append(hidden)
            hidden = layer.attend(inputs[-1])
            outputs = layer.sample(hidden, inputs[-1]).outputs()
            hidden = hidden + layer.added(outputs).view_as(hidden)
        features += [part.mean(dim=1) for part in hidden.tensor_split(segments, dim=1)]
        pairs = zip(hidden, ids.to(hidden.device), strict=True)
        gradient = torch.stack([_loss_gradient(head, *window) for window in pairs])
        # the gradient goes backwards layer by layer, each computed again from its stored inputs
        scores = []
        for layer_idx in reversed(range(replay.num_layers)):
            gradient, score = _backward(replay, layer_idx, inputs.pop(), gradient)
            scores.append(
                torch.cat([part.mean(dim=1) for part in score.tensor_split(segments, dim=1)])
            )
        parts.append(torch.stack(scores[::-1], dim=1))
        report(Progress("importance", done + 1, len(batches)))
    return SegmentImportance(torch.cat(parts), torch.cat(features))


def check_segments(segments: int, num_clusters: int) -> None:
    """Raise a CorpusError for text of fewer segments than clusters."""
    if segments < num_clusters:
        raise CorpusError(
            f"{segments} calibration segments cannot make {num_clusters} clusters of text: raise "
            "calibration_tokens, or use fewer experts"
        )


def _loss_gradient(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "sequence hidden"],
    ids: Int[Tensor, " sequence"],
) -> Float[Tensor, "sequence hidden"]:
    """Return the gradient of a window's next-token loss at its final hidden states."""
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(head(leaf[:-1]), ids[1:], reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]


def _backward(
    replay: ModelReplay,
    layer_idx: int,
    inputs: Float[Tensor, "windows sequence hidden"],
    gradient: Float[Tensor, "windows sequence hidden"],
) -> tuple[Float[Tensor, "windows sequence hidden"], Float[Tensor, "windows sequence neurons"]]:
    """Return the gradient at a layer's inputs, and |h ⊙ ∂L/∂h|."""
    # FFN and attention are computed again with a gradient, from the layer's stored inputs
    layer = replay.layer(layer_idx)
    leaf = inputs.requires_grad_()
    with torch.enable_grad():
        residual = layer.attend(leaf)
        sample = layer.sample(residual, leaf)
        activations = swiglu(sample.inputs, sample.gate, sample.up)
        outputs = residual + layer.added(activations @ sample.down.T).view_as(residual)
    at_inputs, at_activations = torch.autograd.grad(outputs, (leaf, activations), gradient)
    score = (activations.detach() * at_activations).abs()
    return at_inputs, score.unflatten(0, inputs.shape[:2])
