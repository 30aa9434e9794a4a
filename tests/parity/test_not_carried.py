"""Refused families: the nearest MoE architecture, tried with their weights, computes others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conftest import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from moefy.checkpoint.families import NOT_CARRIED

TRIED = {
    "olmo2": ["flex_olmo"],  # which is exact: it shows that the weights are moved as they should
    "olmo3": ["flex_olmo"],
    "exaone4": ["exaone_moe", "flex_olmo"],
    "glm4": ["glm4_moe"],
    "gemma2": ["mixtral"],
    "gemma3_text": ["mixtral"],
}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


def tried(family: str, target: str) -> float:
    """Return the largest difference of logits where all weights with a place are moved."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"head_dim": 8}
    settings |= {"olmo3": WINDOW, "exaone4": WINDOW}.get(family, {})
    config = tiny_config(family, **settings)
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    size = config["intermediate_size"] // 2
    names = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")
    experts = dict.fromkeys(names, 2) | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    experts |= {"norm_topk_prob": True, "routed_scaling_factor": 1.0, "num_shared_experts": 1}
    experts |= {"mlp_layer_types": ["sparse"] * 2}
    sizes = {"intermediate_size": size, "moe_intermediate_size": size, "model_type": target}
    moe = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | experts | sizes)).eval()
    stored = dense.state_dict()
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
        for name, place in moe.named_parameters():
            prefix = name.partition(".mlp.")[0] + ".mlp."
            if name in stored and stored[name].shape == place.shape:
                place.copy_(stored[name])
            elif name.endswith("experts.gate_up_proj"):
                gate, up = halves(stored, prefix)
                parts = zip(gate.split(size), up.split(size), strict=True)
                place.copy_(torch.stack([torch.cat(part) for part in parts]))
            elif name.endswith("experts.down_proj"):
                down = stored[f"{prefix}down_proj.weight"]
                place.copy_(2 * torch.stack(down.split(size, dim=1)))
            elif ".mlp." in name:
                place.zero_()  # routers and shared experts
    ids = torch.randint(0, 257, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return float((dense(ids).logits - moe(ids).logits).abs().max())


def halves(stored: dict[str, torch.Tensor], prefix: str) -> Any:
    fused = stored.get(f"{prefix}gate_up_proj.weight")
    if fused is not None:
        return fused.chunk(2)
    return stored[f"{prefix}gate_proj.weight"], stored[f"{prefix}up_proj.weight"]


@pytest.mark.parametrize(
    ("family", "target"), [(family, target) for family in TRIED for target in TRIED[family]]
)
def test_the_nearest_architecture_computes_something_else(family: str, target: str) -> None:
    difference = tried(family, target)
    assert (difference > 0.01) == (family in NOT_CARRIED), difference
    assert difference > 0.01 or difference < 1e-5
