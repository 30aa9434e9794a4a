"""Alternate router and partition: a neuron goes to the expert that runs when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moefy.calibrate.sample import FfnSample
from moefy.construct.ffn import Partition, Routing
from moefy.construct.partition.balanced import balanced_assignment
from moefy.construct.partition.random import independent_random
from moefy.split import Split

ROUNDS = 8
_FEW = 1 / 500  # of the neurons; what still moves after that changes the loss by less than a seed


def alternating(
    sample: FfnSample,
    split: Split,
    fit_router: Callable[[Float[Tensor, "tokens experts"]], Float[Tensor, "experts hidden"]],
    generator: np.random.Generator,
) -> Partition:
    """Improve a random partition together with the router that will serve it.

    With e_tj = h_tj²·‖w_j‖² the energy of neuron j at token t, and m_te = 1 where the router
    chooses expert e, neuron j is worth V_je = Σ_t ω_t·m_te·e_tj in expert e, and
    V_j0 = Σ_t ω_t·e_tj in the shared one. Rounds of

    1. fit the router to the energies of the present experts (`fit_router`),
    2. give neurons to experts so that Σ_j V_{j,expert(j)} is largest, sizes fixed.

    Step 2 never lowers the energy that this routing keeps, but for the tolerance of the assignment.
    A shared place goes to the neuron that gains most by it over its best routed expert, not to the
    largest: a large neuron that its expert's router foresees need not always run. The rounds end
    when fewer than one neuron in 500 moves, or after eight.

    Source: none known; moefy's own. The energies ignore that contributions of neurons cancel; the
    refit of `down_proj` repairs what that costs. A start from co-activation ends no better
    (docs/experiments.md, section 3).

    Args:
        sample: FFN and calibration tokens of the layer.
        split: counts of experts, with some to choose between: 0 < chosen < routed.
        fit_router: returns a router for target energies, as the conversion will use it.
        generator: draws the start.
    """
    partition = independent_random(sample.num_neurons, split, generator)
    cluster = np.empty(sample.num_neurons, dtype=np.int64)
    cluster[partition.slots] = partition.expert_of_slot
    size = split.size(sample.num_neurons)
    capacity = np.array([split.shared * size, *[size] * split.routed])
    energies = list(_energies(sample)) if sample.fits_in_memory else None
    for _ in range(ROUNDS):
        # [neurons, routed]: column 0 of the identity, the shared expert, has no router row
        member = torch.from_numpy(np.eye(split.routed + 1, dtype=np.float32)[cluster][:, 1:])
        member = member.to(sample.down.device)
        by_expert = [energy @ member for _, energy in energies or _energies(sample)]
        routing = Routing(fit_router(torch.cat(by_expert)), split.chosen)
        value = sample.down.new_zeros(split.routed + 1, sample.num_neurons)
        for tokens, energy in energies or _energies(sample):
            chosen = routing.chosen(sample.inputs[tokens])
            runs = torch.cat([torch.ones_like(chosen[:, :1]), chosen], dim=1)
            value += (runs * sample.token_weights[tokens, None]).T @ energy
        new = balanced_assignment(value.T.double().cpu().numpy(), capacity)
        moved = np.mean(new != cluster)
        cluster = new
        if moved < _FEW:
            break
    return Partition.of_clusters(cluster, split)


def _energies(sample: FfnSample) -> Iterator[tuple[slice, Float[Tensor, "chunk neurons"]]]:
    column_energy = sample.down.square().sum(0)
    for tokens, activations in sample.chunks():
        yield tokens, activations.square().mul_(column_energy)
