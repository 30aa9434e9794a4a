from __future__ import annotations

import math

import pytest

from moefy.training.optimizer import learning_rate


def rates(num_steps: int) -> list[float]:
    return [
        learning_rate(step, num_steps, peak=2.0, warmup_fraction=0.2, final_fraction=0.1)
        for step in range(num_steps)
    ]


def test_warms_up_linearly_then_falls_as_a_cosine_to_the_floor() -> None:
    found = rates(11)
    assert found[:2] == [1.0, 2.0]
    assert found[-1] == pytest.approx(0.2)
    assert found[6] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert found[2:] == sorted(found[2:], reverse=True)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_short_runs_learn(num_steps: int) -> None:
    assert all(rate > 0 for rate in rates(num_steps))
