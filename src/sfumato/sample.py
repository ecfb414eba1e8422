"""Prompt -> image: what a request asks for, encoded, denoised and decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Generator, Tensor

from sfumato.data.batch import Extras, Sizes, Tensors
from sfumato.families.base import Family
from sfumato.families.deep_shrink import shrink_features
from sfumato.families.encoding import FrozenTextEncoders, decode_latents, encode_with_grad
from sfumato.sampling.denoise import DenoisedStep, DenoiseRequest, Guidance, Predictor, Region, denoise_steps
from sfumato.sampling.growth import Growth
from sfumato.sampling.highres import enlarge, make_first_stage
from sfumato.sampling.image_vectors import with_image_vector
from sfumato.sampling.images import encode_request_images, encode_start
from sfumato.sampling.regions import read_region_weights
from sfumato.sampling.request import ImageRequest
from sfumato.sampling.schedulers import make_scheduler
from sfumato.sampling.settings import SizeInputs
from sfumato.sampling.start import Start, draw_first_noise


def encode_prompts(
    model: Family,
    captions: Sequence[str],
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
    captions_by_part = dict.fromkeys(model.text_parts, captions)
    features = encode_features(model, captions_by_part, weighted=weighted, negative=negative, frozen=frozen, live=live)
    return model.condition(features, sizes, guidance)


@torch.no_grad()
def encode_features(
    model: Family,
    captions: Mapping[str, Sequence[str]],
    *,
    weighted: bool,
    negative: bool,
    frozen: FrozenTextEncoders | None,
    live: frozenset[str],
) -> dict[str, Tensors]:
    """Text encoder -> its features on the device, of these captions by encoder."""
    features: dict[str, Tensors] = {}
    for part, texts in captions.items():
        if frozen is None or part in live:
            encoded = encode_with_grad(model, part, texts, weighted=weighted, negative=negative)
        else:
            encoded = frozen.encode(part, texts, weighted=weighted, negative=negative)
        features[part] = {name: tensor.to(model.device, non_blocking=True) for name, tensor in encoded.items()}
    return features


def encode_requests(
    model: Family, method: Predictor, requests: Sequence[ImageRequest], sizes: Sizes, frozen: FrozenTextEncoders | None
) -> Tensors:
    """The denoiser's arguments for the prompts, each encoder with the text that the request has for it."""
    first = requests[0]

    def encode(texts: Mapping[str, Sequence[str]]) -> dict[str, Tensors]:
        captions = {part: [method.rewrite_caption(text) for text in row] for part, row in texts.items()}
        return encode_features(
            model, captions, weighted=first.weighted, negative=False, frozen=frozen, live=method.live_text
        )

    features = encode({part: [request.text_for(model, part) for request in requests] for part in model.text_parts})
    if any(request.clip_prompt is not None for request in requests):
        pooling = [part for part, tensors in features.items() if "pooled" in tensors]
        texts = {part: [request.pooled_text(model, part) for request in requests] for part in pooling}
        for part, tensors in encode(texts).items():
            features[part] = {**features[part], "pooled": tensors["pooled"]}
    if first.start is not None:
        features = with_image_vector(features, first.start, model.device)
    return model.condition(features, sizes, first.guidance)


def list_sizes(settings: SizeInputs, width: int, height: int, count: int, *, negative: bool = False) -> Sizes:
    """What models with such inputs are told of the images' sizes."""
    sizes = Sizes.from_size(count, height, width)
    if negative:
        original = (settings.original_height_negative, settings.original_width_negative)
    else:
        original = (settings.original_height, settings.original_width)
    given = torch.tensor([[original[0] or height, original[1] or width]]).expand(count, 2)
    crop = torch.tensor([[settings.crop_top or 0, settings.crop_left or 0]]).expand(count, 2)
    return replace(sizes, original=given, crop=crop)


def encode_guidance(
    model: Family, method: Predictor, requests: Sequence[ImageRequest], sizes: Sizes, frozen: FrozenTextEncoders | None
) -> Guidance:
    """Classifier-free guidance with the negative prompts, and the empty one where these have their own scale."""
    first = requests[0]
    if not first.guided:
        return Guidance()

    def encode(texts: Sequence[str]) -> Tensors:
        return encode_prompts(
            model, [method.rewrite_caption(text) for text in texts], sizes, first.guidance,
            weighted=first.weighted, negative=True, frozen=frozen, live=method.live_text,
        )  # fmt: skip

    return Guidance(
        negative=encode([request.negative_prompt for request in requests]),
        scale=first.scale,
        empty=None if first.negative_scale is None else encode([""] * len(requests)),
        negative_scale=first.negative_scale or 0.0,
        truncation=first.cfg_trunc_ratio,
        norm_limit=first.renorm_cfg,
    )


def gather_extras(model: Family, requests: Sequence[ImageRequest]) -> Extras:
    """Further images, and the strengths of the adapters where the requests have them."""
    images = encode_request_images(model, requests[0], len(requests))
    if not any(request.multipliers for request in requests):
        return Extras(images=images)
    columns = max(len(request.multipliers) for request in requests)
    rows = [request.multipliers for request in requests]  # all have some, or none has: `batch_key`
    table = torch.tensor([[*row, *row[-1:] * (columns - len(row))] for row in rows])
    return Extras(images=images, multiplier=table[:, 0], multipliers=table)


def encode_regions(
    model: Family,
    method: Predictor,
    requests: Sequence[ImageRequest],
    extras: Extras,
    sizes: Sizes,
    negative_sizes: Sizes,
    frozen: FrozenTextEncoders | None,
) -> Iterator[Region]:
    """The parts of the images, where they have several; adapters of encoders change the text of their part alone."""
    first = requests[0]
    if first.regions is None:
        return
    weights = read_region_weights(model, first.regions, (first.width, first.height))
    for number, prompt in enumerate(first.regions.parts):
        table = None if extras.multipliers is None else keep_column(extras.multipliers, number)
        own = [replace(request, prompt=prompt, regions=None) for request in requests]
        method.set_batch(model, replace(extras, multipliers=table))
        yield Region(
            text=encode_requests(model, method, own, sizes, frozen),
            guidance=encode_guidance(model, method, own, negative_sizes, frozen),
            multipliers=table,
            weight=weights[number][None, None].to(model.device),
        )


def keep_column(table: Tensor, number: int) -> Tensor:
    """(B, N) with zeros in all columns but one; in all where there is no such column."""
    kept = torch.zeros_like(table)
    kept[:, number : number + 1] = table[:, number : number + 1]
    return kept


def denoise_requests(
    model: Family,
    method: Predictor,
    requests: Sequence[ImageRequest],
    generators: list[Generator],
    frozen: FrozenTextEncoders | None,
    start: Start | None,
) -> Iterator[DenoisedStep]:
    """The steps of requests with one batch key."""
    first, count, spec = requests[0], len(requests), model.latents
    extras = gather_extras(model, requests)
    method.set_batch(model, extras)
    sizes = list_sizes(first.sizes, first.width, first.height, count)
    negative_sizes = list_sizes(first.sizes, first.width, first.height, count, negative=True)
    regions = list(encode_regions(model, method, requests, extras, sizes, negative_sizes, frozen))
    guidance = Guidance() if regions else encode_guidance(model, method, requests, negative_sizes, frozen)
    shape = (spec.channels, first.height // spec.downscale, first.width // spec.downscale)
    noise = torch.stack([draw_first_noise(shape, generator, first.first_noise) for generator in generators])
    growth = None if first.growth is None or start is not None else Growth.start(first.growth, (shape[1], shape[2]))
    request = DenoiseRequest(
        noise=(noise if growth is None else growth.shrink(noise)).to(model.device, non_blocking=True),
        text={} if regions else encode_requests(model, method, requests, sizes, frozen),
        scheduler=make_scheduler(first.sampler, model.objective, zero_offset=first.force_scheduler_zero_steps_offset),
        steps=first.steps,
        generators=generators,
        extras=extras,
        flow_shift=first.flow_shift,
        start=start,
        growth=growth,
        regions=regions,
    )
    with nullcontext() if first.shrink is None else shrink_features(model.denoiser, first.shrink):
        yield from denoise_steps(model, method, request, guidance)


@torch.no_grad()
def generate_stages(
    model: Family, method: Predictor, requests: Sequence[ImageRequest], frozen: FrozenTextEncoders | None = None
) -> Iterator[Tensor]:
    """The latents (B, C, h, w) of requests with one batch key; before them those of a smaller first stage, if any."""
    yield from (step.latents for step in generate_steps(model, method, requests, frozen) if step.is_last)


@torch.no_grad()
def generate_steps(
    model: Family, method: Predictor, requests: Sequence[ImageRequest], frozen: FrozenTextEncoders | None = None
) -> Iterator[DenoisedStep]:
    """Each step of each stage; the last one of a stage has its latents."""
    first = requests[0]
    assert all(request.batch_key == first.batch_key for request in requests)
    generators = [Generator().manual_seed(request.seed) for request in requests]
    if first.highres is None:
        given = encode_start(model, first, len(requests))
        yield from denoise_requests(model, method, requests, generators, frozen, given)
        return
    small = [make_first_stage(request, model) for request in requests]
    before = encode_start(model, small[0], len(requests))
    latents = before.latents if before is not None else torch.empty(0)
    for step in denoise_requests(model, method, small, generators, frozen, before):
        latents = step.latents
        yield step
    start = Start(latents=enlarge(model, latents, first), strength=first.highres.strength)
    given = encode_start(model, first, len(requests))
    if given is not None and given.mask is not None:  # what may not change is that of the full-size image
        kept = torch.lerp(given.latents, start.latents, given.mask)
        start = replace(start, latents=kept, mask=given.mask)
    if first.highres.highres_fix_disable_control_net:
        requests = [replace(request, control_image="") for request in requests]
    yield from denoise_requests(model, method, requests, generators, frozen, start)


def decode_images(model: Family, latents: Tensor, batch_size: int = 1) -> list[Tensor]:
    """The images (3, H, W) in [-1, 1], float32 on the CPU. batch_size: how many are decoded at a time."""
    return list(decode_latents(model, latents, batch_size).cpu().clamp(-1, 1))


def generate_batch(
    model: Family, method: Predictor, requests: Sequence[ImageRequest], frozen: FrozenTextEncoders | None = None
) -> list[Tensor]:
    """The images of requests with one batch key, each as `generate` makes it alone, up to rounding."""
    *_, latents = generate_stages(model, method, requests, frozen)
    return decode_images(model, latents)


def generate(
    model: Family, method: Predictor, request: ImageRequest, frozen: FrozenTextEncoders | None = None
) -> Tensor:
    """One image (3, H, W) in [-1, 1], float32 on the CPU; a function of the request and the weights alone.

    frozen: features of encoders that do not train, perhaps remembered from before they left the device.
    """
    return generate_batch(model, method, [request], frozen)[0]
