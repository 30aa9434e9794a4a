"""Refused families: the nearest MoE architecture, tried with their weights.

It computes other logits, or transformers computes the same with it and something else is missing.
"""

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
    "gemma": ["granitemoe"],  # exact, but other runtimes compute SiLU there
    "gemma4_text": ["gemma4_text"],  # exact with all neurons in routed experts
    "gemma2": ["mixtral"],
    "gemma3_text": ["mixtral"],
}
EXACT = ("olmo2", "gemma", "gemma4_text")
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


def tried(family: str, target: str) -> float:
    """Return the largest difference of logits where all weights with a place are moved."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"head_dim": 8}
    settings |= {"olmo3": WINDOW, "exaone4": WINDOW}.get(family, {})
    if family == "gemma4_text":
        settings |= WINDOW | {"hidden_size_per_layer_input": 0, "global_head_dim": 8}
    config = tiny_config(family, **settings)
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    size = config["intermediate_size"] // 2
    names = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")
    experts = dict.fromkeys(names, 2) | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    experts |= {"norm_topk_prob": True, "routed_scaling_factor": 1.0, "num_shared_experts": 1}
    experts |= {"mlp_layer_types": ["sparse"] * 2}
    experts |= {"enable_moe_block": True, "top_k_experts": 2}
    experts |= {
        "embedding_multiplier": config["hidden_size"] ** 0.5,
        "attention_multiplier": 8**-0.5,
    }
    sizes = {"intermediate_size": size, "moe_intermediate_size": size, "model_type": target}
    moe = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | experts | sizes)).eval()
    stored = dense.state_dict()
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif family == "gemma4_text" and "mlp" in name:
                weight.mul_(20)  # its norms have an epsilon, which is little beside such outputs
        for name, place in moe.named_parameters():
            prefix = ".".join(name.split(".")[:3]) + ".mlp."
            if "feedforward_layernorm_2" in name:  # a norm of what is normed again changes nothing
                before = stored[name.removesuffix("_2.weight") + ".weight"]
                place.copy_(before) if "pre_" in name else place.fill_(1.0)
            elif name in stored and stored[name].shape == place.shape:
                # Gemma 1 adds 1 to the weights of its norms
                place.copy_(stored[name] + (family == "gemma" and "norm" in name))
            elif name.endswith("experts.gate_up_proj"):
                gate, up = halves(stored, prefix)
                parts = zip(gate.split(size), up.split(size), strict=True)
                place.copy_(torch.stack([torch.cat(part) for part in parts]))
            elif name.endswith("experts.down_proj"):
                down = stored[f"{prefix}down_proj.weight"]
                place.copy_(2 * torch.stack(down.split(size, dim=1)))
            elif ".mlp." in name or "router" in name:
                place.zero_()  # routers and shared experts
                if name.endswith("per_expert_scale"):
                    place.fill_(1.0)
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
def test_what_the_nearest_architecture_computes(family: str, target: str) -> None:
    difference = tried(family, target)
    assert (difference > 0.01) == (family not in EXACT), difference
    assert difference > 0.01 or difference < 1e-5
    assert (family in NOT_CARRIED) == (family != "olmo2")
