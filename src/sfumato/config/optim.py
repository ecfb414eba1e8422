"""Options of the optimizer, the learning rate and EMA."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from sfumato.config.base import Metavar, Options, option
from sfumato.config.values import Arguments, LearningRateList, LearningRates, Steps, to_tuple


class OptimOptions(Options):
    """Optimizer and learning rate"""

    optimizer_type: str = option("", "optimizer, by name or by the dotted name of a class; default: AdamW")
    optimizer_args: Arguments = option({}, "arguments of the optimizer, e.g. weight_decay=0.01 betas=0.9,0.999")
    use_8bit_adam: bool = option(False, "same as --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "same as --optimizer_type Lion")
    learning_rate: float = option(2e-6, "learning rate of all parts that have none of their own", ge=0)
    unet_lr: float | None = option(None, "learning rate of the denoiser; 0 freezes it", ge=0)
    text_encoder_lr: LearningRates | None = option(
        None, "learning rates of the text encoders, in their order; a single one is for all, 0 freezes an encoder"
    )
    learning_rate_te: float | None = option(
        None, "learning rate of all text encoders (full training); default: --learning_rate; 0 freezes them",
        ge=0,
    )  # fmt: skip
    learning_rate_te1: float | None = option(None, "learning rate of the first text encoder (full training)", ge=0)
    learning_rate_te2: float | None = option(None, "learning rate of the second text encoder (full training)", ge=0)
    learning_rate_te3: float | None = option(None, "learning rate of the third text encoder (full training)", ge=0)
    control_net_lr: float | None = option(
        None, "learning rate of the ControlNet, before --learning_rate where a script sets it", ge=0
    )
    block_lr: LearningRateList | None = option(
        None, "learning rates of the denoiser's blocks (full training), one for each; 0 freezes a block"
    )
    max_grad_norm: float = option(1.0, "maximum gradient norm, for gradient clipping; 0 for no clipping", ge=0)
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
        "piecewise_constant",
        "adafactor",
    ] = option("constant", "learning-rate schedule")
    lr_warmup_steps: Steps = option(0, "warmup steps, or their share of all steps")
    lr_decay_steps: Steps = option(0, "decay steps at the end of warmup_stable_decay, or their share of all steps")
    lr_scheduler_num_cycles: int = option(
        1, "restarts of cosine_with_restarts; half-cosine waves of the schedules with a minimum", ge=1
    )
    lr_scheduler_power: float = option(1.0, "power of the polynomial schedule", ge=0)
    lr_scheduler_timescale: int | None = option(None, "timescale of inverse_sqrt; default: --lr_warmup_steps", ge=1)
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "minimum learning rate as a ratio of the maximum", ge=0, le=1
    )
    lr_scheduler_type: str = option("", "schedule class: a name in torch.optim.lr_scheduler, or a dotted name")
    lr_scheduler_args: Arguments = option({}, "arguments of that class, or of a schedule that has some")
    fused_backward_pass: bool = option(
        False, "step each parameter within backward once its gradient is there, which is freed at once"
    )
    fused_optimizer_groups: int | None = option(
        None, "the same for parameters in this number of groups, each of which steps together", ge=1
    )
    blockwise_fused_optimizers: bool = option(False, "the same for each block of a network that trains whole")

    @property
    def fuses_backward(self) -> bool:
        """Whether the optimizer steps while backward runs."""
        return self.fused_backward_pass or self.fused_optimizer_groups is not None or self.blockwise_fused_optimizers

    @property
    def optimizer(self) -> str:
        """The optimizer's name, from whichever option gives it."""
        switches = {"AdamW8bit": self.use_8bit_adam, "Lion": self.use_lion_optimizer}
        return next((name for name, given in switches.items() if given), self.optimizer_type or "AdamW")

    @property
    def schedule_free(self) -> bool:
        """Whether the optimizer needs no schedule and keeps an average of the weights, used for saving and sampling."""
        return self.optimizer.lower().endswith("schedulefree")

    @property
    def estimates_lr(self) -> bool:
        """Whether the optimizer estimates its learning rate and only multiplies it by the given one."""
        return self.optimizer.lower().startswith(("dadapt", "prodigy"))

    @property
    def is_adafactor(self) -> bool:
        return self.optimizer.lower() == "adafactor"

    @property
    def relative_step(self) -> bool:
        """Whether AdaFactor sets its own learning rate, which is its default."""
        arguments = self.optimizer_args
        return self.is_adafactor and bool(arguments.get("relative_step", True) or arguments.get("warmup_init", False))


MAX_SIGMA_REL = 0.28  # a power-function EMA of relative width 0.289 is a plain average, and none is wider


def check_distinct(widths: tuple[float, ...]) -> tuple[float, ...]:
    """The widths, which must differ in six digits: they name files."""
    if len({f"{width:g}" for width in widths}) < len(widths):
        raise ValueError("has the same width twice")
    return widths


RelativeWidths = Annotated[
    tuple[Annotated[float, Field(gt=0, le=MAX_SIGMA_REL)], ...],
    BeforeValidator(to_tuple),
    AfterValidator(check_distinct),
    Metavar("X ..."),
]


class EmaOptions(Options):
    """EMA of the weights"""

    ema_decay: float | None = option(
        None, "also save an exponential moving average of the weights with this decay, e.g. 0.999", gt=0, lt=1
    )
    ema_sigma_rel: RelativeWidths = option(
        (), "also save power-function EMAs (EDM2) of these relative widths, e.g. 0.05 0.1"
    )
    ema_on_cpu: bool = option(False, "keep the EMA weights in CPU memory: slower, but uses no device memory")
    evaluate_with_ema: bool = option(False, "use the first EMA for samples and validation")

    @property
    def ema_count(self) -> int:
        """Number of EMAs of the weights."""
        return (self.ema_decay is not None) + len(self.ema_sigma_rel)
