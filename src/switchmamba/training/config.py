"""What a training run is: the tables ``model``, ``data`` and ``training`` of a file, and their resolution.

A resolved configuration names vocabulary, device, precision and micro-batch; it is what ``config.json`` of a run and of
its checkpoints holds. A layer's own "auto" (Mamba's ``dt_rank``), a function of ``d_model``, stays.
"""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from switchmamba.config import Config, Tables, validate
from switchmamba.data.config import DataConfig
from switchmamba.errors import ConfigError
from switchmamba.layers.feed_forward.moe import mixtures
from switchmamba.models.config import ModelConfig
from switchmamba.models.lora import LoraSettings

CHANGEABLE_ON_RESUME = frozenset(
    f"training.{name}"
    for name in (
        "asynchronous_checkpoints",
        "checkpoint_every",
        "cuda_graph",
        "device",
        "freeze",
        "keep_checkpoints",
        "log_every",
        "save_optimizer",
        "steps",
        "tensorboard",
        "validate_every",
        "validation_batches",
    )
)
"""Fields that a resumed run may set anew: the past stays as it was (``steps`` bends the cosine to come)."""


class TrainingConfig(Config):
    """How to train. The defaults are the modern ones; the paper's values stand in its presets.

    Attributes:
        steps: optimizer steps of the whole run; the cosine ends there.
        batch_size: sequences per optimizer step, over all micro-batches.
        micro_batch_size: sequences per forward pass; None: the whole batch. Expert capacity and the balancing
            loss are those of a micro-batch; everything else equals one big batch.
        learning_rate: the peak. ``min_learning_rate_ratio``: what remains of it at the last step.
        warmup_steps: linear warm-up; a run shorter than this ends in it.
        betas, eps, weight_decay: AdamW's.
        weight_decay_scope: "matrices" spares biases, norms, embeddings, A_log, D and dt; "all" decays every
            parameter, as the paper's code does.
        gradient_clip: largest norm of the whole gradient; None: no clipping.
        load_balance_coef, load_balance_entropy_coef, load_balance_l2_coef, router_z_coef: weights of the routers'
            auxiliary losses (``losses.py``), averaged over routers.
        load_balance_target: largest load over the mean load that a controller (``balance.py``) steers to, by a factor
            on the three balance losses; None: their weights stay as they are. ``load_balance_gain``: how fast.
        router_bias_rate: step of the bias of routers that balance by one (``kind = "bias_balanced"``).
        router_policy_coef: weight of the loss of routers that learn by policy gradient.
        capacity_schedule: capacity factor of the first and the last step, linear between them, for every layer that
            has a ``capacity_factor``; None: the layer's own throughout.
        router_learning_rate_ratio, expert_learning_rate_ratio: the learning rate of routers, and of the experts behind
            them (not shared ones), over that of all else.
        freeze: what no step changes: "router", "experts" (those behind the router, not shared ones) or both.
        lora: train an adapter (``models/lora.py``) and nothing else, on the weights of ``initial_checkpoint``; None:
            train the weights themselves.
        initial_checkpoint: a run or checkpoint of the same model and tokenizer, whose weights the run starts from; all
            else starts anew. A run that is resumed reads its own. None: random weights.
        seed: of the initialisation and of the order of the samples.
        device: "auto" takes CUDA where there is one.
        precision: "bf16" runs matrix products in bfloat16 by autocast, parameters stay fp32; "auto" does so
            on CUDA. CPUs without bfloat16 units lose by it.
        activation_recompute: keep only each block's input, and run its forward pass again in the backward.
        compile: torch.compile, block by block. Off, because on a CPU it takes minutes and a compiler, while
            the time is in the scan and the experts, which have kernels of their own.
        cuda_graph: on a GPU capture a step once and replay it, which takes the host out of the way; not with
            activation_recompute or compile. A model whose step cannot be captured runs launch by launch.
        loss_ema_alpha: weight of the newest step in ``loss_ema``, the smoothed log perplexity.
        validate_every: steps between validations, and one at the end; 0: never.
        validation_batches: batches of ``batch_size`` sequences per validation, the same every time.
        checkpoint_every: steps between checkpoints, and one at the end; 0: only at the end.
        keep_checkpoints: the newest ones that stay.
        save_optimizer: whether the last checkpoint has the optimizer's state, twice the size of the weights; without it
            training cannot go on beyond the last step.
        asynchronous_checkpoints: write from a copy in a thread while training goes on.
        log_every: steps between lines of progress where there is no terminal.
        tensorboard: also write TensorBoard events (needs the extra ``tensorboard``).
    """

    steps: int = Field(default=1000, ge=1, le=10**9)
    batch_size: int = Field(default=8, ge=1, le=10**6)
    micro_batch_size: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0, le=10, allow_inf_nan=False)
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1, allow_inf_nan=False)
    warmup_steps: int = Field(default=0, ge=0, le=10**9)
    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    eps: float = Field(default=1e-8, gt=0, le=1, allow_inf_nan=False)
    weight_decay: float = Field(default=0.1, ge=0, le=10, allow_inf_nan=False)
    weight_decay_scope: Literal["matrices", "all"] = "matrices"
    gradient_clip: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    load_balance_coef: float = Field(default=0.01, ge=0, le=100, allow_inf_nan=False)
    load_balance_entropy_coef: float = Field(default=0.0, ge=0, le=100, allow_inf_nan=False)
    load_balance_l2_coef: float = Field(default=0.0, ge=0, le=100, allow_inf_nan=False)
    load_balance_target: float | None = Field(default=None, gt=1, le=10**6, allow_inf_nan=False)
    load_balance_gain: float = Field(default=0.05, gt=0, le=1, allow_inf_nan=False)
    router_z_coef: float = Field(default=0.0, ge=0, le=100, allow_inf_nan=False)
    router_bias_rate: float = Field(default=1e-3, ge=0, le=1, allow_inf_nan=False)
    router_policy_coef: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False)
    capacity_schedule: tuple[float, float] | None = Field(default=None, strict=False)
    router_learning_rate_ratio: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)
    expert_learning_rate_ratio: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)
    freeze: list[Literal["router", "experts"]] = Field(default=[])
    lora: LoraSettings | None = None
    initial_checkpoint: str | None = Field(default=None, min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    activation_recompute: bool = False
    compile: bool = False
    cuda_graph: bool = True
    loss_ema_alpha: float = Field(default=0.01, gt=0, le=1, allow_inf_nan=False)
    validate_every: int = Field(default=100, ge=0)
    validation_batches: int = Field(default=8, ge=1)
    checkpoint_every: int = Field(default=500, ge=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    save_optimizer: bool = True
    asynchronous_checkpoints: bool = False
    log_every: int = Field(default=10, ge=1)
    tensorboard: bool = False

    @field_validator("betas", mode="before")
    @classmethod
    def _two_numbers(cls, betas: Any) -> Any:
        if not (
            isinstance(betas, (list, tuple))
            and len(betas) == 2
            and all(type(b) in (int, float) for b in betas)
        ):
            raise ValueError("must be a list of two numbers, such as [0.9, 0.95]")
        return betas

    @field_validator("capacity_schedule", mode="before")
    @classmethod
    def _two_factors(cls, schedule: Any) -> Any:
        if schedule is not None and not (
            isinstance(schedule, (list, tuple))
            and len(schedule) == 2
            and all(type(factor) in (int, float) and 0 < factor < float("inf") for factor in schedule)
        ):
            raise ValueError(
                "must be a list of two positive numbers, the first step's and the last's: [2.0, 1.0]"
            )
        return schedule

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size} exceeds batch_size = {self.batch_size}; "
                "lower it or leave it out"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)}: each must be at least 0 and less than 1")
        weights = (self.load_balance_coef, self.load_balance_entropy_coef, self.load_balance_l2_coef)
        if self.load_balance_target is not None and not any(weights):
            raise ValueError(
                f"load_balance_target = {self.load_balance_target} has no loss to steer with; set load_balance_coef, "
                "load_balance_entropy_coef or load_balance_l2_coef above 0"
            )
        if self.capacity_schedule is not None and self.compile:
            raise ValueError(
                "capacity_schedule changes the model with every step, which compile would compile anew; leave one out"
            )
        if len(set(self.freeze)) < len(self.freeze):
            raise ValueError(f"freeze = {self.freeze}: name each once")
        for part in self.freeze:
            if part in self.learning_rate_ratios:
                raise ValueError(
                    f"{part.removesuffix('s')}_learning_rate_ratio = {self.learning_rate_ratios[part]} has no effect "
                    f"on what freeze = {self.freeze} keeps as it is; leave one out"
                )
        if self.lora is not None:
            self._lora_fits()
        return self

    @property
    def learning_rate_ratios(self) -> dict[str, float]:
        """Parts of a mixture, "router" and "experts", whose learning rate is not that of all else, and its ratio."""
        ratios = {"router": self.router_learning_rate_ratio, "experts": self.expert_learning_rate_ratio}
        return {part: ratio for part, ratio in ratios.items() if ratio != 1}

    def _lora_fits(self) -> None:
        if self.initial_checkpoint is None:
            raise ValueError(
                "lora has nothing to adapt; name trained weights with initial_checkpoint (--from)"
            )
        if self.freeze:
            raise ValueError(
                f"freeze = {self.freeze}: with lora only the adapter learns; leave it out, or choose lora.targets"
            )
        if self.learning_rate_ratios:
            raise ValueError(
                "router_learning_rate_ratio and expert_learning_rate_ratio are of the model's own weights, which do "
                "not learn with lora; leave them out"
            )
        if self.compile:
            raise ValueError("lora changes modules as they run, which compile cannot follow; leave one out")


class RunConfig(Config):
    """A configuration file: the model, how its data is cut, how it is trained."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _training_finds_what_it_names(self) -> Self:
        found = list(mixtures(self.model))
        if self.training.freeze and not found:
            raise ValueError(
                f"training.freeze = {self.training.freeze}: no layer of the model has a router; leave it out"
            )
        for part, ratio in self.training.learning_rate_ratios.items():
            if not found:
                raise ValueError(
                    f"training.{part.removesuffix('s')}_learning_rate_ratio = {ratio}: no layer of the model has a "
                    "router; leave it out"
                )
        if self.training.capacity_schedule and not any(moe.capacity_factor is not None for moe in found):
            raise ValueError(
                f"training.capacity_schedule = {list(self.training.capacity_schedule)}: no layer has a capacity; set "
                "model.layers.NAME.capacity_factor, which it then replaces in training"
            )
        return self


def resolve(config: RunConfig, vocab_size: int, device: Literal["cpu", "cuda"]) -> RunConfig:
    """Return ``config`` with this vocabulary, and with a value wherever ``training`` leaves one open."""
    training = config.training
    precision = training.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    chosen = {
        "device": device,
        "precision": precision,
        "micro_batch_size": training.micro_batch_size or training.batch_size,
    }
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"vocab_size": vocab_size}),
            "training": training.model_copy(update=chosen),
        }
    )


def differences(old: Tables, new: Tables) -> list[str]:
    """Name the fields, with both values, in which two dumped configurations differ and may not on resume.

    A field that ``old`` lacks because it is younger had its default.
    """
    before, after = _flatten(_with_defaults(old)), _flatten(new)
    names = sorted(name for name in before.keys() | after.keys() if name not in CHANGEABLE_ON_RESUME)
    return [
        f"{name} (was {before.get(name)!r}, is {after.get(name)!r})"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _with_defaults(dumped: Tables) -> Tables:
    try:
        return validate(RunConfig, dumped, source="").model_dump(mode="json")
    except ConfigError:
        return dumped  # it has a field or a value that is no more, which the comparison names


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= _flatten(item, f"{name}.{key}" if name else key)
    return leaves
