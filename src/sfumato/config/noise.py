"""Options of noise, timesteps and loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from sfumato.common.extensions import LOSSES_GROUP, is_extension
from sfumato.common.registry import did_you_mean
from sfumato.config.base import Metavar, Options, option


class NoiseOptions(Options):
    """Noise and timesteps"""

    min_timestep: int | None = option(None, "minimum timestep; default: 0", ge=0, le=999)
    max_timestep: int | None = option(None, "maximum timestep, exclusive; default: 1000", ge=1, le=1000)
    noise_offset: float | None = option(None, "noise offset: noise that is constant over each channel")
    noise_offset_random_strength: bool = option(False, "draw the strength between 0 and --noise_offset")
    adaptive_noise_scale: float | None = option(None, "add this multiple of the latents' mean to --noise_offset")
    multires_noise_iterations: int | None = option(None, "number of coarser noise layers (multiresolution noise)", ge=0)
    multires_noise_discount: float = option(0.3, "strength of each noise layer relative to the finer one", ge=0)
    ip_noise_gamma: float | None = option(None, "input perturbation: extra noise for the model's input only", ge=0)
    ip_noise_gamma_random_strength: bool = option(False, "draw the strength between 0 and --ip_noise_gamma")
    zero_terminal_snr: bool = option(False, "rescale the noise schedule to zero terminal SNR")
    timestep_sampling: Literal["sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift"] | None = option(
        None, "timestep sampling method; default: that of the family"
    )
    timestep_stratified: bool = option(
        False, "stratified timesteps over the samples: same density as independent ones, less variance"
    )
    sigmoid_scale: float = option(1.0, "scale of the sigmoid timestep density", gt=0)
    discrete_flow_shift: float | None = option(None, "timestep shift of flow models; default: that of the family", gt=0)
    training_shift: float = option(1.0, "timestep shift during training", gt=0)
    model_prediction_type: Literal["raw", "additive", "sigma_scaled"] | None = option(
        None, "how the prediction is interpreted for the loss; default: that of the family"
    )
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"] = option(
        "uniform", "timestep density, or loss weighting over timesteps"
    )
    logit_mean: float = option(0.0, "mean of the logit-normal density")
    logit_std: float = option(1.0, "standard deviation of the logit-normal density", gt=0)
    mode_scale: float = option(1.29, "scale of the mode density")


def check_loss_type(name: str) -> str:
    """One that is known, in any case of letters, or can be imported."""
    if name.lower() in LOSS_TYPES:
        return name.lower()
    if not is_extension(name, LOSSES_GROUP):
        raise ValueError(f"is not known; {did_you_mean(name, LOSS_TYPES)}")
    return name


LOSS_TYPES = ("l1", "l2", "huber", "smooth_l1")
LossType = Annotated[str, AfterValidator(check_loss_type), Metavar("|".join(LOSS_TYPES))]


class LossOptions(Options):
    """Loss"""

    loss_type: LossType = option("l2", "loss function, or a module that registers one")
    masked_prior_preservation_weight: float = option(
        0.0, "weight of a loss towards the untrained model's prediction outside the masks", ge=0
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = option(
        "snr", "schedule of the huber threshold over timesteps"
    )
    huber_c: float = option(0.1, "huber threshold at the end of the schedule", gt=0)
    huber_scale: float = option(1.0, "scale of the huber threshold", gt=0)
    min_snr_gamma: float | None = option(None, "gamma of min-SNR loss weighting (5 is recommended)", gt=0)
    soft_min_snr_gamma: float | None = option(None, "gamma of soft min-SNR loss weighting", gt=0)
    p2_gamma: float | None = option(
        None, "gamma of P2 loss weighting: how much less timesteps with little noise count", gt=0
    )
    p2_k: float = option(1.0, "k of P2 loss weighting", gt=0)
    debiased_estimation_loss: bool = option(False, "debiased estimation loss: weight by 1 / sqrt(SNR)")
    scale_v_pred_loss_like_noise_pred: bool = option(False, "weight a v-prediction loss like that of noise prediction")
    v_pred_like_loss: float | None = option(None, "strength of an additional v-prediction-like loss weight", gt=0)
    uncertainty_weighting: bool = option(
        False, "learn the weight of each noise level (EDM2); the reported loss is L / e^u + u and may be negative"
    )
    uncertainty_lr: float = option(0.01, "learning rate of the learned loss weight", gt=0)
