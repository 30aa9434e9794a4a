"""Recipes refuse what they do not know and say what they allow."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from moefy.cli.options import parse_settings
from moefy.errors import UsageError
from moefy.recipe import (
    ConvertRecipe,
    ConvertSettings,
    Recipe,
    own_recipes,
    recipe_text,
)
from moefy.split import Split
from moefy.studies.recipe import StudyRecipe, StudySettings
from moefy.training.recipe import (
    ImportanceLoadBalance,
    TrainRecipe,
    TrainSettings,
    TuneRecipe,
    TuneSettings,
)

STAND_INS = {str, dict[str, Any]}
PARTS = ("lora", "balance", "distillation", "parallel")
"""A part of a recipe may be given by its name or as a mapping, too."""


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = TrainRecipe.build(tokens=9999, mixture={"a": 1.0}, learning_rate=3e-4)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert TrainRecipe.build(file) == recipe
    assert TrainRecipe.build(file, tokens=5000).tokens == 5000


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"expert": 4}, "unknown key 'expert'; allowed: experts, active"),
        ({"repair": "maybe"}, "repair = 'maybe'"),
        ({"experts": "many"}, "experts = 'many'"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_bad_choices_are_named(choices: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ConvertRecipe.build(**choices)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"tokens": 100}, "less than one sequence"),
        ({"adam_betas": (0.9, 1)}, "adam_betas.1 = 1.*less than 1"),
        ({"tokens": 10**30}, "tokens is 10{30}: numbers of up to"),
        ({"learning_rate": float("inf")}, "learning_rate = inf.*finite"),
        (
            {"balance.noise": 1.0},
            "balance.switch: unknown key 'noise'; allowed: kind, coef",
        ),
        ({"balance": "even"}, "'none', 'switch', 'importance-load', 'selection-bias'"),
        ({"lora.rang": 4}, "lora: unknown key 'rang'; allowed: rank, alpha"),
        ({"distillation.alpha": 0.25}, "needs a teacher"),
        ({"frozen": ["routers"], "balance": "selection-bias"}, "routers are frozen"),
        ({"learning_rate": 0.0}, "greater than 0"),
    ],
)
def test_bad_training_is_refused(choices: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainRecipe.build(**choices)


def test_a_key_of_what_a_name_chose(tmp_path: Path) -> None:
    found = TrainRecipe.build(**{"balance": "importance-load", "balance.coefficient": 0.5})
    assert (found.balance.kind, found.balance.coefficient) == ("importance-load", 0.5)
    file = tmp_path / "recipe.yaml"
    file.write_text("balance: importance-load\nteacher: smollm2-135m\nlora: {rank: 4}\n")
    found = TrainRecipe.build(file, **{"balance.coefficient": 0.5})
    assert (found.balance.kind, found.lora.rank) == ("importance-load", 4)
    with pytest.raises(UsageError, match=r"tokens is 4096 and has no keys"):
        TrainRecipe.build(**{"tokens": 4096, "tokens.many": 1})
    found = TrainRecipe.build(file, **parse_settings(["teacher=null", "lora=", "seed=3"]))
    assert (found.teacher, found.lora, found.seed) == (None, None, 3)
    with pytest.raises(UsageError, match="tokens"):
        TrainRecipe.build(**parse_settings(["tokens=null"]))


@pytest.mark.parametrize(
    ("recipe", "keywords"),
    [
        (ConvertRecipe, ConvertSettings),
        (TrainRecipe, TrainSettings),
        (TuneRecipe, TuneSettings),
        (StudyRecipe, StudySettings),
    ],
)
def test_keywords_are_the_recipes_keys(recipe: type[Recipe], keywords: type) -> None:
    """An editor and mypy read the keywords; what they allow is what the recipe takes."""
    hints = get_type_hints(recipe)
    allowed = get_type_hints(keywords)
    assert set(allowed) == set(recipe.model_fields)
    for key in allowed:
        extra = alternatives(allowed[key]) - alternatives(hints[key])
        assert alternatives(hints[key]) <= alternatives(allowed[key]), key
        assert not extra or (extra <= STAND_INS and key in PARTS), key


def alternatives(type_: Any) -> set[Any]:
    return set(get_args(type_)) if get_origin(type_) in (Union, UnionType) else {type_}


@pytest.mark.parametrize(
    ("recipe", "old", "new"),
    [
        (TrainRecipe, "sequences_per_step", "global_batch_size"),
        (TrainRecipe, "sequences_per_pass", "micro_batch_size"),
        (TrainRecipe, "router_rate_fraction", "router_lr_scale"),
        (TrainRecipe, "final_learning_rate_fraction", "min_lr_ratio"),
        (TrainRecipe, "clip_grad_norm", "max_grad_norm"),
        (TrainRecipe, "distillation.weight", "alpha"),
        (TuneRecipe, "sequences_per_step", "global_batch_size"),
        (TuneRecipe, "clip_grad_norm", "max_grad_norm"),
    ],
)
def test_an_old_key_is_refused_with_its_new_name(recipe: type[Recipe], old: str, new: str) -> None:
    where, _, key = old.rpartition(".")
    with pytest.raises(UsageError) as caught:
        recipe.build(**{old: 1})
    assert str(caught.value) == f"{where}: {key} is now called {new}".removeprefix(": ")
    owner = recipe.model_fields[where].annotation if where else recipe
    assert new in owner.model_fields


def test_a_recipe_is_made_from_another() -> None:
    recipe = TrainRecipe(tokens=9999, balance=ImportanceLoadBalance(noise=1.0))
    assert TrainRecipe.build(recipe) is recipe
    changed = TrainRecipe.build(recipe, **{"seed": 3, "balance.coefficient": 0.5})
    assert changed.balance == ImportanceLoadBalance(noise=1.0, coefficient=0.5)
    assert (changed.tokens, changed.seed) == (9999, 3)
    with pytest.raises(UsageError, match="recipe is a ConvertRecipe: give a TrainRecipe"):
        TrainRecipe.build(ConvertRecipe())


# the last two: a kilobyte that would grow to gigabytes, and a list too deep to read
LAUGHS = "seed:\n - &a0 [x]\n" + "".join(f" - &a{i + 1} [{f'*a{i},' * 9}]\n" for i in range(9))


@pytest.mark.parametrize(
    "content", ["- a\n- b\n", "{", "\tx: 1", LAUGHS, "x: " + "[" * 10**5, "- " * 10**5]
)
def test_a_broken_recipe_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(UsageError, match=r"r\.yaml"):
        TrainRecipe.build(tmp_path / "r.yaml")


def test_a_dotted_key_changes_one_value_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "teacher: dense\ndistillation: {layers: ffn, alpha: 0.25}\nmixture: {a: 0.5, b: 0.5}\n"
    )
    recipe = TrainRecipe.build(tmp_path / "r.yaml", **{"distillation.alpha": 0.75})
    assert (recipe.distillation.layers, recipe.distillation.alpha) == ("ffn", 0.75)
    assert TrainRecipe.build(tmp_path / "r.yaml", mixture={"a": 1.0}).mixture == {"a": 1.0}


def test_a_run_may_go_on_with_other_processes_but_not_other_losses() -> None:
    recipe = TrainRecipe.build(global_batch_size=4)
    same = TrainRecipe.build(global_batch_size=4, micro_batch_size=2, parallel={"shard": 2})
    assert same.identity() == recipe.identity()
    other = TrainRecipe.build(global_batch_size=4, balance="importance-load")
    assert other.identity() != recipe.identity()


def test_steps_round_up() -> None:
    recipe = TrainRecipe.build(tokens=1025, sequence_length=512, global_batch_size=1)
    assert recipe.num_steps == 3


def test_a_split_that_does_not_divide_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="pass --experts 8 or --experts 16"):
        Split(12, 2).check(11008)
    with pytest.raises(UsageError, match=r"pass --experts 7$"):
        Split(9, 2).check(7)


@pytest.mark.parametrize("name", own_recipes())
def test_every_recipe_is_valid_and_says_what_it_is_for(name: str) -> None:
    text = recipe_text(name)
    kinds = {"convert": ConvertRecipe, "train": TrainRecipe}
    command = text.removeprefix("# ").partition(":")[0]
    assert f"--recipe {name}" in text.partition("\n\n")[0]
    assert kinds[command].build(name) == kinds[command].build(own_recipes()[name])


def test_a_name_is_one_of_moefys_own_and_a_path_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("tokens: 1024\n")
    assert TrainRecipe.build("demo").tokens == 32_768
    assert TrainRecipe.build("./demo").tokens == TrainRecipe.build(Path("demo")).tokens == 1024
    message = "recipe lama-moe is no file, and none of moefy's own: demo, llama-moe, "
    with pytest.raises(UsageError, match=message):
        ConvertRecipe.build("lama-moe")


@pytest.mark.parametrize(
    ("intermediate_size", "speed", "quality"),
    [
        (8192, (8, 4, 2), (64, 32, 0)),  # of 1024 and of 128 neurons
        (11008, (8, 4, 2), (43, 22, 0)),  # 8 of 1376, 32 times 43; 43 of 256
        (1536, (8, 4, 2), (48, 24, 0)),  # of 192 and of 32
        (48, (8, 4, 2), (48, 24, 0)),  # no size is a multiple of 8
    ],
)
def test_presets(intermediate_size: int, speed: tuple[int, ...], quality: tuple[int, ...]) -> None:
    for name, counts in {"speed": speed, "quality": quality}.items():
        assert ConvertRecipe.build(preset=name).for_model(intermediate_size).split == Split(*counts)
    given = ConvertRecipe.build(preset="speed", active=2).for_model(intermediate_size).split
    assert given == Split(speed[0], 2, 1)
