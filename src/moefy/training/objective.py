"""What a step minimises: next-token loss, distillation, balance, all passes and workers together.

docs/objective.md has the formulas. Every term is a mean over the tokens of the whole batch, or a
function of sums over them, so it does not matter how a batch is cut (but see `balance` on passes).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from moefy.evaluation.output_loss import LogitsInput, check_vocabularies, output_loss
from moefy.experts.balance import (
    RouterSums,
    importance_and_load_loss,
    router_z_loss,
    switch_loss,
)
from moefy.experts.noisy_gate import NoisyGate
from moefy.experts.router_trace import RouterTrace, routers_of
from moefy.experts.selection_bias import SelectionBias
from moefy.training.layer_match import LayerMatch
from moefy.training.processes import Workers
from moefy.training.recipe import (
    ImportanceLoadBalance,
    SelectionBiasBalance,
    SwitchBalance,
    TrainRecipe,
)


@dataclass
class StepLosses:
    """What one worker's passes of a step came to; sums over its sequences, without gradients.

    Attributes:
        cross_entropy: of each sequence, nats per token, in the order of the batch.
        terms: the other losses that the recipe has, weighted so that they add up over passes; over
            workers they are means.
        router: sums over the tokens of all workers; None for a dense model.
    """

    cross_entropy: list[Tensor] = field(default_factory=list)
    terms: dict[str, Tensor] = field(default_factory=dict)
    router: RouterSums | None = None

    def add(self, name: str, value: Tensor) -> None:
        """Add a pass's share of a term."""
        self.terms[name] = self.terms.get(name, value.new_zeros(())) + value.detach()


class Objective:
    """The losses of a recipe for one student.

    Args:
        student: the model in training.
        teacher: its dense parent, or None.
        recipe: of the run.
        workers: of the run.

    Attributes:
        noise: the noisy gate's matrices, which the optimizer learns too; None without noise.

    Raises:
        UsageError: selection-bias balancing of a model whose checkpoint cannot hold the bias.
        ArchitectureError: the noisy gate cannot serve the student's routers, or the teacher is not
            the student's parent.
    """

    def __init__(
        self, student: Any, teacher: Any | None, recipe: TrainRecipe, workers: Workers
    ) -> None:
        self._student, self._teacher = student, teacher
        self._recipe, self._workers = recipe, workers
        if teacher is not None:
            check_vocabularies(student.config.vocab_size, teacher.config.vocab_size)
            if recipe.distillation.layers != "none":
                LayerMatch(student, teacher, recipe.distillation.layers)
        balance = recipe.balance
        self.noise: NoisyGate | None = None
        if isinstance(balance, ImportanceLoadBalance) and balance.noise:
            self.noise = NoisyGate(routers_of(student), scale=balance.noise)
        self._bias = SelectionBias(student) if isinstance(balance, SelectionBiasBalance) else None

    @contextmanager
    def step(self) -> Iterator[_Step]:
        """Give what computes the passes of one step."""
        distillation = self._recipe.distillation
        with ExitStack() as stack:
            trace = stack.enter_context(RouterTrace(self._student, noise=self.noise))
            match = None
            if self._teacher is not None and distillation.layers != "none":
                match = LayerMatch(self._student, self._teacher, distillation.layers)
                stack.enter_context(match)
            yield _Step(self._student, self._teacher, self._recipe, self._workers, trace, match)

    def reduce_noise_gradients(self) -> None:
        """Average the noisy gate's gradients over workers, as the student's are by FSDP."""
        if self.noise is None or self._workers.size == 1:
            return
        for parameter in self.noise.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=self._workers.group)
                parameter.grad /= self._workers.num_data

    def after_step(self, done: StepLosses) -> None:
        """Shift the selection biases by what the whole batch chose."""
        if self._bias is not None and done.router is not None:
            assert isinstance(self._recipe.balance, SelectionBiasBalance)
            self._bias.update(done.router.choices, self._recipe.balance.rate)


class _Step:
    """The passes of one step, one worker's part of them."""

    def __init__(
        self,
        student: Any,
        teacher: Any | None,
        recipe: TrainRecipe,
        workers: Workers,
        trace: RouterTrace,
        match: LayerMatch | None,
    ) -> None:
        self._student, self._teacher = student, teacher
        self._recipe, self._workers = recipe, workers
        self._trace, self._match = trace, match
        self._sequences = recipe.global_batch_size // workers.num_data
        self._num_passes = self._sequences // recipe.micro_batch_size
        self._pass = 0
        self.done = StepLosses()

    def loss(self, tokens: Int[Tensor, "batch sequence"]) -> Float[Tensor, ""]:
        """Return one pass's part of the step's loss; the gradients of all parts add up.

        Where there are several workers their gradients are to be averaged.
        """
        distillation, done = self._recipe.distillation, self.done
        self._pass += 1
        self._trace.clear()
        parent = None
        if self._match is not None:
            self._match.clear()
        if self._teacher is not None and distillation.needs_teacher:
            with torch.no_grad():
                parent = LogitsInput.of(self._teacher, tokens).predicting()
        out = output_loss(
            LogitsInput.of(self._student, tokens).predicting(),
            tokens[:, 1:],
            teacher=parent,
            teacher_share=distillation.alpha if parent is not None else 0.0,
            temperature=distillation.temperature,
            num_tokens=float(self._sequences * (tokens.shape[1] - 1)),
        )
        loss = out.loss
        done.cross_entropy += out.cross_entropy.mean(1).unbind()
        if out.divergence is not None:
            done.add("kl", out.divergence.mean() / self._num_passes)
        if self._match is not None:
            layers = self._match.loss()
            done.add("layer_loss", layers / self._num_passes)
            loss = loss + distillation.layer_weight / self._num_passes * layers
        return loss + self._router_loss(loss)

    def _router_loss(self, like: Tensor) -> Tensor:
        """Return the pass's part of balance and z-loss; see the top of training/balance.py."""
        total = like.new_zeros(())
        own = self._trace.sums()
        if own is None:
            return total
        num_workers = 1
        if self._workers.group is not None:
            own, num_workers = own.over_workers(self._workers.group), self._workers.num_data
        before = self.done.router
        sums = own if before is None else before + own
        self.done.router = sums.detach()
        weight = self._pass / self._num_passes
        balance = self._recipe.balance
        if isinstance(balance, SwitchBalance | ImportanceLoadBalance):
            is_switch = isinstance(balance, SwitchBalance)
            value = (switch_loss if is_switch else importance_and_load_loss)(sums)
            self.done.terms["balance_loss"] = value.detach()  # of all passes so far
            total = total + weight * balance.coefficient * value
        if self._recipe.z_loss:
            value = router_z_loss(sums)
            self.done.terms["z_loss"] = value.detach()
            total = total + weight * self._recipe.z_loss * value
        return num_workers * total.to(like.dtype)
