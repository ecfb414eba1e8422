"""Options of the optimizer and the learning rate."""

from __future__ import annotations

from typing import Literal

from sfumato.config.base import Options, option
from sfumato.config.values import Arguments, Rates, Steps


class OptimOptions(Options):
    """Optimizer and learning rate"""

    optimizer_type: str = option("", "optimizer by name; without it AdamW")
    optimizer_args: Arguments = option({}, "its arguments, as weight_decay=0.01 betas=0.9,0.999")
    use_8bit_adam: bool = option(False, "old way to write --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "old way to write --optimizer_type Lion")
    learning_rate: float = option(2e-6, "learning rate of all parts without one of their own", ge=0)
    unet_lr: float | None = option(None, "learning rate of the denoiser; 0 leaves it as it is", ge=0)
    text_encoder_lr: Rates | None = option(
        None, "learning rates of the text encoders, in their order; one value serves all, 0 leaves one as it is"
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
    ] = option(
        "constant",
        "course of the learning rate",
        planned_values={
            "cosine_with_restarts": "the other schedules",
            "polynomial": "the other schedules",
            "inverse_sqrt": "the other schedules",
            "cosine_with_min_lr": "the other schedules",
            "warmup_stable_decay": "the other schedules",
            "piecewise_constant": "the other schedules",
            "adafactor": "the other schedules",
        },
    )
    lr_warmup_steps: Steps = option(0, "steps, or share of all steps, over which the learning rate rises")
    lr_decay_steps: Steps = option(
        0, "steps, or share of all steps, over which it falls at the end", planned="the other schedules"
    )
    lr_scheduler_num_cycles: int = option(1, "cycles of a cosine schedule", planned="the other schedules", ge=1)
    lr_scheduler_power: float = option(1.0, "exponent of the polynomial schedule", planned="the other schedules")
    lr_scheduler_timescale: int | None = option(
        None, "time scale of inverse_sqrt; without it the warm-up", planned="the other schedules", ge=1
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "lowest learning rate as a share of the highest", planned="the other schedules", ge=0, le=1
    )
    lr_scheduler_type: str = option("", "a schedule class by its dotted name", planned="the other schedules")
    lr_scheduler_args: Arguments = option({}, "arguments of that class", planned="the other schedules")
    fused_backward_pass: bool = option(
        False, "step each parameter as soon as its gradient is there", planned="the memory options"
    )
