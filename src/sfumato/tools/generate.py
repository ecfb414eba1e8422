"""`sfumato generate`: images of prompts, by a model alone or with adapter files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sfumato.config.prompts import Prompt
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.sample import decode_images, generate_steps
from sfumato.sampling.request import ImageRequest, group_requests
from sfumato.tools.generate_names import FileNames, find_free_sheet
from sfumato.tools.generate_recipes import make_image_requests, make_texts
from sfumato.tools.generate_setup import GenerateRequest, load_requested_model, make_adapters
from sfumato.tools.generate_start import start_generating
from sfumato.tools.image_sheet import draw_contact_sheet, save_sheet
from sfumato.tools.progress_sketch import ProgressSketch
from sfumato.track.progress_task import ProgressTask
from sfumato.training.image_metadata import save_image

log = logging.getLogger(__name__)


class ImageMaker:
    """A model with its adapters, which makes images of prompts as long as there are any."""

    def __init__(self, request: GenerateRequest, names: FileNames | None = None) -> None:
        """names: of images that others make, too."""
        start_generating(request)
        self.request = request
        self.model = load_requested_model(request)
        self.adapters = make_adapters(request, self.model)
        self.names = names or FileNames(request)
        self.sketch = None if request.progress_file is None else ProgressSketch(self.model, request.progress_file)
        self.paths: list[Path] = []  # of all images until now

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
        together = config.samples.sample_batch_size or 1
        if self.request.calculates_weights and any(image.multipliers for image in images):
            together = 1  # the weights have one strength at a time
        for group in group_requests(list(zip(images, wanted, strict=True)), together):
            self._make_group([image for image, _ in group], [path for _, (_, path) in group], frozen, group[0][1][0])
        self.paths += paths
        return paths

    def finish(self) -> None:
        """After the last image: their sheet, where it is wanted."""
        if self.request.has_sheet and self.paths:
            path = find_free_sheet(self.request.outdir, "grid")
            save_sheet(draw_contact_sheet(self.paths), path)
            log.info("%s", path)

    def _open_progress(self) -> ProgressTask:
        return ProgressTask("denoising", "steps", plain=self.request.config.log.console_log_simple)

    def _make_group(
        self, images: Sequence[ImageRequest], paths: Sequence[Path], frozen: FrozenTextEncoders, keep_first: bool
    ) -> None:
        """One batch; keep_first: its smaller first stage is saved, too, where it has one."""
        dtype = MIXED_PRECISION[self.request.config.memory.mixed_precision]
        stages: list[Tensor] = []
        with (
            torch.autocast(self.model.device.type, dtype, enabled=dtype != torch.float32),
            self._open_progress() as show,
        ):
            for step in generate_steps(self.model, self.adapters, images, frozen):
                show(step.number, step.count)
                if self.sketch is not None:
                    self.sketch.write(step.estimate_image())
                if step.is_last:
                    stages = [*stages, step.latents] if keep_first else [step.latents]
            batch_size = self.request.config.cache.vae_batch_size
            decoded = [decode_images(self.model, latents, batch_size) for latents in stages]
        if len(decoded) > 1:
            self._save(images, [self.names.first_stages[path] for path in paths], decoded[0])
        self._save(images, paths, decoded[-1])

    def _save(self, images: Sequence[ImageRequest], paths: Sequence[Path], pixels: Sequence[Tensor]) -> None:
        for image, path, tensor in zip(images, paths, pixels, strict=True):
            save_image(path, tensor, make_texts(self.request, self.model, image))
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
