"""A loaded model that makes images of prompts, with or without an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from sfumato.config import Config
from sfumato.config.schema import vocabulary
from sfumato.demo.base import Base
from sfumato.families.base import Family
from sfumato.families.detection import describe_model
from sfumato.methods import make_method
from sfumato.methods.base import Method
from sfumato.sample import generate
from sfumato.sampling.request import ImageRequest


@dataclass(frozen=True, kw_only=True)
class DemoPipeline:
    """A model, its adapter, and how the base model samples."""

    base: Base
    model: Family
    method: Method

    def generate(self, prompt: str, seed: int) -> Image.Image:
        """A function of weights, prompt and seed alone."""
        request = ImageRequest(
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
        pixels = (generate(self.model, self.method, request) + 1) * 127.5
        return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())


def load_pipeline(base: Base, *, adapter: Path | None = None) -> DemoPipeline:
    """Load the base model, with the adapter file where one is given; a new adapter changes nothing."""
    network = {"network_module": "networks.lora", "network_weights": adapter, "dim_from_weights": adapter is not None}
    themes = group_by_theme(base.model) | {"network": network, "loop": {"seed": 0}}
    config = Config.model_validate({**themes, "sources": {}})
    family, blueprint = describe_model(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = family(blueprint, config.model, dtype=torch.float32, device=device)
    method = make_method(config)
    method.plan(blueprint)
    method.change_frozen(model)
    model.load()
    method.prepare(model)
    method.modules.eval()
    return DemoPipeline(base=base, model=model, method=method)


def group_by_theme(options: Mapping[str, str | bool]) -> dict[str, dict[str, str | bool]]:
    """Options by the theme that they belong to."""
    known = vocabulary()
    themes: dict[str, dict[str, str | bool]] = {}
    for name, value in options.items():
        themes.setdefault(known[name].theme, {})[name] = value
    return themes
