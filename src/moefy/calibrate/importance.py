"""First-order importance of neurons, by clusters of the text, with one layer in memory."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.replay import ModelReplay
from moefy.calibrate.sample import swiglu
from moefy.construct.partition.kmeans import balanced_kernel_kmeans
from moefy.construct.seeds import stream
from moefy.errors import CorpusError
from moefy.progress import Progress, ProgressFn, silent

_WINDOWS_AT_ONCE = 8


def neuron_importance(
    replay: ModelReplay,
    windows: Int[np.ndarray, "windows sequence"],
    num_clusters: int,
    *,
    seed: int,
    report: ProgressFn = silent,
) -> Float[Tensor, "layers clusters neurons"]:
    """Return v = Σ_tokens |h ⊙ ∂L/∂h| / tokens for every layer and cluster of windows.

    h is the input of `down_proj`, L the next-token loss summed over tokens: |h·∂L/∂h| is the
    first-order Taylor estimate of what removing the neuron at that token changes. Windows are
    clustered by balanced k-means on their mean final hidden states.

    The gradient goes backwards layer by layer from stored layer inputs, so that memory is one
    layer plus the hidden states of eight windows.

    Source: LLaMA-MoE (arXiv 2406.16554), section 3.1, "Sharing". Deviation: windows are clustered
    by this model's hidden states, the paper's documents by an embedding model.

    Args:
        replay: of the dense model.
        windows: calibration tokens.
        num_clusters: one per routed expert.
        seed: of the clustering.
        report: told about progress.

    Raises:
        CorpusError: fewer windows than clusters.
    """
    if len(windows) < num_clusters:
        raise CorpusError(
            f"{len(windows)} calibration windows cannot make {num_clusters} clusters of text: "
            "raise calibration_tokens, lower calibration_length, or use fewer experts"
        )
    head = replay.head()
    means, parts = [], []
    batches = torch.from_numpy(windows).split(_WINDOWS_AT_ONCE)
    for done, ids in enumerate(batches):
        hidden = replay.embed(ids)
        inputs = []
        for layer_idx in range(replay.num_layers):
            layer = replay.layer(layer_idx)
            inputs.append(hidden)
            hidden = layer.attend(hidden)
            sample = layer.sample(hidden)
            hidden = hidden + sample.outputs().view_as(hidden)
        means.append(hidden.mean(dim=1))
        leaf = hidden.requires_grad_()
        with torch.enable_grad():
            logits = head.logits(leaf[:, :-1].flatten(0, 1))
            loss = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        scores = []
        for layer_idx in reversed(range(replay.num_layers)):
            gradient, score = _backward(replay, layer_idx, inputs.pop(), gradient)
            scores.append(score)
        parts.append(torch.stack(scores[::-1], dim=1))
        report(Progress("importance", done + 1, len(batches)))
    by_window = torch.cat(parts)
    features = F.normalize(torch.cat(means).double(), dim=1)
    label = balanced_kernel_kmeans(
        (features @ features.T).numpy(), num_clusters, stream(seed, "text clusters", 0)
    )
    clusters = [by_window[torch.from_numpy(label == c)].mean(dim=0) for c in range(num_clusters)]
    return torch.stack(clusters, dim=1)


def _backward(
    replay: ModelReplay,
    layer_idx: int,
    inputs: Float[Tensor, "windows sequence hidden"],
    gradient: Float[Tensor, "windows sequence hidden"],
) -> tuple[Float[Tensor, "windows sequence hidden"], Float[Tensor, "windows neurons"]]:
    """Return the gradient at a layer's inputs, and |h ⊙ ∂L/∂h| averaged over each window."""
    layer = replay.layer(layer_idx)
    leaf = inputs.requires_grad_()
    with torch.enable_grad():
        residual = layer.attend(leaf)
        sample = layer.sample(residual)
        activations = swiglu(sample.inputs, sample.gate, sample.up)
        outputs = residual + (activations @ sample.down.T).view_as(residual)
    at_inputs, at_activations = torch.autograd.grad(outputs, (leaf, activations), gradient)
    score = (activations.detach() * at_activations).abs().unflatten(0, inputs.shape[:2])
    return at_inputs, score.mean(dim=1)
