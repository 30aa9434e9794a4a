"""The objective on transformers' own modules: every target, padding, checkpointing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import write_tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import moefy
from moefy.errors import ArchitectureError, UsageError
from moefy.evaluation.output_loss import LogitsInput, output_loss
from moefy.experts.balance import (
    importance_and_load_loss,
    router_sums,
    router_z_loss,
    switch_loss,
)
from moefy.experts.noisy_gate import NoisyGate, choose
from moefy.experts.routers import RouterTrace, SelectionBias, routers_of
from moefy.recipe import LLAMA_MOE
from moefy.training.objective import LayerMatch

TARGETS = ["mixtral", "granitemoe", "granitemoeshared", "qwen3_moe", "glm4_moe"]
_EXTRAS: dict[str, dict[str, Any]] = {
    "granitemoe": {"logits_scaling": 3.0, "residual_multiplier": 0.5},
    "granitemoeshared": {"logits_scaling": 3.0, "shared_intermediate_size": 16},
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 6, "norm_topk_prob": True},
    "glm4_moe": {
        "moe_intermediate_size": 16,
        "n_routed_experts": 6,
        "num_local_experts": 6,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
    },
}


def native(model_type: str, **settings: Any) -> Any:
    """A tiny random MoE whose routers have opinions."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "pad_token_id": None,
            "experts_implementation": "eager",
        }
        | _EXTRAS.get(model_type, {})
        | settings,
    )
    model = AutoModelForCausalLM.from_config(config).double().train()
    with torch.no_grad():
        for router in routers_of(model):
            router.weight.normal_(std=0.3)
            if hasattr(router, "e_score_correction_bias"):
                router.e_score_correction_bias.uniform_(-0.1, 0.1)
    return model


def some_tokens() -> Tensor:
    return torch.randint(257, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", TARGETS)
@pytest.mark.parametrize("tied", [True, False])
def test_cross_entropy_is_transformers_loss(model_type: str, tied: bool) -> None:
    model, tokens = native(model_type, tie_word_embeddings=tied), some_tokens()
    model(tokens, labels=tokens).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    theirs = model(tokens, labels=tokens).loss.item()
    model.zero_grad(set_to_none=True)
    student = LogitsInput.of(model, tokens).predicting()
    ours = output_loss(student, tokens[:, 1:], chunk_bytes=4 * 257 * 5)
    ours.loss.backward()
    assert ours.loss.item() == pytest.approx(theirs, rel=1e-6)  # theirs is computed in float32
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None), name
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("model_type", TARGETS)
def test_distillation_is_kl_of_the_models_logits(model_type: str) -> None:
    model, tokens = native(model_type), some_tokens()
    teacher = native(model_type, num_experts_per_tok=6)
    with torch.no_grad():
        wanted = teacher(tokens).logits[:, :-1].log_softmax(-1)
        parent = LogitsInput.of(teacher, tokens).predicting()
    given = model(tokens).logits[:, :-1].log_softmax(-1)
    expected = F.kl_div(given, wanted, log_target=True, reduction="none").sum(-1).mean()
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    student = LogitsInput.of(model, tokens).predicting()
    ours = output_loss(
        student, tokens[:, 1:], teacher=parent, teacher_share=1.0, chunk_bytes=4 * 257 * 5
    )
    ours.loss.backward()
    assert ours.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, gradients[name], rtol=1e-7, atol=1e-12), name


@pytest.mark.parametrize("model_type", TARGETS)
def test_choosing_again_is_what_the_router_chose(model_type: str) -> None:
    model = native(model_type)
    score = "sigmoid" if model_type == "glm4_moe" else "softmax"
    for router in routers_of(model):
        outputs = router(torch.randn(20, 32).double())
        weights, chosen = choose(router, outputs[0], score)
        expected = torch.zeros(20, 6).double().scatter(-1, outputs[2], outputs[1].double())
        found = torch.zeros(20, 6).double().scatter(-1, chosen, weights.double())
        assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("model_type", TARGETS)
def test_the_trace_sees_every_layer_and_leaves_padding_out(model_type: str) -> None:
    model, tokens = native(model_type), some_tokens()
    mask = torch.ones_like(tokens)
    mask[1:, 7:] = 0
    with RouterTrace(model) as trace:
        model(tokens, attention_mask=mask)
        whole, masked = trace.sums(), trace.sums(mask.bool())
        logits = model(tokens, attention_mask=mask, output_router_logits=True).router_logits
    assert whole is not None
    assert masked is not None
    assert whole.tokens == 36
    assert masked.tokens == int(mask.sum()) == 26
    assert whole.choices.shape == (2, 6)
    assert masked.choices.sum(-1).tolist() == [52.0, 52.0]
    kept = torch.stack(logits).double()[:, mask.bool().reshape(-1)]
    z_sums = masked.squared_logsumexp.double()  # granite and glm route in float32
    assert torch.allclose(z_sums, kept.logsumexp(-1).square().sum(-1))
    if model_type != "glm4_moe":
        assert torch.allclose(masked.probs.double(), kept.softmax(-1).sum(1))
    total = switch_loss(masked) + importance_and_load_loss(masked) + router_z_loss(masked)
    total.backward()
    for router in routers_of(model):
        assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("model_type", TARGETS)
def test_noise_is_of_training_alone_and_learns(model_type: str) -> None:
    model, tokens = native(model_type), some_tokens()
    names = set(model.state_dict())
    with torch.no_grad():
        clean = model(tokens).logits
    gate = NoisyGate(routers_of(model))
    assert len(list(gate.parameters())) == 2
    with RouterTrace(model, noise=gate) as trace:
        torch.manual_seed(5)
        noisy = model(tokens).logits
        sums = trace.sums()
        assert sums is not None
        assert not torch.allclose(noisy, clean, atol=1e-4)
        assert not torch.equal(sums.load, sums.choices)
        # expected choices: k per token, up to what one draw of the noise moves
        assert sums.load.sum(-1).tolist() == pytest.approx([72.0, 72.0], rel=0.1)
        importance_and_load_loss(sums).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gate.parameters())
        std = gate.std(0, torch.randn(4, 32).double())
        assert torch.allclose(std, torch.full_like(std, torch.log(torch.tensor(2.0)) + 1e-2))
        half = NoisyGate(routers_of(model), scale=0.5).std(0, torch.randn(4, 32).double())
        assert torch.allclose(half, std / 2)
        trace.clear()
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, clean)
    assert set(model.state_dict()) == names


def test_checkpointed_layers_give_the_same_gradients() -> None:
    model, teacher, tokens = native("granitemoeshared"), native("granitemoeshared"), some_tokens()
    gate = NoisyGate(routers_of(model))
    teacher.load_state_dict(
        {name: value * 1.1 for name, value in teacher.state_dict().items()}
    )  # another model
    gradients: list[list[Tensor]] = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        with RouterTrace(model, noise=gate) as trace, LayerMatch(model, teacher, "ffn") as match:
            torch.manual_seed(3)
            with torch.no_grad():
                teacher(tokens)
            loss = model(tokens, labels=tokens).loss + match.loss()
            sums = trace.sums()
            assert sums is not None
            loss = loss + importance_and_load_loss(sums) + router_z_loss(sums)
            noted = [logits for logits, *_ in trace._routed.values()]
            noted += [match._outputs[part] for parts, _ in match._pairs for part in parts]
            loss.backward()
            # what is recomputed must not be held: it would keep every layer's activations
            held = [logits for logits, *_ in trace._routed.values()]
            held += [match._outputs[part] for parts, _ in match._pairs for part in parts]
            assert all(a is b for a, b in zip(noted, held, strict=True))
        parameters = [*model.parameters(), *gate.parameters()]
        gradients.append([p.grad for p in parameters if p.grad is not None])
        for parameter in parameters:
            parameter.grad = None
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("place", ["residual", "ffn"])
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_layers_of_an_exact_split_match(place: Any, family: str, tmp_path: Path) -> None:
    settings = {"residual_multiplier": 0.5} if family == "granite" else {}
    dense = write_tiny_model(tmp_path / "dense", family, **settings)
    moefy.convert(
        dense, tmp_path / "moe", experts=4, active=4, **LLAMA_MOE | {"shared": 2, "repair": "none"}
    )
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").double()
    student.set_experts_implementation("eager")
    teacher = AutoModelForCausalLM.from_pretrained(dense).double()
    tokens = some_tokens()
    with LayerMatch(student, teacher, place) as match:
        with torch.no_grad():
            teacher(tokens)
        student(tokens)
        assert match.loss() < 1e-10
        match.clear()
        with torch.no_grad():
            outputs = teacher(tokens, output_hidden_states=True).hidden_states
            for layer in student.model.layers:
                layer.input_layernorm.weight.mul_(1.3)
        moved = student(tokens, output_hidden_states=True).hidden_states
        loss = match.loss()
        loss.backward()
    assert student.model.layers[0].self_attn.q_proj.weight.grad is not None
    if place == "residual":  # the last entry of hidden_states is behind the final norm
        y, target = moved[1], outputs[1]
        first = ((y - target).square().sum(-1) / target.square().sum(-1)).mean()
        with LayerMatch(student, teacher, place) as match, torch.no_grad():
            teacher(tokens)
            student(tokens)
            match._pairs = match._pairs[:1]
            assert match.loss().item() == pytest.approx(first.item(), rel=1e-9)


def test_layers_of_another_model_are_refused(make_llama: Callable[..., Path]) -> None:
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(make_llama(f"of{n}", num_hidden_layers=n))
        for n in (2, 3)
    )
    with pytest.raises(ArchitectureError, match="2 layers of width 32, the teacher 3 of 32"):
        LayerMatch(student, teacher, "residual")


def test_selection_bias_where_the_checkpoint_has_one() -> None:
    model, tokens = native("glm4_moe"), some_tokens()
    before = [router.e_score_correction_bias.clone() for router in routers_of(model)]
    with RouterTrace(model) as trace, torch.no_grad():
        model(tokens)
        sums = trace.sums()
    assert sums is not None
    SelectionBias(model).update(sums.choices, 1e-3)
    for router, old, choices in zip(routers_of(model), before, sums.choices, strict=True):
        moved = router.e_score_correction_bias - old
        assert torch.allclose(moved, -1e-3 * (choices - 12).sign().to(moved), atol=1e-7)
    for model_type in TARGETS[:-1]:
        with pytest.raises(UsageError, match=r"no selection bias.*'switch'.*--target glm4_moe"):
            SelectionBias(native(model_type))


def test_a_dense_model_leaves_no_trace(make_llama: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_llama())
    with RouterTrace(model) as trace, torch.no_grad():
        model(some_tokens())
        assert trace.sums() is None
    with pytest.raises(UsageError, match="llama model has no selection bias"):
        SelectionBias(model)


def test_two_workers_have_the_loss_and_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    logits = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0)).double()
    torch.save(logits, tmp_path / "logits.pt")
    script = Path(__file__).with_name("two_workers.py")
    workers = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)])
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    logits.requires_grad_()
    top, chosen = logits.topk(2)
    loss = importance_and_load_loss(router_sums(logits, top.softmax(-1), chosen, score="softmax"))
    loss.backward()
    for rank in range(2):
        found, grad = torch.load(tmp_path / f"{rank}.pt")
        assert found.item() == pytest.approx(loss.item(), rel=1e-12)
        assert torch.allclose(grad, logits.grad[:, rank::2], rtol=1e-10, atol=1e-15)
