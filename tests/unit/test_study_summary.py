"""What a study says of its numbers: no difference inside the spread, and nothing typed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import scipy.stats

from moefy.errors import UsageError
from moefy.recipe import ConvertRecipe
from moefy.studies.ablations import ABLATIONS, METHODS, ablations_named
from moefy.studies.recipe import StudyRecipe
from moefy.studies.report import Spread, arms_in, difference, spread, summary_rows
from moefy.studies.runs import RUNS, Run, write_runs
from moefy.training.recipe import TrainRecipe

OFF, ON = "4/16 not rescaled", "4/16 rescaled"


def run(
    arm: str, seed: int, loss: float, against: str | None = None, expected: str | None = None
) -> Run:
    return Run(
        ablation="rescaling",
        arm=arm,
        seed=seed,
        against=against,
        expected=expected,
        key="",
        trained=0 if arm == "dense" else 1000,
        total_params=2_000_000,
        active_params=1_000_000,
        flops_per_token=10,
        loss_before=loss if arm == "dense" else loss + 2,
        loss=loss,
        domain_loss={"wiki": loss - 0.5, "book": loss + 0.5},
        machine="2 CPU threads",
    )


def arms_of(off: list[float], on: list[float], expected: str = "lower") -> dict[str, list[Run]]:
    return {
        "dense": [run("dense", 0, 1.5)],
        OFF: [run(OFF, seed, loss) for seed, loss in enumerate(off)],
        ON: [run(ON, seed, loss, OFF, expected) for seed, loss in enumerate(on)],
    }


def test_a_difference_is_paired_by_seed() -> None:
    ours = [run(ON, seed, loss) for seed, loss in {0: 1.1, 1: 1.3, 2: 1.2, 7: 9.0}.items()]
    theirs = [run(OFF, seed, loss) for seed, loss in {0: 1.0, 1: 1.0, 2: 1.0, 5: 0.0}.items()]
    found = difference(ours, theirs)
    assert found is not None
    assert found.mean == pytest.approx(0.2)
    assert found.half_width == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert found.mark == "not decided"  # 0.2 ± 0.248
    assert difference(ours[3:], theirs) is None


@pytest.mark.parametrize("count", range(2, 11))
def test_the_interval_is_students(count: int) -> None:
    values = [seed**0.5 for seed in range(count)]
    found = spread(values)
    low, high = scipy.stats.t.interval(
        0.95, count - 1, loc=found.mean, scale=scipy.stats.sem(values)
    )
    assert found.half_width == pytest.approx((high - low) / 2, rel=1e-3)


def test_equal_values_have_no_spread() -> None:
    assert spread([1.0, 1.0, 1.0]) == Spread(1.0, None)
    assert spread([1.0, 1.0, 1.0]).mark == "not decided"
    assert spread([0.0001, 0.00011, 0.0001]).mark == "not decided"  # three decimals show nothing
    assert spread([-0.0001, -0.0002]).text("+").startswith("+0.000 ±")


@pytest.mark.parametrize(
    ("on", "expected", "said"),
    [
        ([2.0, 2.11, 2.19], "lower", ["-1.000 ± 0.025", "lower", "lower", "agrees"]),
        ([4.0, 4.11, 4.19], "lower", ["+1.000 ± 0.025", "higher", "lower", "contradicts"]),
        ([2.0, 2.11, 2.19], "same", ["-1.000 ± 0.025", "lower", "same", "contradicts"]),
        ([4.0, 4.11, 4.19], "same", ["+1.000 ± 0.025", "higher", "same", "contradicts"]),
        ([2.9, 3.2, 3.1], "lower", ["-0.033 ± 0.287", "not decided", "lower", "not decided"]),
        ([2.9, 3.2, 3.1], "same", ["-0.033 ± 0.287", "not decided", "same", "not decided"]),
        ([2.0], "lower", ["-1.000", "not decided", "lower", "not decided"]),
        ([2.0, 2.11], "lower", ["-0.995 ± 0.064", "lower", "lower", "agrees"]),
    ],
)
def test_marks(on: list[float], expected: str, said: list[str]) -> None:
    rows = summary_rows(arms_of([3.0, 3.1, 3.2], on, expected))
    assert rows[3][6:10] == said


def test_seeds_that_two_arms_do_not_share() -> None:
    arms = arms_of([3.0], [2.0])
    arms[OFF] = [run(OFF, 5, 3.0)]
    rows = summary_rows(arms)
    assert rows[3][2:4] == [OFF, "4.000"]
    assert rows[3][6:10] == ["", "not decided", "lower", "not decided"]


def test_the_table_by_hand(tmp_path: Path) -> None:
    arms = arms_of([3.0, 3.1, 3.2], [2.0, 2.11, 2.19])
    runs = [run for runs in arms.values() for run in runs]
    write_runs(tmp_path / RUNS, {run.place: run for run in reversed(runs)})
    (tmp_path / "recipe.yaml").write_text(StudyRecipe().to_yaml())
    assert arms_in(tmp_path) == {"rescaling": arms}
    rows = summary_rows(arms)
    assert rows[0] == [
        *("arm", "seeds", "compared with", "loss before", "difference", "loss", "difference"),
        *("result", "the paper", "agreement", "params", "active"),
    ]
    assert rows[1] == ["dense", "1", "", "1.500", "", "1.500", "", "", "", "", "2.0M", "1.0M"]
    assert rows[3] == [
        *(ON, "3", OFF, "4.100 ± 0.237", "-1.000 ± 0.025", "2.100 ± 0.237", "-1.000 ± 0.025"),
        *("lower", "lower", "agrees", "2.0M", "1.0M"),
    ]
    untrained = {"dense": arms["dense"]}
    assert summary_rows(untrained)[0][3:5] == ["loss", "difference"]


@pytest.mark.parametrize(
    "recipe",
    [
        StudyRecipe(),
        StudyRecipe(experts=8, active=2),
        StudyRecipe(experts=64, active=32),
    ],
)
def test_the_arms_in_the_file_can_be_run(recipe: StudyRecipe) -> None:
    for ablation in ABLATIONS:
        arms = {arm.name: arm for arm in ablation.arms(recipe)}
        assert len(arms) == len(ablation.arms(recipe))
        assert [name for name, arm in arms.items() if (arm.start, arm.train) == ("dense", None)]
        for arm in arms.values():
            assert arm.against is None or arm.against in arms.keys() - {arm.name}
            assert arm.expected is None or arm.against
            TrainRecipe.build(**arm.train or {})
            if arm.start != "dense":
                made = ConvertRecipe.build(**arm.convert).for_model(1536)
                assert arm.convert == {key: getattr(made, key) for key in arm.convert}


def test_a_method_at_a_split() -> None:
    (methods,) = ablations_named(["methods"])
    arms = {arm.name: arm for arm in methods.arms(StudyRecipe(experts=64, active=32))}
    assert list(arms) == ["dense", *METHODS]
    shared = {name: arms[name].convert["shared"] for name in ("moefy", "static + refit", "random")}
    assert shared == {"moefy": 16, "static + refit": 32, "random": 0}
    assert arms["moefy: quarter shared"].convert["shared"] == 8
    assert arms["moefy: the model's own text"].text == "self"
    (rescaling,) = ablations_named(["rescaling"])
    names = [arm.name for arm in rescaling.arms(StudyRecipe())]
    # 16 = 4²: there the paper's factor is 1, so weight 1 is no arm of its own
    assert names == [
        *("dense", OFF, ON, "2/16 not rescaled", "2/16 rescaled"),
        "2/16 each expert with weight 1",
    ]


def test_the_papers_splits_are_in_the_grid() -> None:
    (size,) = ablations_named(["size"])
    arms = {arm.name: arm.expected for arm in size.arms(StudyRecipe())}
    assert {"2/16", "4/16", "2/8"} <= set(arms)
    assert {name: e for name, e in arms.items() if e} == {"2/8": "same", "2/16": "higher"}


def test_an_unknown_ablation() -> None:
    with pytest.raises(UsageError, match="no ablation 'magic'; there are rescaling, construction"):
        ablations_named(["size", "magic"])
    with pytest.raises(UsageError, match="active 3 of 16 experts: active must be even"):
        StudyRecipe.build(active=3)
