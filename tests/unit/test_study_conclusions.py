"""What a study says of its numbers: no difference inside the spread, and nothing typed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats

from moefy.errors import UsageError
from moefy.report.tables import write_csv
from moefy.studies.ablations import ABLATIONS, ablations_named
from moefy.studies.conclude import conclusion
from moefy.studies.outcome import ArmOutcome, difference, read_outcome, spread
from moefy.studies.recipe import StudyRecipe
from moefy.studies.report import outcome_rows
from moefy.studies.runs import Run, run_csv_rows

(RESCALING,) = ablations_named(["rescaling"])
OFF, ON = "4/16 not rescaled", "4/16 rescaled"


def run(arm: str, seed: int, before: float, loss: float, against: str | None = None) -> Run:
    return Run(
        ablation="rescaling",
        arm=arm,
        seed=seed,
        against=against,
        expected="lower" if against else None,
        key=f"{arm}{seed}",
        trained=0 if arm == "dense" else 1000,
        conversations=0,
        total_params=2_000_000,
        active_params=1_000_000,
        flops_per_token=10,
        loss_before=before,
        loss=loss,
        domain_loss={"wiki": loss - 0.5, "book": loss + 0.5},
        curve=[],
        machine="2 CPU threads",
    )


def outcome(folder: Path, off: list[float], on: list[float]) -> dict[str, ArmOutcome]:
    """Write and read losses by seed; before training everything is 2 nats higher."""
    runs = [run("dense", 0, 1.5, 1.5)]
    runs += [run(OFF, seed, loss + 2, loss) for seed, loss in enumerate(off)]
    runs += [run(ON, seed, loss + 2, loss, OFF) for seed, loss in enumerate(on)]
    write_csv(folder / "rescaling.csv", run_csv_rows(runs))
    return read_outcome(folder / "rescaling.csv")


def test_an_interval_by_hand() -> None:
    found = difference({0: 1.1, 1: 1.3, 2: 1.2, 7: 9.0}, {0: 1.0, 1: 1.0, 2: 1.0, 5: 0.0})
    assert found is not None
    assert (found.count, found.sign) == (3, 0)  # 0.2 ± 0.248
    assert found.mean == pytest.approx(0.2)
    assert found.half_width == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("count", range(2, 11))
def test_the_interval_is_students(count: int) -> None:
    values = [seed**0.5 for seed in range(count)]
    found = spread(values)
    low, high = scipy.stats.t.interval(
        0.95, count - 1, loc=found.mean, scale=scipy.stats.sem(values)
    )
    assert found.half_width == pytest.approx((high - low) / 2, rel=1e-3)


def test_equal_values_have_no_spread() -> None:
    assert spread([1.0, 1.0, 1.0]).half_width is None
    assert spread([1.0, 1.0, 1.0]).sign == 0
    assert spread([0.0001, 0.00011, 0.0001]).sign == 0  # three decimals show nothing
    assert spread([-0.0001, -0.0002]).text("+").startswith("+0.000 ±")


def test_a_clear_difference(tmp_path: Path) -> None:
    text = conclusion(RESCALING, outcome(tmp_path, [3.0, 3.1, 3.2], [2.0, 2.11, 2.19]))
    assert text.startswith("Three seeds, 1,000 training tokens. The lowest loss is that of **4/16")
    assert "**4/16 rescaled** (2.100), below every other by more than the spread" in text
    assert f"At the start, lower: {ON} against {OFF} (-1.000 ± 0.025)." in text
    assert f"In the end, lower: {ON} against {OFF} (-1.000 ± 0.025)." in text
    assert text.endswith("51.0. The losses here agree with that.")


def test_a_difference_within_the_spread_is_none(tmp_path: Path) -> None:
    text = conclusion(RESCALING, outcome(tmp_path, [3.0, 3.1, 3.2], [2.9, 3.2, 3.1]))
    assert f"(3.067); not told apart from it: {OFF}." in text
    assert f"no difference beyond the spread: {ON} against {OFF} (-0.033 ± 0.287)" in text
    assert "lower:" not in text
    assert text.endswith("The losses here do not decide that: no difference is beyond the spread.")


def test_the_opposite_of_the_paper(tmp_path: Path) -> None:
    text = conclusion(RESCALING, outcome(tmp_path, [2.0, 2.1, 2.2], [3.0, 3.11, 3.19]))
    assert f"In the end, higher: {ON} against {OFF} (+1.000 ± 0.025)." in text
    assert text.endswith("The losses here contradict that.")
    reasoned = replace(RESCALING, why="Few tokens.")
    arms = outcome(tmp_path, [2.0, 2.1, 2.2], [3.0, 3.11, 3.19])
    assert conclusion(reasoned, arms).endswith("contradict that. Few tokens.")
    arms = outcome(tmp_path, [3.0, 3.1, 3.2], [2.0, 2.11, 2.19])
    assert conclusion(reasoned, arms).endswith("agree with that.")


def test_what_the_paper_found_to_be_the_same(tmp_path: Path) -> None:
    for losses in ([2.0, 2.11, 2.19], [4.0, 4.11, 4.19]):
        arms = outcome(tmp_path, [3.0, 3.1, 3.2], losses)
        arms[ON] = replace(arms[ON], expected="same")
        assert conclusion(RESCALING, arms).endswith("The losses here contradict that.")
    arms = outcome(tmp_path, [3.0, 3.1, 3.2], [2.9, 3.2, 3.1])
    arms[ON] = replace(arms[ON], expected="same")
    assert "do not decide that: no difference" in conclusion(RESCALING, arms)
    (size,) = ablations_named(["size"])
    grid = {arm.name: arm.expected for arm in size.arms(StudyRecipe()) if arm.expected}
    assert grid == {"2/8": "same", "2/16": "higher"}


def test_one_seed_concludes_nothing(tmp_path: Path) -> None:
    text = conclusion(RESCALING, outcome(tmp_path, [3.0], [2.0]))
    assert "One seed has no spread, so no difference of it can be called more than chance" in text
    assert f"against {OFF}" not in text  # its differences stand in the table alone
    assert "below every other" not in text
    assert text.endswith("do not decide that: they are of one seed.")


def test_seeds_that_are_missing(tmp_path: Path) -> None:
    arms = outcome(tmp_path, [3.0], [2.0])
    arms["2/16"] = replace(arms[ON], name="2/16", before={0: 5.0, 1: 5.0}, after={0: 3.0, 1: 3.1})
    text = conclusion(RESCALING, arms)
    assert text.startswith("1 to 2 seeds, 1,000 training tokens. One seed has no spread")
    assert f"no spread known: {ON} against {OFF} (-1.000), 2/16 against" in text
    arms = outcome(tmp_path, [3.0, 3.1, 3.2], [2.0, 2.11])
    assert f"(-0.995 ± 0.064)" in conclusion(RESCALING, arms)  # noqa: F541
    arms[OFF] = replace(arms[OFF], before={5: 5.0}, after={5: 3.0})
    text = conclusion(RESCALING, arms)
    assert f"In the end, no seed in common: {ON} against {OFF}." in text
    assert "do not decide that" in text


def test_the_table_by_hand(tmp_path: Path) -> None:
    rows = outcome_rows(outcome(tmp_path, [3.0, 3.1, 3.2], [2.0, 2.11, 2.19]))
    assert rows[0] == [
        *("arm", "seeds", "against", "loss before", "difference", "loss", "difference"),
        *("wiki", "book", "params", "active"),
    ]
    assert rows[1] == ["dense", "1", "", "1.500", "", "1.500", "", "1.000", "2.000", "2.0M", "1.0M"]
    assert rows[3][:7] == [
        *(ON, "3", OFF, "4.100 ± 0.237", "-1.000 ± 0.025", "2.100 ± 0.237", "-1.000 ± 0.025"),
    ]


def test_every_arm_is_compared_with_one_that_is_there() -> None:
    for recipe in (StudyRecipe(), StudyRecipe(experts=8, active=2, grid=(8, 32))):
        for ablation in ABLATIONS:
            names = [arm.name for arm in ablation.arms(recipe)]
            assert len(set(names)) == len(names)
            for arm in ablation.arms(recipe):
                assert arm.against is None or arm.against in set(names) - {arm.name}
                assert arm.expected is None or arm.against


def test_the_papers_splits_are_in_the_grid() -> None:
    (size,) = ablations_named(["size"])
    assert {"2/16", "4/16", "2/8"} <= {arm.name for arm in size.arms(StudyRecipe())}


def test_an_unknown_ablation() -> None:
    with pytest.raises(UsageError, match="no ablation 'magic'; there are rescaling, construction"):
        ablations_named(["size", "magic"])
    with pytest.raises(UsageError, match="active 3 of 16 experts: active must be even"):
        StudyRecipe.build(active=3)
