"""The recipe of instruction tuning: every choice that changes what a run does."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moefy.recipe import Positive, Recipe


class TuneRecipe(Recipe):
    """Instruction tuning on conversations.

    The defaults are those of LLaMA-MoE (arXiv 2406.16554): two epochs, 2e-5 with a cosine to zero,
    3% warm-up, 2,048 tokens, 128 conversations a step, frozen routers. Adam's rates, no weight
    decay and a clip of 1 are the usual ones of this step, not the paper's word.

    A sequence is a conversation, or with `packing` as many as fit; none is seen by another.
    `balanced` routers learn at `router_lr_scale` of the rate (see `TrainRecipe`), with the
    Switch loss. `lora_rank` 0 trains the weights themselves; `lora_alpha` None is twice the rank.
    """

    epochs: Positive = 2
    sequence_length: Annotated[int, Field(ge=2)] = 2048
    global_batch_size: Positive = 128
    micro_batch_size: Positive = 1
    packing: bool = False
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    router: Literal["frozen", "balanced"] = "frozen"
    router_lr_scale: Annotated[float, Field(ge=0)] = 0.01
    balance_coefficient: Annotated[float, Field(ge=0)] = 1e-2
    lora_rank: Annotated[int, Field(ge=0)] = 0
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    chat_template: str | None = None
    heldout_conversations: Annotated[int, Field(ge=0)] = 100
    gradient_checkpointing: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpoint_every_steps: Annotated[int, Field(ge=0)] = 25
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _choices_fit(self) -> TuneRecipe:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} must be a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        if self.lora_rank and self.router == "balanced":
            raise ValueError(
                "balanced routers learn, and with --lora-rank only the adapters do: leave one out"
            )
        return self
