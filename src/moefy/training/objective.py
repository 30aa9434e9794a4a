"""The loss of a step: next token, distillation and balance over all passes and processes.

docs/objective.md has the formulas. Every term is a mean over the tokens of the whole batch, or a
function of sums over them, so it does not matter how a batch is cut (but see `balance` on passes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from moefy.data.template import IGNORED
from moefy.errors import ArchitectureError
from moefy.evaluation.output_loss import LogitsInput, check_vocabularies, output_loss
from moefy.experts.balance import RouterSums, importance_and_load_loss, router_z_loss, switch_loss
from moefy.experts.noisy_gate import NoisyGate
from moefy.experts.routers import ForwardHooks, RouterTrace, SelectionBias, routers_of
from moefy.training.processes import Processes
from moefy.training.recipe import (
    ImportanceLoadBalance,
    SelectionBiasBalance,
    SwitchBalance,
    TrainRecipe,
)
from moefy.training.samples import Rows, StepSamples

Place = Literal["residual", "ffn"]


def relative_error(
    student: Float[Tensor, "batch sequence hidden"],
    teacher: Float[Tensor, "batch sequence hidden"],
) -> Float[Tensor, ""]:
    """Return the mean over tokens of ‖y_student - y_teacher‖² / ‖y_teacher‖²."""
    # each token is divided by its own norm, or tokens whose stream is large would outweigh the
    # others; the RMSNorm behind it sees directions only
    wide = torch.promote_types(student.dtype, torch.float32)
    target = teacher.to(wide)
    error = (student.to(wide) - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-10)
    return error.mean()


class LayerMatch(ForwardHooks):
    """Compares the layers of a student with its dense parent's inside a `with` block.

    Each model runs on its own inputs: the parent's layer outputs of one forward pass are the
    targets, so that a student's layer also mends what earlier layers lost (docs/objective.md).

    `place` "residual" compares the residual stream behind every layer, "ffn" what the FFN adds to
    it. ArchitectureError says that the two have not the same number of layers or width.
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

        def compared(layer: Any) -> list[Any]:
            # the outputs of these modules sum to what is compared
            parts = [
                getattr(layer, name, None) for name in ("mlp", "block_sparse_moe", "shared_mlp")
            ]
            return [layer] if place == "residual" else [part for part in parts if part is not None]

        self._pairs = [
            [compared(layer) for layer in layers]
            for layers in zip(student.model.layers, teacher.model.layers, strict=True)
        ]
        self._outputs: dict[Any, Tensor] = {}  # by module

    def hooks(self) -> Iterable[tuple[Any, Callable[..., Any]]]:
        """Return what is compared on both sides, each module with its hook."""
        return [(m, self._note) for pair in self._pairs for side in pair for m in side]

    def _note(self, module: Any, _inputs: Any, output: Tensor) -> None:
        # gradient checkpointing runs a layer twice; the first output is in the loss's graph
        self._outputs.setdefault(module, output)

    def clear(self) -> None:
        """Forget the last forward passes; to be called before the next."""
        self._outputs.clear()

    def loss(self) -> Float[Tensor, ""]:
        """Return the mean over layers of `relative_error`, after both models have run."""
        errors = []
        for pair in self._pairs:
            student, teacher = (reduce(add, [self._outputs[m] for m in side]) for side in pair)
            errors.append(relative_error(student, teacher))
        return torch.stack(errors).mean()


@dataclass
class StepLosses:
    """Losses of the passes of one process, without gradients."""

    # domain, mean cross-entropy of the labels (nats) and number of labels of every row
    rows: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    # the other losses, weighted so that they add up over passes; over processes they are means
    terms: dict[str, Tensor] = field(default_factory=dict)
    router: RouterSums | None = None  # over the tokens of all processes; None for a dense model

    def add(self, name: str, value: Tensor) -> None:
        """Add a pass's share of a term."""
        self.terms[name] = self.terms.get(name, value.new_zeros(())) + value.detach()


class Objective:
    """The losses of a recipe for one student, and its teacher where there is one.

    Refuses a balance that the student's routers cannot have, and a teacher that is not its parent.
    """

    def __init__(
        self, student: Any, teacher: Any | None, recipe: TrainRecipe, processes: Processes
    ) -> None:
        self.student, self.teacher = student, teacher
        self.recipe, self.processes = recipe, processes
        self._match: LayerMatch | None = None
        if teacher is not None:
            check_vocabularies(student.config.vocab_size, teacher.config.vocab_size)
            if recipe.distillation.layers != "none":
                self._match = LayerMatch(student, teacher, recipe.distillation.layers)
        balance = recipe.balance
        self.noise: NoisyGate | None = None  # its matrices are learned too
        if isinstance(balance, ImportanceLoadBalance) and balance.noise:
            self.noise = NoisyGate(routers_of(student), scale=balance.noise)
        self._bias = SelectionBias(student) if isinstance(balance, SelectionBiasBalance) else None

    @contextmanager
    def step(self, samples: StepSamples) -> Iterator[StepLosses]:
        """Watch the models while `loss` computes the passes of a step; yield the losses."""
        self._samples, self._done, self._pass = samples, StepLosses(), 0
        with ExitStack() as stack:
            self._trace = stack.enter_context(RouterTrace(self.student, noise=self.noise))
            if self._match is not None:
                stack.enter_context(self._match)
            yield self._done

    def reduce_noise_gradients(self) -> None:
        """Average the noisy gate's gradients over processes, as the student's are by FSDP."""
        if self.noise is None or self.processes.size == 1:
            return
        for parameter in self.noise.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=self.processes.group)
                parameter.grad /= self.processes.num_data

    def after_step(self) -> None:
        """Shift the selection biases by what the whole batch chose."""
        router = self._done.router
        if self._bias is not None and router is not None:
            assert isinstance(self.recipe.balance, SelectionBiasBalance)
            self._bias.update(router.choices, self.recipe.balance.rate)

    def loss(self, rows: Rows) -> Float[Tensor, ""]:
        """Return one pass's part of the step's loss; the gradients of all parts add up.

        Where there are several processes their gradients are to be averaged.
        """
        done, num_passes = self._done, self._samples.num_passes
        distillation = self.recipe.distillation
        self._pass += 1
        self._trace.clear()
        parent = None
        if self._match is not None:
            self._match.clear()
        if self.teacher is not None:
            with torch.no_grad():
                parent = LogitsInput.of(self.teacher, rows.tokens).predicting()
        labels = rows.labels[:, 1:]
        out = output_loss(
            LogitsInput.of(self.student, rows.tokens).predicting(),
            labels,
            teacher=parent,
            teacher_share=distillation.alpha if parent is not None else 0.0,
            temperature=distillation.temperature,
            # the mean over processes of sums divided by this is the mean over all labels
            num_tokens=self._samples.num_labels / self.processes.num_data,
        )
        loss = out.loss
        counts = (labels != IGNORED).sum(1)
        means = out.cross_entropy.sum(1) / counts.clamp(min=1)
        done.rows += zip(rows.domains, means, counts, strict=True)
        if out.divergence is not None:
            done.add("kl", out.divergence.mean() / num_passes)
        if self._match is not None:
            layers = self._match.loss()
            done.add("layer_loss", layers / num_passes)
            loss = loss + distillation.layer_weight / num_passes * layers
        return loss + self._router_loss(rows, loss)

    def _router_loss(self, rows: Rows, like: Tensor) -> Tensor:
        """Return the pass's part of balance and z-loss; see the top of experts/balance.py."""
        total, recipe, processes = like.new_zeros(()), self.recipe, self.processes
        own = self._trace.sums(rows.is_real)
        if own is None:
            return total
        if processes.group is not None:
            own = own.over_workers(processes.group)
        before = self._done.router
        sums = own if before is None else before + own
        self._done.router = sums.detach()
        # pass p of P adds p/P times the loss of all sums so far: nearer to the whole batch's
        # gradient than the mean of every pass's own loss
        weight = self._pass / self._samples.num_passes
        balance = recipe.balance
        if isinstance(balance, SwitchBalance) and balance.per_pass:
            value = switch_loss(own) / self._samples.num_passes
            self._done.add("balance_loss", value)
            total = total + balance.coefficient * value
        elif isinstance(balance, SwitchBalance | ImportanceLoadBalance):
            is_switch = isinstance(balance, SwitchBalance)
            value = (switch_loss if is_switch else importance_and_load_loss)(sums)
            self._done.terms["balance_loss"] = value.detach()  # of all passes so far
            total = total + weight * balance.coefficient * value
        if recipe.z_loss:
            value = router_z_loss(sums)
            self._done.terms["z_loss"] = value.detach()
            total = total + weight * recipe.z_loss * value
        # gradients are averaged over the processes, and these losses are the whole batch's
        return processes.num_data * total.to(like.dtype)
