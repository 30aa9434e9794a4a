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
    coefficient: NonNegative = Field(1e-2, description="Weight of the loss")
    # transformers' Trainer has it so
    per_pass: bool = Field(False, description="Mean of every pass's own loss, not that of the step")


class ImportanceLoadBalance(Recipe):
    """LLaMA-MoE's loss (`balance.importance_and_load_loss`), with its noisy gate if `noise` > 0."""

    kind: Literal["importance-load"] = "importance-load"
    coefficient: NonNegative = Field(1e-2, description="Weight of the loss")
    # 1 is the paper's gate, too noisy for a router that `convert` has fitted (docs/objective.md)
    noise: NonNegative = Field(0.0, description="Scale of the gate's noise; 1 is the paper's")


class SelectionBiasBalance(Recipe):
    """DeepSeek-V3's balancing without a loss (`selection_bias`); for glm4_moe models."""

    kind: Literal["selection-bias"] = "selection-bias"
    rate: NonNegative = Field(1e-3, description="Step of the bias after each step of training")


Balance = Annotated[
    NoBalance | SwitchBalance | ImportanceLoadBalance | SelectionBiasBalance,
    Field(discriminator="kind"),
]


class Distillation(Recipe):
    """What is learned from the teacher."""

    renamed: ClassVar[dict[str, str]] = {"weight": "alpha"}

    # nearest to the teacher; half learns the training text besides (docs/training.md)
    alpha: Fraction = Field(1.0, description="Teacher's share of the loss; the rest is next-token")
    temperature: float = Field(1.0, gt=0, description="Divides both models' logits")
    layers: Literal["none", "residual", "ffn"] = Field("none", description="Outputs to match too")
    layer_weight: NonNegative = Field(1.0, description="Weight of the layers' distance")


class Lora(Recipe):
    """Low-rank adapters (arXiv 2106.09685) through peft: the weights themselves do not move."""

    rank: Positive = Field(16, description="Rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="Scale of the adapters, times 1 / rank")
    modules: Literal["attention", "all"] = Field("attention", description="all: all but routers")


class Parallel(Recipe):
    """How shard × replicate × tensor processes, which torchrun starts, share the work."""

    shard: Positive | None = Field(None, description="Hold one copy (FSDP2); None: the rest")
    replicate: Positive = Field(1, description="Number of such copies; each reads other sequences")
    tensor: Positive = Field(1, description="Compute each product of an expert together")
    expert: Positive = Field(1, description="Hold different experts; divides shard × tensor")


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
    global_batch_size: Positive = Field(1, description="Sequences of a step, of all processes")
    micro_batch_size: Positive = Field(1, description="Sequences a process computes at once")
    learning_rate: Annotated[float, option("Peak learning rate", gt=0)] = 1e-4
    warmup_fraction: Fraction = Field(0.1, description="Share of the steps with a rising rate")
    weight_decay: NonNegative = Field(0.1, description="AdamW's weight decay, on matrices")
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are scaled down to it")
    router_lr_scale: NonNegative = Field(0.01, description="Routers' rate over the others'")
    precision: Precision = Field("auto", description="Number type; auto: bfloat16 if fast")
    parallel: Parallel = Field(Parallel(), description="How processes share the work")
    gradient_checkpointing: bool = Field(False, description="Less memory, a third more time")
    checkpoint_every_steps: int = Field(100, ge=0, description="Steps between checkpoints; 0: none")
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
    # LLaMA-MoE's: 2.5B tokens of 14.7M a step
    mixture_interval_steps: Positive = Field(170, description="Steps between dynamic weights")
    reference_losses: Literal["dense"] | dict[str, Annotated[float, Field(gt=0)]] = Field(
        "dense",
        description="Losses that dynamic weights are compared with; dense: the teacher's",
    )

    min_lr_ratio: Fraction = Field(0.1, description="Last learning rate over the peak")
    adam_betas: tuple[Share, Share] = Field((0.9, 0.95), description="AdamW's averages")
    frozen: tuple[Part, ...] = Field((), description="Parts that do not learn")
    lora: Lora | None = Field(None, description="Adapters in place of weights, merged at the end")

    balance: Balance = Field(SwitchBalance(), description="How experts are kept evenly used")
    z_loss: NonNegative = Field(0.0, description="Weight of the routers' squared logsumexp")
    teacher: Annotated[
        str | None, option("Dense model to distil from", unset="next-token loss alone")
    ] = None
    distillation: Distillation = Field(Distillation(), description="What the teacher teaches")

    compile: bool = Field(False, description="Compile the layers once")
    experts_implementation: ExpertsImplementation = Field("lean", description="Expert layers")
    checkpoints_kept: Positive = Field(2, description="Newest checkpoints that stay")
    evaluate_every_steps: int | None = Field(
        None, ge=0, description="Steps between held-out losses; None: before and after, 0: never"
    )
    heldout_sequences: Positive | None = Field(
        None, description="Held-out sequences of a domain; None: 8, fewer in a short run"
    )
    trackers: tuple[Tracker, ...] = Field((), description="Where steps are logged, too")

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
    global_batch_size: Positive = Field(128, description="Conversations of a step")
    learning_rate: Annotated[float, option("Peak learning rate", gt=0)] = 2e-5
    warmup_fraction: Fraction = Field(0.03, description="Share of the steps with a rising rate")
    weight_decay: NonNegative = Field(0.0, description="AdamW's weight decay, on matrices")
    checkpoint_every_steps: int = Field(25, ge=0, description="Steps between checkpoints; 0: none")

    epochs: Annotated[int, option("Number of passes over the conversations", ge=1)] = 2
    router: Annotated[
        Literal["frozen", "balanced"], option("Whether routers stay as they are, or learn balanced")
    ] = "frozen"
    balance_coefficient: NonNegative = Field(1e-2, description="Weight of the loss that balances")
    lora_rank: Annotated[int, option("Rank of LoRA adapters; 0 trains all weights", ge=0)] = 0
    lora_alpha: float | None = Field(None, gt=0, description="Their scale; None: twice the rank")
    chat_template: Annotated[
        str | None,
        option("Chat template: chatml or a Jinja file", unset="the model's own, else chatml"),
    ] = None
    heldout_conversations: int = Field(100, ge=0, description="Held-out conversations at most")

    @model_validator(mode="after")
    def _choices_fit(self) -> TuneRecipe:
        if self.lora_rank and self.router == "balanced":
            raise ValueError(
                "balanced routers learn, and with --lora-rank only the adapters do: leave one out"
            )
        return self
