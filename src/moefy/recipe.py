"""What a run is: frozen pydantic models that forbid unknown keys, YAML in, YAML out.

A recipe holds every choice that changes the result. Paths and progress are not part of it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypedDict

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moefy.errors import UsageError
from moefy.split import Split
from moefy.storage import load_yaml


def option(text: str, *, unset: str = "", flag: str = "", **bounds: Any) -> Any:
    """Make a key an option of its command: the metadata of an annotation.

    `--help` shows `text`, the default (`unset` for None) and a `Literal`'s values; `flag` is the
    option's name where it is not the key's; `bounds` are those of pydantic's `Field`.
    """
    return Field(description=text, json_schema_extra={"unset": unset, "flag": flag}, **bounds)


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
Seed = Annotated[int, option("Seed of every random choice", ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
_LARGEST = 2**53  # every whole number up to here is one for torch, numpy and a float alike


class Recipe(BaseModel):
    """Base of all recipes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    renamed: ClassVar[dict[str, str]] = {}
    """Keys of earlier versions, and what they are called now."""

    @classmethod
    def build(cls, recipe: Self | str | Path | None = None, /, **settings: Any) -> Self:
        """Make a recipe from another one, its name or file, and from keys that override it.

        `a.b` is key b of a. UsageError names a file that cannot be read, or what is not allowed.
        """
        if isinstance(recipe, Recipe):
            if not isinstance(recipe, cls):
                raise UsageError(f"recipe is a {type(recipe).__name__}: give a {cls.__name__}")
            if not settings:
                return recipe
        values = recipe.model_dump() if isinstance(recipe, Recipe) else _read(recipe)
        # one by one, because `a.b` may change what an earlier key `a` has set
        for key, value in settings.items():
            _set(values, key, value)
        try:
            return cls(**values)
        except ValidationError as error:
            raise UsageError(_explain(error)) from error

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, values: Any) -> Any:
        # pydantic would forbid them too, but it cannot say what is allowed or what took their place
        for key, value in values.items() if isinstance(values, dict) else ():
            if new := cls.renamed.get(key):
                raise ValueError(f"{key} is now called {new}")
            if key not in cls.model_fields:
                raise ValueError(f"unknown key {key!r}; allowed: {', '.join(cls.model_fields)}")
            # a seed is hashed, and may have any size
            if key != "seed" and isinstance(value, int) and abs(value) > _LARGEST:
                raise ValueError(f"{key} is {value}: numbers of up to {_LARGEST} are allowed")
        return values

    def to_yaml(self) -> str:
        """Return the recipe as YAML that `build` reads back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


Partition = Literal[
    "random",
    "clustering-up",
    "clustering-gate",
    "coactivation",
    "sharing-inner",
    "sharing-inter",
    "gradient",
    "carve",
    "alternating",
]
Router = Literal["random", "mean-gate", "representative", "ridge", "ridge-log", "ascent"]
Repair = Literal["none", "unscaled", "paper", "scale", "refit", "fit"]
Effort = Literal["fast", "normal", "high"]
Target = Literal[
    "mixtral",
    "granitemoeshared",
    "granitemoe",
    "hunyuan_v1_moe",
    "ernie4_5_moe",
    "lfm2_moe",
    "flex_olmo",
    "cohere2_moe",
    "qwen3_5_moe_text",
    "qwen3_vl_moe_text",
    "qwen3_moe",
    "glm4_moe",
    "granitemoe_swa",
]
REGRESSIONS = ("ridge", "ridge-log", "ascent")
"""Routers that are fitted to the experts' energies on calibration tokens."""


def _effort(repair: Repair, tokens: int, epochs: float, end_to_end: float) -> dict[str, Any]:
    return {
        "repair": repair,
        "calibration_tokens": tokens,
        "fit_epochs": epochs,
        "end_to_end_epochs": end_to_end,
    }


EFFORTS: dict[Effort, dict[str, Any]] = {
    "fast": _effort("refit", 28_672, 1.0, 0.0),
    "normal": _effort("fit", 40_960, 2.0, 1.0),
    "high": _effort("fit", 172_032, 2.0, 1.0),
}
"""What the effort decides where a key is None; measured in docs/construction.md."""


class ConvertSettings(TypedDict, total=False):
    """The keys of `ConvertRecipe`, as keywords of a function."""

    preset: Literal["speed", "quality"] | None
    experts: int | None
    active: int | None
    shared: int | None
    partition: Partition
    router: Router
    router_ridge: float
    effort: Effort
    repair: Repair | None
    refit_ridge: float
    refit_tokens: int
    fit_epochs: float | None
    fit_learning_rate: float
    fit_batch_tokens: int
    end_to_end_epochs: float | None
    end_to_end_learning_rate: float
    aim: Literal["ffn", "residual"]
    target: Target | None
    part: Literal["text"] | None
    calibration_tokens: int | None
    calibration_length: int
    seed: int


class ConvertRecipe(Recipe):
    """How a dense model is split; the defaults are what won in docs/construction.md.

    `experts` and `active` count the `shared` slices too: 4 of 16 with 2 shared is one shared expert
    of two slices, and 2 of 14 routed ones. What is None depends on the model: see `for_model`.
    """

    experts: Annotated[
        int | None, option("Number of slices that every FFN is cut into, E", unset="64 or fewer")
    ] = None
    active: Annotated[
        int | None, option("Number of slices that run for a token, k", unset="half of --experts")
    ] = None
    shared: Annotated[
        int | None,
        option("Number of active slices that run for every token", unset="half of --active", ge=0),
    ] = None
    preset: Annotated[
        Literal["speed", "quality"] | None,
        option(
            "Purpose for which counts are chosen that are not given", unset="none", flag="--for"
        ),
    ] = None
    partition: Annotated[Partition, option("How neurons are assigned to slices")] = "alternating"
    router: Annotated[Router, option("How the router's weights are made")] = "ascent"
    router_ridge: float = Field(1.0, gt=0, description="Ridge of the router's regression")
    effort: Annotated[
        Effort, option("Time spent on quality (closed form alone, minutes, or hours)")
    ] = "normal"
    repair: Annotated[
        Repair | None,
        option(
            "How the split is corrected (unscaled: 1/k, paper: E/k², refit: down_proj, fit: all)",
            unset="fit; refit where --effort is fast",
        ),
    ] = None
    refit_ridge: float = Field(0.3, gt=0, description="Ridge of the refit of down_proj")
    refit_tokens: Annotated[
        int, Field(ge=1, description="Calibration tokens that the closed form reads at most")
    ] = 28_672
    fit_epochs: Annotated[
        float | None, Field(gt=0, description="Passes of the fit; None: by effort")
    ] = None
    fit_learning_rate: Annotated[
        float, Field(gt=0, description="Its learning rate, times each matrix's root mean square")
    ] = 0.02
    fit_batch_tokens: Annotated[int, Field(ge=1, description="Tokens of a step of the fit")] = 512
    end_to_end_epochs: Annotated[
        float | None,
        Field(
            ge=0,
            description="Passes after the fit that train norms and routers through the whole "
            "model; None: by effort, 0 where the weights take over 4 GiB in float32",
        ),
    ] = None
    end_to_end_learning_rate: Annotated[
        float, Field(gt=0, description="Its learning rate, times each tensor's root mean square")
    ] = 0.003
    aim: Literal["ffn", "residual"] = Field("residual", description="Dense output to fit to")
    target: Annotated[
        Target | None, option("Architecture to write", unset="the first that is exact")
    ] = None
    part: Annotated[
        Literal["text"] | None,
        option(
            "Model inside of a vision-language model that is converted alone",
            unset="the whole, where its MoE class exists: Qwen3-VL, Qwen3.5",
        ),
    ] = None
    calibration_tokens: Annotated[
        int | None, Field(ge=1, description="Tokens of the calibration text; None: by effort")
    ] = None
    calibration_length: int = Field(512, ge=2, description="Tokens of a window of that text")
    seed: Seed = 0

    @model_validator(mode="after")
    def _inner_has_no_shared(self) -> Self:
        if self.partition == "sharing-inner" and self.shared:
            raise ValueError(
                f"sharing-inner has no shared experts, {self.shared} were asked for: pass --shared "
                "0, or --partition sharing-inter"
            )
        return self

    @model_validator(mode="after")
    def _trained_end_to_end(self) -> Self:
        if self.end_to_end_epochs and (self.repair not in ("fit", None) or self.aim != "residual"):
            raise ValueError(
                f"end_to_end_epochs is {self.end_to_end_epochs:g}, and only --repair fit with the "
                "aim residual trains anything: leave it out"
            )
        return self

    @property
    def needs_gradients(self) -> bool:
        """Whether the partition needs the neurons' importance."""
        return self.partition in ("sharing-inner", "sharing-inter", "gradient")

    @property
    def calibrated(self) -> bool:
        """Whether a choice needs calibration tokens."""
        return (
            self.partition not in ("random", "clustering-up", "clustering-gate")
            or self.router in ("representative", *REGRESSIONS)
            or self.fitted
        )

    @property
    def follows_dense(self) -> bool:
        """Whether a fitted repair aims at the dense residual stream."""
        return self.aim == "residual" and self.fitted

    @property
    def fitted(self) -> bool:
        """Whether the repair fits weights to calibration tokens."""
        return self.repair in ("scale", "refit", "fit", None)

    def for_model(self, intermediate_size: int) -> Self:
        """Return the recipe with every choice made: the counts by `Split.of`, and the effort."""
        # sharing-inner has no shared experts, whatever the usual number is
        shared = 0 if self.partition == "sharing-inner" else self.shared
        split = Split.of(intermediate_size, self.experts, self.active, shared, self.preset)
        effort = EFFORTS[self.effort]
        unset = {key: value for key, value in effort.items() if getattr(self, key) is None}
        return self.model_copy(update=asdict(split) | unset)

    def identity(self) -> dict[str, Any]:
        """Return the choices that decide the weights, of a recipe `for_model`, as JSON keeps them.

        `effort` and `preset` decide nothing more, nor what a fit alone reads where none is asked.
        """
        skipped = {"effort", "preset"}
        if self.repair != "fit":
            skipped |= {key for key in type(self).model_fields if key.startswith("fit_")}
        if not self.end_to_end_epochs:
            skipped.add("end_to_end_learning_rate")
        if self.calibration_tokens is not None and self.calibration_tokens <= self.refit_tokens:
            skipped.add("refit_tokens")
        return self.model_dump(mode="json", exclude=skipped)

    @property
    def split(self) -> Split:
        """The counts of a recipe `for_model`."""
        assert self.experts is not None
        assert self.active is not None
        assert self.shared is not None
        return Split(self.experts, self.active, self.shared)


LLAMA_MOE: dict[str, Any] = {
    "shared": 0,
    "partition": "random",
    "router": "random",
    "repair": "paper",
}
"""The choices of LLaMA-MoE (arXiv 2406.16554)."""


def own_recipes() -> dict[str, Path]:
    """Return the files of the recipes that come with moefy, by name."""
    files = {file.stem: file for file in Path(__file__).with_name("recipes").glob("*.yaml")}
    return dict(sorted(files.items()))


def recipe_text(recipe: str | Path) -> str:
    """Return what a recipe's file holds; a text is first looked for among moefy's own names."""
    own = own_recipes()
    try:
        return Path(own.get(recipe, recipe) if isinstance(recipe, str) else recipe).read_text()
    except FileNotFoundError:
        raise UsageError(
            f"recipe {recipe} is no file, and none of moefy's own: {', '.join(own)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {recipe} cannot be read: {error}") from error


def _read(file: str | Path | None) -> dict[str, Any]:
    """Read the keys of a recipe's YAML; no recipe has none."""
    if file is None:
        return {}
    try:
        values = load_yaml(recipe_text(file)) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"recipe {file} must be a mapping of keys to values")
    return values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for part in outer:
        inner = values.get(part) or {}
        if isinstance(inner, str):  # as in `balance: switch`
            inner = {"kind": inner}
        elif isinstance(inner, Recipe):
            inner = inner.model_dump()
        if not isinstance(inner, dict):
            raise UsageError(f"{part} is {inner!r} and has no keys: {key} cannot be set")
        values[part] = dict(inner)
        values = values[part]
    values[last] = value


def _explain(error: ValidationError) -> str:
    """Turn pydantic's report into one line."""
    lines = []
    for item in error.errors():
        where = ".".join(map(str, item["loc"]))
        # errors that recipes raise themselves name the value in a sentence of their own
        if item["type"] == "value_error":
            text = item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {text}" if where else text)
        else:
            lines.append(f"{where} = {item['input']!r}: {item['msg'].lower()}")
    return "; ".join(lines)
