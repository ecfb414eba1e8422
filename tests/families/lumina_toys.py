"""Help for tests of Lumina-Image 2.0: its toy loaded, and what it predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.loading import load_model
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes
from sfumato.families import _lumina_files
from sfumato.families.base import Family
from sfumato.families.encoding import encode_with_grad
from sfumato.families.part import DENOISER_PREFIX

CAPTIONS = ["a cat", "a red cup of coffee on a wooden table with a cat and a dog"]
SYSTEM = "you draw a (wide) picture"
Options = dict[str, str]


def load(dtype: torch.dtype = torch.float32, noise: NoiseOptions | None = None, **options: Any) -> Family:
    return load_model(ModelOptions(**options), dtype, noise, "lumina")


@torch.no_grad()
def prediction(model: Family, captions: list[str], *, spoil: float = 0.0, longer: int = 0) -> Tensor:
    """With `spoil` and `longer`, text beyond the mask is replaced by that value, and there is that much more of it."""
    features = encode_with_grad(model, "gemma2", captions)
    hidden = features["hidden"].masked_fill(~features["mask"][..., None], spoil)
    padded = {
        "hidden": torch.nn.functional.pad(hidden, (0, 0, 0, longer), value=spoil),
        "mask": torch.nn.functional.pad(features["mask"], (0, longer)),
    }
    given = model.condition({"gemma2": padded}, Sizes.from_size(len(captions), 64, 64), None)
    x = torch.randn(len(captions), 16, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.predict(x, torch.full((len(captions),), 500.0), given)


def state(path: str) -> dict[str, Tensor]:
    return load_file(path)


def write_whole_model(toy: Options, path: Path) -> Path:
    """One file with everything, in the layout that other programs pass around."""
    tensors = {DENOISER_PREFIX + key: tensor for key, tensor in state(toy["pretrained_model_name_or_path"]).items()}
    tensors |= {_lumina_files.LUMINA_TEXT_PREFIX + key: tensor for key, tensor in state(toy["gemma2"]).items()}
    tensors |= {"vae." + key: tensor for key, tensor in state(toy["ae"]).items()}
    tensors["text_encoders.gemma2_2b.logit_scale"] = torch.ones(())
    save_file(tensors, path)
    return path
