"""Recipes against models without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from moefy.checkpoint.cost import inspect
from moefy.cli import app
from moefy.errors import UsageError
from moefy.report.tables import dry_run_rows, markdown
from moefy.training.dry_run import DryRun, dry_run
from moefy.training.recipe import TrainRecipe

RECIPES = Path(__file__).parents[2] / "recipes"
PAPER = RECIPES / "llama-moe-7b-train.yaml"


@pytest.fixture(scope="module")
def paper() -> DryRun:
    return dry_run("llama-2-7b:4/16", processes=112, recipe=PAPER)


def test_the_papers_run(paper: DryRun) -> None:
    """Steps and tokens as published; parameters as `inspect` counts them, on another way."""
    (_, counted) = inspect("llama-2-7b", experts=16, active=4).costs.values()
    assert (paper.steps, paper.tokens_per_step) == (13_624, 14_680_064)
    assert paper.total_params == paper.learned_params == counted.total_params
    assert paper.active_params == counted.active_params
    assert paper.state_bytes == 16 * counted.total_params // 8
    assert paper.passes_per_step == 3584 // 112
    trained = 13_624 * 14_680_064
    assert paper.total_flops == trained * 3 * counted.flops_per_token


def test_the_training_pages_table(paper: DryRun) -> None:
    assert markdown(dry_run_rows(paper)) in (RECIPES.parent / "docs/training.md").read_text()


@pytest.mark.parametrize(("precision", "width"), [("float32", 4), ("bfloat16", 2)])
def test_a_teacher_counts(precision: str, width: int) -> None:
    common = {"processes": 2, "global_batch_size": 2, "precision": precision}
    alone = dry_run("smollm2-135m:8/16", **common)
    taught = dry_run("smollm2-135m:8/16", teacher="smollm2-135m", **common)
    dense = next(iter(inspect("smollm2-135m", context=512).costs.values()))
    assert taught.state_bytes - alone.state_bytes == width * dense.total_params // 2
    tokens = taught.steps * taught.tokens_per_step
    assert taught.total_flops - alone.total_flops == tokens * dense.flops_per_token


def test_frozen_weights_have_no_optimizer() -> None:
    free, frozen = (
        dry_run("smollm2-135m:8/16", processes=1, frozen=parts) for parts in ((), ("experts",))
    )
    experts = 30 * 3 * 576 * 1536
    assert free.learned_params - frozen.learned_params == experts
    assert free.state_bytes - frozen.state_bytes == 12 * experts


@pytest.mark.parametrize(
    ("model", "processes", "choices", "message"),
    [
        ("llama-2-7b:4/16", 100, {"recipe": PAPER}, r"shard 8 × replicate 14.*not make 100 proc"),
        ("llama-2-7b:4/16", 1, {"sequence_length": 8192, "tokens": 8192}, "context of llama-2-7b"),
        ("llama-2-7b:4", 1, {}, "llama-2-7b:4 does not exist; give a model folder"),
        ("llama-2-7b:4/15", 1, {}, "cannot be split into 15"),
        (
            "llama-2-7b:4/16",
            3,
            {"parallel": {"expert": 3}, "global_batch_size": 3},
            "16 routed experts .* cannot be spread evenly over 3",
        ),
        ("llama-2-7b:4/16", 4, {"global_batch_size": 6}, "multiple of 4: 4 processes"),
        ("smollm2-135m:8/16", 1, {"lora": {}}, "does not count lora's adapters"),
        ("smollm2-135m:8/16", 1, {"balance": "selection-bias"}, "no selection bias to balance"),
        ("smollm2-135m", 1, {"router_warmup_fraction": 0.1}, "no router learns here"),
        ("smollm2-135m", 1, {"mixture": "DynamicUniform"}, "name it with --teacher"),
    ],
)
def test_what_cannot_run_is_said(
    model: str, processes: int, choices: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        dry_run(model, processes=processes, **choices)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama-moe-7b-train", "smollm2-one-gpu", "demo"])
def test_every_training_recipe_is_valid(name: str) -> None:
    TrainRecipe.build(RECIPES / f"{name}.yaml")


def test_the_command() -> None:
    done = CliRunner().invoke(app, ["train", "smollm2-135m:8/16", "x", "--dry-run", "1"])
    assert "optimizer steps" in done.stdout
    assert "128" in done.stdout
    assert not Path("x").exists()
