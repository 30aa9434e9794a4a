"""A split FFN: which neuron belongs to which expert, who is chosen, and the output weights."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.sample import FfnSample, swiglu
from moefy.checkpoint.targets import RouterScore
from moefy.split import Split

_CHUNK = 4096  # tokens
_SMALL = 64  # neurons of an expert


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

    def top(
        self, inputs: Float[Tensor, "tokens hidden"]
    ) -> tuple[Float[Tensor, "tokens active"], Int[Tensor, "tokens active"]]:
        """Return the weights of the experts with the k largest logits, and which these are.

        The weights are k·softmax over the k logits, 2·sigmoid of each, or k times its share of the
        k sigmoids: 1 where the logits are 0.
        """
        top, chosen = (inputs @ self.router.T).topk(self.active, dim=-1)
        # 2·sigmoid and k·softmax are both 1 where the logits are equal, as in the dense sum
        weights = 2 * top.sigmoid() if self.score != "softmax" else self.active * top.softmax(-1)
        if self.score == "shares of sigmoids":
            weights = self.active * weights / weights.sum(-1, keepdim=True)
        return weights, chosen

    def weights(self, inputs: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens experts"]:
        """Return `top`'s weights in a row per token, 0 for the experts that rest."""
        everywhere = inputs.new_zeros(len(inputs), len(self.router))
        if self.active == 0:  # topk of 0 has no softmax
            return everywhere
        weights, chosen = self.top(inputs)
        return everywhere.scatter(-1, chosen, weights)

    def chosen(self, inputs: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens experts"]:
        """Return 1 for the k experts that run and 0 for the others."""
        # not weights() > 0: a softmax underflows where logits differ by more than about 100
        logits = inputs @ self.router.T
        return torch.zeros_like(logits).scatter_(-1, logits.topk(self.active, dim=-1).indices, 1.0)

    @property
    def folded_factor(self) -> float:
        """The part of the weights that goes into the routed experts' `down_proj`.

        The native weights sum to 1 instead of k; the sigmoid targets have a factor 2.
        """
        return 1.0 if self.score == "sigmoid" else float(self.active)


@dataclass(frozen=True)
class FitError:
    """Error of one layer on calibration tokens that were not fitted, before and after the fit.

    Both are Σ ω·‖y − f‖² / Σ ω·‖y‖², y the target and f the split FFN's outputs.
    """

    before: float
    after: float


@dataclass(frozen=True)
class SplitFfn:
    """One converted FFN, in the form that mathematics is done in (weights as in the dense sum).

    `gate` and `up` are the dense matrices, or fitted ones with a row per slot (`fitted`); the
    columns of `down` follow `partition.slots`.
    """

    partition: Partition
    routing: Routing
    gate: Float[Tensor, "rows hidden"]
    up: Float[Tensor, "rows hidden"]
    down: Float[Tensor, "hidden slots"]
    fitted: bool = False
    error: FitError | None = None

    @property
    def rows(self) -> Partition:
        """Which rows of `gate` and `up` every expert has."""
        if not self.fitted:
            return self.partition
        kept, routed = len(self.partition.shared), self.partition.routed
        return Partition(np.arange(kept), kept + np.arange(routed.size).reshape(routed.shape))

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and the transposed down, each [slots, hidden]."""
        slots = torch.from_numpy(self.rows.slots)
        return self.gate[slots], self.up[slots], self.down.T.contiguous()

    def __call__(
        self, inputs: Float[Tensor, "tokens hidden"], precision: str = "float32"
    ) -> Float[Tensor, "tokens hidden"]:
        """Return the converted FFN's outputs, the neurons' products formed in a precision."""
        dtype, num_shared = getattr(torch, precision), len(self.partition.shared)
        gate, up, down = (matrix.to(dtype) for matrix in self.weights)
        parts = (
            routed_ffn(z, gate, up, down, self.routing.weights(z), num_shared)
            for z in inputs.split(_CHUNK)
        )
        return torch.cat(list(parts))


def routed_ffn(
    inputs: Float[Tensor, "tokens hidden"],
    gate: Float[Tensor, "slots hidden"],
    up: Float[Tensor, "slots hidden"],
    down: Float[Tensor, "slots hidden"],
    weights: Float[Tensor, "tokens experts"],
    num_shared: int,
) -> Float[Tensor, "tokens hidden"]:
    """Return the outputs of a split FFN; only the chosen experts are computed.

    Products are formed in the dtype of `gate`, `up` and `down`; sums in the inputs'.

    Args:
        inputs: z, the FFN's inputs.
        gate: rows of the shared neurons, then expert by expert.
        up: the same.
        down: the same; `down_proj` transposed.
        weights: of the experts, 0 where one rests.
        num_shared: number of shared neurons.
    """
    z, experts = inputs.to(gate.dtype), weights.shape[1]
    outputs = torch.zeros_like(inputs)
    if num_shared:
        shared = slice(num_shared)
        outputs = outputs + swiglu(z, gate[shared], up[shared]) @ down[shared]
    expert, token = weights.T.nonzero(as_tuple=True)
    if not len(token):
        return outputs
    routed = [m[num_shared:] for m in (gate, up, down)]
    if len(routed[0]) < _SMALL * experts and 8 * len(token) >= weights.numel():
        # products with a few rows are slower than one large product of which a part is masked
        hidden = swiglu(z, routed[0], routed[1]).unflatten(1, (experts, -1))
        return outputs + (hidden * weights[:, :, None].to(z.dtype)).flatten(1) @ routed[2]
    counts = expert.bincount(minlength=experts).tolist()
    by_expert = zip(
        z[token].split(counts),
        weights[token, expert, None].to(z.dtype).split(counts),
        *(m.unflatten(0, (experts, -1)).unbind(0) for m in routed),
        strict=True,
    )
    parts = [(swiglu(x, g, u) * weight) @ d for x, weight, g, u, d in by_expert]
    return outputs.index_add(0, token, torch.cat(parts).to(outputs.dtype))


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
