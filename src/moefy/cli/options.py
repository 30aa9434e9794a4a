"""Options of commands: those that recipes define, and those that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
import yaml

from moefy.errors import UsageError
from moefy.recipe import Recipe, own_recipes

Model = Annotated[str, typer.Argument(help="Model folder.")]
Models = Annotated[list[str], typer.Argument(help="Models; put the dense one among them.")]
Out = Annotated[Path, typer.Argument(help="Folder to write.")]
ResumedOut = Annotated[Path, typer.Argument(help="Folder to write; the same command resumes it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Data = Annotated[
    str, typer.Option(help="File, folder of DOMAIN.jsonl files, hf:DATASET or 'demo'.")
]
SplitName = Annotated[
    Literal["heldout", "train", "all"],
    # a metavar of its own: Typer's would list the names and squeeze all other texts
    typer.Option(metavar="<str>", help="Documents to measure on: heldout, train or all."),
]
Dtype = Annotated[str, typer.Option(help="Precision: float32 or bfloat16.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option(help="Benchmarks, as in sciq,piqa; llama-moe: the paper's eleven."),
]
Limit = Annotated[int | None, typer.Option(help="Items of each benchmark. [default: all]")]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens of the longest answer.")]

_FILE = Annotated[
    str | None,  # no path, which would make the name `demo` of the file `./demo`
    typer.Option(
        "--recipe",
        help="YAML file with any of the settings, or a name that `moefy recipes` lists.",
        autocompletion=lambda: list(own_recipes()),
    ),
]
_SET = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting of the recipe, as in a.b=1."),
]


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the parameters of a command that are recipes into options.

    `recipe: TrainRecipe` becomes one option for each key that `moefy.recipe.option` marks, and
    `--recipe FILE` and `--set KEY=VALUE` for all keys. `Annotated[dict[str, Any], TrainRecipe(),
    "tokens", "seed"]` becomes these two options, and the command gets a mapping of their values;
    the recipe in it holds the defaults.
    """
    hints = get_type_hints(command, include_extras=True)
    options: list[inspect.Parameter] = []
    # what each recipe of the command is made from, and the keys that are options of their own
    sources: dict[str, tuple[Recipe | type[Recipe], tuple[str, ...]]] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        source, *keys = get_args(hint)[1:] if get_origin(hint) is Annotated else (hint,)
        if isinstance(source, Recipe):
            options += _options_of(source, keys)
        elif isinstance(source, type) and issubclass(source, Recipe):
            keys = [key for key, field in source.model_fields.items() if field.json_schema_extra]
            options += _options_of(source(), keys)
            options += [_keyword("recipe", _FILE, None), _keyword("settings", _SET, None)]
        else:
            options.append(_keyword(parameter.name, hint, parameter.default))
            continue
        sources[parameter.name] = (source, tuple(keys))

    @wraps(command)
    def run(**values: Any) -> None:
        for name, (source, keys) in sources.items():
            given = {key: values.pop(key) for key in keys}
            # None is an option that was not given; `--set key=null` sets null
            chosen = {key: value for key, value in given.items() if value is not None}
            if isinstance(source, Recipe):
                recipe = source.build(source, **chosen)
                values[name] = {key: getattr(recipe, key) for key in keys}
            else:
                # the nearer to the command line the stronger: file, then --set, then options
                settings = parse_settings(values.pop("settings")) | chosen
                values[name] = source.build(values.pop("recipe"), **settings)
        command(**values)

    # Typer reads a command's signature, and makes the options that it finds there
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    # keyword-only, so that an option may stand before an argument without default
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _options_of(recipe: Recipe, keys: list[str]) -> Iterator[inspect.Parameter]:
    """Make options of some keys: text, type, choices and default are the recipe's."""
    for key in keys:
        field = type(recipe).model_fields[key]
        kind: Any = field.annotation
        text, marked = field.description, field.json_schema_extra
        assert isinstance(marked, dict)
        flag = marked["flag"] or f"--{key.replace('_', '-')}"
        if kind is bool:  # off is the default and `--set key=false`, so that --no-KEY is not needed
            yield _keyword(key, Annotated[bool | None, typer.Option(flag, help=f"{text}.")], None)
            continue
        if get_origin(kind) in (Union, UnionType):  # such as `int | None`: None is "not given"
            kind = get_args(kind)[0]
        if get_origin(kind) is Literal:
            *others, last = get_args(kind)
            names = " or ".join(filter(None, [", ".join(others), last]))
            kind, text = str, f"{text}: {names}"
        default = getattr(recipe, key)
        text = f"{text}. [default: {marked['unset'] if default is None else default}]"
        # click gets a string: the recipe reads it, so that there is one check and one message
        option = typer.Option(flag, metavar=f"<{kind.__name__}>", help=text)
        yield _keyword(key, Annotated[str | None, option], None)


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """Return what `--set KEY=VALUE` says, by key."""
    choices = {}
    for setting in settings or []:
        key, separator, value = setting.partition("=")
        if not separator:
            raise UsageError(f"--set {setting}: write KEY=VALUE")
        try:
            choices[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {setting}: {value!r} is not valid YAML") from error
    return choices


def text_words(data: str) -> list[str]:
    """Return the option by which another command reads the same text; `demo` needs none."""
    from moefy.data.shards import is_prepared, read_record

    if is_prepared(data):  # only train reads tokens
        data = read_record(Path(data).expanduser())["inputs"]["data"]
    return [] if data in ("demo", "self") else ["--data", data]


def counts(option: str, text: str | None) -> list[int] | None:
    """Return the whole numbers that an option lists; None where it was not given."""
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise UsageError(f"{option} {text!r}: write whole numbers, as in 1,8") from None


def listed(texts: list[str] | None) -> list[str]:
    """Return the names that an option lists: separated by commas, given again, or both."""
    return [part.strip() for text in texts or () for part in text.split(",") if part.strip()]
