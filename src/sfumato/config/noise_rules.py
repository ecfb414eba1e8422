"""Rules between the options of noise, timesteps and loss."""

from __future__ import annotations

from sfumato.config.option_rule import OptionRule
from sfumato.config.schema import Config

SAMPLERS_NEEDING_SIGNAL = ("pndm", "lms", "heun", "dpm_2", "dpm_2_a", "dpmsingle")
HUBER_LOSSES = ("huber", "smooth_l1")
PARENTS = {  # option -> the one without which it has no effect
    "noise_offset_random_strength": "noise_offset",
    "adaptive_noise_scale": "noise_offset",
    "multires_noise_discount": "multires_noise_iterations",
    "ip_noise_gamma_random_strength": "ip_noise_gamma",
    "p2_k": "p2_gamma",
    "uncertainty_lr": "uncertainty_weighting",
}
ON_V, ON_NOISE = "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"
LOSS_WEIGHTS = (
    "min_snr_gamma",
    "soft_min_snr_gamma",
    "p2_gamma",
    "debiased_estimation_loss",
    ON_V,
    ON_NOISE,
)


def has_loss_weight(config: Config) -> bool:
    """Whether noise levels have a weight that is not learned."""
    return config.is_changed(*LOSS_WEIGHTS) or config.noise.weighting_scheme in ("sigma_sqrt", "cosmap")


def uses_huber(config: Config) -> bool:
    return config.loss.loss_type in HUBER_LOSSES


_CONFLICTS = (
    OptionRule(
        code="timestep-range-reversed",
        severity="conflict",
        options=("min_timestep", "max_timestep"),
        is_broken=lambda c: (
            (c.noise.min_timestep or 0) > (1000 if c.noise.max_timestep is None else c.noise.max_timestep)
        ),
        what="--min_timestep is above --max_timestep",
        fix="swap the two values",
    ),
    OptionRule(
        code="uncertainty-with-loss-weights",
        severity="conflict",
        options=("uncertainty_weighting", "weighting_scheme", *LOSS_WEIGHTS),
        is_broken=lambda c: c.loss.uncertainty_weighting and has_loss_weight(c),
        what="--uncertainty_weighting learns the weight of each noise level and would learn to undo a fixed weight",
        fix="remove --min_snr_gamma and the other loss weights",
    ),
    OptionRule(
        code="uncertainty-with-single-lr",
        severity="conflict",
        options=("uncertainty_weighting", "optimizer_type"),
        is_broken=lambda c: c.loss.uncertainty_weighting and c.optim.estimates_lr,
        what="--uncertainty_weighting needs its own learning rate, but D-Adaptation and Prodigy use a single one for "
        "all parameters",
        fix="give another --optimizer_type, or remove it",
    ),
)

_UNUSED = (
    OptionRule(
        code="stratified-single-timestep",
        severity="no effect",
        options=("timestep_stratified", "min_timestep", "max_timestep"),
        is_broken=lambda c: (
            c.noise.timestep_stratified and (c.noise.min_timestep or 0) + 1 >= (c.noise.max_timestep or 1000)
        ),
        what="--timestep_stratified",
        reason="--min_timestep and --max_timestep leave a single timestep",
        fix="remove it",
    ),
    OptionRule(
        code="uncertainty-lr-unused",
        severity="no effect",
        options=("uncertainty_lr", "optimizer_type", "optimizer_args"),
        is_broken=lambda c: c.loss.uncertainty_weighting and c.optim.relative_step and c.is_changed("uncertainty_lr"),
        what="--uncertainty_lr",
        reason="AdaFactor's relative_step sets the learning rate",
        fix="remove it, or give --optimizer_args relative_step=False",
    ),
    *(
        OptionRule(
            code="parent-option-missing",
            severity="no effect",
            options=(option, parent),
            is_broken=lambda c, option=option, parent=parent: (
                c.is_changed(option) and c.value(option) and not c.value(parent)
            ),
            what=f"--{option}",
            reason=f"without --{parent}",
            fix=f"give --{parent}, or remove it",
        )
        for option, parent in PARENTS.items()
    ),
    *(
        OptionRule(
            code="huber-option-unused",
            severity="no effect",
            options=(option, "loss_type"),
            is_broken=lambda c, option=option: c.is_changed(option) and not uses_huber(c),
            what=f"--{option}",
            reason="only the losses huber and smooth_l1 use it",
            fix="remove it, or give --loss_type huber",
        )
        for option in ("huber_schedule", "huber_c", "huber_scale")
    ),
)

NOISE_RULES = _CONFLICTS + _UNUSED
