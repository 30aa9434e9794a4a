"""The calibration tokens' way through the layers, the converted ones before each layer included."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.replay import WINDOWS_AT_ONCE, LayerReplay, ModelReplay
from moefy.calibrate.sample import FfnSample, check_finite
from moefy.hardware import device, products_in

_IN_MEMORY_BYTES = 1 << 29


class HiddenStates:
    """The residual stream of all calibration tokens, in float32 on the CPU.

    More than half a GiB of it lies in a file without a name, which vanishes even after a kill. The
    file is mapped anew for each access, so that memory does not grow with the number of tokens.
    """

    def __init__(self, num_tokens: int, hidden_size: int, scratch: Path | None = None) -> None:
        self._shape = (num_tokens, hidden_size)
        self._file: IO[bytes] | None = None
        if 4 * math.prod(self._shape) > _IN_MEMORY_BYTES:
            self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 (open while this lives)
            self._file.truncate(4 * math.prod(self._shape))
            try:
                # on a full disk a write to a mapping would end the process without a word
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._file.fileno(), 0, 4 * math.prod(self._shape))
            except OSError:
                self.close()
                raise
        else:
            self._kept = np.empty(self._shape, dtype=np.float32)

    def _array(self) -> np.ndarray:
        if self._file is None:
            return self._kept
        return np.memmap(self._file, np.float32, "r+", shape=self._shape)

    def close(self) -> None:
        """Let the file go."""
        if self._file is not None:
            self._file.close()

    def __getitem__(self, tokens: slice | np.ndarray) -> Float[Tensor, "tokens hidden"]:
        """Return a copy of the states of some tokens, on the device."""
        return torch.from_numpy(np.array(self._array()[tokens])).to(device())

    def __setitem__(self, tokens: slice, states: Float[Tensor, "tokens hidden"]) -> None:
        self._array()[tokens] = states.cpu().numpy()


@dataclass(frozen=True)
class LayerTokens:
    """All calibration tokens in front of a layer's FFN; a part of them is a `FfnSample`."""

    layer: LayerReplay
    hidden: HiddenStates  # behind the layer's attention
    dense: HiddenStates | None  # behind the dense layer; None: aim at the dense FFN's outputs
    num_tokens: int
    entered: HiddenStates | None  # in front of the layer, where its FFN reads them; else None

    def sample(self, tokens: slice | np.ndarray) -> FfnSample:
        """Return the FFN with some of the tokens."""
        residual = self.hidden[tokens]
        entered = None if self.entered is None else self.entered[tokens][None]
        sample = self.layer.sample(residual[None], entered)
        # behind a norm the outputs cannot be asked to mend the stream, only to be the dense ones
        if self.dense is not None and not self.layer.normed:
            # added to the stream in front of the FFN, this gives the dense model's behind it
            sample.desired = self.dense[tokens] - residual
        return sample


class CalibrationWalk:
    """Gives every layer the inputs that the converted layers before it really produce.

    A layer's target is the dense FFN's output for those inputs. With `follow_dense` it is what
    brings the residual stream back to the dense model's, which is then carried along beside (one
    more pass of the dense layer): a layer so mends what earlier ones lost.

    Args:
        replay: the dense model.
        windows: calibration tokens.
        follow_dense: see above.
        precision: dtype of the matrix products, float32 or bfloat16.
        scratch: folder for what does not fit in memory; None: the system's.
    """

    def __init__(
        self,
        replay: ModelReplay,
        windows: Int[np.ndarray, "windows sequence"],
        *,
        follow_dense: bool,
        precision: str = "float32",
        scratch: Path | None = None,
    ) -> None:
        self.replay, self.windows = replay, windows
        self._precision, self._length = precision, windows.shape[1]
        self._num_tokens = windows.size
        size = replay.hidden_size
        self._hidden = HiddenStates(windows.size, size, scratch)
        self.dense = HiddenStates(windows.size, size, scratch) if follow_dense else None
        parallel = replay.dense.family.parallel
        self._entered = HiddenStates(windows.size, size, scratch) if parallel else None
        for block in self._blocks():
            ids = torch.from_numpy(windows.reshape(-1)[block]).view(-1, self._length)
            embedded = replay.embed(ids).flatten(0, 1)
            self._hidden[block] = embedded
            if self.dense is not None:
                self.dense[block] = embedded

    def close(self) -> None:
        """Let the files of the states go."""
        for states in (self._hidden, self.dense, self._entered):
            if states is not None:
                states.close()

    def _blocks(self) -> Iterator[slice]:
        # a few windows at a time: what is computed of them stays in the processor's cache
        step = WINDOWS_AT_ONCE * self._length
        for start in range(0, self._num_tokens, step):
            yield slice(start, min(start + step, self._num_tokens))

    def enter(self, layer: LayerReplay) -> LayerTokens:
        """Take the tokens through a layer's attention; return what its FFN sees.

        Raises:
            CorpusError: the states are not finite.
        """
        with products_in(self._precision, device()):
            for block in self._blocks():
                if self.dense is not None:
                    entered = self.dense[block].unflatten(0, (-1, self._length))
                    residual = layer.attend(entered)
                    outputs = layer.ffn(entered if layer.parallel else residual)
                    self.dense[block] = (residual + outputs).flatten(0, 1)
                entered = self._hidden[block].unflatten(0, (-1, self._length))
                if self._entered is not None:
                    self._entered[block] = entered.flatten(0, 1)
                states = layer.attend(entered)
                check_finite(states)
                self._hidden[block] = states.flatten(0, 1)
        return LayerTokens(layer, self._hidden, self.dense, self._num_tokens, self._entered)

    def leave(
        self,
        tokens: LayerTokens,
        ffn: Callable[[Float[Tensor, "tokens hidden"], str], Float[Tensor, "tokens hidden"]],
    ) -> None:
        """Take the tokens through the converted FFN, which is given the precision too."""
        for block in self._blocks():
            residual = self._hidden[block]
            entered = None if self._entered is None else self._entered[block][None]
            inputs = tokens.layer.inputs(residual[None], entered)
            outputs = tokens.layer.added(ffn(inputs, self._precision))
            self._hidden[block] = residual + outputs
