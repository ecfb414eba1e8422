"""The toys that every family's contract is tested with, as options of both layouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from families.loading import load_model
from families.toys import ToyShelf
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.families.base import Family

CASES = {
    "sd": {},
    "sd2": {"v2": True},
    "sd2_v": {"v_parameterization": True},
    "sd2_v_zero": {"v_parameterization": True},
    "sdxl": {},
    "flux": {"apply_t5_attn_mask": True},
    "chroma": {"apply_t5_attn_mask": True},
    "lumina": {},
    "sd3": {},
    "sd35": {"apply_t5_attn_mask": True, "apply_lg_attn_mask": True},
}
ALWAYS_MASKED = {"chroma"}
VARIANTS = {  # case -> family and variant of its toy
    "sd2": ("sd", "2"),
    "sd2_v": ("sd", "2-v"),
    "sd2_v_zero": ("sd", "2-v"),
    "sd35": ("sd3", "3.5-medium"),
}
NOISE = {"sd2_v_zero": NoiseOptions(zero_terminal_snr=True)}
UNMASKED = {"apply_t5_attn_mask": False, "apply_lg_attn_mask": False}  # diffusers' pipelines have no masks
each_case = pytest.mark.parametrize("case", sorted(CASES))


@dataclass(frozen=True)
class Toys:
    """One family's toy in both layouts, and the options that it is loaded with."""

    original: ModelOptions
    diffusers: ModelOptions
    unmasked: (
        ModelOptions  # diffusers' layout, text as diffusers' pipelines encode it: masked only where that is needed
    )
    folder: Path  # in diffusers' layout
    noise: NoiseOptions

    def load(self, options: ModelOptions, dtype: torch.dtype = torch.float32) -> Family:
        return load_model(options, dtype, self.noise)


def find_toys(shelf: ToyShelf, case: str) -> Toys:
    family, variant = VARIANTS.get(case, (case, ""))
    paths = shelf.paths(family, variant=variant)
    folder = shelf.paths(family, "diffusers", variant)["pretrained_model_name_or_path"]
    components = {name: str(path) for name, path in paths.items() if not name.startswith("tokenizer")}
    diffusers = ModelOptions(pretrained_model_name_or_path=str(folder), **CASES[case])
    return Toys(
        original=ModelOptions(**components, **CASES[case]),
        diffusers=diffusers,
        unmasked=diffusers.model_copy(update={**UNMASKED, "apply_t5_attn_mask": case in ALWAYS_MASKED}),
        folder=folder,
        noise=NOISE.get(case, NoiseOptions()),
    )
