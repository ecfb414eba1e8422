"""`sfumato generate`: images of prompts, by a model alone or with adapter files."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import torch

from sfumato.common.files import check_writable
from sfumato.config.secrets import collect_secrets
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.sample import generate_batch
from sfumato.sampling.request import ImageRequest, group_requests, list_ignored, make_request
from sfumato.tools.generate_setup import GenerateRequest, load_requested_model, make_adapters
from sfumato.tools.ignored_options import describe_ignored_options
from sfumato.track.console import configure_logging
from sfumato.training.image_metadata import OTHER_OPTIONS, generate_command, image_metadata, save_image

log = logging.getLogger(__name__)
# The options that generating uses: all of these groups, and single ones of others.
GENERATE_THEMES = ("run", "model", "samples", "log")
GENERATE_OPTIONS = (*OTHER_OPTIONS, "network_weights", "seed", "resolution")


def generate_images(request: GenerateRequest) -> list[Path]:
    """Make and save every image; the files, in the order of the prompts."""
    config = request.config
    configure_logging(config.log, secrets=collect_secrets(config))
    ignored = describe_ignored_options(config, themes=GENERATE_THEMES, options=GENERATE_OPTIONS, purpose="images")
    for line in (*(f"note: {note}" for note in config.notes), *ignored):
        log.info("%s", line)
    check_writable(request.outdir, option="--outdir")
    model = load_requested_model(request)
    adapters = make_adapters(request, model)
    images = list(make_image_requests(request, model))
    for line in list_unused_words(adapters, images):
        log.warning("%s", line)
    if config.model.enable_scaled_pos_embed:
        resolution = config.buckets.resolution
        model.set_resolutions([resolution] if resolution else [(image.width, image.height) for image in images])
    paths = choose_file_names(request.outdir, images)
    dtype = MIXED_PRECISION[config.memory.mixed_precision]
    frozen = encode_all_prompts(model, adapters, images)
    for part in ("denoiser", "vae"):
        model.parts[part].load()
    for group in group_requests(list(zip(images, paths, strict=True)), config.samples.sample_batch_size or 1):
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            batch = generate_batch(model, adapters, [image for image, _ in group], frozen)
        for pixels, (image, path) in zip(batch, group, strict=True):
            save_image(path, pixels, {**image_metadata(image), "command": make_command(request, model, image)})
            log.info("%s", path)
    return paths


def encode_all_prompts(
    model: Family, adapters: InferenceAdapters, images: Sequence[ImageRequest]
) -> FrozenTextEncoders:
    """The features of all prompts, with one encoder in memory at a time; those with adapters stay and run live."""
    frozen = FrozenTextEncoders(model)
    for part in model.text_parts:
        if part in adapters.live_text:
            model.parts[part].load()
            continue
        with model.parts[part].hold():
            for image in images:
                frozen.encode(part, [adapters.rewrite_caption(image.prompt)], weighted=image.weighted)
                if image.guided:
                    negative = adapters.rewrite_caption(image.negative_prompt)
                    frozen.encode(part, [negative], weighted=image.weighted, negative=True)
    return frozen


def list_unused_words(adapters: InferenceAdapters, images: Sequence[ImageRequest]) -> Iterator[str]:
    """A line for each new word that no prompt names."""
    named: set[str] = set()
    for image in images:
        named |= adapters.words.find(image.prompt) | adapters.words.find(image.negative_prompt)
    for word in adapters.words:
        if word.text.lower() not in named:
            yield f"no prompt names the word {word.text}, so its vectors have no effect"


def make_image_requests(request: GenerateRequest, model: Family) -> Iterator[ImageRequest]:
    """One per prompt; those without a seed of their own get --seed, or a random one, plus their index."""
    samples, seed = request.config.samples, request.config.loop.seed
    first = random.SystemRandom().randrange(2**32) if seed is None else seed
    for index, prompt in enumerate(request.prompts):
        image = make_request(
            prompt,
            model,
            sampler=samples.sample_sampler,
            seed=(first + index) % 2**64,
            weighted=samples.prompt_weighting,
        )
        for line in (*prompt.notes, *list_ignored(prompt, image, model)):
            log.warning("%s", line)
        yield image


def make_command(request: GenerateRequest, model: Family, image: ImageRequest) -> str:
    """The command that makes one image alone."""
    options: dict[str, object] = {}
    if request.networks:
        options["network_weights"] = [path for path, _ in request.networks]
        multipliers = [multiplier for _, multiplier in request.networks]
        options["network_mul"] = multipliers if set(multipliers) != {1.0} else None
    if request.embeddings:
        options["textual_inversion_embeddings"] = [
            f"{path}={word}" if word else path for path, word in request.embeddings
        ]
    if request.float32_parts:
        options["float32_parts"] = list(request.float32_parts)
    return generate_command(request.config, image, model.sampling, options)


def choose_file_names(folder: Path, images: Sequence[ImageRequest]) -> list[Path]:
    """im_TIME_000_SEED.png and so on, of files that do not exist yet."""
    stamp, numbers = time.strftime("%Y%m%d%H%M%S"), count()
    paths = []
    for image in images:
        names = (folder / f"im_{stamp}_{number:03d}_{image.seed}.png" for number in numbers)
        paths.append(next(path for path in names if not path.exists()))
    return paths
