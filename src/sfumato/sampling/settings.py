"""Settings of a request that only some images have; their fields are options of `sfumato generate`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from sfumato.config.prompts import Prompt

DEFAULT_STRENGTH = 0.8
GROWTH_START = 650  # the timestep at which a gradual latent begins to grow
HIGHRES_STEPS = 28  # of the first stage


@dataclass(frozen=True, kw_only=True)
class StartImage:
    """An image that is noised and denoised again, everywhere or where a mask is white."""

    init_image: str
    mask_image: str = ""
    strength: float = DEFAULT_STRENGTH  # share of the steps that are made
    clip_vision_strength: float | None = None  # factor of its vector in the place of the text's; None: the text's
    clip_vision_model: str | None = None  # a folder or a name on the hub with the CLIP that gives it


@dataclass(frozen=True, kw_only=True)
class RegionSettings:
    """Prompts of parts of an image, and where these are; the n-th adapter acts in the n-th part."""

    parts: tuple[str, ...]
    region_mask: str = ""  # red, green and blue are where the first three are; the others are everywhere
    network_regional_mask_max_color_codes: int | None = (
        None  # the n-th is where the color has the bits of n: red 1, ...
    )


@dataclass(frozen=True, kw_only=True)
class SizeInputs:
    """The sizes and the crop in pixels that models with such inputs are told; None: those of the image."""

    original_width: int | None = None
    original_height: int | None = None
    original_width_negative: int | None = None  # for the negative prompt
    original_height_negative: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None


@dataclass(frozen=True, kw_only=True)
class GradualLatent:
    """An image that starts small and grows while it is denoised, for sizes beyond those that a model learned."""

    gradual_latent_timesteps: int = GROWTH_START
    gradual_latent_ratio: float = 0.5  # its first size, as a share of the last
    gradual_latent_ratio_step: float = 0.125
    gradual_latent_every_n_steps: int = 3
    gradual_latent_s_noise: float = 1.0  # factor of the noise that a step adds in which it grows
    gradual_latent_unsharp_params: str | None = None  # "kernel size, sigma, strength[, 1 for the latents or 0]"


@dataclass(frozen=True, kw_only=True)
class HighresFix:
    """A first stage at a smaller size; the image is made from its result."""

    highres_fix_scale: float
    strength: float = DEFAULT_STRENGTH  # share of the steps that are made from the first stage's result
    highres_fix_steps: int = HIGHRES_STEPS
    highres_fix_strength: float | None = None  # of the first stage where it starts from an image; None: the same
    highres_fix_latents_upscaling: bool = False  # its latents are enlarged, not its image
    highres_fix_upscaler: str | None = None  # weights of a network that sharpens the latents of the enlarged image
    highres_fix_disable_control_net: bool = False  # control images steer the first stage alone


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """How ControlNets and LLLites act; the n-th value is that of the n-th one, in the order of the options."""

    further_control_images: tuple[str, ...] = ()  # after the first; images are repeated where there are fewer
    control_net_multipliers: tuple[float, ...] = ()
    control_net_ratios: tuple[float, ...] = ()  # share of the steps up to which it acts
    control_net_starts: tuple[float, ...] = ()  # share of the steps from which it acts
    control_net_preps: tuple[str, ...] = ()  # "canny_63_191": its image are the edges of the file; "none"


@dataclass(frozen=True, kw_only=True)
class FirstNoise:
    """What is done to the noise that an image starts from."""

    noise_offset: float | None = None
    pyramid_noise_discount: float | None = None


Settings = TypeVar("Settings")


def read_settings(kind: type[Settings], prompt: Prompt) -> Settings:
    """Settings of a kind with the prompt's values where it has them."""
    return kind(**given_values(kind, prompt))


def given_values(kind: type[Any], prompt: Prompt) -> dict[str, Any]:
    """The values that a prompt has of a kind of settings."""
    values = {field.name: vars(prompt)[field.name] for field in fields(kind)}
    return {name: value for name, value in values.items() if value not in (None, ())}
