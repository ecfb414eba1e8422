"""The images that are compared: every prompt with every seed, for the model before training and for each checkpoint.

Each is a file that says what it was made of, so that a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from sfumato.common.files import read_file
from sfumato.config.prompts import Prompt
from sfumato.data.find.image_formats import DECODER_ERRORS, open_image
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenTextEncoders
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.sample import generate_batch
from sfumato.sampling.request import ImageRequest, group_requests, list_ignored, make_request
from sfumato.tools.compare.models import CheckpointModels
from sfumato.tools.generate import encode_all_prompts
from sfumato.training.image_metadata import generate_command, image_metadata, model_options, save_image

log = logging.getLogger(__name__)
RECIPE_KEY = "made of"  # the text of a file that says what it depends on
OnImage = Callable[[int, int], None]  # images that are there, of all


@dataclass(frozen=True, kw_only=True)
class ComparedPrompts:
    """Prompts that are about what was trained, and neutral ones that are not; each is made with every seed."""

    concept: Sequence[Prompt]
    neutral: Sequence[Prompt]
    seeds: Sequence[int]
    sampler: str
    weighted: bool  # whether (words) and [words] have more and less weight

    def list_seeded(self) -> list[tuple[str, Prompt]]:
        """(name, prompt) of every image, those of one prompt one after the other."""
        found: list[tuple[str, Prompt]] = []
        for letter, prompts in (("c", self.concept), ("n", self.neutral)):
            for number, prompt in enumerate(prompts):
                for i, seed in enumerate(self.seeds):
                    own = seed if prompt.seed is None else prompt.seed + i
                    found.append((f"{letter}{number:02d}_{i}", replace(prompt, seed=own, seeds=())))
        return found


class ComparedImages:
    """Makes the images of one checkpoint after the other, but for those that are there."""

    def __init__(
        self, models: CheckpointModels, prompts: ComparedPrompts, folder: Path, on_image: OnImage, total: int
    ) -> None:
        """total: images of all checkpoints. on_image: called after each."""
        self.models, self.prompts, self.folder = models, prompts, folder
        self.config = models.config
        self.on_image, self.total, self.count = on_image, total, 0
        self._frozen: FrozenTextEncoders | None = None  # features that no checkpoint changes
        self._noted: set[str] = set()

    def make(self, checkpoint: Path | None, name: str) -> list[Image.Image]:
        """The images of a checkpoint in the order of the prompts and seeds. name: begins their files' names."""
        wanted = [(self.folder / f"{name}_{end}.png", prompt) for end, prompt in self.prompts.list_seeded()]
        keys = {path: self._make_key(prompt, checkpoint) for path, prompt in wanted}
        missing = [(path, prompt) for path, prompt in wanted if read_key(path) != keys[path]]
        self._count(len(wanted) - len(missing))
        if missing:
            with self.models.use(checkpoint) as (model, adapters):
                self._make_missing(model, adapters, missing, keys, checkpoint)
        return [open_made(path) for path, _ in wanted]

    def _make_missing(
        self,
        model: Family,
        adapters: InferenceAdapters,
        missing: Sequence[tuple[Path, Prompt]],
        keys: Mapping[Path, str],
        checkpoint: Path | None,
    ) -> None:
        requests = [(self._make_request(prompt, model), path) for path, prompt in missing]
        frozen = self._encode(model, adapters, [request for request, _ in requests])
        for part in (name for name in model.parts if name not in model.text_parts):
            model.parts[part].load()
        options = self.models.list_options(checkpoint)
        dtype = MIXED_PRECISION[self.config.memory.mixed_precision]
        for group in group_requests(requests, self.config.samples.sample_batch_size or 1):
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                made = generate_batch(model, adapters, [request for request, _ in group], frozen)
            for pixels, (request, path) in zip(made, group, strict=True):
                command = generate_command(self.config, request, model.sampling, options)
                save_image(path, pixels, {**image_metadata(request), "command": command, RECIPE_KEY: keys[path]})
                self._count(1)

    def _encode(
        self, model: Family, adapters: InferenceAdapters, requests: Sequence[ImageRequest]
    ) -> FrozenTextEncoders:
        """The features of all prompts; those of the base model's own encoders are kept for the next checkpoint."""
        if not self.models.is_base(model):
            self._frozen = None  # nor is the base model kept by them
        if adapters.words or not self.models.is_base(model):
            return encode_all_prompts(model, adapters, requests)
        if self._frozen is None:
            self._frozen = encode_all_prompts(model, adapters, requests)
        return self._frozen

    def _make_request(self, prompt: Prompt, model: Family) -> ImageRequest:
        assert prompt.seed is not None
        request = make_request(
            prompt, model, sampler=self.prompts.sampler, seed=prompt.seed, weighted=self.prompts.weighted
        )
        for line in (*prompt.notes, *list_ignored(prompt, request, model)):
            if line not in self._noted:
                self._noted.add(line)
                log.info("%s", line)
        return request

    def _make_key(self, prompt: Prompt, checkpoint: Path | None) -> str:
        """A hash of all that an image depends on; files count by size and time."""
        facts = [repr(prompt), self.prompts.sampler, str(self.prompts.weighted)]
        for name, value in {**model_options(self.config), **self.models.list_options(checkpoint)}.items():
            values = value if isinstance(value, tuple | list) else (value,)
            facts += [name, *(identify_file(str(item)) for item in values)]
        return hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogatepass")).hexdigest()

    def _count(self, images: int) -> None:
        self.count += images
        self.on_image(self.count, self.total)


def identify_file(text: str) -> str:
    """Of a path its size and time, too; of a folder those of its files."""
    path = Path(text)
    if not path.exists():
        return text
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps([text, facts])


def read_key(path: Path) -> str:
    """What a file says that it was made of; "" where there is no such image."""
    try:
        with open_image(BytesIO(read_file(path))) as image:
            image.load()
            return str(image.info.get(RECIPE_KEY, ""))
    except DECODER_ERRORS:
        return ""


def open_made(path: Path) -> Image.Image:
    with open_image(BytesIO(read_file(path))) as image:
        return image.convert("RGB")
