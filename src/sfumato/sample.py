"""Prompt -> image: what a request asks for, encoded, denoised and decoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from sfumato.data.batch import Extras, ImageInput, Images, Sizes, Tensors, name_reference
from sfumato.data.cache.entries import to_tensor
from sfumato.data.images import read_image
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders, decode_latents, encode_images, encode_with_grad
from sfumato.sampling.denoise import DenoiseRequest, Guidance, Predictor, denoise
from sfumato.sampling.request import ImageRequest
from sfumato.sampling.schedulers import make_scheduler


@torch.no_grad()
def encode_prompts(
    model: Family,
    captions: list[str],
    sizes: Sizes,
    guidance: float | None,
    *,
    weighted: bool = False,
    negative: bool = False,
    frozen: FrozenTextEncoders | None = None,
    live: frozenset[str] = frozenset(),
) -> Tensors:
    """The denoiser's text arguments; `weighted`: (words) and [words] have more and less weight.

    With `frozen`, the features of all encoders but the `live` ones come from there.
    """
    features: dict[str, Tensors] = {}
    for part in model.text_parts:
        if frozen is None or part in live:
            encoded = encode_with_grad(model, part, captions, weighted=weighted, negative=negative)
        else:
            encoded = frozen.encode(part, captions, weighted=weighted, negative=negative)
        features[part] = {name: tensor.to(model.device, non_blocking=True) for name, tensor in encoded.items()}
    return model.condition(features, sizes, guidance)


def encode_reference(model: Family, request: ImageRequest, count: int) -> Images:
    """The latents of a request's reference image for so many samples; UserError where it cannot be read."""
    if not request.reference_image:
        return {}
    image = read_image(Path(request.reference_image))
    size = model.choose_reference_size(image.size, (request.width, request.height))
    pixels = to_tensor([np.asarray(image.resize(size, Image.Resampling.LANCZOS))])
    latents = encode_images(model, pixels, None, vae_batch_size=1)
    return {name_reference(0): ImageInput(latents=latents.expand(count, -1, -1, -1))}


def generate(
    model: Family, method: Predictor, request: ImageRequest, frozen: FrozenTextEncoders | None = None
) -> Tensor:
    """One image (3, H, W) in [-1, 1], float32 on the CPU; a function of the request and the weights alone.

    frozen: features of encoders that do not train, perhaps remembered from before they left the device.
    """
    return generate_batch(model, method, [request], frozen)[0]


@torch.no_grad()
def generate_batch(
    model: Family, method: Predictor, requests: Sequence[ImageRequest], frozen: FrozenTextEncoders | None = None
) -> list[Tensor]:
    """The images of requests with one batch key, each as `generate` makes it alone, up to rounding."""
    first, count = requests[0], len(requests)
    assert all(request.batch_key == first.batch_key for request in requests)
    generators = [Generator().manual_seed(request.seed) for request in requests]
    spec = model.latents
    shape = (spec.channels, first.height // spec.downscale, first.width // spec.downscale)
    extras, sizes = (
        Extras(images=encode_reference(model, first, count)),
        Sizes.from_size(count, first.height, first.width),
    )
    method.set_batch(model, extras)

    def read(texts: list[str], *, negative: bool) -> Tensors:
        return encode_prompts(
            model, [method.rewrite_caption(text) for text in texts], sizes, first.guidance,
            weighted=first.weighted, negative=negative, frozen=frozen, live=method.live_text,
        )  # fmt: skip

    positive = read([request.prompt for request in requests], negative=False)
    negative = read([request.negative_prompt for request in requests], negative=True) if first.guided else None
    x = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    x = x.to(model.device, non_blocking=True)
    guidance = Guidance(
        negative=negative, scale=first.scale, truncation=first.cfg_trunc_ratio, norm_limit=first.renorm_cfg
    )
    scheduler = make_scheduler(first.sampler, model.objective)
    denoising = DenoiseRequest(
        noise=x, text=positive, scheduler=scheduler, steps=first.steps, generators=generators, extras=extras,
        flow_shift=first.flow_shift,
    )  # fmt: skip
    clean = denoise(model, method, denoising, guidance)
    return list(decode_latents(model, clean).cpu().clamp(-1, 1))
