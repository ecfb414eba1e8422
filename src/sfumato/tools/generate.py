"""`sfumato generate`: pictures of prompts, by a model alone or with adapter files."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from sfumato.common.files import check_writable
from sfumato.config import Config
from sfumato.config.prompts import Prompt
from sfumato.config.schema import vocabulary
from sfumato.config.secrets import secrets_of
from sfumato.errors import Problems
from sfumato.families import register_all
from sfumato.families.base import Family, find_family
from sfumato.families.encoding import FrozenText
from sfumato.families.source import open_source
from sfumato.methods.attached import Attached
from sfumato.sample import Picture, fill_in, generate_together, together, without_effect
from sfumato.track.console import set_up
from sfumato.training.image_metadata import OTHERS, command, recipe, save_picture
from sfumato.training.run import DTYPES

log = logging.getLogger(__name__)
THEMES = ("run", "model", "samples", "log")  # what is read of the vocabulary
OPTIONS = (*OTHERS, "network_weights", "seed", "resolution")  # and of other themes


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to make."""

    config: Config
    prompts: Sequence[Prompt]
    networks: Sequence[tuple[Path, float]]  # adapter files and their strengths
    outdir: Path
    float32_parts: Sequence[str] = ()  # kept in float32 whatever --mixed_precision says, as in training


def generate_pictures(asked: Request) -> list[Path]:
    """Make and save every picture; the files, in the order of the prompts."""
    config = asked.config
    set_up(config.log, secrets=secrets_of(config))
    for line in (*(f"note: {note}" for note in config.notes), *idle(config)):
        log.info("%s", line)
    check_writable(asked.outdir, option="--outdir")
    model = load(asked)
    base = config.network.base_weights
    strengths = (*config.network.base_weights_multiplier, *[1.0] * len(base))
    adapters = Attached(model, asked.networks, base=list(zip(base, strengths, strict=False)))
    adapters.live_text |= set(asked.float32_parts) & {*model.text_parts}
    pictures = list(numbered(asked, model))
    if config.model.enable_scaled_pos_embed:
        model.expect([config.buckets.resolution] if config.buckets.resolution else sizes_of(pictures))
    paths = free_names(asked.outdir, pictures)
    frozen, dtype = FrozenText(model), DTYPES[config.memory.mixed_precision]
    for group in together(list(zip(pictures, paths, strict=True)), config.samples.sample_batch_size or 1):
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            images = generate_together(model, adapters, [picture for picture, _ in group], frozen)
        for image, (picture, path) in zip(images, group, strict=True):
            save_picture(path, image, {**recipe(picture), "command": remade(asked, model, picture)})
            log.info("%s", path)
    return paths


def load(asked: Request) -> Family:
    """The model, in the dtypes that training has it in."""
    config, problems = asked.config, Problems()
    register_all()
    source = open_source(config.model)
    family = find_family(config.model.model_type or config.run.family, source)
    blueprint = family.read(source, config.model, config.noise)
    for note in blueprint.notes:
        log.info("note: %s", note)
    for name in (name for name in asked.float32_parts if name not in blueprint.networks):
        problems.add(f"--float32_parts: this model has no part {name}", fix=f"one of {', '.join(blueprint.networks)}")
    problems.raise_all()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blueprint = blueprint.with_dtype(asked.float32_parts, torch.float32)
    return family.load(blueprint, config.model, dtype=DTYPES[config.memory.mixed_precision], device=device)


def numbered(asked: Request, model: Family) -> Iterator[Picture]:
    """The recipes; pictures without a seed of their own count on from --seed, or from one drawn."""
    samples, seed = asked.config.samples, asked.config.loop.seed
    first = random.SystemRandom().randrange(2**32) if seed is None else seed
    for number, prompt in enumerate(asked.prompts):
        given = (first + number) % 2**32
        picture = fill_in(prompt, model, sampler=samples.sample_sampler, seed=given, weighted=samples.prompt_weighting)
        for line in (*prompt.notes, *without_effect(prompt, picture, model)):
            log.warning("%s", line)
        yield picture


def sizes_of(pictures: Sequence[Picture]) -> list[tuple[int, int]]:
    return [(picture.width, picture.height) for picture in pictures]


def remade(asked: Request, model: Family, picture: Picture) -> str:
    """The command for one picture alone."""
    more: dict[str, object] = {}
    if asked.networks:
        more["network_weights"] = [path for path, _ in asked.networks]
        strengths = [strength for _, strength in asked.networks]
        more["network_mul"] = strengths if set(strengths) != {1.0} else None
    if asked.float32_parts:
        more["float32_parts"] = list(asked.float32_parts)
    return command(asked.config, picture, model.sampling, more)


def free_names(folder: Path, pictures: Sequence[Picture]) -> list[Path]:
    """im_TIME_000_SEED.png and so on, none of which is there yet."""
    stamp, found, numbers = time.strftime("%Y%m%d%H%M%S"), [], count()
    for picture in pictures:
        names = (folder / f"im_{stamp}_{number:03d}_{picture.seed}.png" for number in numbers)
        found.append(next(path for path in names if not path.exists()))
    return found


def idle(config: Config) -> list[str]:
    """A line about options that only training reads: the same configuration file serves both."""
    known = vocabulary()
    names = [n for n in known if config.changed(n) and known[n].theme not in THEMES and n not in OPTIONS]
    return [f"note: no effect on pictures: {', '.join(f'--{name}' for name in names)}"] if names else []
