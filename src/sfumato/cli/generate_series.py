"""From prompts and the options beside them to one prompt per image: repetitions, seeds, variants, first images."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

from sfumato.cli.generate_options import FirstNoiseOptions, SeriesOptions
from sfumato.common.files import read_file
from sfumato.config.prompts import Prompt, parse_line
from sfumato.config.wildcards import expand_variants, has_every
from sfumato.data.find.image_formats import open_image
from sfumato.data.images import read_image
from sfumato.errors import UserError

DEFAULT_RANGES = {"noise_offset": (0.02, 0.1), "pyramid_noise_discount": (0.6, 0.8)}
PART_SEPARATOR = " AND "
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_SEED = 2**64


@dataclass(frozen=True, kw_only=True)
class NoiseChance:
    """A change of the first noise that only some images have."""

    probability: float
    low: float
    high: float

    def draw(self, seed: str) -> float | None:
        """Its value, uniform within the limits; None where the image does not have it."""
        generator = Random(seed)
        return generator.uniform(self.low, self.high) if generator.random() < self.probability else None


@dataclass(frozen=True, kw_only=True)
class Series:
    """What is made of each prompt."""

    options: SeriesOptions
    first_seed: int  # of prompts without a seed of their own, plus the number of images before
    images: Sequence[Path] = ()  # to start from, in turn
    masks: Sequence[Path] = ()  # theirs, in turn
    controls: Sequence[Path] = ()  # control images: one for each reader, then those of the next image, in turn
    num_controls: int = 0  # how many read one
    noise: Mapping[str, NoiseChance] = field(default_factory=dict)  # field of a prompt -> when it is set
    plain: bool = False  # prompts have no variants
    before: int = field(default=0)  # images that were made before these

    def list_images(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """A prompt per image, each with its seed."""
        found: list[Prompt] = []
        for iteration in range(self.options.n_iter):
            order = list(prompts)
            if self.options.shuffle_prompts:
                Random(self.first_seed + iteration).shuffle(order)
            for prompt in order:
                found += self._repeat(prompt, iteration, self.before + len(found))
        return [self._add_files(prompt, self.before + i) for i, prompt in enumerate(found)]

    def _add_files(self, prompt: Prompt, number: int) -> Prompt:
        return self._change_noise(self._add_controls(self._start_from_image(prompt, number), number))

    def _add_controls(self, prompt: Prompt, number: int) -> Prompt:
        """Its control images, in turn, unless it names one."""
        if not self.controls or prompt.controlnet_image is not None:
            return prompt
        wanted = min(max(self.num_controls, 1), len(self.controls))
        first, *further = (str(self.controls[(number * wanted + i) % len(self.controls)]) for i in range(wanted))
        return replace(prompt, controlnet_image=first, further_control_images=tuple(further))

    def _change_noise(self, prompt: Prompt) -> Prompt:
        """What the image's seed draws for its first noise, where the prompt does not say."""
        assert prompt.seed is not None
        drawn = {name: chance.draw(f"{name} {prompt.seed}") for name, chance in self.noise.items()}
        return prompt.apply_defaults({name: value for name, value in drawn.items() if value is not None})

    def _repeat(self, prompt: Prompt, iteration: int, before: int) -> Iterator[Prompt]:
        """The images of one prompt. Of one that stands for every combination all have the first seed, as in gen_img."""
        count = max(self.options.images_per_prompt, len(prompt.seeds))
        every = not self.plain and has_every(prompt.prompt)
        seeds = [self._choose_seed(prompt, iteration, repeat, count, before) for repeat in range(count)]
        for seed in seeds:
            for text, negative in self._expand(prompt, seed):
                own = seeds[0] if every else seed
                parts = () if self.plain else split_parts(text)
                yield replace(prompt, prompt=text, negative_prompt=negative, parts=parts, seed=own, seeds=())

    def _choose_seed(self, prompt: Prompt, iteration: int, repeat: int, count: int, before: int) -> int:
        if repeat < len(prompt.seeds):
            return prompt.seeds[repeat]
        if prompt.seed is not None:
            return (prompt.seed + iteration * count + repeat) % MAX_SEED
        return (self.first_seed + (iteration if self.options.iter_same_seed else before + repeat)) % MAX_SEED

    def _expand(self, prompt: Prompt, seed: int) -> Iterator[tuple[str, str]]:
        if self.plain:
            yield prompt.prompt, prompt.negative_prompt
            return
        for text in expand_variants(prompt.prompt, seed):
            for negative in expand_variants(prompt.negative_prompt, seed):
                yield text, negative

    def _start_from_image(self, prompt: Prompt, number: int) -> Prompt:
        """The image to start from, in turn; without a size in the prompt its own."""
        if self.images and prompt.init_image is None:
            prompt = replace(prompt, init_image=str(self.images[number % len(self.images)]))
        takes_mask = prompt.init_image or prompt.parts or prompt.controlnet_image or self.controls
        if self.masks and takes_mask and prompt.mask_image is None:
            prompt = replace(prompt, mask_image=str(self.masks[number % len(self.masks)]))
        if prompt.init_image and None in (prompt.width, prompt.height):
            width, height = read_image(Path(prompt.init_image)).size
            prompt = replace(prompt, width=prompt.width or width, height=prompt.height or height)
        return prompt


def split_parts(text: str) -> tuple[str, ...]:
    """The prompts of parts of the image; empty where there is only one."""
    parts = tuple(part.strip() for part in text.split(PART_SEPARATOR))
    return parts if len(parts) > 1 else ()


def read_noise_chances(options: FirstNoiseOptions) -> dict[str, NoiseChance]:
    """Field of a prompt -> when it is set; UserError for limits that are no pair."""
    chances: dict[str, NoiseChance] = {}
    for name, default in DEFAULT_RANGES.items():
        limits = vars(options)[f"{name}_range"] or default
        probability = vars(options)[f"{name.removesuffix('_discount')}_prob"]
        if len(limits) != 2 or limits[0] > limits[1]:
            raise UserError(
                f"--{name}_range takes two numbers, the smaller first",
                code="noise-range-invalid",
                fix=f"--{name}_range {default[0]} {default[1]}",
            )
        if probability:
            chances[name] = NoiseChance(probability=probability, low=limits[0], high=limits[1])
    return chances


def list_image_files(path: Path | None, option: str) -> list[Path]:
    """The file, or those of a folder in the order of their names; UserError for a folder without any."""
    if path is None:
        return []
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.iterdir() if each.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UserError(
            f"{option} {path}: there is no image in this folder",
            code="start-folder-empty",
            fix=f"give a folder with files that end in {', '.join(IMAGE_SUFFIXES)}",
        )
    return found


def read_image_prompts(images: Sequence[Path], masks: Sequence[Path]) -> list[Prompt]:
    """The prompts that images carry in their text, as gen_img, this program and AUTOMATIC1111 write them.

    Each has its image, and of the masks, which are in the same order, its own.
    """
    prompts: list[Prompt] = []
    for i, path in enumerate(images):
        with open_image(BytesIO(read_file(path))) as image:
            text = {name: value for name, value in image.info.items() if isinstance(value, str)}
        if "prompt" in text:
            prompt, negative = text["prompt"], text.get("negative_prompt", text.get("negative-prompt", ""))
        elif "parameters" in text:
            first, _, rest = text["parameters"].partition("\nNegative prompt: ")
            prompt, negative = first.partition("\nSteps: ")[0], rest.partition("\nSteps: ")[0]
        else:
            raise UserError(
                f"{path} carries no prompt in its text", code="image-without-prompt", fix='give --prompt "a cat"'
            )
        mask = str(masks[i % len(masks)]) if masks else None
        prompts.append(Prompt(prompt=prompt, negative_prompt=negative, init_image=str(path), mask_image=mask))
    return prompts


def read_module_prompts(path: Path, arguments: str | None) -> list[Prompt]:
    """The lines that the function get_prompter(args, pipe, networks) of a user's Python file gives."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if "get_prompter" not in vars(module):
        raise UserError(
            f"--from_module {path}: it has no function get_prompter",
            code="prompt-module-without-function",
            fix="write def get_prompter(args, pipe, networks): return a list of prompts",
        )
    prompter: Any = module.get_prompter(Namespace(prompter_module_args=arguments), None, [])
    lines: Iterable[Any] = prompter() if callable(prompter) else prompter  # pyright: ignore[reportAssignmentType]
    return [parse_line(str(line), where=f"{path}[{i}]") for i, line in enumerate(lines)]
