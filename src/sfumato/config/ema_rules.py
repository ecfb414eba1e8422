"""Rules between the options of running averages and others."""

from __future__ import annotations

from sfumato.config.rule import Rule

WHICH = ("ema_decay", "ema_sigma_rel")
EVALUATED = ("sample_prompts", "validation_split", "dataset_config")  # the last may hold images out, too

EMA_RULES = (
    Rule(
        name="ema-schedule-free",
        kind="conflict",
        options=(*WHICH, "optimizer_type"),
        broken=lambda c: c.optim.schedule_free and c.ema.averages > 0,
        what="--ema_decay and --ema_sigma_rel do not go with a schedule-free optimizer, which saves its own average",
        fix="leave them out",
    ),
    Rule(
        name="ema-off",
        kind="no effect",
        options=(*WHICH, "ema_on_cpu", "evaluate_with_ema"),
        broken=lambda c: not c.ema.averages and c.changed("ema_on_cpu", "evaluate_with_ema"),
        what="--ema_on_cpu and --evaluate_with_ema have no effect: no average is kept",
        fix="give --ema_decay or --ema_sigma_rel",
    ),
    Rule(
        name="ema-not-evaluated",
        kind="no effect",
        options=("evaluate_with_ema", *EVALUATED),
        broken=lambda c: c.ema.averages > 0 and c.ema.evaluate_with_ema and not c.changed(*EVALUATED),
        what="--evaluate_with_ema has no effect: no samples are made and no images held out",
        fix="give --sample_prompts or --validation_split, or leave it out",
    ),
)
