"""The chunked loss against float64 references and plain autograd."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefy.errors import ArchitectureError
from moefy.evaluation.output_loss import IGNORED, LogitsInput, OutputLoss, output_loss

SIZES = [(7, 5, 11), (96, 24, 300)]  # tokens, hidden, vocabulary
SETTINGS = [(0.0, 1.0), (1.0, 1.0), (0.5, 1.0), (1.0, 2.0), (0.3, 3.0)]  # share, temperature


def made(size: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    tokens, hidden, vocab = size
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[::5] = IGNORED
    return (
        draw(tokens, hidden).requires_grad_(),
        (0.5 * draw(vocab, hidden)).requires_grad_(),
        labels,
        draw(tokens, hidden + 3),
        0.5 * draw(vocab, hidden + 3),
    )


def plain(
    hidden: Tensor, weight: Tensor, labels: Tensor, th: Tensor, tw: Tensor, share: float, tau: float
) -> Tensor:
    """The definition, with all logits at once; scales 1/3 and 1/2."""
    logits, teacher = hidden @ weight.T / 3, th @ tw.T / 2
    counted = labels != IGNORED
    cross_entropy = F.cross_entropy(logits[counted], labels[counted])
    p = (teacher[counted] / tau).softmax(-1)
    divergence = (p * (p.log() - (logits[counted] / tau).log_softmax(-1))).sum(-1).mean()
    return (1 - share) * cross_entropy + share * tau**2 * divergence


def chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    th: Tensor,
    tw: Tensor,
    share: float,
    tau: float,
    chunk_tokens: int = 3,
) -> OutputLoss:
    return output_loss(
        LogitsInput(hidden / 3, weight),
        labels,
        teacher=LogitsInput(th / 2, tw),
        teacher_share=share,
        temperature=tau,
        chunk_bytes=4 * len(weight) * chunk_tokens,
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("share", "tau"), SETTINGS)
def test_loss_and_gradients_are_plain_autograds(
    size: tuple[int, int, int], share: float, tau: float
) -> None:
    data = made(size)
    expected = plain(*data, share, tau)
    gradients = torch.autograd.grad(1.7 * expected, data[:2])
    for chunk_tokens in (1, 3, 1000):
        found = chunked(*data, share, tau, chunk_tokens)
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)
        for mine, theirs in zip(
            torch.autograd.grad(1.7 * found.loss, data[:2]), gradients, strict=True
        ):
            assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-15)


def test_float32_is_near_float64() -> None:
    wide, narrow = made(SIZES[1]), made(SIZES[1], torch.float32)
    expected = torch.autograd.grad(plain(*wide, 0.5, 1.0), wide[:2])
    found = torch.autograd.grad(chunked(*narrow, 0.5, 1.0).loss, narrow[:2])
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() < 1e-6 * theirs.norm()


def test_losses_by_token_are_by_hand() -> None:
    data = made(SIZES[0])
    hidden, weight, labels, teacher_hidden, teacher_weight = (part.detach() for part in data)
    found = chunked(*data, 0.5, 2.0)
    assert found.divergence is not None
    for t, label in enumerate(labels.tolist()):
        if label == IGNORED:
            assert found.cross_entropy[t] == found.divergence[t] == 0
            continue
        z = [float(hidden[t] @ row) / 3 for row in weight]
        q = [math.exp(float(teacher_hidden[t] @ row) / 2 / 2) for row in teacher_weight]
        q = [value / sum(q) for value in q]
        cross_entropy = math.log(sum(map(math.exp, z))) - z[label]
        log_sum = math.log(sum(math.exp(value / 2) for value in z))
        divergence = sum(
            p * (math.log(p) - value / 2 + log_sum) for p, value in zip(q, z, strict=True)
        )
        assert float(found.cross_entropy[t]) == pytest.approx(cross_entropy, rel=1e-10)
        assert float(found.divergence[t]) == pytest.approx(divergence, rel=1e-9)


def test_cross_entropy_alone_needs_no_teacher() -> None:
    hidden, weight, labels, *_ = made(SIZES[1])
    found = output_loss(LogitsInput(hidden, weight), labels, chunk_bytes=4 * 300 * 10)
    expected = F.cross_entropy(hidden @ weight.T, labels)
    assert found.divergence is None
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(found.loss, [hidden, weight]),
        torch.autograd.grad(expected, [hidden, weight]),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-15)


def test_parts_that_divide_by_the_whole_batch_add_up() -> None:
    data = made(SIZES[1])
    whole = torch.autograd.grad(chunked(*data, 0.5, 1.0).loss, data[:2])
    hidden, weight, labels, teacher_hidden, teacher_weight = data
    found = [torch.zeros_like(hidden), torch.zeros_like(weight)]
    for start, stop in pairwise((0, 20, 96)):
        part = slice(start, stop)
        loss = output_loss(
            LogitsInput(hidden[part] / 3, weight),
            labels[part],
            teacher=LogitsInput(teacher_hidden[part] / 2, teacher_weight),
            teacher_share=0.5,
            num_tokens=float((labels != IGNORED).sum()),
        ).loss
        for total, mine in zip(found, torch.autograd.grad(loss, [hidden, weight]), strict=True):
            total += mine
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(found, whole, strict=True))


def test_without_gradients_and_without_labels() -> None:
    data = made(SIZES[0])
    with torch.no_grad():
        found = chunked(*data, 0.5, 2.0)
    assert not found.loss.requires_grad
    assert found.loss.item() == pytest.approx(chunked(*data, 0.5, 2.0).loss.item(), rel=1e-12)
    nothing = torch.full_like(data[2], IGNORED)
    loss = output_loss(LogitsInput(data[0], data[1]), nothing).loss
    loss.backward()
    assert loss == 0
    assert data[0].grad is not None
    assert data[0].grad.eq(0).all()


def test_a_frozen_matrix_gets_no_gradient() -> None:
    hidden, weight, labels, *_ = made(SIZES[0])
    weight.requires_grad_(False)
    output_loss(LogitsInput(hidden, weight), labels).loss.backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_autocast_is_near_float32() -> None:
    data = made(SIZES[1], torch.float32)
    exact = chunked(*data, 0.5, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = chunked(*data, 0.5, 1.0)
    assert rounded.loss.dtype == torch.float32
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2)
    assert rounded.loss.item() != exact.loss.item()
    pairs = zip(
        torch.autograd.grad(rounded.loss, data[:2]),
        torch.autograd.grad(exact.loss, data[:2]),
        strict=True,
    )
    for mine, theirs in pairs:
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


def test_agreement_is_that_of_the_likeliest_tokens() -> None:
    """Only without gradients; it does not depend on the temperature."""
    data = made(SIZES[1])
    hidden, weight, labels, teacher_hidden, teacher_weight = (part.detach() for part in data)
    ours = (hidden @ weight.T).argmax(-1) == (teacher_hidden @ teacher_weight.T).argmax(-1)
    # two of three teachers' states are the student's: they agree there
    mixed = torch.where(torch.arange(96)[:, None] % 3 > 0, hidden, -hidden)
    same = (hidden @ weight.T).argmax(-1) == (mixed @ weight.T).argmax(-1)
    assert 60 <= same.sum() < 96
    with torch.no_grad():
        found = chunked(*data, 0.5, 2.0).agreement
        found_mixed = chunked(hidden, weight, labels, mixed, weight, 0.0, 1.0).agreement
    counted = labels != IGNORED
    assert found is not None
    assert found_mixed is not None
    assert torch.equal(found, ours & counted)
    assert torch.equal(found_mixed, same & counted)
    assert chunked(*data, 0.5, 2.0).agreement is None


def test_another_vocabulary_is_refused() -> None:
    hidden, weight, labels, teacher_hidden, teacher_weight = made(SIZES[0])
    with pytest.raises(ArchitectureError, match="10 tokens in its vocabulary, the student 11"):
        output_loss(
            LogitsInput(hidden, weight),
            labels,
            teacher=LogitsInput(teacher_hidden, teacher_weight[:10]),
        )


def test_a_large_vocabulary_costs_no_digits() -> None:
    """torch's own float32 cross-entropy is 8e-6 nats too low with SmolLM2's 49,152 tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(128, 49_152, generator=generator)
    labels = torch.randint(49_152, (128,), generator=generator)
    exact = F.cross_entropy(logits.double(), labels).item()
    with torch.no_grad():
        # the hidden states are one-hot: they pick the columns of the output matrix
        found = output_loss(LogitsInput(torch.eye(128), logits.T.contiguous()), labels)
    assert found.loss.item() == pytest.approx(exact, abs=1e-6)
    assert found.cross_entropy.double().mean().item() == pytest.approx(exact, abs=2e-7)
