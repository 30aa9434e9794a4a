"""The recipes of continual pre-training and instruction tuning."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypedDict, get_args

from pydantic import Field, field_validator, model_validator

from moefy.recipe import Fraction, NonNegative, Positive, Recipe, Seed, option

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Part = Literal["embeddings", "attention", "norms", "experts", "shared-experts", "routers"]
Precision = Literal["auto", "float32", "bfloat16"]
Tracker = Literal["tensorboard", "wandb"]
Mixture = Literal[
    "Uniform", "StaticLLaMA", "StaticSheared", "DynamicUniform", "DynamicLLaMA", "DynamicSheared"
]
ExpertsImplementation = Literal["lean", "grouped_mm", "batched_mm", "eager"]


class NoBalance(Recipe):
    """Leave the routers to the other losses."""

    kind: Literal["none"] = "none"


class SwitchBalance(Recipe):
    """The auxiliary loss of the native architectures (`balance.switch_loss`)."""

    kind: Literal["switch"] = "switch"
    coefficient: NonNegative = 1e-2
    # the mean of every pass's own loss, as transformers' Trainer has it, not that of all together
    per_pass: bool = False


class ImportanceLoadBalance(Recipe):
    """LLaMA-MoE's loss (`balance.importance_and_load_loss`), with its noisy gate if `noise` > 0."""

    kind: Literal["importance-load"] = "importance-load"
    coefficient: NonNegative = 1e-2
    # 1 is the paper's gate, too noisy for a router that `convert` has fitted (docs/objective.md)
    noise: NonNegative = 0.0


class SelectionBiasBalance(Recipe):
    """DeepSeek-V3's balancing without a loss (`selection_bias`); for glm4_moe models."""

    kind: Literal["selection-bias"] = "selection-bias"
    rate: NonNegative = 1e-3


Balance = Annotated[
    NoBalance | SwitchBalance | ImportanceLoadBalance | SelectionBiasBalance,
    Field(discriminator="kind"),
]


class Distillation(Recipe):
    """What is learned from the teacher."""

    renamed: ClassVar[dict[str, str]] = {"weight": "alpha"}

    # the teacher's share λ of the loss, the rest is next-token loss; half did best on text that is
    # not the teacher's own (docs/objective.md)
    alpha: Fraction = 0.5
    temperature: Annotated[float, Field(gt=0)] = 1.0
    layers: Literal["none", "residual", "ffn"] = "none"
    layer_weight: NonNegative = 1.0  # of the layers' distance from the teacher's (`LayerMatch`)


class Lora(Recipe):
    """Low-rank adapters (arXiv 2106.09685) through peft: the weights themselves do not move."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    modules: Literal["attention", "all"] = "attention"  # all: of the layers, but the routers


class Parallel(Recipe):
    """How shard × replicate × tensor processes, which torchrun starts, share the work."""

    shard: Positive | None = None  # hold a copy of the weights (FSDP2); None takes what is left
    replicate: Positive = 1  # such copies, which read different sequences
    tensor: Positive = 1  # compute every product of an expert together
    expert: Positive = 1  # hold different experts; divides shard × tensor


class LoopSettings(TypedDict, total=False):
    """The keys that both recipes have."""

    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    learning_rate: float
    warmup_fraction: float
    weight_decay: float
    max_grad_norm: float
    router_lr_scale: float
    precision: Precision
    parallel: Parallel | dict[str, Any]
    gradient_checkpointing: bool
    checkpoint_every_steps: int
    seed: int


class TrainSettings(LoopSettings, total=False):
    """The keys of `TrainRecipe`, as keywords of a function; a mapping stands for a part's keys."""

    tokens: int
    mixture: Mixture | dict[str, float]
    mixture_interval_steps: int
    reference_losses: Literal["dense"] | dict[str, float]
    min_lr_ratio: float
    adam_betas: tuple[float, float]
    frozen: tuple[Part, ...]
    lora: Lora | dict[str, Any] | None
    balance: Balance | str | dict[str, Any]
    z_loss: float
    teacher: str | None
    distillation: Distillation | dict[str, Any]
    compile: bool
    experts_implementation: ExpertsImplementation
    checkpoints_kept: int
    evaluate_every_steps: int | None
    heldout_sequences: int | None
    trackers: tuple[Tracker, ...]


class LoopRecipe(Recipe):
    """What the recipes of both commands share."""

    renamed: ClassVar[dict[str, str]] = {
        "sequences_per_step": "global_batch_size",
        "sequences_per_pass": "micro_batch_size",
        "clip_grad_norm": "max_grad_norm",
        "router_rate_fraction": "router_lr_scale",
    }

    sequence_length: Annotated[int, option("Tokens of the longest sequence", ge=2)] = 512
    global_batch_size: Positive = 1  # of all processes together
    micro_batch_size: Positive = 1  # what one process computes at once
    learning_rate: Annotated[float, option("Peak learning rate", gt=0)] = 1e-4
    warmup_fraction: Fraction = 0.1
    weight_decay: NonNegative = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    router_lr_scale: NonNegative = 0.01
    precision: Precision = "auto"
    parallel: Parallel = Parallel()
    gradient_checkpointing: bool = False
    checkpoint_every_steps: Annotated[int, Field(ge=0)] = 100
    seed: Seed = 0

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for a stopped run to go on."""
        # how the work is cut, kept and watched may change: a run may go on with other processes
        free = {
            "micro_batch_size", "parallel", "gradient_checkpointing", "compile",
            "experts_implementation", "checkpoint_every_steps", "checkpoints_kept", "trackers",
        }  # fmt: skip
        return self.model_dump(mode="json", exclude=free)


class TrainRecipe(LoopRecipe):
    """Continual pre-training.

    Routers learn at `router_lr_scale` of the rate: a converted router's weights are about a
    hundred times smaller than other matrices', and Adam's first steps at the common rate would
    replace the fitted choice by noise.

    Schedule and optimizer are the paper's (AdamW 0.9/0.95, weight decay 0.1, clip 1, cosine to
    10%), its sizes and its learning rate (2e-4 at 14.7M tokens a step) are not: these defaults suit
    a small model and thousands of tokens. `moefy recipes` lists the paper's.
    """

    renamed: ClassVar[dict[str, str]] = LoopRecipe.renamed | {
        "final_learning_rate_fraction": "min_lr_ratio"
    }

    tokens: Annotated[int, option("Number of training tokens", ge=1)] = 65_536

    mixture: Annotated[
        Mixture | dict[str, NonNegative],
        option("Shares of the domains, as in book=0.7,arxiv=0.3, or their name"),
    ] = "Uniform"
    mixture_interval_steps: Positive = 170  # LLaMA-MoE's: 2.5B tokens of 14.7M a step
    # what a dynamic mixture compares the losses with, nats per token; dense: the teacher's losses
    reference_losses: Literal["dense"] | dict[str, Annotated[float, Field(gt=0)]] = "dense"

    min_lr_ratio: Fraction = 0.1
    adam_betas: tuple[Share, Share] = (0.9, 0.95)
    frozen: tuple[Part, ...] = ()
    lora: Lora | None = None

    balance: Balance = SwitchBalance()
    z_loss: NonNegative = 0.0
    teacher: Annotated[
        str | None, option("Dense model to distil from", unset="next-token loss alone")
    ] = None
    distillation: Distillation = Distillation()

    compile: bool = False
    experts_implementation: ExpertsImplementation = "lean"
    checkpoints_kept: Positive = 2
    # when held-out loss and KL to the dense model are measured, besides before and after; 0: never
    evaluate_every_steps: Annotated[int, Field(ge=0)] | None = None
    # of each domain; None: 8, in a short run as few as measuring in about 5% of it allows, or 1
    heldout_sequences: Positive | None = None
    trackers: tuple[Tracker, ...] = ()  # of every step, besides log.jsonl

    @field_validator("mixture", mode="before")
    @classmethod
    def _weights_of_text(cls, mixture: Any) -> Any:
        names = get_args(Mixture)
        if not isinstance(mixture, str) or mixture in names:
            return mixture
        try:
            pairs = [entry.split("=") for entry in mixture.split(",")]
            return {name.strip(): float(number) for name, number in pairs}
        except ValueError:  # no number, or more or fewer than one "="
            raise ValueError(
                f"unknown mixture {mixture!r}: write one of {', '.join(names)}, or a weight for "
                "each domain, as in wikipedia=0.7,book=0.3"
            ) from None

    @model_validator(mode="before")
    @classmethod
    def _usual_balance(cls, values: Any) -> Any:
        balance = values.get("balance")
        if isinstance(balance, str):
            return values | {"balance": {"kind": balance}}
        if isinstance(balance, dict) and "kind" not in balance:
            return values | {"balance": {"kind": "switch", **balance}}
        return values

    @model_validator(mode="after")
    def _sizes_fit(self) -> TrainRecipe:
        if self.tokens < self.sequence_length:
            raise ValueError(
                f"--tokens {self.tokens} is less than one sequence of {self.sequence_length} "
                "tokens: raise --tokens or lower --sequence-length"
            )
        if self.teacher is None and self.distillation != Distillation():
            raise ValueError("distillation needs a teacher: name the dense model with --teacher")
        if self.balance.kind == "selection-bias" and "routers" in self.frozen:
            raise ValueError("selection-bias moves the routers' choice, and routers are frozen")
        return self

    @property
    def num_steps(self) -> int:
        """Optimizer steps: the tokens asked for, rounded up to whole steps."""
        return -(-self.tokens // (self.sequence_length * self.global_batch_size))

    @property
    def distils(self) -> bool:
        """Whether a teacher runs in every step."""
        learned = self.distillation
        return self.teacher is not None and (learned.alpha > 0 or learned.layers != "none")

    @property
    def is_dynamic(self) -> bool:
        """Whether the weights of the mixture follow the losses."""
        return isinstance(self.mixture, str) and self.mixture.startswith("Dynamic")


class TuneSettings(LoopSettings, total=False):
    """The keys of `TuneRecipe`, as keywords of a function."""

    epochs: int
    router: Literal["frozen", "balanced"]
    balance_coefficient: float
    lora_rank: int
    lora_alpha: float | None
    chat_template: str | None
    heldout_conversations: int


class TuneRecipe(LoopRecipe):
    """Instruction tuning on conversations.

    The defaults are those of LLaMA-MoE (arXiv 2406.16554): two epochs, 2e-5 with a cosine to zero,
    3% warm-up, 2,048 tokens, 128 conversations a step, frozen routers. Adam's rates, no weight
    decay and a clip of 1 are the usual ones of this step, not the paper's word.

    `balanced` routers learn at `router_lr_scale` of the rate (see `TrainRecipe`), with the Switch
    loss. `lora_rank` 0 trains the weights themselves; `lora_alpha` None is twice the rank.
    """

    sequence_length: Annotated[int, option("Tokens of the longest sequence", ge=2)] = 2048
    global_batch_size: Positive = 128
    learning_rate: Annotated[float, option("Peak learning rate", gt=0)] = 2e-5
    warmup_fraction: Fraction = 0.03
    weight_decay: NonNegative = 0.0
    checkpoint_every_steps: Annotated[int, Field(ge=0)] = 25

    epochs: Annotated[int, option("Number of passes over the conversations", ge=1)] = 2
    router: Annotated[
        Literal["frozen", "balanced"], option("Whether routers stay or learn, kept balanced")
    ] = "frozen"
    balance_coefficient: NonNegative = 1e-2
    lora_rank: Annotated[int, option("Rank of LoRA adapters; 0 trains all weights", ge=0)] = 0
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    chat_template: Annotated[
        str | None,
        option("chatml or a Jinja file", unset="the model's own, else chatml"),
    ] = None
    heldout_conversations: Annotated[int, Field(ge=0)] = 100

    @model_validator(mode="after")
    def _choices_fit(self) -> TuneRecipe:
        if self.lora_rank and self.router == "balanced":
            raise ValueError(
                "balanced routers learn, and with --lora-rank only the adapters do: leave one out"
            )
        return self
