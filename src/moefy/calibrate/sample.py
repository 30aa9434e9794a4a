"""What calibrated methods see of a layer: its FFN and the inputs it meets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moefy.errors import CorpusError

_CHUNK_TOKENS = 4096
_KEEP_BYTES = 2 << 30
_LARGEST = 1e15


@dataclass
class FfnSample:
    """A layer's SwiGLU FFN and the calibration tokens' inputs to it."""

    gate: Float[Tensor, "neurons hidden"]
    up: Float[Tensor, "neurons hidden"]
    down: Float[Tensor, "hidden neurons"]
    norm_gain: Float[Tensor, " hidden"]  # of the RMSNorm in front of the FFN
    inputs: Float[Tensor, "tokens hidden"]  # z, normed; no tokens without calibration
    token_weights: Float[Tensor, " tokens"]  # how much each token's error counts, mean 1
    desired: Float[Tensor, "tokens hidden"] | None = None  # if not the dense outputs
    importance: Float[Tensor, "clusters neurons"] | None = None  # see `calibrate.importance`
    _kept: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def num_tokens(self) -> int:
        """Number of calibration tokens."""
        return self.inputs.shape[0]

    @property
    def num_neurons(self) -> int:
        """The dense layer's d_ff."""
        return self.gate.shape[0]

    @property
    def fits_in_memory(self) -> bool:
        """Whether one number per token and neuron takes at most 2 GiB."""
        return 4 * self.num_tokens * self.num_neurons <= _KEEP_BYTES

    def chunks(self) -> Iterator[tuple[slice, Float[Tensor, "chunk neurons"]]]:
        """Iterate over the activations h = silu(z·gateᵀ) ⊙ (z·upᵀ) in the order of the tokens.

        Raises:
            CorpusError: an activation is not finite, or its square would not be.
        """
        # Kept where they fit, else computed again in every pass: memory must not grow with d_ff
        # times the number of tokens.
        for number, start in enumerate(range(0, self.num_tokens, _CHUNK_TOKENS)):
            tokens = slice(start, min(start + _CHUNK_TOKENS, self.num_tokens))
            if number < len(self._kept):
                yield tokens, self._kept[number]
                continue
            activations = swiglu(self.inputs[tokens], self.gate, self.up)
            check_finite(activations)
            if self.fits_in_memory:
                self._kept.append(activations)
            yield tokens, activations

    def outputs(self) -> Float[Tensor, "tokens hidden"]:
        """Return the dense FFN's outputs."""
        return torch.cat([activations @ self.down.T for _, activations in self.chunks()])

    def target(self) -> Float[Tensor, "tokens hidden"]:
        """Return what the converted FFN should give."""
        return self.outputs() if self.desired is None else self.desired


def check_finite(activations: Tensor) -> None:
    """Raise a CorpusError for activations of which float32 cannot hold the sum of squares."""
    low, high = activations.aminmax()  # NaN fails both comparisons
    if not (low > -_LARGEST and high < _LARGEST):
        raise CorpusError(
            "the activations are not finite on the calibration tokens: the checkpoint is damaged "
            "or its weights overflow float32"
        )


def swiglu(
    inputs: Float[Tensor, "tokens hidden"],
    gate: Float[Tensor, "neurons hidden"],
    up: Float[Tensor, "neurons hidden"],
) -> Float[Tensor, "tokens neurons"]:
    """Return h = silu(z·gateᵀ) ⊙ (z·upᵀ), the input of `down_proj`."""
    return F.silu(inputs @ gate.T) * (inputs @ up.T)
