"""FLUX.1 Kontext: FLUX.1 dev trained to edit, which reads a reference image as further tokens after the noisy one's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import ImageInput, Images, name_reference
from sfumato.data.buckets import Size
from sfumato.families import _flux_files, _flux_keys, _flux_parts
from sfumato.families._flux_parts import make_image_ids, pack, unpack
from sfumato.families.base import FAMILIES
from sfumato.families.blueprint import Blueprint
from sfumato.families.flux import Flux
from sfumato.families.source import Source

_PREFERRED_WIDTHS = (672, 688, 720, 752, 800, 832, 880, 944, 1024)  # pixels; each goes with the one of _HEIGHTS
_HEIGHTS = (1568, 1504, 1456, 1392, 1328, 1248, 1184, 1104, 1024)
PREFERRED_SIZES = tuple(
    sorted({size for pair in zip(_PREFERRED_WIDTHS, _HEIGHTS, strict=True) for size in (pair, pair[::-1])})
)  # those that Kontext was trained with, as in diffusers' FluxKontextPipeline
_FULL_AREA = 1024 * 1024  # pixels
_SIZE_STEP = 16


@FAMILIES.register("flux_kontext")
class FluxKontext(Flux):
    """Its files have the keys of FLUX.1 dev: a model folder of diffusers and a file's metadata say what it is."""

    name = "flux_kontext"
    sampling = replace(Flux.sampling, width=1024, height=1024)
    num_references = 1
    control_net = None
    no_control_net = "diffusers has no pipeline that joins a reference image and a ControlNet"

    @classmethod
    def detect(cls, source: Source) -> bool:
        transformer = _flux_keys.FLUX_TRANSFORMER
        return transformer.is_in(source) and not _flux_files.inpaints(transformer.read(source))

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        return replace(super().read(source, model, noise), title="FLUX.1 Kontext", architecture=_flux_parts.KONTEXT)

    def add_images(self, arguments: dict[str, object], noisy: Tensor, images: Images) -> dict[str, object]:
        """The reference's tokens follow those of the noisy image, at positions (1, y, x)."""
        reference = images.get(name_reference(0))
        if reference is None:
            return arguments
        assert reference.latents is not None, "references are encoded before"
        tokens, positions = pack(reference.latents.to(noisy.dtype)), make_image_ids(reference.latents)
        positions[:, 0] = 1
        hidden, ids = arguments["hidden_states"], arguments["img_ids"]
        assert isinstance(hidden, Tensor)
        assert isinstance(ids, Tensor)
        return {
            **arguments,
            "hidden_states": torch.cat([hidden, tokens], dim=1),
            "img_ids": torch.cat([ids, positions.to(ids)]),
            **extend_attention(arguments, hidden, mask_missing(reference, tokens), tokens.shape[1]),
        }

    def convert_output(self, raw: Tensor, noisy: Tensor) -> Tensor:
        """Only what is predicted for the noisy image's own tokens counts."""
        return unpack(raw[:, : noisy.shape[-2] * noisy.shape[-1] // 4], noisy.shape)

    def choose_reference_size(self, image: Size, generated: Size) -> Size:
        """The preferred size of the nearest shape, smaller where the generated image has fewer pixels than that."""
        ratio = image[0] / image[1]
        width, height = min(PREFERRED_SIZES, key=lambda size: (abs(ratio - size[0] / size[1]), size))
        scale = min(1.0, math.sqrt(generated[0] * generated[1] / _FULL_AREA))
        return scale_side(width, scale), scale_side(height, scale)


def scale_side(side: int, scale: float) -> int:
    """A multiple of 16 pixels, at least one step."""
    return max(_SIZE_STEP, int(side * scale) // _SIZE_STEP * _SIZE_STEP)


def mask_missing(reference: ImageInput, tokens: Tensor) -> Tensor | None:
    """(B, reference tokens) bool: False for samples without a reference, as if they had no such tokens; None: none."""
    if reference.present is None:
        return None
    return reference.present.to(tokens.device, non_blocking=True)[:, None].expand(tokens.shape[:2])


def extend_attention(
    arguments: Mapping[str, object], hidden: Tensor, present: Tensor | None, tokens: int
) -> dict[str, object]:
    """The attention's mask with the reference's tokens at its end; empty where nothing is masked.

    hidden: the noisy image's tokens (B, N, D). present: (B, reference tokens) bool. tokens: those of the reference.
    """
    before, text = arguments.get("joint_attention_kwargs"), arguments["encoder_hidden_states"]
    assert isinstance(text, Tensor)
    if before is None and present is None:
        return {}
    if isinstance(before, dict):
        mask = before["attention_mask"][:, 0, 0]
    else:
        mask = torch.ones(len(hidden), text.shape[1] + hidden.shape[1], dtype=torch.bool, device=hidden.device)
    further = mask.new_ones(len(mask), tokens) if present is None else present
    return {"joint_attention_kwargs": {"attention_mask": torch.cat([mask, further], dim=1)[:, None, None, :]}}
