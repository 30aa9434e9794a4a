"""The paper's parameter counts."""

from __future__ import annotations

import moefy


def test_llama_2_7b_counts_are_the_papers() -> None:
    costs = moefy.inspect("llama-2-7b").costs
    assert f"{costs['dense'].total_params / 1e9:.2f}" == "6.74"
    active = {name: f"{cost.active_params / 1e9:.2f}" for name, cost in costs.items()}
    assert active == {"dense": "6.74", "2/16": "2.95", "4/16": "3.49", "2/8": "3.49"}
