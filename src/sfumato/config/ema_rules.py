"""Rules between the options of running averages and others."""

from __future__ import annotations

from sfumato.config.rule import Rule

WHICH = ("ema_decay", "ema_sigma_rel")

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
        options=(*WHICH, "ema_on_cpu", "sample_with_ema"),
        broken=lambda c: not c.ema.averages and c.changed("ema_on_cpu", "sample_with_ema"),
        what="--ema_on_cpu and --sample_with_ema have no effect: no average is kept",
        fix="give --ema_decay or --ema_sigma_rel",
    ),
    Rule(
        name="ema-no-samples",
        kind="no effect",
        options=("sample_with_ema", "sample_prompts"),
        broken=lambda c: c.ema.averages > 0 and c.ema.sample_with_ema and c.samples.sample_prompts is None,
        what="--sample_with_ema has no effect: no samples are made",
        fix="give --sample_prompts, or leave it out",
    ),
)
