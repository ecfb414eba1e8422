"""Rules between the options of the optimizer, the learning rate, EMA and precision."""

from __future__ import annotations

from collections.abc import Iterator

from sfumato.config.option_rule import OptionRule
from sfumato.config.schema import Config

OPTIMIZER_OPTIONS = ("optimizer_type", "optimizer_args", "use_8bit_adam", "use_lion_optimizer")
SCHEDULE_OPTIONS = ("lr_scheduler", "lr_scheduler_type", "lr_scheduler_args")
LEARNING_RATES = (
    "learning_rate",
    "unet_lr",
    "text_encoder_lr",
    "learning_rate_te",
    "learning_rate_te1",
    "learning_rate_te2",
    "learning_rate_te3",
    "block_lr",
)
WAVE_SCHEDULES = ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay")
SCHEDULES_OF_OPTION = {  # option -> the schedules that read it
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_num_cycles": WAVE_SCHEDULES,
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
}
COMPILE_OPTIONS = (
    *("compile_backend", "compile_mode", "compile_dynamic", "compile_fullgraph"),
    "compile_cache_size_limit",
)
FUSED_OPTIONS = ("fused_backward_pass", "fused_optimizer_groups", "blockwise_fused_optimizers")
EMA_OPTIONS = ("ema_decay", "ema_sigma_rel")
EVALUATION_OPTIONS = ("sample_prompts", "validation_split", "dataset_config")  # a dataset file can set a split, too


def has_schedule(config: Config) -> bool:
    """Whether a schedule sets the learning rate, and not the optimizer itself."""
    return not config.optim.schedule_free and not config.optim.relative_step


def schedule_name(config: Config) -> str:
    """The schedule of --lr_scheduler; empty where something else sets the learning rate."""
    return config.optim.lr_scheduler if has_schedule(config) and not config.optim.lr_scheduler_type else ""


def used_learning_rates(config: Config) -> Iterator[float]:
    """The learning rates of the parts that are trained."""
    optim, network = config.optim, config.network
    if config.embedding.token_string:
        yield optim.learning_rate if config.embedding.embedding_lr is None else config.embedding.embedding_lr
    if config.run.method == "textual_inversion":
        return
    if config.run.method == "full":
        yield from optim.block_lr or (optim.learning_rate if optim.unet_lr is None else optim.unet_lr,)
        if config.full.trains_text:
            own = (optim.learning_rate_te, optim.learning_rate_te1, optim.learning_rate_te2, optim.learning_rate_te3)
            given = [*(optim.text_encoder_lr or ()), *(lr for lr in own if lr is not None)]
            yield from given or [optim.learning_rate]
        return
    if config.run.method == "control_net":
        yield optim.learning_rate if optim.control_net_lr is None else optim.control_net_lr
        return
    if config.run.takes_control:
        yield optim.learning_rate
        return
    if not network.network_train_text_encoder_only:
        yield optim.learning_rate if optim.unet_lr is None else optim.unet_lr
    if not network.network_train_unet_only:
        yield from optim.text_encoder_lr or (optim.learning_rate,)


def trains_denoiser(config: Config) -> bool:
    """Whether full training trains the denoiser, and not the text encoders alone."""
    optim = config.optim
    lrs = optim.block_lr or (optim.learning_rate if optim.unet_lr is None else optim.unet_lr,)
    return config.run.method == "full" and any(lrs)


def uses_plain_adafactor(config: Config) -> bool:
    return config.optim.is_adafactor and not config.optim.relative_step


_CONFLICTS = (
    OptionRule(
        code="optimizer-switches-conflict",
        severity="conflict",
        options=("use_8bit_adam", "use_lion_optimizer"),
        is_broken=lambda c: c.optim.use_8bit_adam and c.optim.use_lion_optimizer,
        what="--use_8bit_adam and --use_lion_optimizer name two optimizers",
        fix="give --optimizer_type AdamW8bit or --optimizer_type Lion",
    ),
    OptionRule(
        code="optimizer-given-twice",
        severity="conflict",
        options=("use_8bit_adam", "use_lion_optimizer", "optimizer_type"),
        is_broken=lambda c: (c.optim.use_8bit_adam or c.optim.use_lion_optimizer) and c.optim.optimizer_type != "",
        what="--optimizer_type and an old switch (--use_8bit_adam, --use_lion_optimizer) both name the optimizer",
        fix="keep --optimizer_type",
    ),
    OptionRule(
        code="warmup-with-constant-schedule",
        severity="conflict",
        options=(*SCHEDULE_OPTIONS, *OPTIMIZER_OPTIONS, "lr_warmup_steps"),
        is_broken=lambda c: schedule_name(c) == "constant" and c.optim.lr_warmup_steps != 0,
        what="--lr_warmup_steps cannot be combined with --lr_scheduler constant",
        fix="give --lr_scheduler constant_with_warmup",
    ),
    OptionRule(
        code="warmup-with-piecewise-schedule",
        severity="conflict",
        options=(*SCHEDULE_OPTIONS, *OPTIMIZER_OPTIONS, "lr_warmup_steps"),
        is_broken=lambda c: schedule_name(c) == "piecewise_constant" and c.optim.lr_warmup_steps != 0,
        what="--lr_warmup_steps cannot be combined with --lr_scheduler piecewise_constant",
        fix="start its step_rules with a small factor",
    ),
    OptionRule(
        code="warmup-with-scheduler-type",
        severity="conflict",
        options=("lr_scheduler_type", *OPTIMIZER_OPTIONS, "lr_warmup_steps"),
        is_broken=lambda c: c.optim.lr_scheduler_type != "" and has_schedule(c) and c.optim.lr_warmup_steps != 0,
        what="--lr_warmup_steps cannot be combined with --lr_scheduler_type",
        fix="set the warmup of that class with --lr_scheduler_args",
    ),
    OptionRule(
        code="warmup-with-relative-step",
        severity="conflict",
        options=(*OPTIMIZER_OPTIONS, "lr_warmup_steps"),
        is_broken=lambda c: c.optim.relative_step and c.optim.lr_warmup_steps != 0,
        what="--lr_warmup_steps cannot be combined with AdaFactor's relative_step, which sets the learning rate",
        fix="give --optimizer_args warmup_init=True, or relative_step=False",
    ),
    OptionRule(
        code="warmup-with-dadaptsgd",
        severity="conflict",
        options=(*OPTIMIZER_OPTIONS, "lr_warmup_steps"),
        is_broken=lambda c: c.optim.optimizer.lower() == "dadaptsgd" and c.optim.lr_warmup_steps != 0,
        what="--lr_warmup_steps cannot be combined with DAdaptSGD, which divides by its first learning rate",
        fix="remove it",
    ),
    OptionRule(
        code="adafactor-schedule-without-relative-step",
        severity="conflict",
        options=(*SCHEDULE_OPTIONS, *OPTIMIZER_OPTIONS),
        is_broken=lambda c: schedule_name(c) == "adafactor",
        what="--lr_scheduler adafactor is AdaFactor's relative_step, which is not enabled",
        fix="give --optimizer_type AdaFactor without relative_step=False, or another schedule",
    ),
    OptionRule(
        code="min-lr-ratio-missing",
        severity="conflict",
        options=(*SCHEDULE_OPTIONS, *OPTIMIZER_OPTIONS, "lr_scheduler_min_lr_ratio"),
        is_broken=lambda c: schedule_name(c) == "cosine_with_min_lr" and c.optim.lr_scheduler_min_lr_ratio is None,
        what="--lr_scheduler cosine_with_min_lr has no minimum learning rate",
        fix="e.g. --lr_scheduler_min_lr_ratio 0.1",
    ),
    OptionRule(
        code="ema-with-schedule-free",
        severity="conflict",
        options=(*EMA_OPTIONS, "optimizer_type"),
        is_broken=lambda c: c.optim.schedule_free and c.ema.ema_count > 0,
        what="--ema_decay and --ema_sigma_rel cannot be combined with a schedule-free optimizer, which saves its own "
        "average",
        fix="remove them",
    ),
    OptionRule(
        code="fused-backward-given-twice",
        severity="conflict",
        options=FUSED_OPTIONS,
        is_broken=lambda c: sum(bool(c.value(name)) for name in FUSED_OPTIONS) > 1,
        what="--fused_backward_pass, --fused_optimizer_groups and --blockwise_fused_optimizers exclude each other",
        fix="keep one of them",
    ),
    OptionRule(
        code="fused-backward-fp16",
        severity="conflict",
        options=(*FUSED_OPTIONS, "mixed_precision"),
        is_broken=lambda c: c.optim.fuses_backward and c.memory.mixed_precision == "fp16",
        what="--mixed_precision fp16 looks at all gradients before a step, and the fused backward pass steps with the "
        "first",
        fix="give --mixed_precision bf16",
    ),
    OptionRule(
        code="full-training-swap-without-fused-backward",
        severity="conflict",
        options=("blocks_to_swap", *FUSED_OPTIONS),
        is_broken=lambda c: c.memory.swapped_blocks > 0 and trains_denoiser(c) and not c.optim.fuses_backward,
        what="--blocks_to_swap in full training: weights that left the device with their block cannot take a step "
        "after backward",
        fix="add --fused_backward_pass",
    ),
    OptionRule(
        code="streaming-of-trained-blocks",
        severity="conflict",
        options=("stream_blocks", "method"),
        is_broken=lambda c: c.memory.stream_blocks and trains_denoiser(c),
        what="--stream_blocks reads frozen weights from the checkpoint again and again, but --method full trains them",
        fix="remove it",
    ),
    OptionRule(
        code="full-bf16-without-bf16-precision",
        severity="conflict",
        options=("full_bf16", "mixed_precision"),
        is_broken=lambda c: c.memory.full_bf16 and c.memory.mixed_precision != "bf16",
        what="--full_bf16 keeps weights in bfloat16, but the computation is not in bfloat16",
        fix="give --mixed_precision bf16",
    ),
)

_UNUSED = (
    OptionRule(
        code="fused-backward-accumulation",
        severity="note",
        options=(*FUSED_OPTIONS, "gradient_accumulation_steps"),
        is_broken=lambda c: c.optim.fuses_backward and c.loop.gradient_accumulation_steps > 1,
        what="with --gradient_accumulation_steps the fused backward pass keeps all gradients until a step's last batch "
        "and saves no memory of them",
        fix="a larger --train_batch_size needs none of it",
    ),
    OptionRule(
        code="scheduler-type-takes-precedence",
        severity="no effect",
        options=SCHEDULE_OPTIONS,
        is_broken=lambda c: c.optim.lr_scheduler_type != "" and c.optim.lr_scheduler != "constant",
        what="--lr_scheduler",
        reason="--lr_scheduler_type takes precedence",
        fix="remove it",
    ),
    OptionRule(
        code="schedule-with-schedule-free",
        severity="no effect",
        options=(*SCHEDULE_OPTIONS, *OPTIMIZER_OPTIONS, "lr_warmup_steps"),
        is_broken=lambda c: (
            c.optim.schedule_free and c.is_changed(*SCHEDULE_OPTIONS, *SCHEDULES_OF_OPTION, "lr_warmup_steps")
        ),
        what="--lr_scheduler and its options",
        reason="a schedule-free optimizer has no schedule",
        fix="remove them; warmup is --optimizer_args warmup_steps=N",
    ),
    OptionRule(
        code="schedule-with-relative-step",
        severity="no effect",
        options=(*SCHEDULE_OPTIONS, *OPTIMIZER_OPTIONS),
        is_broken=lambda c: (
            c.optim.relative_step
            and (
                c.optim.lr_scheduler not in ("constant", "adafactor")
                or c.is_changed(*SCHEDULE_OPTIONS[1:], *SCHEDULES_OF_OPTION)
            )
        ),
        what="--lr_scheduler and its options",
        reason="AdaFactor's relative_step sets the learning rate",
        fix="remove them, or give --optimizer_args relative_step=False",
    ),
    OptionRule(
        code="lr-with-relative-step",
        severity="no effect",
        options=(*LEARNING_RATES, *OPTIMIZER_OPTIONS),
        is_broken=lambda c: (
            c.optim.relative_step and any(c.value(name) for name in LEARNING_RATES if c.is_changed(name))
        ),
        what="--learning_rate and the learning rates of parts",
        reason="AdaFactor's relative_step sets the learning rate",
        fix="remove them, or give --optimizer_args relative_step=False",
    ),
    OptionRule(
        code="relative-step-forced",
        severity="no effect",
        options=OPTIMIZER_OPTIONS,
        is_broken=lambda c: c.optim.relative_step and not c.optim.optimizer_args.get("relative_step", True),
        what="--optimizer_args relative_step=False",
        reason="AdaFactor's warmup_init needs relative_step",
        fix="remove one of them",
    ),
    OptionRule(
        code="single-lr-optimizer",
        severity="no effect",
        options=(*LEARNING_RATES, *OPTIMIZER_OPTIONS),
        is_broken=lambda c: (
            c.optim.estimates_lr
            and "." not in c.optim.optimizer
            and len({lr for lr in used_learning_rates(c) if lr}) > 1
        ),
        what="all but the first of the learning rates",
        reason="D-Adaptation and Prodigy use a single one for all parts",
        fix="give one --learning_rate",
    ),
    *(
        OptionRule(
            code="schedule-option-unused",
            severity="no effect",
            options=(option, *SCHEDULE_OPTIONS, *OPTIMIZER_OPTIONS),
            is_broken=lambda c, option=option, schedules=schedules: (
                c.is_changed(option) and has_schedule(c) and schedule_name(c) not in schedules
            ),
            what=f"--{option}",
            reason=f"it is for --lr_scheduler {', '.join(schedules)}",
            fix="remove it",
        )
        for option, schedules in SCHEDULES_OF_OPTION.items()
    ),
    OptionRule(
        code="ema-disabled",
        severity="no effect",
        options=(*EMA_OPTIONS, "ema_on_cpu", "evaluate_with_ema"),
        is_broken=lambda c: not c.ema.ema_count and c.is_changed("ema_on_cpu", "evaluate_with_ema"),
        what="--ema_on_cpu and --evaluate_with_ema",
        reason="no EMA is kept",
        fix="give --ema_decay or --ema_sigma_rel",
    ),
    OptionRule(
        code="ema-not-evaluated",
        severity="no effect",
        options=("evaluate_with_ema", *EVALUATION_OPTIONS),
        is_broken=lambda c: c.ema.ema_count > 0 and c.ema.evaluate_with_ema and not c.is_changed(*EVALUATION_OPTIONS),
        what="--evaluate_with_ema",
        reason="there are no samples and no validation",
        fix="give --sample_prompts or --validation_split, or remove it",
    ),
    OptionRule(
        code="stochastic-rounding-unused",
        severity="no effect",
        options=("full_bf16", "full_fp16", "stochastic_rounding"),
        is_broken=lambda c: c.memory.trained_precision == "no" and not c.memory.stochastic_rounding,
        what="--no_stochastic_rounding",
        reason="trained weights are in float32",
        fix="remove it, or give --full_bf16",
    ),
    OptionRule(
        code="text-encoder-swap-without-cache",
        severity="no effect",
        options=("text_encoder_blocks_to_swap", "cache_text_encoder_outputs"),
        is_broken=lambda c: c.memory.text_encoder_blocks_to_swap is not None and not c.cache.cache_text_encoder_outputs,
        what="--text_encoder_blocks_to_swap",
        reason="text features are not cached",
        fix="give --cache_text_encoder_outputs, or remove it",
    ),
    OptionRule(
        code="streaming-without-swap",
        severity="no effect",
        options=("stream_blocks", "blocks_to_swap"),
        is_broken=lambda c: c.memory.stream_blocks and not c.memory.swapped_blocks,
        what="--stream_blocks",
        reason="every block is on the device",
        fix="give --blocks_to_swap, or remove it",
    ),
    OptionRule(
        code="older-swap-options-unused",
        severity="no effect",
        options=("blocks_to_swap", "double_blocks_to_swap", "single_blocks_to_swap", "split_mode"),
        is_broken=lambda c: (
            c.memory.blocks_to_swap is not None
            and c.is_changed("double_blocks_to_swap", "single_blocks_to_swap", "split_mode")
        ),
        what="--double_blocks_to_swap, --single_blocks_to_swap and --split_mode",
        reason="--blocks_to_swap takes precedence",
        fix="remove them",
    ),
    OptionRule(
        code="compile-options-without-compile",
        severity="no effect",
        options=("compile", *COMPILE_OPTIONS),
        is_broken=lambda c: not c.memory.compile and c.is_changed(*COMPILE_OPTIONS),
        what="--compile_backend and the other options of --compile",
        reason="nothing is compiled",
        fix="add --compile",
    ),
    OptionRule(
        code="compile-mode-unused",
        severity="no effect",
        options=("compile", "compile_backend", "compile_mode"),
        is_broken=lambda c: (
            c.memory.compile and c.memory.compile_backend != "inductor" and c.is_changed("compile_mode")
        ),
        what="--compile_mode",
        reason="only the backend inductor has modes",
        fix="remove it, or --compile_backend",
    ),
)

_NOTES = (
    OptionRule(
        code="low-lr-multiplier",
        severity="note",
        options=(*LEARNING_RATES, *OPTIMIZER_OPTIONS),
        is_broken=lambda c: c.optim.estimates_lr and any(0 < lr <= 0.1 for lr in used_learning_rates(c)),
        what="a learning rate of 0.1 or less is very low: D-Adaptation and Prodigy multiply it by the one they "
        "estimate",
        fix="--learning_rate 1.0 is recommended",
    ),
    OptionRule(
        code="decay-steps-missing",
        severity="note",
        options=(*SCHEDULE_OPTIONS, *OPTIMIZER_OPTIONS, "lr_decay_steps"),
        is_broken=lambda c: schedule_name(c) == "warmup_stable_decay" and c.optim.lr_decay_steps == 0,
        what="--lr_scheduler warmup_stable_decay never decays without --lr_decay_steps",
        fix="e.g. --lr_decay_steps 20%",
    ),
    OptionRule(
        code="adafactor-grad-norm",
        severity="note",
        options=("max_grad_norm", *OPTIMIZER_OPTIONS),
        is_broken=lambda c: uses_plain_adafactor(c) and c.optim.max_grad_norm != 0,
        what="gradients are clipped to --max_grad_norm, but AdaFactor limits its steps by itself",
        fix="--max_grad_norm 0 is recommended",
    ),
    OptionRule(
        code="adafactor-without-warmup",
        severity="note",
        options=(*SCHEDULE_OPTIONS, *OPTIMIZER_OPTIONS),
        is_broken=lambda c: uses_plain_adafactor(c) and schedule_name(c) != "constant_with_warmup",
        what="AdaFactor without relative_step is recommended with a warmup",
        fix="e.g. --lr_scheduler constant_with_warmup",
    ),
    OptionRule(
        code="adafactor-clip-threshold",
        severity="note",
        options=OPTIMIZER_OPTIONS,
        is_broken=lambda c: uses_plain_adafactor(c) and c.optim.optimizer_args.get("clip_threshold", 1.0) != 1.0,
        what="AdaFactor without relative_step is recommended with clip_threshold=1.0",
        fix="remove clip_threshold",
    ),
    OptionRule(
        code="full-bf16-stochastic-rounding",
        severity="note",
        options=("full_bf16", "stochastic_rounding"),
        is_broken=lambda c: c.memory.full_bf16 and c.memory.stochastic_rounding,
        what="weights and gradients are in bfloat16; each step is computed in float32, with stochastic rounding",
        fix="--no_stochastic_rounding rounds to nearest, which loses steps below 1/512 of a weight",
    ),
    OptionRule(
        code="full-bf16-nearest-rounding",
        severity="note",
        options=("full_bf16", "stochastic_rounding"),
        is_broken=lambda c: c.memory.full_bf16 and not c.memory.stochastic_rounding,
        what="weights and gradients are in bfloat16, rounded to nearest: steps below 1/512 of a weight are lost",
        fix="remove --no_stochastic_rounding",
    ),
)

OPTIM_RULES = _CONFLICTS + _UNUSED + _NOTES
