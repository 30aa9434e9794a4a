"""Loss over measured speed: pruning is compared at a split's own speed."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import pytest
from matplotlib.text import Text

from moefy.report.frontier import Design, at_equal, frontier_figure, pruned_loss

ROOT = Path(__file__).parents[2]
DESIGNS = [
    Design(
        "pruned 8 of 16", pruned=True, nats=0.6, gains={"decode speed": 1.4, "prefill speed": 1.5}
    ),
    Design(
        "pruned 4 of 16", pruned=True, nats=1.4, gains={"decode speed": 1.8, "prefill speed": 2.0}
    ),
    Design("12 of 16", pruned=False, nats=0.2, gains={"decode speed": 1.2, "prefill speed": 0.9}),
    Design("8 of 16", pruned=False, nats=0.5, gains={"decode speed": 1.4, "prefill speed": 1.25}),
    Design(
        "8 of 16, 4 shared",
        pruned=False,
        nats=0.5,
        gains={"decode speed": 1.4, "prefill speed": 1.25},
    ),
    Design("2 of 8", pruned=False, nats=1.1, gains={"decode speed": 1.9, "prefill speed": 1.6}),
]


@pytest.mark.parametrize(
    ("speed", "nats"), [(0.9, 0.0), (1.0, 0.0), (1.2, 0.3), (1.4, 0.6), (1.6, 1.0), (1.81, None)]
)
def test_pruning_between_its_measured_points(speed: float, nats: float | None) -> None:
    found = pruned_loss(DESIGNS, "decode speed", speed)
    assert found is None if nats is None else found == pytest.approx(nats)


def test_a_pruned_model_that_gains_nothing_by_its_loss_is_no_rival() -> None:
    slow = Design("pruned 2 of 16", pruned=True, nats=2.0, gains={"decode speed": 1.3})
    assert pruned_loss([*DESIGNS, slow], "decode speed", 1.2) == pytest.approx(0.3)


def test_where_it_wins_and_by_how_much() -> None:
    assert at_equal(DESIGNS, "decode speed") == (
        "At equal decode speed, the split has the lower loss for 12 of 16 (by 0.10 nats), "
        "8 of 16 (by 0.10 nats), 8 of 16, 4 shared (by 0.10 nats). "
        "No pruned model was as fast as 2 of 8."
    )
    # slower than the dense model, which loses nothing; at 1.6 pruning stands 0.76 above dense
    assert at_equal(DESIGNS, "prefill speed") == (
        "At equal prefill speed, pruning has the lower loss for 12 of 16 (by 0.20 nats), "
        "8 of 16 (by 0.20 nats), 8 of 16, 4 shared (by 0.20 nats), 2 of 8 (by 0.34 nats)."
    )
    assert at_equal(DESIGNS[:2], "decode speed") == ""


def test_every_point_has_its_name_and_no_name_covers_another() -> None:
    figure = frontier_figure(DESIGNS, "a title")
    figure.draw_without_rendering()
    names = {"dense", *(each.name.replace(" of ", "/") for each in DESIGNS)}
    for axes in figure.axes:
        assert {text.get_text() for text in axes.texts} == names
        boxes = [Text.get_window_extent(text) for text in axes.texts]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_losses_and_speeds_are_joined_within_an_effort() -> None:
    parts = runpy.run_path(str(ROOT / "benchmarks/frontier.py"))
    speed = {"prefill speed / dense": "1.2", "decode speed / dense": "1.4"}
    speeds = [{"design": name} | speed for name in ("8 of 16", "pruned to 8 of 16", "4 of 8")]
    losses = [
        {"design": design, "effort": effort, "nats above dense": nats}
        for design, effort, nats in (
            ("8 of 16", "normal", "0.5"),
            ("pruned to 8 of 16", "normal", "0.7"),
            ("9 of 16", "normal", "0.4"),  # its speed was not measured
            ("8 of 16", "high", "0.4"),  # it has no rival of the same effort
        )
    ]
    assert parts["joined"](speeds, losses) == {
        "normal": [
            Design(
                "8 of 16", pruned=False, nats=0.5, gains={"decode speed": 1.4, "prefill speed": 1.2}
            ),
            Design(
                "pruned 8 of 16",
                pruned=True,
                nats=0.7,
                gains={"decode speed": 1.4, "prefill speed": 1.2},
            ),
        ]
    }


def test_designs_are_named_as_in_the_table_of_losses() -> None:
    fit = runpy.run_path(str(ROOT / "benchmarks/fit.py"))["SPLITS"]
    parts = runpy.run_path(str(ROOT / "benchmarks/frontier.py"))
    splits = {parts["name_of"](*split): split for split in parts["SPLITS"]}
    for name, options in fit.items():
        experts, active, shared = map(int, options[1::2])
        assert splits[name] == (active, experts, shared)
