"""A split FFN: which neuron belongs to which expert, who is chosen, and the output weights."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.sample import FfnSample
from moefy.checkpoint.targets import RouterScore
from moefy.split import Split


def stream(seed: int, purpose: str, layer_idx: int) -> np.random.Generator:
    """Return the random stream of one purpose in one layer.

    Streams are keyed, not drawn from one another, so the result does not depend on the order of
    layers or shards, nor on the number of threads.
    """
    key = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), layer_idx])
    return np.random.Generator(np.random.Philox(key))


@dataclass(frozen=True)
class Partition:
    """Neurons that always run, and those of each routed expert, both ascending."""

    shared: Int[np.ndarray, " shared"]
    routed: Int[np.ndarray, "experts size"]

    @classmethod
    def of_clusters(cls, cluster: Int[np.ndarray, " neurons"], split: Split) -> Partition:
        """Read a partition from labels: 0 is shared, e + 1 is routed expert e."""
        order = np.argsort(cluster, kind="stable")  # stable: neurons stay ascending in an expert
        num_shared = int((cluster == 0).sum())
        return cls(order[:num_shared], order[num_shared:].reshape(split.routed, -1))

    @property
    def slots(self) -> Int[np.ndarray, " slots"]:
        """The neuron in every slot: the shared ones, then expert by expert.

        Where experts overlap, a neuron fills several slots.
        """
        return np.concatenate([self.shared, self.routed.ravel()])

    @property
    def expert_of_slot(self) -> Int[np.ndarray, " slots"]:
        """0 for shared slots, e + 1 for those of routed expert e."""
        experts, size = self.routed.shape
        routed = np.repeat(np.arange(1, experts + 1), size)
        return np.concatenate([np.zeros(len(self.shared), dtype=routed.dtype), routed])

    def columns(self, matrix: Float[Tensor, "hidden neurons"]) -> Float[Tensor, "hidden slots"]:
        """Return `matrix[:, slots]`."""
        if matrix.device.type != "cpu":
            return matrix[:, torch.from_numpy(self.slots)]
        # numpy moves the bits four times as fast as torch; it has no bfloat16
        bits = matrix.view(torch.int16) if matrix.element_size() == 2 else matrix
        return torch.from_numpy(bits.numpy().take(self.slots, axis=1)).view(matrix.dtype)


@dataclass(frozen=True)
class Routing:
    """Which k = `active` experts run for a token, and with what weight."""

    router: Float[Tensor, "experts hidden"]
    active: int
    score: RouterScore = "softmax"

    def weights(self, inputs: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens experts"]:
        """Return the weights of the experts with the k largest logits, and 0 for those that rest.

        They are k·softmax over the k logits, or 2·sigmoid of each: 1 where the logits are 0.
        """
        # topk of 0 has no softmax
        if self.active == 0:
            return inputs.new_zeros(len(inputs), len(self.router))
        logits = inputs @ self.router.T
        top, chosen = logits.topk(self.active, dim=-1)
        weights = 2 * top.sigmoid() if self.score == "sigmoid" else self.active * top.softmax(-1)
        return torch.zeros_like(logits).scatter_(-1, chosen, weights)

    def chosen(self, inputs: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens experts"]:
        """Return 1 for the k experts that run and 0 for the others."""
        # not weights() > 0: a softmax underflows where logits differ by more than about 100
        logits = inputs @ self.router.T
        return torch.zeros_like(logits).scatter_(-1, logits.topk(self.active, dim=-1).indices, 1.0)

    @property
    def folded_factor(self) -> float:
        """The part of the weights that goes into the routed experts' `down_proj`.

        The native softmax weights sum to 1 instead of k; the sigmoid targets have a factor 2.
        """
        return 1.0 if self.score == "sigmoid" else float(self.active)


@dataclass(frozen=True)
class SplitFfn:
    """One converted FFN, in the form that mathematics is done in (weights as in the dense sum).

    `gate` and `up` are the dense matrices; the columns of `down` follow `partition.slots`.
    """

    partition: Partition
    routing: Routing
    gate: Float[Tensor, "neurons hidden"]
    up: Float[Tensor, "neurons hidden"]
    down: Float[Tensor, "hidden slots"]

    def __call__(self, sample: FfnSample) -> Float[Tensor, "tokens hidden"]:
        """Return the converted FFN's outputs for the tokens of a sample of the dense one."""
        chunks = masked_chunks(sample, self.partition, self.routing)
        return torch.cat([masked @ self.down.T for _, masked in chunks])


def masked_chunks(
    sample: FfnSample, partition: Partition, routing: Routing
) -> Iterator[tuple[slice, Float[Tensor, "chunk slots"]]]:
    """Iterate over h̃: the activations by slot, times the weight with which the slot runs."""
    slots = torch.from_numpy(partition.slots)
    expert_of_slot = torch.from_numpy(partition.expert_of_slot)
    for tokens, activations in sample.chunks():
        weights = routing.weights(sample.inputs[tokens])  # [chunk, routed]
        # column 0 is the shared expert, which runs with weight 1
        every = torch.cat([torch.ones_like(weights[:, :1]), weights], dim=1)
        yield tokens, activations[:, slots].mul_(every[:, expert_of_slot])
