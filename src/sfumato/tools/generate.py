"""`sfumato generate`: images of prompts, by a model alone or with adapter files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sfumato.common.files import check_writable
from sfumato.config.prompts import Prompt
from sfumato.config.secrets import collect_secrets
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.sample import decode_images, generate_stages
from sfumato.sampling.request import ImageRequest, group_requests, list_ignored, make_request
from sfumato.tools.generate_names import FileNames
from sfumato.tools.generate_setup import GenerateRequest, load_requested_model, make_adapters
from sfumato.tools.ignored_options import describe_ignored_options
from sfumato.track.console import configure_logging
from sfumato.training.image_metadata import OTHER_OPTIONS, generate_command, image_metadata, save_image

log = logging.getLogger(__name__)
# The options that generating uses: all of these groups, and single ones of others.
GENERATE_THEMES = ("run", "model", "samples", "log")
GENERATE_OPTIONS = (*OTHER_OPTIONS, "network_weights", "seed", "resolution")


class ImageMaker:
    """A model with its adapters, which makes images of prompts as long as there are any."""

    def __init__(self, request: GenerateRequest) -> None:
        config = request.config
        configure_logging(config.log, secrets=collect_secrets(config))
        ignored = describe_ignored_options(config, themes=GENERATE_THEMES, options=GENERATE_OPTIONS, purpose="images")
        for line in (*(f"note: {note}" for note in config.notes), *ignored):
            log.info("%s", line)
        check_writable(request.outdir, option="--outdir")
        self.request = request
        self.model = load_requested_model(request)
        self.adapters = make_adapters(request, self.model)
        self.names = FileNames(request)

    def make(self, prompts: Sequence[Prompt]) -> list[Path]:
        """Make and save an image of each prompt, which has its seed; the files, in the order of the prompts."""
        config, model = self.request.config, self.model
        images = list(make_image_requests(self.request, model, prompts))
        for line in list_unused_words(self.adapters, images):
            log.warning("%s", line)
        if config.model.enable_scaled_pos_embed:
            resolution = config.buckets.resolution
            model.set_resolutions([resolution] if resolution else [(image.width, image.height) for image in images])
        paths = [self.names.choose(image, prompt.file_name) for image, prompt in zip(images, prompts, strict=True)]
        frozen = encode_all_prompts(model, self.adapters, images)
        for part in (name for name in model.parts if name not in model.text_parts):
            model.parts[part].load()
        wanted = [(prompt.highres_fix_save_1st or False, path) for prompt, path in zip(prompts, paths, strict=True)]
        for group in group_requests(list(zip(images, wanted, strict=True)), config.samples.sample_batch_size or 1):
            self._make_group([image for image, _ in group], [path for _, (_, path) in group], frozen, group[0][1][0])
        return paths

    def _make_group(
        self, images: Sequence[ImageRequest], paths: Sequence[Path], frozen: FrozenTextEncoders, keep_first: bool
    ) -> None:
        """One batch; keep_first: its smaller first stage is saved, too, where it has one."""
        dtype = MIXED_PRECISION[self.request.config.memory.mixed_precision]
        stages: list[Tensor] = []
        with torch.autocast(self.model.device.type, dtype, enabled=dtype != torch.float32):
            for latents in generate_stages(self.model, self.adapters, images, frozen):
                stages = [*stages, latents] if keep_first else [latents]
            decoded = [decode_images(self.model, latents) for latents in stages]
        if len(decoded) > 1:
            self._save(images, [self.names.first_stages[path] for path in paths], decoded[0])
        self._save(images, paths, decoded[-1])

    def _save(self, images: Sequence[ImageRequest], paths: Sequence[Path], pixels: Sequence[Tensor]) -> None:
        for image, path, tensor in zip(images, paths, pixels, strict=True):
            text = {**image_metadata(image), "command": make_command(self.request, self.model, image)}
            save_image(path, tensor, text)
            log.info("%s", path)


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
                for text, negative in image.texts:
                    frozen.encode(part, [adapters.rewrite_caption(text)], weighted=image.weighted, negative=negative)
    return frozen


def list_unused_words(adapters: InferenceAdapters, images: Sequence[ImageRequest]) -> Iterator[str]:
    """A line for each new word that no prompt names."""
    named: set[str] = set()
    for image in images:
        named = named.union(*(adapters.words.find(text) for text, _ in image.texts))
    for word in adapters.words:
        if word.text.lower() not in named:
            yield f"no prompt names the word {word.text}, so its vectors have no effect"


def make_image_requests(request: GenerateRequest, model: Family, prompts: Sequence[Prompt]) -> Iterator[ImageRequest]:
    """One per prompt, whose seed is set; what is ignored of it is reported."""
    samples = request.config.samples
    for prompt in prompts:
        assert prompt.seed is not None
        image = make_request(
            prompt, model, sampler=samples.sample_sampler, seed=prompt.seed, weighted=samples.prompt_weighting
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
    if request.merged:
        options["network_merge_n_models"] = request.merged
    if request.lllite:
        options["control_net_lllite_models"] = list(request.lllite)
    if request.float32_parts:
        options["float32_parts"] = list(request.float32_parts)
    return generate_command(request.config, image, model.sampling, options)
