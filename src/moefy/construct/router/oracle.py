"""The oracle: chooses by the true energies. A ceiling for evaluation, no router to ship."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moefy.calibrate.sample import FfnSample, swiglu
from moefy.construct.ffn import Partition, Routing
from moefy.construct.router.energy import energy_members


@dataclass(frozen=True, kw_only=True)
class OracleRouting(Routing):
    """Runs the k experts with the largest Σ_{j∈e} h_j²·‖w_j‖² at the token, each with weight 1."""

    sample: FfnSample
    partition: Partition

    def weights(self, inputs: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens experts"]:
        """Return 1 for the chosen experts and 0 for the others."""
        return self.chosen(inputs)

    def chosen(self, inputs: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens experts"]:
        """Return 1 for the experts with the largest energies and 0 for the others."""
        # computed again from the inputs, which may be other tokens than the sample's
        activations = swiglu(inputs, self.sample.gate, self.sample.up)
        energies = activations.square() @ energy_members(self.sample, self.partition)
        chosen = energies.topk(self.active, dim=-1).indices
        return torch.zeros_like(energies).scatter_(-1, chosen, 1.0)
