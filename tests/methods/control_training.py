"""Help for tests of ControlNet training: a model with one, and a trained one of each family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families.toys import ToyShelf
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import CONTROL, ImageInput, Sizes
from sfumato.families import register_families
from sfumato.families.base import Family, find_family
from sfumato.families.control_net_files import add_control_net
from sfumato.families.source import open_source
from sfumato.sample import encode_prompts
from toy_runs import make_controlled_images, train_toy

OPTIONS = {"method": "control_net", "network_dim": None, "cache_latents": True, "max_train_steps": 4}


def load_with(options: ModelOptions, given: Path | None, seed: int = 7) -> Family:
    """The model with this ControlNet, or a new one."""
    register_families()
    source = open_source(options)
    family = find_family(None, source)
    blueprint = family.read(source, options, NoiseOptions())
    options = options.model_copy(update={"controlnet_model_name_or_path": given and str(given)})
    blueprint = add_control_net(family, blueprint, options, seed)
    model = family(blueprint, options, dtype=torch.float32, device=torch.device("cpu"))
    model.load()
    return model


def predict(model: Family, control: Tensor | None) -> Tensor:
    text = encode_prompts(model, ["a cat"], Sizes.from_size(1, 64, 64), None)
    x = torch.randn(1, model.latents.channels, 8, 8, generator=torch.Generator().manual_seed(1))
    images = {} if control is None else {CONTROL: ImageInput(pixels=control)}
    if control is not None and model.takes_control_latents:
        images = {CONTROL: ImageInput(latents=torch.ones_like(x) * control.mean())}
    with torch.no_grad():
        return model.predict(x, torch.tensor([500.0]), text, images)


@dataclass(frozen=True)
class Trained:
    """Four steps and a preview; images and their control images."""

    family: str
    toy: Mapping[str, Path]
    options: ModelOptions
    images: Path
    controls: Path
    output: Path

    def train(self, output: Path, **options: Any) -> Path:
        return train_toy(
            self.toy, self.images, output, **{**OPTIONS, "conditioning_data_dir": self.controls, **options}
        )

    @property
    def control_image(self) -> Path:
        return self.controls / "2_cat" / "0.png"

    @property
    def file(self) -> Path:
        return self.output / "lora.safetensors"


@dataclass
class ControlShelf:
    """Trained ControlNets by family, each trained when it is first asked for."""

    toys: ToyShelf
    folder: Path
    _made: dict[str, Trained] = field(default_factory=dict)

    def get(self, family: str) -> Trained:
        if family not in self._made:
            self._made[family] = self._train(family)
        return self._made[family]

    def _train(self, family: str) -> Trained:
        root = self.folder / family
        images, controls = make_controlled_images(root)
        toy, options = self.toys.paths(family), self.toys.options(family)
        trained = Trained(family, toy, options, images, controls, root / "out")
        prompts = root / "prompts.txt"
        prompts.write_text(f"a cat --w 64 --h 64 --s 2 --d 1 --cn {trained.control_image}\n")
        trained.train(trained.output, sample_prompts=prompts, sample_every_n_steps=4)
        return trained
