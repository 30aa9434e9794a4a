"""The recipe of a study: what all of its arms have in common."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from pydantic import Field, model_validator

from moefy.recipe import Positive, Recipe, option

Settings = dict[str, Any]
_FREE = {"seeds", "first_seed"}  # they add runs and change none that is there


class StudySettings(TypedDict, total=False):
    """The keys of `StudyRecipe`, as keywords of a function."""

    tokens: int
    seeds: int
    first_seed: int
    sequence_length: int
    windows: int
    experts: int
    active: int
    convert: Settings
    train: Settings


class StudyRecipe(Recipe):
    """Settings that are the same for every arm of every ablation.

    `convert` and `train` hold keys of these commands' recipes; what an arm itself says comes before
    them, and the teacher `dense` is the study's own model.
    """

    tokens: Annotated[int, option("Number of tokens that every arm trains on", ge=1)] = 32_768
    seeds: Annotated[int, option("Number of seeds of every arm", ge=1)] = 3
    first_seed: int = Field(0, ge=0, description="Several machines share a study by seeds")
    sequence_length: Annotated[int, option("Tokens per held-out window", ge=2)] = 512
    windows: Annotated[int, option("Number of held-out windows per domain", ge=1)] = 8
    # the paper's 4/16
    experts: Positive = Field(16, description="Slices of every FFN, in all ablations but size")
    active: int = Field(4, ge=2, description="Slices that run for a token; even")
    convert: Settings = Field(default_factory=dict, description="Keys of a ConvertRecipe")
    train: Settings = Field(default_factory=dict, description="Keys of a TrainRecipe")

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
