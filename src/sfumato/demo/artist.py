"""A loaded model that makes pictures of prompts, with an adapter or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from sfumato.config import Config
from sfumato.config.schema import vocabulary
from sfumato.demo.base import Base
from sfumato.families import register_all
from sfumato.families.base import Family, find_family
from sfumato.families.source import open_source
from sfumato.methods import make_method
from sfumato.methods.base import Method
from sfumato.sample import Picture, generate


@dataclass(frozen=True, kw_only=True)
class Artist:
    base: Base
    model: Family
    method: Method

    def draw(self, prompt: str, seed: int) -> Image.Image:
        """A function of weights, prompt and seed alone."""
        recipe = Picture(
            prompt=prompt,
            negative_prompt="",
            width=self.base.size,
            height=self.base.size,
            seed=seed,
            steps=self.base.steps,
            scale=self.base.scale,
            guidance=None,
            sampler=self.base.sampler,
        )
        pixels = (generate(self.model, self.method, recipe) + 1) * 127.5
        return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())


def hire(base: Base, *, adapter: Path | None = None) -> Artist:
    """Load the base model, with the adapter file where one is given; a new adapter changes nothing."""
    register_all()
    adapting = {"network_module": "networks.lora", "network_weights": adapter, "dim_from_weights": adapter is not None}
    config = Config.model_validate({**themes(base.model), "network": adapting, "loop": {"seed": 0}, "sources": {}})
    source = open_source(config.model)
    family = find_family(None, source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blueprint = family.read(source, config.model, config.noise)
    model = family.load(blueprint, config.model, dtype=torch.float32, device=device)
    method = make_method(config)
    method.prepare(model)
    method.modules.eval()
    return Artist(base=base, model=model, method=method)


def themes(options: Mapping[str, str | bool]) -> dict[str, dict[str, str | bool]]:
    """Options by the theme that they belong to."""
    known = vocabulary()
    found: dict[str, dict[str, str | bool]] = {}
    for name, value in options.items():
        found.setdefault(known[name].theme, {})[name] = value
    return found
