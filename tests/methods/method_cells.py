"""The cells of docs/methods.md: each method on each family, the run of its test, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from families.toys import ToyShelf
from sfumato.training.run import Run
from toy_runs import build_toy_run, make_images

FAMILIES: Mapping[str, tuple[str, str]] = {  # column -> family and variant of its toy
    "sd": ("sd", ""),
    "sd2": ("sd", "2-v"),
    "sdxl": ("sdxl", ""),
    "sd3": ("sd3", ""),
    "sd35": ("sd3", "3.5-medium"),
    "flux": ("flux", ""),
    "flux_kontext": ("flux_kontext", ""),
    "chroma": ("chroma", ""),
    "lumina": ("lumina", ""),
}
WORD = "zwx"
NEW_WORD: dict[str, Any] = {
    "method": "textual_inversion", "network_dim": None, "token_string": WORD, "learning_rate": "1e-4",
    "use_object_template": True, "num_vectors_per_token": 2,
}  # fmt: skip
FULL: dict[str, Any] = {"method": "full", "network_dim": None, "learning_rate": "1e-4"}
OPTIONS: dict[str, dict[str, Any]] = {  # method -> what asks for it
    "adapter": {},
    "full": FULL,
    "full_text": {**FULL, "train_text_encoder": True},
    "textual_inversion": NEW_WORD,
    "control_net": {"method": "control_net", "network_dim": None},
    "lllite": {"method": "lllite", "network_dim": 4},
    "lllite_version_2": {"method": "lllite", "network_dim": 4, "lllite_version": 2},
    "lllite_latents": {"method": "lllite", "network_dim": 4, "lllite_cond_input": "latent"},
    "leco": {"method": "leco", "max_denoising_steps": 4},
    "inpainting": {},
    "inpainting_full": FULL,
    "inpainting_words": NEW_WORD,
}
INPAINTING = ("inpainting", "inpainting_full", "inpainting_words")
ROWS: Mapping[str, tuple[str, ...]] = {  # row of the table -> its methods
    "adapter": ("adapter",),
    "full": ("full", "full_text"),
    "textual_inversion": ("textual_inversion",),
    "control_net": ("control_net",),
    "lllite": ("lllite", "lllite_version_2", "lllite_latents"),
    "leco": ("leco",),
    "inpainting": INPAINTING,
}
UNETS = ("sd", "sd2", "sdxl")
WITH_T5 = ("sd3", "sd35", "flux", "flux_kontext", "chroma")
CONTROLLED = ("control_net", "lllite", "lllite_version_2", "lllite_latents")
FIRST_LAYERS = {  # of models for inpainting: the layer whose inputs are more, how many
    "sd": ("model.diffusion_model.input_blocks.0.0.weight", 9),
    "sd2": ("model.diffusion_model.input_blocks.0.0.weight", 9),
    "sdxl": ("model.diffusion_model.input_blocks.0.0.weight", 9),
    "flux": ("img_in.weight", 384),
}
NOES: dict[tuple[str, str], tuple[str, str]] = {  # row, family -> the error's code, and why
    **{
        ("control_net", name): ("control-net-unsupported", "diffusers has no class for them")
        for name in ("chroma", "lumina")
    },
    ("control_net", "flux_kontext"): (
        "control-net-unsupported", "diffusers has no pipeline that joins a reference image and a ControlNet"
    ),
    **{
        ("inpainting", name): ("inpainting-model-missing", "no such checkpoint is published")
        for name in ("sd3", "sd35", "flux_kontext", "chroma", "lumina")
    },
}  # fmt: skip
CONCEPTS = '[[prompts]]\ntarget = "a cat"\npositive = "a dog"\nresolution = 64\n'
NO_IMAGES = ("train_data_dir", "caption_extension", "resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso")


def list_cells(row: str, family: str) -> list[str]:
    """The names of a cell's runs; none where the answer is no."""
    if (row, family) in NOES:
        return []
    others = () if family in UNETS else ("lllite_version_2",)  # whose only version it is
    return [f"{method}-{family}" for method in ROWS[row] if method not in others]


def list_every_cell() -> list[str]:
    return [cell for row in ROWS for family in FAMILIES for cell in list_cells(row, family)]


def list_model_options(cell: str, toy_shelf: ToyShelf, folder: Path) -> dict[str, Any]:
    """The options of the base model; folder: for one that is made for inpainting."""
    method, column = cell.split("-")
    family, variant = FAMILIES[column]
    options: dict[str, Any] = toy_shelf.options(family, variant=variant).model_dump(exclude_defaults=True)
    toy = toy_shelf.paths(family, variant=variant)
    options["tokenizer"] = [str(path) for name, path in toy.items() if name.startswith("tokenizer")]
    if family == "flux_kontext":
        options["model_type"] = family
    if method in INPAINTING and column in FIRST_LAYERS:
        options["pretrained_model_name_or_path"] = widen(options["pretrained_model_name_or_path"], column, folder)
    return options


def widen(checkpoint: Path, column: str, folder: Path) -> Path:
    """The same model for inpainting, written once."""
    path = folder / "inpainting.safetensors"
    if not path.exists():
        name, channels = FIRST_LAYERS[column]
        tensors = load_file(checkpoint)
        shape = (tensors[name].shape[0], channels, *tensors[name].shape[2:])
        tensors[name] = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / channels
        save_file(tensors, path)
    return path


def build_cell(cell: str, model: Mapping[str, Any], folder: Path, name: str, **more: Any) -> Run:
    """The run of a cell before its first step; model: the options of the base model. name: of its output folder."""
    method, column = cell.split("-")
    images = folder / "images"
    if not images.exists():
        make_images(images, 2)
    options: dict[str, Any] = {"learning_rate": "1e-2", **model, **OPTIONS[method]}
    if method in INPAINTING:
        options["train_inpainting"] = True
    if method == "full_text" and column in WITH_T5:
        options["train_t5xxl"] = True
    if column == "flux_kontext":
        options["reference_data_dirs"] = [images]
    if method in CONTROLLED:
        options["conditioning_data_dir"] = images
    if method == "leco":
        (folder / "concepts.toml").write_text(CONCEPTS)
        options |= {**dict.fromkeys(NO_IMAGES), "reference_data_dirs": None, "prompts_file": folder / "concepts.toml"}
    options |= more
    toy = {"pretrained_model_name_or_path": Path(options.pop("pretrained_model_name_or_path"))}
    return build_toy_run(toy, images, folder / name, max_train_steps=2, **options)
