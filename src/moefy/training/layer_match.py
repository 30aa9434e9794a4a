"""Layer-wise distillation: the distance of each layer's output from the dense parent's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from operator import add
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moefy.errors import ArchitectureError
from moefy.experts.routers import ForwardHooks

Place = Literal["residual", "ffn"]


def relative_error(
    student: Float[Tensor, "batch sequence hidden"],
    teacher: Float[Tensor, "batch sequence hidden"],
    mask: Bool[Tensor, "batch sequence"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean over the tokens of `mask` of ‖y_student - y_teacher‖² / ‖y_teacher‖².

    As a mean over tokens, it does not depend on how a batch is cut where every part has as many.
    """
    # each token is divided by its own norm, or tokens whose stream is large would outweigh the
    # others; the RMSNorm behind it sees directions only
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
        self._pairs = [
            [_modules(layer, place) for layer in layers]
            for layers in zip(student.model.layers, teacher.model.layers, strict=True)
        ]
        self._outputs: dict[Any, Tensor] = {}  # by module

    def hooks(self) -> Iterable[tuple[Any, Callable[..., Any]]]:
        """Return what is compared on both sides, each module with its hook."""
        sides = [side for pair in self._pairs for side in pair]
        return [(module, self._note) for side in sides for module in side]

    def _note(self, module: Any, _inputs: Any, output: Tensor) -> None:
        # gradient checkpointing runs a layer twice; the first output is in the loss's graph
        self._outputs.setdefault(module, output)

    def clear(self) -> None:
        """Forget the last forward passes; to be called before the next."""
        self._outputs.clear()

    def loss(self, mask: Bool[Tensor, "batch sequence"] | None = None) -> Float[Tensor, ""]:
        """Return the mean over layers of `relative_error`, after both models have run."""
        errors = []
        for pair in self._pairs:
            student, teacher = (reduce(add, [self._outputs[m] for m in side]) for side in pair)
            errors.append(relative_error(student, teacher, mask))
        return torch.stack(errors).mean()


def _modules(layer: Any, place: Place) -> list[Any]:
    """Return the modules of a decoder layer whose outputs sum to what is compared."""
    if place == "residual":
        return [layer]
    parts = [getattr(layer, name, None) for name in ("mlp", "block_sparse_moe", "shared_mlp")]
    return [part for part in parts if part is not None]
