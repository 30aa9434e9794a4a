"""The calibration tokens on their way through the layers, past the ones already converted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.replay import LayerReplay, ModelReplay
from moefy.calibrate.sample import FfnSample, check_finite


class CalibrationWalk:
    """Gives every layer the inputs that the converted layers before it really produce.

    A layer's target is the dense FFN's output for those inputs. With `follow_dense` it is what
    brings the residual stream back to the dense model's, which is then carried along beside (one
    more pass of the dense layer): a layer so mends what earlier ones lost.
    """

    def __init__(
        self,
        replay: ModelReplay,
        windows: Int[np.ndarray, "windows sequence"],
        *,
        follow_dense: bool,
    ) -> None:
        self._hidden = replay.embed(torch.from_numpy(windows))
        self._dense = self._hidden.clone() if follow_dense else None

    def enter(self, layer: LayerReplay) -> FfnSample:
        """Take the tokens through a layer's attention; return what its FFN sees.

        Raises:
            CorpusError: an activation is not finite.
        """
        if self._dense is not None:
            self._dense = layer.attend(self._dense)
            self._dense += layer.sample(self._dense).outputs().view_as(self._dense)
        self._hidden = layer.attend(self._hidden)
        check_finite(self._hidden)
        sample = layer.sample(self._hidden)
        if self._dense is not None:
            # added to the stream in front of the FFN, this gives the dense model's behind it
            sample.desired = (self._dense - self._hidden).flatten(0, 1)
        return sample

    def leave(
        self, sample: FfnSample, ffn: Callable[[FfnSample], Float[Tensor, "tokens hidden"]]
    ) -> None:
        """Take the tokens through the converted FFN."""
        self._hidden += ffn(sample).view_as(self._hidden)
