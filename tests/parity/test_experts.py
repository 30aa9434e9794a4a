"""Our expert implementation computes what transformers' own do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import write_tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

import moefy
from moefy.checkpoint.expert_layers import lean_experts, register
from moefy.checkpoint.families import FAMILIES
from moefy.checkpoint.load import load_model
from moefy.checkpoint.targets import TARGETS
from moefy.recipe import LLAMA_MOE

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}
SPLIT: dict[str, Any] = LLAMA_MOE | {"repair": "none", "experts": 6, "active": 4}


def write_moe(folder: Path, target: str) -> Path:
    shared = int(bool(TARGETS[target].shared_down))
    settings = {"sliding_window": 8} if target == "granitemoe_swa" else {}
    usual = "qwen3" if TARGETS[target].qk_norm else "mistral" if settings else "llama"
    family = TARGETS[target].of or usual
    dense = write_tiny_model(folder / "dense", family, **settings)
    moefy.convert(dense, folder / "moe", **SPLIT | {"target": target, "shared": shared})
    return folder / "moe"


@pytest.mark.parametrize("target", [n for n in TARGETS if TARGETS[n].of in (None, *FAMILIES)])
def test_logits_and_generated_tokens(tmp_path: Path, target: str) -> None:
    folder = write_moe(tmp_path, target)
    ids = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(0))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("eager", register()):
        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=name)
        assert model.config._experts_implementation == name
        with torch.inference_mode():
            written = [
                model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
                for prompt in (ids, ids[:1])  # two tokens at a time, then one
            ]
            found[name] = model(ids).logits, torch.cat([w.flatten() for w in written])
    (logits, tokens), (ours, our_tokens) = found.values()
    assert (logits - ours).abs().max() < 1e-5
    assert torch.equal(tokens, our_tokens)


@pytest.mark.parametrize("num_tokens", [1, 7, 50])
@pytest.mark.parametrize("dtype", CLOSE)
def test_answers(tmp_path: Path, num_tokens: int, dtype: torch.dtype) -> None:
    """Also where an expert has no token, and with the float32 weights that Mixtral gives."""
    experts = next(
        module
        for module in load_model(write_moe(tmp_path, "mixtral"), dtype=dtype).modules()
        if hasattr(module, "gate_up_proj")
    )
    assert experts.config._experts_implementation == "lean"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, 32, generator=generator).to(dtype)
    scores = torch.rand(num_tokens, 6, generator=generator)
    weights, index = scores[:, :5].topk(4)  # nothing for the last
    weights = weights.to(torch.promote_types(dtype, torch.float32))
    plain = copy.deepcopy(experts).double()
    plain.config = copy.deepcopy(experts.config)
    plain.config._experts_implementation = "eager"
    with torch.inference_mode():
        exact, ours = plain(x.double(), index, weights.double()), experts(x, index, weights)
    assert ours.dtype == dtype
    assert (exact - ours).abs().max() <= CLOSE[dtype] * exact.abs().max()


def test_other_layouts_are_left_to_transformers() -> None:
    config = GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
    experts: nn.Module = GptOssExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    inputs = torch.ones(1, 8), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
    with torch.inference_mode():
        config._experts_implementation = "eager"
        assert torch.equal(lean_experts(experts, *inputs), experts(*inputs))
