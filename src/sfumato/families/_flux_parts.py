"""What FLUX.1 and the models made from it share besides files: objective, sampling steps, packed latents, metadata."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.diffusion.objective import RectifiedFlow, TimestepGrid
from sfumato.diffusion.timesteps import make_time_grid, resolution_mu

FLUX_OPTIONS = frozenset(  # of those that only some families read
    {"t5xxl", "ae", "no_half_vae", "model_type", "t5xxl_max_token_length", "apply_t5_attn_mask", "guidance_scale"}
    | {"timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "model_prediction_type"}
    | {"weighting_scheme", "logit_mean", "logit_std", "mode_scale"}
    | {"weighted_captions", "prompt_weighting"}
)
KONTEXT, FILL = "flux-1-kontext-dev", "flux-1-fill-dev"  # modelspec.architecture
READ_BY_SCRIPT = frozenset({"ip_noise_gamma", "ip_noise_gamma_random_strength"})


def make_objective(noise: NoiseOptions, *, shifted: bool) -> RectifiedFlow:
    """shifted: whether images with more tokens are sampled with more steps at high noise."""
    return RectifiedFlow(
        space=noise.model_prediction_type or "sigma_scaled",
        grid=make_flux_grid(compute_resolution_shift if shifted else lambda tokens: 1.0),
        make_grid=lambda shift: make_flux_grid(lambda tokens: shift),
    )


def compute_resolution_shift(tokens: int) -> float:
    """Larger for images with more tokens (Esser et al. 2024, sec. 5.3.2)."""
    return math.exp(resolution_mu(tokens))


def make_flux_grid(find_shift: Callable[[int], float]) -> TimestepGrid:
    """Even steps, moved towards noise by a shift. find_shift: tokens -> shift.

    In float32 as in diffusers: the time embedding is exact enough for the last bit to matter.
    """

    def make_sigmas(steps: int, tokens: int) -> list[float]:
        sigmas, shift = np.linspace(1, 1 / steps, steps).astype(np.float32), find_shift(tokens)
        if shift != 1:
            sigmas = shift / (shift + (1 / sigmas - 1))
        return sigmas.tolist()

    return make_time_grid(make_sigmas)


def keep_time_exact(network: nn.Module) -> None:
    """Give the time embedding the exact time, which diffusers rounds to the dtype of the activations.

    bfloat16 has 506 values for the 1000 timesteps.
    """
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "timestep" in kwargs:
            seen["time"] = kwargs["timestep"]

    def restore(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        """Only for the first call: the same module then embeds the guidance."""
        time = seen.pop("time", None)
        return None if time is None or args[0].dtype.itemsize >= 4 else (time.float() * 1000,)

    network.register_forward_pre_hook(note, with_kwargs=True)
    network.get_submodule("time_text_embed.time_proj").register_forward_pre_hook(restore)


def make_metadata(model_type: str, model: ModelOptions, noise: NoiseOptions, guidance: float) -> dict[str, Any]:
    """The ss_ keys that only adapter files of these models have."""
    return {
        "ss_model_type": model_type,
        "ss_apply_t5_attn_mask": model.apply_t5_attn_mask,
        "ss_weighting_scheme": noise.weighting_scheme,
        "ss_logit_mean": noise.logit_mean,
        "ss_logit_std": noise.logit_std,
        "ss_mode_scale": noise.mode_scale,
        "ss_guidance_scale": guidance if model.guidance_scale is None else model.guidance_scale,
        "ss_timestep_sampling": noise.timestep_sampling or "sigma",
        "ss_sigmoid_scale": noise.sigmoid_scale,
        "ss_model_prediction_type": noise.model_prediction_type or "sigma_scaled",
        "ss_discrete_flow_shift": noise.discrete_flow_shift or 3.0,
    }


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C): one token for each 2x2 patch."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack`."""
    batch, channels, height, width = shape
    patches = tokens.view(batch, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def make_common_inputs(noisy: Tensor, t: Tensor, text: Tensor) -> dict[str, object]:
    """The arguments that the transformers of all these models take. text: (B, L, D)."""
    return {
        "hidden_states": pack(noisy),
        "timestep": t.to(noisy.device, non_blocking=True) / 1000,
        "encoder_hidden_states": text.to(noisy.dtype),
        "img_ids": make_image_ids(noisy),
        "txt_ids": noisy.new_zeros(text.shape[1], 3),
    }


def make_image_ids(like: Tensor) -> Tensor:
    """(tokens, 3) positions (0, y, x) of the patches of latents (B, C, h, w)."""
    height, width = like.shape[-2] // 2, like.shape[-1] // 2
    y, x = torch.meshgrid(
        torch.arange(height, device=like.device), torch.arange(width, device=like.device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).to(like.dtype)


def add_masked_image(arguments: dict[str, object], inpaint: Tensor, channels: int) -> dict[str, object]:
    """The latents of the masked image and its mask follow the noisy latents' numbers in each token, as in FLUX.1 Fill.

    inpaint: the mask's channels, then those of the latents (B, M + C, h, w). channels: of latents.
    """
    hidden = arguments["hidden_states"]
    assert isinstance(hidden, Tensor)
    mask, image = inpaint[:, :-channels].to(hidden), inpaint[:, -channels:].to(hidden)
    return {**arguments, "hidden_states": torch.cat([hidden, pack(image), pack(mask)], dim=2)}


def extend_mask(text: Tensor, noisy: Tensor) -> Tensor:
    """(B, text + image tokens) bool from the text's (B, text): every image token counts."""
    tokens = noisy.shape[-2] * noisy.shape[-1] // 4
    return torch.cat([text, text.new_ones(len(text), tokens)], dim=1)
