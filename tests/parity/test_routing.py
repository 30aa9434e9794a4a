"""What routers do, against transformers' own router logits; what another k computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import byte_tokenizer, write_tiny_model
from tests.parity.test_objective import TARGETS, native
from torch import Tensor
from transformers import AutoModelForCausalLM

import moefy
from moefy.checkpoint.cost import cost
from moefy.data.records import open_domains
from moefy.data.tokenise import pack
from moefy.errors import UsageError
from moefy.evaluation.routing import RoutingResult
from moefy.experts.routers import ActiveExperts, routers_of
from moefy.recipe import LLAMA_MOE

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none"}
WINDOWS, LENGTH = 3, 32


def write_native(folder: Path, model_type: str) -> Path:
    native(model_type).float().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def measure(models: list[Path], corpus: Path, **settings: Any) -> RoutingResult:
    return moefy.measure_routing(
        models, data=corpus, windows=WINDOWS, sequence_length=LENGTH, **settings
    )


def windows_of(corpus: Path) -> dict[str, Tensor]:
    tokenizer, size = byte_tokenizer(), {"sequence_length": LENGTH, "max_windows": WINDOWS}
    return {
        domain.name: torch.from_numpy(pack(domain.documents("heldout"), tokenizer, **size))
        for domain in open_domains(corpus)
    }


@pytest.mark.parametrize("model_type", TARGETS)
def test_choices_are_those_of_transformers_router_logits(
    model_type: str, tmp_path: Path, corpus: Path
) -> None:
    folder = write_native(tmp_path / "moe", model_type)
    (found,) = measure([folder], corpus, active=[1]).models
    assert (found.experts, found.active) == (6, 2)
    assert [at.k for at in found.quality] == [1, 2]

    model = AutoModelForCausalLM.from_pretrained(folder)
    chosen: dict[str, list[list[set[int]]]] = {}  # by domain and layer, of every token
    losses = []
    for domain, ids in windows_of(corpus).items():
        with torch.inference_mode():
            out = model(ids, labels=ids, output_router_logits=True)
            losses.append(model(ids, labels=ids).loss.item())
        chosen[domain] = []
        for router, logits in zip(routers_of(model), out.router_logits, strict=True):
            by = logits
            if model_type == "glm4_moe":
                by = logits.sigmoid() + router.e_score_correction_bias
            top = by.argsort(dim=-1, descending=True)[:, :2]
            chosen[domain].append([set(row) for row in top.tolist()])
        for layer_idx, tokens in enumerate(chosen[domain]):
            shares = [sum(e in token for token in tokens) / (2 * len(tokens)) for e in range(6)]
            assert found.load[domain][layer_idx] == pytest.approx(shares, abs=1e-12)
    for layer_idx in range(2):
        tokens = [token for layers in chosen.values() for token in layers[layer_idx]]
        counts = [sum(e in token for token in tokens) for e in range(6)]
        shares = [count / sum(counts) for count in counts]
        nats = -sum(share * math.log(share) for share in shares if share)
        assert found.entropy[layer_idx] == pytest.approx(nats / math.log(6))
        assert found.dead[layer_idx] == [e for e in range(6) if not counts[e]]
        assert found.max_over_mean[layer_idx] == pytest.approx(6 * max(shares))
    assert found.quality[1].loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("model_type", TARGETS)
def test_the_saved_k_changes_nothing(model_type: str) -> None:
    model, ids = native(model_type).float().eval(), torch.arange(40)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        with ActiveExperts(model, 2):
            assert torch.equal(model(ids).logits, expected)
        for other in (1, 6):
            with ActiveExperts(model, other):
                assert not torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("active", [1, 2, 5])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [*((name, {}) for name in TARGETS), ("glm4_moe", {"norm_topk_prob": True})],
)
def test_chosen_experts_keep_their_weight(
    model_type: str, settings: dict[str, Any], active: int
) -> None:
    """In float64, from what the router itself says with the saved k = 3."""
    model = native(model_type, num_experts_per_tok=3, **settings)
    router, x = routers_of(model)[0], torch.randn(50, 32).double()

    def weights() -> tuple[Tensor, Tensor]:
        logits, chosen_weights, chosen = router(x)
        found = torch.full((50, 6), torch.nan).double()
        return logits.double(), found.scatter(-1, chosen, chosen_weights.double())

    logits, saved = weights()
    with ActiveExperts(model, active):
        _, found = weights()
    assert torch.equal(found.isfinite().sum(-1), torch.full((50,), active))
    in_both = found.isfinite() & saved.isfinite()
    assert torch.equal(in_both.sum(-1), torch.full((50,), min(active, 3)))
    raw = logits.sigmoid() if model_type == "glm4_moe" else logits.exp()
    per_raw = (saved / raw).nanmean(-1, keepdim=True)  # the same for all experts of a token
    assert torch.allclose((raw * per_raw)[found.isfinite()], found[found.isfinite()], atol=1e-6)
    assert torch.allclose(found[in_both], saved[in_both], atol=1e-6)


CASES = [
    ("llama", {}, 0, "mixtral"),
    ("llama", {}, 2, "granitemoeshared"),
    ("qwen2", {}, 0, "granitemoe"),
    ("qwen3", {}, 0, "qwen3_moe"),
    ("qwen3", {}, 2, "glm4_moe"),
    ("phi3", {"sliding_window": 16}, 2, "granitemoe_swa"),
]


@pytest.mark.parametrize(("family", "settings", "shared", "target"), CASES)
def test_all_experts_of_an_unfitted_conversion_are_the_dense_model(
    family: str, settings: dict[str, Any], shared: int, target: str, tmp_path: Path, corpus: Path
) -> None:
    """The routers are set to 0, for weights that are 1 to the last digit; the choice is any."""
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    write_tiny_model(dense, family, initializer_range=0.2, **settings)
    moefy.convert(dense, moe, experts=6, active=3, **EXACT | {"shared": shared})
    tensors = load_file(moe / "model.safetensors")
    routers = [name for name in tensors if name.endswith((".gate.weight", "router.weight"))]
    routers += [name for name in tensors if name.endswith("router.layer.weight")]
    assert len(routers) == 2
    tensors |= {name: torch.zeros_like(tensors[name]) for name in routers}
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})

    found = measure([moe, dense], corpus, names=["moe", "dense"])
    assert found.reference == "dense"
    assert found.tokens == {"ab": WINDOWS * LENGTH, "xyz": WINDOWS * LENGTH}
    (routing,) = found.models
    assert (routing.name, routing.experts, routing.shared) == ("moe", 6 - shared, shared)
    assert moefy.inspect(moe).config["model_type"] == target
    expected_ks = {(6, 3): [1, 2, 3, 4, 6], (4, 1): [1, 2, 4]}[routing.experts, routing.active]
    assert [at.k for at in routing.quality] == expected_ks
    *fewer, every = routing.quality
    assert every.loss == pytest.approx(found.reference_loss, abs=1e-5)
    assert abs(every.kl_to_reference) < 1e-6
    assert every.top1_agreement > 0.98  # a tie may fall another way
    assert all(at.kl_to_reference > 1e-5 for at in fewer)
    config = moefy.inspect(dense).config
    routers_size = 2 * 32 * routing.experts
    assert every.active_params - routers_size >= cost(config).active_params
    assert [at.active_params for at in fewer] == sorted(at.active_params for at in fewer)
    for at in routing.quality:
        assert at.perplexity == pytest.approx(math.exp(at.loss))

    plain = moefy.evaluate(
        [dense, moe], data=corpus, windows=WINDOWS, sequence_length=LENGTH, decode=False
    )
    saved = next(at for at in routing.quality if at.k == routing.active)
    assert saved.perplexity == plain.results[1].perplexity
    assert saved.kl_to_reference == plain.results[1].kl_to_reference
    assert found.reference_loss == pytest.approx(math.log(plain.results[0].perplexity))


def test_domains_of_different_letters_are_told_apart(tmp_path: Path, corpus: Path) -> None:
    """A router that looks at the letters does, one that chooses every expert cannot."""
    (found,) = measure([write_native(tmp_path / "moe", "mixtral")], corpus).models
    assert found.domain_noise is not None
    for layer_idx in range(2):
        assert found.domain_distance[layer_idx] > 3 * found.domain_noise[layer_idx] > 0
    moefy.convert(
        write_tiny_model(tmp_path / "dense", "llama"),
        tmp_path / "all",
        experts=4,
        active=4,
        **EXACT,
    )
    (found,) = measure([tmp_path / "all"], corpus).models
    assert found.domain_distance == found.domain_noise == [0, 0]
    assert found.entropy == [1, 1]


def test_without_experts_there_is_nothing_to_watch(
    make_llama: Callable[..., Path], corpus: Path
) -> None:
    with pytest.raises(UsageError, match="no model has experts to choose from"):
        measure([make_llama("a"), make_llama("b")], corpus)


@pytest.mark.parametrize("k", [0, 7])
def test_a_k_out_of_range_is_refused(tmp_path: Path, corpus: Path, k: int) -> None:
    with pytest.raises(UsageError, match=rf"so {k} cannot be active: allowed are 1 to 6"):
        measure([write_native(tmp_path / "moe", "mixtral")], corpus, active=[1, k])
