"""The recipe of a study: what all of its arms have in common."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from pydantic import Field, model_validator

from moefy.recipe import Positive, Recipe, option

Settings = dict[str, Any]
# They add runs, or measure speed, and change no run that is there.
_FREE = {"seeds", "first_seed", "grid", "prompt_tokens", "new_tokens", "rounds"}


class StudySettings(TypedDict, total=False):
    """The keys of `StudyRecipe`, as keywords of a function."""

    tokens: int
    seeds: int
    first_seed: int
    sequence_length: int
    windows: int
    evaluations: int
    experts: int
    active: int
    grid: tuple[int, ...]
    train_sizes: bool
    prompt_tokens: int
    new_tokens: int
    rounds: int
    convert: Settings
    train: Settings
    tune: Settings


class StudyRecipe(Recipe):
    """Settings that are the same for every arm of every ablation.

    `seeds` of them are run, from `first_seed` on: other machines may run others into folders of
    their own, whose `runs.jsonl` are then put together.
    `experts` and `active` are the split of all ablations but that of size, the paper's 4/16;
    `grid` are the numbers of experts of the ablation of size, which is trained
    only with `train_sizes`. `tokens` are trained on by every arm
    that trains, `windows` of `sequence_length` tokens are held out in every domain, and the loss
    there is measured `evaluations` times along training. `convert`, `train` and `tune` hold keys of
    these commands' recipes; what an arm itself says comes before them, and the teacher `dense` is
    the study's own model. Speed is measured on `prompt_tokens` and `new_tokens`, in `rounds`.
    """

    tokens: Annotated[int, option("Number of tokens that every arm trains on", ge=1)] = 32_768
    seeds: Annotated[int, option("Number of seeds of every arm", ge=1)] = 3
    first_seed: Annotated[int, Field(ge=0)] = 0
    sequence_length: Annotated[int, option("Tokens per held-out window", ge=2)] = 512
    windows: Annotated[int, option("Number of held-out windows per domain", ge=1)] = 8
    evaluations: Positive = 8
    experts: Positive = 16
    active: Annotated[int, Field(ge=2)] = 4
    grid: tuple[Positive, ...] = (8, 16, 32, 64)
    train_sizes: bool = False
    prompt_tokens: Annotated[int, option("Prompt tokens of a speed measurement", ge=1)] = 128
    new_tokens: Annotated[int, option("Generated tokens of a speed measurement", ge=1)] = 32
    rounds: Annotated[int, option("Number of speed measurements", ge=1)] = 3
    convert: Settings = Field(default_factory=dict)
    train: Settings = Field(default_factory=dict)
    tune: Settings = Field(default_factory=dict)

    @model_validator(mode="after")
    def _half_is_whole(self) -> StudyRecipe:
        if self.active % 2 or self.active >= self.experts:
            raise ValueError(
                f"active {self.active} of {self.experts} experts: active must be even, because "
                "arms with half of it are compared, and less than experts"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for results to stand in one folder."""
        return self.model_dump(mode="json", exclude=_FREE)
