"""Layer-wise distillation: each layer's output towards the dense parent's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moefy.errors import ArchitectureError
from moefy.experts.hooks import ForwardHooks

Place = Literal["residual", "ffn"]


def relative_error(
    student: Float[Tensor, "batch sequence hidden"],
    teacher: Float[Tensor, "batch sequence hidden"],
    mask: Bool[Tensor, "batch sequence"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean over tokens of ‖y_student - y_teacher‖² / ‖y_teacher‖².

    Each token is divided by its own norm, so that tokens whose stream is large do not outweigh the
    others; the RMSNorm behind it sees directions only. As a mean over tokens, it does not depend on
    how a batch is cut where every part has as many tokens.

    Args:
        student: gets the gradients.
        teacher: the target.
        mask: True for the tokens that count; None if all do.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    target = teacher.to(wide)
    error = (student.to(wide) - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-10)
    return error.mean() if mask is None else (error * mask).sum() / mask.sum().clamp(min=1)


class LayerMatch(ForwardHooks):
    """Compares the layers of a student with its dense parent's inside a `with` block.

    Each model runs on its own inputs: the parent's layer outputs of one forward pass are the
    targets, so that a student's layer also mends what earlier layers lost (docs/objective.md).

    Args:
        student: a native MoE.
        teacher: the dense model it was made from; to be run without gradients.
        place: "residual" compares the residual stream behind every layer, "ffn" what the FFN adds
            to it.

    Raises:
        ArchitectureError: the two have not the same number of layers or width.
    """

    def __init__(self, student: Any, teacher: Any, place: Place) -> None:
        super().__init__()
        shapes = [(m.config.num_hidden_layers, m.config.hidden_size) for m in (student, teacher)]
        if shapes[0] != shapes[1]:
            raise ArchitectureError(
                f"the student has {shapes[0][0]} layers of width {shapes[0][1]}, the teacher "
                f"{shapes[1][0]} of {shapes[1][1]}: layers can only be matched with those of the "
                "model that was converted"
            )
        self._sides = [
            [_modules(layer, place) for layer in model.model.layers] for model in (student, teacher)
        ]
        self._outputs: list[dict[tuple[int, int], Tensor]] = [{}, {}]

    def hooks(self) -> Iterable[tuple[Any, Callable[..., Any]]]:
        """Return what is compared on both sides, each module with its hook."""
        return [
            (module, self._hook(side, (layer_idx, part)))
            for side, layers in enumerate(self._sides)
            for layer_idx, modules in enumerate(layers)
            for part, module in enumerate(modules)
        ]

    def clear(self) -> None:
        """Forget the last forward passes; to be called before the next."""
        for outputs in self._outputs:
            outputs.clear()

    def loss(self, mask: Bool[Tensor, "batch sequence"] | None = None) -> Float[Tensor, ""]:
        """Return the mean over layers of `relative_error`, after both models have run.

        Args:
            mask: True for the tokens that count; None if all do.
        """
        errors = [
            relative_error(self._output(0, layer_idx), self._output(1, layer_idx), mask)
            for layer_idx in range(len(self._sides[0]))
        ]
        return torch.stack(errors).mean()

    def _output(self, side: int, layer_idx: int) -> Tensor:
        first, *others = (
            self._outputs[side][layer_idx, part]
            for part in range(len(self._sides[side][layer_idx]))
        )
        return sum(others, first)

    def _hook(self, side: int, place: tuple[int, int]) -> Callable[[Any, Any, Tensor], None]:
        def note(_module: Any, _inputs: Any, output: Tensor) -> None:
            # gradient checkpointing runs a layer twice; the first output is in the loss's graph
            self._outputs[side].setdefault(place, output)

        return note


def _modules(layer: Any, place: Place) -> list[Any]:
    """Return the modules of a decoder layer whose outputs sum to what is compared."""
    if place == "residual":
        return [layer]
    parts = [getattr(layer, name, None) for name in ("mlp", "block_sparse_moe", "shared_mlp")]
    return [part for part in parts if part is not None]
