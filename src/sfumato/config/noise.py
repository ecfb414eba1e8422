"""Options of noise, timesteps and loss."""

from __future__ import annotations

from typing import Literal

from sfumato.config.base import Options, option


class NoiseOptions(Options):
    """Noise and timesteps"""

    min_timestep: int | None = option(None, "lowest timestep that is trained; without it 0", ge=0, le=999)
    max_timestep: int | None = option(None, "timesteps that are trained lie below this; without it 1000", ge=1, le=1000)
    noise_offset: float | None = option(None, "noise that is equal over a whole channel")
    noise_offset_random_strength: bool = option(False, "draw its strength between 0 and the value given")
    adaptive_noise_scale: float | None = option(None, "add this share of the latents' mean to --noise_offset")
    multires_noise_iterations: int | None = option(None, "coarser layers of noise that are added", ge=0)
    multires_noise_discount: float = option(0.3, "strength of each layer relative to the finer one", ge=0)
    ip_noise_gamma: float | None = option(None, "extra noise that only the model's input gets", ge=0)
    ip_noise_gamma_random_strength: bool = option(False, "draw its strength between 0 and the value given")
    zero_terminal_snr: bool = option(False, "rescale the noise schedule so that its end is pure noise")
    timestep_sampling: Literal["sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift"] | None = option(
        None, "how timesteps are drawn; without it the family's way"
    )
    timestep_stratified: bool = option(
        False, "spread timesteps evenly over the samples, instead of drawing each by itself; same density, less noise"
    )
    sigmoid_scale: float = option(1.0, "width of the sigmoid density", gt=0)
    discrete_flow_shift: float | None = option(None, "shift towards noise; without it the family's value", gt=0)
    training_shift: float = option(1.0, "shift towards noise in training", gt=0)
    model_prediction_type: Literal["raw", "additive", "sigma_scaled"] | None = option(
        None, "space in which the prediction is compared; without it the family's"
    )
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"] = option(
        "uniform", "density of timesteps, or weight of the loss over them"
    )
    logit_mean: float = option(0.0, "mean of the logit-normal density")
    logit_std: float = option(1.0, "deviation of the logit-normal density", gt=0)
    mode_scale: float = option(1.29, "strength of the mode density")


class LossOptions(Options):
    """Loss"""

    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = option(
        "l2",
        "how prediction and target are compared",
    )
    masked_prior_preservation_weight: float = option(
        0.0, "weight of a loss to what the model said before training, where masks leave pictures out", ge=0
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = option(
        "snr", "how the huber threshold follows the timestep"
    )
    huber_c: float = option(0.1, "huber threshold at the end of the schedule", gt=0)
    huber_scale: float = option(1.0, "factor on the huber threshold", gt=0)
    min_snr_gamma: float | None = option(None, "caps the weight of timesteps with little noise (5 is usual)", gt=0)
    soft_min_snr_gamma: float | None = option(None, "the same cap without its corner", gt=0)
    p2_gamma: float | None = option(None, "how much less timesteps with little noise count (P2)", gt=0)
    p2_k: float = option(1.0, "signal-to-noise ratio from which --p2_gamma counts", gt=0)
    debiased_estimation_loss: bool = option(False, "weight by 1 / sqrt(SNR)")
    scale_v_pred_loss_like_noise_pred: bool = option(False, "weight a v-prediction loss as if noise were predicted")
    v_pred_like_loss: float | None = option(None, "strength of a v-prediction-like part of the weight", gt=0)
    uncertainty_weighting: bool = option(
        False, "learn the weight of each noise level (EDM2); the loss shown is then L / e^u + u, and falls below 0"
    )
    uncertainty_lr: float = option(0.01, "learning rate of that weight", gt=0)
