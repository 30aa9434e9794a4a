"""Next-token loss and distillation from hidden states, without the logits of the whole batch.

A language model's logits are by far its largest activation: [tokens, vocabulary] in float32, and as
much again for their gradient and for each copy that a softmax makes. Here the output matrix is
applied to a chunk of tokens at a time, and the chunk's loss and gradient are formed at once. No
product is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch  # sets an attribute, and puts back what was there

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefy.errors import ArchitectureError

IGNORED = -100  # label of a token that does not count, as in transformers
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class LogitsInput:
    """What a model's logits are made of: hidden · weightᵀ.

    Attributes:
        hidden: last hidden states, after the final norm and, for Granite, its `logits_scaling`.
        weight: the output matrix; with tied embeddings the embedding itself, whose gradient then
            has two parts.
    """

    hidden: Float[Tensor, "*tokens hidden"]
    weight: Float[Tensor, "vocab hidden"]

    @classmethod
    def of(cls, model: Any, tokens: Int[Tensor, "batch sequence"], **inputs: Any) -> LogitsInput:
        """Run a transformers language model up to its output matrix.

        The model's own forward runs, with the matrix passed over: FSDP gathers the weights in it.

        Args:
            model: any family or target of moefy.
            tokens: ids.
            **inputs: of the model's forward pass, such as `attention_mask`.

        Raises:
            ArchitectureError: the logits are more than a matrix product.
        """
        head = model.get_output_embeddings()
        if head.bias is not None or getattr(model.config, "final_logit_softcapping", None):
            raise ArchitectureError(
                f"the logits of this {model.config.model_type} model have a bias or a soft cap, "
                "which the chunked loss does not know"
            )
        # FSDP hooks the output, and warns of views: hence a copy
        with patch.object(head, "forward", torch.clone):
            hidden = model(tokens, use_cache=False, **inputs).logits
        # a tied matrix is taken where FSDP keeps it up to date: the head's has rows that never
        # change where the vocabulary has no multiple of the processes (pytorch issue 176076)
        tied = getattr(model.config, "tie_word_embeddings", False)
        return cls(hidden, (model.get_input_embeddings() if tied else head).weight)

    def predicting(self) -> LogitsInput:
        """Return the same without each sequence's last token, which has nothing to predict."""
        return LogitsInput(self.hidden[:, :-1], self.weight)


@dataclass(frozen=True)
class OutputLoss:
    """What `output_loss` returns; only the first has gradients."""

    loss: Float[Tensor, ""]  # the weighted sum
    cross_entropy: Float[Tensor, "*tokens"]  # nats; 0 where the label is IGNORED
    # KL(teacher ‖ student) at the temperature, nats, without the factor τ²; None without a teacher
    divergence: Float[Tensor, "*tokens"] | None
    # whether both find the same token the likeliest; None without a teacher or with gradients
    agreement: Bool[Tensor, "*tokens"] | None = None


def output_loss(
    student: LogitsInput,
    labels: Int[Tensor, "*tokens"],
    *,
    teacher: LogitsInput | None = None,
    teacher_share: float = 0.0,
    temperature: float = 1.0,
    num_tokens: float | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
) -> OutputLoss:
    """Return cross-entropy, distillation, or a mixture of both, and their gradients.

    loss = Σ_t (1 - λ)·CE_t + λ·τ²·KL(softmax(z_teacher/τ) ‖ softmax(z_student/τ))_t, divided by the
    number of tokens. Source: Hinton et al. (arXiv 1503.02531), section 2; τ² keeps the gradient's
    size. Passes and workers that all divide by the whole batch's `num_tokens` add up to the same
    loss and gradient, however the batch is cut.

    Beside the inputs it holds two to five buffers of `chunk_bytes` and the gradients of `hidden`
    and `weight`. Under autocast the products run in its dtype; the loss is float32 or wider.

    Args:
        student: gets the gradients.
        labels: the token that each hidden state should predict, or IGNORED.
        teacher: the dense parent on the same tokens, without gradients.
        teacher_share: λ, 0 to 1.
        temperature: τ.
        num_tokens: to divide by; None for the number of labels that count.
        chunk_bytes: size of a chunk's logits; at least one token is taken.

    Raises:
        ArchitectureError: student and teacher have different vocabularies.
    """
    if teacher is not None:
        check_vocabularies(len(student.weight), len(teacher.weight))
    assert teacher is not None or teacher_share == 0, "a teacher's share needs a teacher"
    counted = labels != IGNORED
    divisor = max(1.0, float(counted.sum() if num_tokens is None else num_tokens))
    with_gradient = torch.is_grad_enabled()  # inside of an autograd.Function it never is
    # [tokens that count, hidden]: ignored ones cost nothing
    loss, cross_entropy, divergence, agreement = _ChunkedLoss.apply(
        student.hidden[counted],
        student.weight,
        labels[counted],
        teacher.hidden[counted] if teacher else None,
        teacher.weight if teacher else None,
        teacher_share,
        temperature,
        divisor,
        chunk_bytes,
        with_gradient,
    )

    def placed(values: Tensor) -> Tensor:
        return torch.zeros_like(labels, dtype=values.dtype).masked_scatter(counted, values)

    return OutputLoss(
        loss,
        placed(cross_entropy),
        placed(divergence) if teacher else None,
        placed(agreement) if teacher and not with_gradient else None,
    )


def check_vocabularies(student: int, teacher: int) -> None:
    """Raise an ArchitectureError where two vocabularies have different numbers of tokens."""
    if student != teacher:
        raise ArchitectureError(
            f"the teacher has {teacher:,} tokens in its vocabulary, the student {student:,}: "
            "distil from the model that was converted"
        )


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradient in one pass over chunks of tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        share: float,
        temperature: float,
        divisor: float,
        chunk_bytes: int,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        # products may be in bfloat16; a sum over the vocabulary in it would lose the loss's digits
        wide = torch.promote_types(dtype, torch.float32)
        matrix = weight.to(dtype)
        teacher_matrix = None if teacher_weight is None else teacher_weight.to(dtype)
        cross_entropy = hidden.new_zeros(len(hidden), dtype=wide)
        divergence = torch.zeros_like(cross_entropy)
        agreement = torch.zeros_like(labels, dtype=torch.bool)
        needs_hidden, needs_weight = (
            needed and with_gradient for needed in ctx.needs_input_grad[:2]
        )
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        chunk_tokens = max(1, chunk_bytes // (4 * len(weight)))
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(hidden), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                inputs = hidden[rows].to(dtype)
                logits = F.linear(inputs, matrix).to(wide)  # [chunk, vocab]
                teacher_logits = None
                if teacher_hidden is not None and teacher_matrix is not None:
                    teacher_logits = F.linear(teacher_hidden[rows].to(dtype), teacher_matrix)
                    teacher_logits = teacher_logits.to(wide)
                    if not with_gradient:  # training has no use for it
                        agreement[rows] = logits.argmax(-1) == teacher_logits.argmax(-1)
                cross_entropy[rows], divergence[rows], grad = _losses_and_gradient(
                    logits,
                    labels[rows],
                    teacher_logits,
                    share,
                    temperature,
                    with_gradient=needs_hidden or needs_weight,
                )
                if grad is None:
                    continue
                grad = grad.mul_(1 / divisor).to(dtype)
                if hidden_grad is not None:
                    hidden_grad[rows] = grad @ matrix
                if weight_grad is not None and dtype == wide:
                    weight_grad.addmm_(grad.T, inputs)
                elif weight_grad is not None:  # addmm_ does not mix dtypes
                    weight_grad += grad.T @ inputs
        # kept here and not by save_for_backward: backward must be free to scale them in place
        ctx.gradients = (
            hidden_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
        )
        ctx.mark_non_differentiable(cross_entropy, divergence, agreement)
        by_token = (1 - share) * cross_entropy
        by_token += share * temperature**2 * divergence
        return by_token.sum() / divisor, cross_entropy, divergence, agreement

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the chunked loss keeps its gradients for one backward"
        gradients = [g if g is None else g.mul_(loss_grad) for g in ctx.gradients]
        ctx.gradients = None  # so that autograd can keep the tensors instead of copying them
        return *gradients, *[None] * 8


def _losses_and_gradient(
    logits: Float[Tensor, "chunk vocab"],
    labels: Int[Tensor, " chunk"],
    teacher_logits: Float[Tensor, "chunk vocab"] | None,
    share: float,
    temperature: float,
    *,
    with_gradient: bool,
) -> tuple[
    Float[Tensor, " chunk"], Float[Tensor, " chunk"] | float, Float[Tensor, "chunk vocab"] | None
]:
    """Return a chunk's losses and the gradient of (1 - λ)·CE + λ·τ²·KL with respect to its logits.

    It overwrites the logits that it is given: they are the largest tensors.
    """
    label_column = labels[:, None]  # [chunk, 1]
    log_sum = logits.logsumexp(-1, keepdim=True)
    cross_entropy = (log_sum - logits.gather(-1, label_column))[:, 0]
    if teacher_logits is None:
        if not with_gradient:
            return cross_entropy, 0.0, None
        # d CE / d logits = softmax - one-hot
        grad = logits.sub_(log_sum).exp_()
        grad.scatter_add_(-1, label_column, torch.full_like(log_sum, -1.0))
        return cross_entropy, 0.0, grad

    hot_grad = None  # of the cross-entropy, whose temperature is 1
    if with_gradient and temperature != 1 and share != 1:
        hot_grad = (logits - log_sum).exp_().mul_(1 - share)
    if temperature != 1:
        logits.div_(temperature)
        log_sum = logits.logsumexp(-1, keepdim=True)
        teacher_logits.div_(temperature)
    log_probs = logits.sub_(log_sum)
    teacher_log_probs = teacher_logits.sub_(teacher_logits.logsumexp(-1, keepdim=True))
    teacher_probs = teacher_log_probs.exp()
    divergence = torch.linalg.vecdot(teacher_probs, teacher_log_probs.sub_(log_probs))
    if not with_gradient:
        return cross_entropy, divergence, None
    # d τ²·KL / d logits = τ·(softmax(z/τ) - teacher's); at τ = 1 both losses share one softmax
    probs = log_probs.exp_()
    if temperature == 1:
        grad = probs.sub_(teacher_probs.mul_(share))
    else:
        grad = probs.sub_(teacher_probs).mul_(share * temperature)
        if hot_grad is not None:
            grad.add_(hot_grad)  # (1 - λ)·softmax(z)
    grad.scatter_add_(-1, label_column, torch.full_like(log_sum, share - 1))
    return cross_entropy, divergence, grad
