"""Rules between the options of noise and loss."""

from __future__ import annotations

from sfumato.config.rule import Rule
from sfumato.config.schema import Config

ROBUST = ("huber", "smooth_l1")
CHILDREN = {  # option -> the one without which it has no effect
    "noise_offset_random_strength": "noise_offset",
    "adaptive_noise_scale": "noise_offset",
    "multires_noise_discount": "multires_noise_iterations",
    "ip_noise_gamma_random_strength": "ip_noise_gamma",
    "p2_k": "p2_gamma",
    "uncertainty_lr": "uncertainty_weighting",
}
ON_V, ON_NOISE = "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"

WEIGHTS = (
    "min_snr_gamma", "soft_min_snr_gamma", "p2_gamma", "debiased_estimation_loss", ON_V, ON_NOISE,
)  # fmt: skip


def weighted(config: Config) -> bool:
    """Whether noise levels have a weight that is not learned."""
    return config.changed(*WEIGHTS) or config.noise.weighting_scheme in ("sigma_sqrt", "cosmap")


def robust(config: Config) -> bool:
    return config.loss.loss_type in ROBUST


LOSS_RULES = (
    Rule(
        name="noise-twice",
        kind="conflict",
        options=("noise_offset", "multires_noise_iterations"),
        broken=lambda c: bool(c.noise.noise_offset) and bool(c.noise.multires_noise_iterations),
        what="--noise_offset and --multires_noise_iterations both change a picture's brightness, each for itself",
        fix="leave one of them out",
    ),
    Rule(
        name="v-weight",
        kind="conflict",
        options=(ON_V, "v_parameterization"),
        broken=lambda c: c.loss.scale_v_pred_loss_like_noise_pred and not c.model.v_parameterization,
        what=f"--{ON_V} is for a model that predicts v",
        fix="leave it out, or give --v_parameterization",
    ),
    Rule(
        name="noise-weight",
        kind="conflict",
        options=(ON_NOISE, "v_parameterization"),
        broken=lambda c: c.loss.v_pred_like_loss is not None and c.model.v_parameterization,
        what=f"--{ON_NOISE} is for a model that predicts noise",
        fix="leave it out",
    ),
    Rule(
        name="strata-of-one",
        kind="no effect",
        options=("timestep_stratified", "min_timestep", "max_timestep"),
        broken=lambda c: (
            c.noise.timestep_stratified and (c.noise.min_timestep or 0) + 1 >= (c.noise.max_timestep or 1000)
        ),
        what="--timestep_stratified has no effect: --min_timestep and --max_timestep leave no choice of timesteps",
        fix="leave it out",
    ),
    Rule(
        name="two-weights",
        kind="conflict",
        options=("uncertainty_weighting", "weighting_scheme", *WEIGHTS),
        broken=lambda c: c.loss.uncertainty_weighting and weighted(c),
        what="--uncertainty_weighting learns the weight of each noise level, and would learn to undo a given one",
        fix="leave --min_snr_gamma and the other weights of the loss out",
    ),
    Rule(
        name="uncertain-rate",
        kind="conflict",
        options=("uncertainty_weighting", "optimizer_type"),
        broken=lambda c: c.loss.uncertainty_weighting and c.optim.finds_rate,
        what="--uncertainty_weighting needs a rate of its own, and D-Adaptation and Prodigy know one for all",
        fix="give another --optimizer_type, or leave it out",
    ),
    Rule(
        name="uncertain-relative-rate",
        kind="no effect",
        options=("uncertainty_lr", "optimizer_type", "optimizer_args"),
        broken=lambda c: c.loss.uncertainty_weighting and c.optim.relative_step and c.changed("uncertainty_lr"),
        what="--uncertainty_lr has no effect: AdaFactor's relative_step sets the rate",
        fix="leave it out, or give --optimizer_args relative_step=False",
    ),
    *(
        Rule(
            name=f"alone-{child}",
            kind="no effect",
            options=(child, parent),
            broken=lambda c, child=child, parent=parent: c.changed(child) and not c.value(parent),
            what=f"--{child} has no effect without --{parent}",
            fix=f"give --{parent}, or leave it out",
        )
        for child, parent in CHILDREN.items()
    ),
    *(
        Rule(
            name=f"not-robust-{option}",
            kind="no effect",
            options=(option, "loss_type"),
            broken=lambda c, option=option: c.changed(option) and not robust(c),
            what=f"--{option} has no effect: only the losses huber and smooth_l1 read it",
            fix="leave it out, or give --loss_type huber",
        )
        for option in ("huber_schedule", "huber_c", "huber_scale")
    ),
)
