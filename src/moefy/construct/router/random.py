"""A random router whose choice is random and whose gate weights start nearly equal."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

LOGIT_STD = 1e-2
"""Standard deviation of the router's logits at the start."""


def random_router(
    norm_gain: Float[Tensor, " hidden"], num_experts: int, generator: np.random.Generator
) -> Float[Tensor, "experts hidden"]:
    """Draw a router in float32.

    W_ej = s·n_ej with n ~ N(0, 1) and s = 1e-2 / ‖g‖, g the gain of the RMSNorm in front of the
    FFN. The router's input is x_j = g_j·z_j with mean(z²) = 1, so a logit Σ_j W_ej·x_j has the
    standard deviation 1e-2 whatever the model: the order of the logits, and so the choice of
    experts, is that of any random router, and the softmax weights of the chosen ones differ by
    about a percent. Their common value is folded into `down_proj` (see `Routing.folded_factor`).

    Deviation from LLaMA-MoE (arXiv 2406.16554): the paper starts from the framework's default
    initialisation, where the weights of the chosen experts differ by tens of percent before
    anything has been learned.
    """
    # drawn by numpy in float64: the same on every device and version of torch
    normal = generator.standard_normal((num_experts, norm_gain.numel()))
    scale = LOGIT_STD / norm_gain.double().norm().clamp_min(1e-12)
    return (torch.from_numpy(normal).to(scale) * scale).float()
