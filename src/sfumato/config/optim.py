"""Options of the optimizer and the learning rate."""

from __future__ import annotations

from typing import Literal

from sfumato.config.base import Options, option
from sfumato.config.values import Arguments, RateList, Rates, Steps


class OptimOptions(Options):
    """Optimizer and learning rate"""

    optimizer_type: str = option("", "optimizer by name, or a class by its dotted name; without it AdamW")
    optimizer_args: Arguments = option({}, "its arguments, as weight_decay=0.01 betas=0.9,0.999")
    use_8bit_adam: bool = option(False, "old way to write --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "old way to write --optimizer_type Lion")
    learning_rate: float = option(2e-6, "learning rate of all parts without one of their own", ge=0)
    unet_lr: float | None = option(None, "learning rate of the denoiser; 0 leaves it as it is", ge=0)
    text_encoder_lr: Rates | None = option(
        None, "learning rates of the text encoders, in their order; one value serves all, 0 leaves one as it is"
    )
    learning_rate_te: float | None = option(
        None, "learning rate of every text encoder of a whole model, without it --learning_rate; 0 leaves it as it is",
        ge=0,
    )  # fmt: skip
    learning_rate_te1: float | None = option(None, "learning rate of a whole model's first text encoder", ge=0)
    learning_rate_te2: float | None = option(None, "learning rate of a whole model's second text encoder", ge=0)
    block_lr: RateList | None = option(
        None, "learning rates of a whole denoiser's blocks, one for each; 0 leaves a block as it is"
    )
    max_grad_norm: float = option(1.0, "gradients with a larger norm are scaled down to it; 0 for never", ge=0)
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
    ] = option("constant", "course of the learning rate")
    lr_warmup_steps: Steps = option(0, "steps, or share of all steps, over which the learning rate rises")
    lr_decay_steps: Steps = option(0, "steps, or share of all, over which warmup_stable_decay falls at the end")
    lr_scheduler_num_cycles: int = option(1, "restarts of a cosine, or its half waves with a lowest rate", ge=1)
    lr_scheduler_power: float = option(1.0, "exponent of the polynomial schedule", ge=0)
    lr_scheduler_timescale: int | None = option(None, "time scale of inverse_sqrt; without it the warm-up", ge=1)
    lr_scheduler_min_lr_ratio: float | None = option(None, "lowest learning rate as a share of the highest", ge=0, le=1)
    lr_scheduler_type: str = option("", "a schedule class of torch by name, or another by its dotted name")
    lr_scheduler_args: Arguments = option({}, "arguments of that class, or of a schedule that takes some")
    fused_backward_pass: bool = option(
        False, "step each parameter as soon as its gradient is there", planned="the fused backward pass"
    )

    fused_optimizer_groups: int | None = option(
        None, "optimizers that share the parameters, each stepping by itself", planned="the fused backward pass", ge=1
    )
    blockwise_fused_optimizers: bool = option(
        False, "an optimizer for each block, stepping by itself", planned="the fused backward pass"
    )

    @property
    def optimizer(self) -> str:
        """The optimizer's name, however it was given."""
        switches = {"AdamW8bit": self.use_8bit_adam, "Lion": self.use_lion_optimizer}
        return next((name for name, given in switches.items() if given), self.optimizer_type or "AdamW")

    @property
    def schedule_free(self) -> bool:
        """Whether the optimizer needs no schedule, and keeps an average of the weights that must be put in place."""
        return self.optimizer.lower().endswith("schedulefree")

    @property
    def finds_rate(self) -> bool:
        """Whether the optimizer finds its learning rate and only multiplies it by the given one."""
        return self.optimizer.lower().startswith(("dadapt", "prodigy"))

    @property
    def adafactor(self) -> bool:
        return self.optimizer.lower() == "adafactor"

    @property
    def relative_step(self) -> bool:
        """Whether AdaFactor sets its own learning rate, as it does unless it is told otherwise."""
        arguments = self.optimizer_args
        return self.adafactor and bool(arguments.get("relative_step", True) or arguments.get("warmup_init", False))
