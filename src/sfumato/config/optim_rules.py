"""Rules between the options of the optimizer and of the learning rate, as data."""

from __future__ import annotations

from collections.abc import Iterator

from sfumato.config.rule import Rule
from sfumato.config.schema import Config

OPTIMIZER = ("optimizer_type", "optimizer_args", "use_8bit_adam", "use_lion_optimizer")
SCHEDULE = ("lr_scheduler", "lr_scheduler_type", "lr_scheduler_args")
RATES = (
    "learning_rate", "unet_lr", "text_encoder_lr", "learning_rate_te", "learning_rate_te1", "learning_rate_te2",
    "block_lr",
)  # fmt: skip
WAVES = ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay")
READERS = {  # option -> the schedules that read it
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_num_cycles": WAVES,
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
}


def has_schedule(config: Config) -> bool:
    """Whether a schedule moves the learning rate, and not the optimizer itself."""
    return not config.optim.schedule_free and not config.optim.relative_step


def named_schedule(config: Config) -> str:
    """The schedule of --lr_scheduler; empty where something else moves the rate."""
    return config.optim.lr_scheduler if has_schedule(config) and not config.optim.lr_scheduler_type else ""


def rates_in_use(config: Config) -> Iterator[float]:
    """The rates that are given to the parts that train."""
    optim, network = config.optim, config.network
    if config.run.method == "full":
        yield from optim.block_lr or (optim.learning_rate if optim.unet_lr is None else optim.unet_lr,)
        own = (optim.learning_rate_te, optim.learning_rate_te1, optim.learning_rate_te2)
        given = [*(optim.text_encoder_lr or ()), *(rate for rate in own if rate is not None)]
        yield from (given or [optim.learning_rate]) if config.full.trains_text else ()
        return
    if not network.network_train_text_encoder_only:
        yield optim.learning_rate if optim.unet_lr is None else optim.unet_lr
    if not network.network_train_unet_only:
        yield from optim.text_encoder_lr or (optim.learning_rate,)


def with_plain_adafactor(config: Config) -> bool:
    return config.optim.adafactor and not config.optim.relative_step


CONFLICTS = (
    Rule(
        name="two-optimizers",
        kind="conflict",
        options=("use_8bit_adam", "use_lion_optimizer"),
        broken=lambda c: c.optim.use_8bit_adam and c.optim.use_lion_optimizer,
        what="--use_8bit_adam and --use_lion_optimizer name two optimizers",
        fix="give --optimizer_type AdamW8bit or --optimizer_type Lion",
    ),
    Rule(
        name="optimizer-twice",
        kind="conflict",
        options=("use_8bit_adam", "use_lion_optimizer", "optimizer_type"),
        broken=lambda c: (c.optim.use_8bit_adam or c.optim.use_lion_optimizer) and c.optim.optimizer_type != "",
        what="--optimizer_type and an old switch (--use_8bit_adam, --use_lion_optimizer) both name the optimizer",
        fix="keep --optimizer_type",
    ),
    Rule(
        name="constant-warmup",
        kind="conflict",
        options=(*SCHEDULE, *OPTIMIZER, "lr_warmup_steps"),
        broken=lambda c: named_schedule(c) == "constant" and c.optim.lr_warmup_steps != 0,
        what="--lr_warmup_steps does not go with --lr_scheduler constant",
        fix="write --lr_scheduler constant_with_warmup",
    ),
    Rule(
        name="piecewise-warmup",
        kind="conflict",
        options=(*SCHEDULE, *OPTIMIZER, "lr_warmup_steps"),
        broken=lambda c: named_schedule(c) == "piecewise_constant" and c.optim.lr_warmup_steps != 0,
        what="--lr_warmup_steps does not go with --lr_scheduler piecewise_constant",
        fix="begin its step_rules with a small factor",
    ),
    Rule(
        name="own-schedule-warmup",
        kind="conflict",
        options=("lr_scheduler_type", *OPTIMIZER, "lr_warmup_steps"),
        broken=lambda c: c.optim.lr_scheduler_type != "" and has_schedule(c) and c.optim.lr_warmup_steps != 0,
        what="--lr_warmup_steps does not go with --lr_scheduler_type",
        fix="give that class its own warm-up by --lr_scheduler_args",
    ),
    Rule(
        name="relative-warmup",
        kind="conflict",
        options=(*OPTIMIZER, "lr_warmup_steps"),
        broken=lambda c: c.optim.relative_step and c.optim.lr_warmup_steps != 0,
        what="--lr_warmup_steps does not go with AdaFactor's relative_step, which sets the learning rate",
        fix="give --optimizer_args warmup_init=True, or relative_step=False",
    ),
    Rule(
        name="zero-start",
        kind="conflict",
        options=(*OPTIMIZER, "lr_warmup_steps"),
        broken=lambda c: c.optim.optimizer.lower() == "dadaptsgd" and c.optim.lr_warmup_steps != 0,
        what="--lr_warmup_steps does not go with DAdaptSGD, which divides by its first learning rate",
        fix="leave it out",
    ),
    Rule(
        name="adafactor-schedule",
        kind="conflict",
        options=(*SCHEDULE, *OPTIMIZER),
        broken=lambda c: named_schedule(c) == "adafactor",
        what="--lr_scheduler adafactor is AdaFactor's relative_step, which is not in use",
        fix="give --optimizer_type AdaFactor without relative_step=False, or another schedule",
    ),
    Rule(
        name="lowest-rate",
        kind="conflict",
        options=(*SCHEDULE, *OPTIMIZER, "lr_scheduler_min_lr_ratio"),
        broken=lambda c: named_schedule(c) == "cosine_with_min_lr" and c.optim.lr_scheduler_min_lr_ratio is None,
        what="--lr_scheduler cosine_with_min_lr has no lowest rate",
        fix="give --lr_scheduler_min_lr_ratio, as 0.1",
    ),
)

NO_EFFECT = (
    Rule(
        name="schedule-twice",
        kind="no effect",
        options=SCHEDULE,
        broken=lambda c: c.optim.lr_scheduler_type != "" and c.optim.lr_scheduler != "constant",
        what="--lr_scheduler has no effect: --lr_scheduler_type names the schedule",
        fix="leave it out",
    ),
    Rule(
        name="schedule-free",
        kind="no effect",
        options=(*SCHEDULE, *OPTIMIZER, "lr_warmup_steps"),
        broken=lambda c: c.optim.schedule_free and c.changed(*SCHEDULE, *READERS, "lr_warmup_steps"),
        what="--lr_scheduler and what belongs to it have no effect: a schedule-free optimizer has no schedule",
        fix="leave them out; a warm-up is --optimizer_args warmup_steps=N",
    ),
    Rule(
        name="relative-schedule",
        kind="no effect",
        options=(*SCHEDULE, *OPTIMIZER),
        broken=lambda c: (
            c.optim.relative_step
            and (c.optim.lr_scheduler not in ("constant", "adafactor") or c.changed(*SCHEDULE[1:], *READERS))
        ),
        what="--lr_scheduler and what belongs to it have no effect: AdaFactor's relative_step sets the learning rate",
        fix="leave them out, or give --optimizer_args relative_step=False",
    ),
    Rule(
        name="relative-rate",
        kind="no effect",
        options=(*RATES, *OPTIMIZER),
        broken=lambda c: c.optim.relative_step and any(c.value(name) for name in RATES if c.changed(name)),
        what="--learning_rate and the rates of parts have no effect: AdaFactor's relative_step sets the rate",
        fix="leave them out, or give --optimizer_args relative_step=False",
    ),
    Rule(
        name="relative-forced",
        kind="no effect",
        options=OPTIMIZER,
        broken=lambda c: c.optim.relative_step and not c.optim.optimizer_args.get("relative_step", True),
        what="--optimizer_args relative_step=False has no effect: AdaFactor's warmup_init needs relative_step",
        fix="leave one of them out",
    ),
    Rule(
        name="one-rate",
        kind="no effect",
        options=(*RATES, *OPTIMIZER),
        broken=lambda c: (
            c.optim.finds_rate and "." not in c.optim.optimizer and len({rate for rate in rates_in_use(c) if rate}) > 1
        ),
        what="only the first of the learning rates has an effect: D-Adaptation and Prodigy know one for all parts",
        fix="give one --learning_rate",
    ),
    *(
        Rule(
            name=f"unread-{option}",
            kind="no effect",
            options=(option, *SCHEDULE, *OPTIMIZER),
            broken=lambda c, option=option, readers=readers: (
                c.changed(option) and has_schedule(c) and named_schedule(c) not in readers
            ),
            what=f"--{option} has no effect: only {' and '.join(readers)} "
            + ("reads it" if len(readers) == 1 else "read it"),
            fix="leave it out",
        )
        for option, readers in READERS.items()
    ),
)

NOTES = (
    Rule(
        name="low-rate",
        kind="note",
        options=(*RATES, *OPTIMIZER),
        broken=lambda c: c.optim.finds_rate and any(0 < rate <= 0.1 for rate in rates_in_use(c)),
        what="a learning rate of 0.1 or less is very low: D-Adaptation and Prodigy multiply it with the one they find",
        fix="usual is --learning_rate 1.0",
    ),
    Rule(
        name="no-fall",
        kind="note",
        options=(*SCHEDULE, *OPTIMIZER, "lr_decay_steps"),
        broken=lambda c: named_schedule(c) == "warmup_stable_decay" and c.optim.lr_decay_steps == 0,
        what="--lr_scheduler warmup_stable_decay never falls without --lr_decay_steps",
        fix="give it, as 20%",
    ),
    Rule(
        name="adafactor-norm",
        kind="note",
        options=("max_grad_norm", *OPTIMIZER),
        broken=lambda c: with_plain_adafactor(c) and c.optim.max_grad_norm != 0,
        what="gradients are scaled down to --max_grad_norm, and AdaFactor limits its steps by itself",
        fix="usual is --max_grad_norm 0",
    ),
    Rule(
        name="adafactor-warmup",
        kind="note",
        options=(*SCHEDULE, *OPTIMIZER),
        broken=lambda c: with_plain_adafactor(c) and named_schedule(c) != "constant_with_warmup",
        what="AdaFactor without relative_step is known to do well with a warm-up",
        fix="usual is --lr_scheduler constant_with_warmup",
    ),
    Rule(
        name="adafactor-threshold",
        kind="note",
        options=OPTIMIZER,
        broken=lambda c: with_plain_adafactor(c) and c.optim.optimizer_args.get("clip_threshold", 1.0) != 1.0,
        what="AdaFactor without relative_step is known to do well with clip_threshold=1.0",
        fix="leave clip_threshold out",
    ),
)

OPTIM_RULES = CONFLICTS + NO_EFFECT + NOTES
