"""Commands have the options that recipes define, and name what took the place of old spellings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from tests.conftest import write_tiny_llama
from typer.testing import CliRunner

import moefy
from moefy.checkpoint.cost import Cost
from moefy.checkpoint.source import resolve
from moefy.cli import app, main
from moefy.cli.options import recipe_options
from moefy.cli.output import show
from moefy.errors import CheckpointError, UsageError
from moefy.evaluation.compare import Comparison, Result
from moefy.recipe import ConvertRecipe, Recipe, own_recipes
from moefy.report.tables import comparison_rows
from moefy.studies.recipe import StudyRecipe
from moefy.training.recipe import TrainRecipe, TuneRecipe

ROOT = Path(__file__).parents[2]
RECIPES: dict[str, Recipe] = {
    "convert": ConvertRecipe(),
    "train": TrainRecipe(),
    "tune": TuneRecipe(),
    "study": StudyRecipe(),
}
COMMANDS = [
    "bench", "chat", "convert", "demo", "eval", "export dense", "export gguf", "inspect", "judge",
    "plan", "prepare", "push", "recipes", "recipes show", "report", "routing", "study", "suite",
    "train", "tune",
]  # fmt: skip


def help_of(command: str, width: int = 200) -> str:
    done = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": str(width)})
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("command", RECIPES)
def test_help_lists_the_recipes_options(command: str) -> None:
    """Each with its text and its default; all other keys are reached by --set."""
    recipe, text = RECIPES[command], " ".join(help_of(command, 400).split())
    fields = type(recipe).model_fields.items()
    options = {key: field for key, field in fields if field.json_schema_extra}
    assert len(options) >= 2
    for key, field in options.items():
        extra: Any = field.json_schema_extra
        assert (extra["flag"] or f"--{key.replace('_', '-')}") + " " in text
        assert str(field.description) in text
        default = getattr(recipe, key)
        if not isinstance(default, bool):
            assert f"[default: {extra['unset'] if default is None else default}]" in text
    assert "--recipe " in text
    assert "--set " in text


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_fits_the_terminal(command: str, width: int) -> None:
    text = help_of(command, width)
    assert max(map(len, text.splitlines())) <= width
    assert f"Example: moefy {command}" in " ".join(text.split())
    assert "…" not in text, "a text was cut off"
    assert "bool" not in text, "a flag takes no value"
    told = " ".join(text.replace("│", " ").split())
    assert not re.search(r"[:(] (?:or|and)\b|\(\)|: \.", told), "a list without its first part"


def test_every_command_is_listed() -> None:
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    for name, group in groups.items():
        names += [name] * bool(group.registered_callback)
        names += [f"{name} {command.name}" for command in group.registered_commands]
    assert set(names) == set(COMMANDS)


def test_moefy_alone_names_three_commands() -> None:
    done = CliRunner().invoke(app)
    commands = re.findall(r"^  moefy ([a-z ]+)", done.output, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["convert", "eval", "export"]
    assert len(done.output.splitlines()) <= 8
    assert max(map(len, done.output.splitlines())) <= 80


def test_the_recipes_are_listed_and_shown() -> None:
    listed = CliRunner().invoke(app, ["recipes"]).output.splitlines()
    assert [line.split()[0] for line in listed[:-1]] == list(own_recipes())
    assert max(map(len, listed)) <= 80
    shown = CliRunner().invoke(app, ["recipes", "show", "llama-moe"])
    assert shown.output == own_recipes()["llama-moe"].read_text()
    with pytest.raises(UsageError, match="none of moefy's own: demo, llama-moe"):
        CliRunner().invoke(app, ["recipes", "show", "lama"], catch_exceptions=False)


@pytest.mark.parametrize("start", [["moefy"], [sys.executable, "-m", "moefy"]])
def test_the_version(start: list[str]) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [*start, "--version"]
    done = subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"moefy {moefy.__version__}\n"


def test_the_shell_completes_commands_and_names_of_recipes() -> None:
    for words, answer in (("moefy conv", "convert"), ("moefy train --recipe smol", "smollm2")):
        how = {"_MOEFY_COMPLETE": "complete_bash", "COMP_WORDS": words}
        how["COMP_CWORD"] = str(len(words.split()) - 1)
        done = CliRunner().invoke(app, env=how, prog_name="moefy")
        assert done.output.startswith(answer), done.output


def built(*words: str) -> Any:
    """Return what a command of one recipe and one pair of options gets from a command line."""
    got: list[Any] = []
    toy = typer.Typer()

    @toy.command()
    @recipe_options
    def command(
        *,
        recipe: TrainRecipe,
        counts: Annotated[dict[str, Any], ConvertRecipe(experts=8), "experts", "shared"],
    ) -> None:
        got.extend([recipe, counts])

    done = CliRunner().invoke(toy, words)
    if isinstance(done.exception, UsageError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return got


def test_options_override_set_and_set_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("tokens: 1000\nseed: 1\nteacher: dense\n")
    words = ["--recipe", str(file), "--set", "seed=2", "--set", "tokens=2000", "--tokens", "3000"]
    recipe, counts = built(*words, "--mixture", "a=1,b=3", "--shared", "2")
    assert (recipe.tokens, recipe.seed, recipe.teacher) == (3000, 2, "dense")
    assert recipe.mixture == {"a": 1.0, "b": 3.0}
    assert counts == {"experts": 8, "shared": 2}
    recipe, _ = built("--recipe", str(file), "--set", "teacher=null", "--set", "z_loss=1e-3")
    assert (recipe.teacher, recipe.z_loss) == (None, 1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "many"], "tokens = 'many': input should be a valid integer"),
        (["--learning-rate", "0"], "greater than 0"),
        (["--shared", "-1"], "shared = '-1'"),
        (["--mixture", "a=x"], "unknown mixture 'a=x'"),
        (["--set", "clip_grad_norm=1"], "clip_grad_norm is now called max_grad_norm"),
    ],
)
def test_the_recipe_checks_an_option(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        built(*words)


@pytest.mark.parametrize(
    ("words", "new"),
    [
        (["eval", "--speed", "a"], "moefy bench"),
        (["eval", "a", "b", "--routing"], "moefy routing"),
        (["--debug", "eval", "--suite=llama-moe", "a"], "moefy suite"),
        (["eval", "--tasks", "sciq", "a"], "moefy suite --tasks"),
        (["convert", "a", "b", "--rescale", "paper"], "moefy convert --repair"),
        (["demo", "--out", "a"], "moefy demo OUT"),
        (["leaderboard", "a", "b"], "moefy study OUT --only methods"),
    ],
)
def test_an_old_spelling_names_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    new: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["moefy", *words])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is now {new}: see " in line


def written_commands() -> list[tuple[str, str]]:
    """Find the commands in the documentation, each with the file that it stands in."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = []
    for file in [*pages, *own_recipes().values()]:
        text = file.read_text()
        if file.suffix == ".md":  # code, fenced or in a sentence
            text = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)) + "\n".join(
                re.findall(r"`(moefy [a-z][^`]*)`", text)
            )
        text = re.sub(r"\\\n#?", "", text)
        lines = re.findall(r"^(?:#\s+)?(moefy [a-z].*)", text, re.MULTILINE)
        found += [(file.name, line.partition("  #")[0]) for line in lines]
    return found


def test_the_documentations_commands_exist() -> None:
    """Every command of README, docs and recipes is one, with options that it has."""
    written = written_commands()
    assert len(written) > 40
    texts = {command: help_of(command) for command in COMMANDS}
    for file, line in written:
        _, *words = line.split()
        name = " ".join(words[:2])
        name = name if name in COMMANDS else words[0]
        options = re.findall(r"(?<!\S)--[a-z-]+", line)
        assert name in COMMANDS, (file, line)
        for option in options:
            assert f"{option} " in texts[name], (file, line)


def drawn(capsys: pytest.CaptureFixture[str], rows: list[list[str]], title: str) -> list[str]:
    show(None, (rows, title), as_json=False)
    return capsys.readouterr().out.splitlines()


def test_a_narrow_terminal_shows_the_most_important_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`moefy eval` with four domains, and a model with a long name."""
    path = "/somewhere/far/away/in/a/folder/out/moe"
    results = [
        Result(
            name=name,
            perplexity=11_942.0,
            domain_perplexity=dict.fromkeys(("django", "news", "shakespeare", "wikipedia"), 20.0),
            excess_loss=None,
            kl_to_reference=0.52,
            top1_agreement=0.551,
            cost=Cost(14, 6, 134_500_000, 94_900_000, 190_000_000, 4096),
            prefill_tokens_per_s=1234.0,
            decode_tokens_per_s=55.5,
        )
        for name in ("smollm2-135m", path)
    ]
    rows = comparison_rows(Comparison("smollm2-135m", 8176, 512, results))
    title = "8,176 [i]held-out[/i] tokens"
    main = ["model", "KL to dense", "loss above", "perplexity", "decode tok/s", "active"]
    for width, count in ((60, 4), (80, 5), (100, 6)):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = drawn(capsys, rows, title)
        assert lines[0] == title
        assert max(map(len, lines)) <= width
        assert [name.strip() for name in lines[2].strip("┃").split("┃")] == sorted(
            main[:count], key=rows[0].index
        )
        first = "".join(line.split("│")[1].strip() for line in lines if line.startswith("│"))
        assert first == "smollm2-135m" + path  # folded, and not cut
        assert "or --json, shows all" in " ".join(lines)
    monkeypatch.delenv("COLUMNS")
    assert all(name in drawn(capsys, rows, title)[2] for name in rows[0])  # into a file


@pytest.mark.parametrize("width", [60, 80])
def test_the_tables_of_commands_are_not_cut(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for words in ("inspect llama-2-7b", "plan llama-1b --speedup 1.4", "plan llama-1b --for speed"):
        done = CliRunner().invoke(app, words.split())
        table = [line for line in done.output.splitlines() if line[:1] in "┏┃┡│└"]
        assert max(map(len, table)) <= width
        assert "…" not in done.output
        assert "What next: moefy " in done.output
        assert "recommended" in done.output or "speedup" not in words


@pytest.mark.parametrize("path", ["../no/model", "./no", "/no/model", "~/no", "../no"])
def test_a_path_is_no_name_of_the_hub(path: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist; a source is a model folder"):
        resolve(path)


def test_a_pruned_model_is_called_dense(tmp_path: Path) -> None:
    dense = write_tiny_llama(tmp_path / "dense")
    counts = ["--experts", "6", "--active", "2", "--shared", "2", "--partition", "random"]
    choices = ["--router", "random", "--repair", "none"]
    done = CliRunner().invoke(
        app, ["convert", str(dense), str(tmp_path / "out"), *counts, *choices]
    )
    assert "a dense model of 2 layers with 16 neurons each" in done.output.replace("\n", " ")
