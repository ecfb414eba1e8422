"""The wrong file for an option: one line that names the option and says what the file is or lacks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families.loading import load_family
from families.toys import ToyShelf
from sfumato.config import NoiseOptions
from sfumato.errors import UserError
from sfumato.families import register_families
from sfumato.families._file_kinds import describe_keys
from sfumato.families.base import find_family
from sfumato.families.source import open_source

BASE = "pretrained_model_name_or_path"
BASE_CODES = {
    "model-family-mismatch", "model-family-unknown", "model-path-missing", "network-file-missing",
    "not-safetensors",
}  # fmt: skip
SLOTS = {
    "flux": ("clip_l", "t5xxl", "ae"), "chroma": ("t5xxl", "ae"), "sd3": ("clip_l", "clip_g", "t5xxl", "vae"),
    "lumina": ("gemma2", "ae"), "sd": ("vae",), "sdxl": ("vae",),
}  # fmt: skip
# What fits, by the option. Stable Diffusion 3's autoencoder has the keys of FLUX.1's and nothing in a file tells them
# apart; those of Stable Diffusion 1 and XL are alike, too. In a folder each says what it is scaled by.
LATENTS_OF_16 = {"flux ae", "chroma ae", "lumina ae", "sd3"}
FIT = {
    ("flux", "clip_l"): {"flux clip_l", "sd3", "flux/text_encoder", "sd3/text_encoder", "sd/text_encoder"},
    ("flux", "t5xxl"): {"flux t5xxl", "chroma t5xxl", "flux/text_encoder_2"},
    ("flux", "ae"): {*LATENTS_OF_16, "flux/", "lumina/", "flux/vae", "lumina/vae"},
    ("chroma", "t5xxl"): {"flux t5xxl", "chroma t5xxl", "flux/text_encoder_2"},
    ("chroma", "ae"): {*LATENTS_OF_16, "flux/", "lumina/", "flux/vae", "lumina/vae"},
    ("sd3", "clip_l"): {"flux clip_l", "sd3", "flux/text_encoder", "sd3/text_encoder", "sd/text_encoder"},
    ("sd3", "clip_g"): {"sd3", "sd3/text_encoder_2"},
    ("sd3", "t5xxl"): {"sd3", "sd3/text_encoder_3"},
    ("sd3", "vae"): {*LATENTS_OF_16, "sd3/", "sd3/vae"},
    ("lumina", "gemma2"): {"lumina gemma2", "lumina/text_encoder"},
    ("lumina", "ae"): {*LATENTS_OF_16, "flux/", "lumina/", "flux/vae", "lumina/vae"},
    ("sd", "vae"): {"sd", "sdxl", "sd/", "sd/vae"},
    ("sdxl", "vae"): {"sd", "sdxl"},
}
EXPECTED = {  # file -> pattern on code and message, whatever option it is given for
    "empty": "an empty file", "lora": "an adapter (LoRA or the like)",
    "diffusers lora": "an adapter (LoRA or the like)",
    "text": "not-safetensors", "nothing": "model-path-missing",
    "folder": "network-folder-without-weights|model-config-missing",
    "short t5": "lacks encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight|but a T5 text encoder",
    "old t5": "lacks encoder.block.0.layer.1.DenseReluDense.wi_0.weight|but a T5 text encoder",
    "flux": "the denoiser of an image model", "chroma": "the denoiser of an image model",
    "lumina": "the denoiser of an image model", "sdxl": "a whole image model|its latents have 4 channels",
    "lumina gemma2": "a Gemma 2 text encoder", "flux/transformer": "the denoiser of an image model",
    "sd/unet": "the denoiser of an image model",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(toy_shelf: ToyShelf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Everything that could be given by mistake: all toys' files and folders, and files of other kinds."""
    found: dict[str, Path] = {}
    for family in SLOTS:
        paths = toy_shelf.paths(family)
        found |= {family: paths[BASE]} | {f"{family} {name}": paths[name] for name in SLOTS[family] if name in paths}
    for family in ("flux", "sd3", "lumina", "sd"):
        folder = toy_shelf.paths(family, "diffusers")[BASE]
        found |= {f"{family}/": folder}
        found |= {f"{family}/{each.name}": each for each in sorted(folder.iterdir()) if each.is_dir()}
    made = tmp_path_factory.mktemp("made")

    def save(name: str, state: dict[str, torch.Tensor]) -> None:
        found[name] = made / f"{name}.safetensors".replace(" ", "_")
        save_file(state, found[name])

    t5 = load_file(found["flux t5xxl"])
    save("empty", {})
    save("lora", {f"lora_unet_img_in.lora_{which}.weight": torch.ones(2, 2) for which in ("down", "up")})
    save("diffusers lora", {f"transformer.x_embedder.lora_{which}.weight": torch.ones(2, 2) for which in "AB"})
    save("short t5", {key: tensor for key, tensor in t5.items() if "relative_attention_bias" not in key})
    save("old t5", {key.replace("wi_0", "wi"): tensor for key, tensor in t5.items() if "wi_1" not in key})
    found["text"], found["nothing"], found["folder"] = made / "text.safetensors", made / "none.safetensors", made / "d"
    found["text"].write_text("no weights at all")
    found["folder"].mkdir()
    return found


def read(toy_shelf: ToyShelf, family: str, option: str, path: Path) -> Any:
    register_families()
    model = toy_shelf.options(family).model_copy(update={option: str(path)})
    source = open_source(model)
    return find_family(family, source).read(source, model, NoiseOptions())


def find_error(toy_shelf: ToyShelf, family: str, option: str, path: Path) -> UserError | None:
    """What reading the model with this file for the option raises; None where the file fits."""
    try:
        read(toy_shelf, family, option, path)
    except UserError as error:
        return error
    return None


@pytest.mark.parametrize(("family", "option"), FIT)
def test_every_wrong_file_for_every_option(
    family: str, option: str, toy_shelf: ToyShelf, files: dict[str, Path]
) -> None:
    fitting: set[str] = set()
    for name, path in files.items():
        error = find_error(toy_shelf, family, option, path)
        if error is None:
            fitting.add(name)
            continue
        text = str(error)
        if error.code not in ("clip-encoders-swapped", "clip-pooled-size-mismatch"):  # these name both options
            assert text.startswith(f"--{option}: "), (name, text)
            assert str(path) in text, (name, text)
        assert "\n" not in text
        pattern = EXPECTED.get(name, "").replace("(", r"\(").replace(")", r"\)")
        assert re.search(pattern, f"{error.code} {text}"), (name, error.code, text)
    assert fitting == FIT[family, option]


@pytest.mark.parametrize("family", sorted(SLOTS))
def test_every_wrong_file_as_the_base_model(family: str, toy_shelf: ToyShelf, files: dict[str, Path]) -> None:
    for name, path in files.items():
        if name in (family, f"{family}/"):
            continue
        if name == "flux/transformer" and family == "flux":  # the transformer's folder is one, too
            continue
        with pytest.raises(UserError) as error:
            read(toy_shelf, family, BASE, path)
        assert str(path) in str(error.value), (name, str(error.value))
        assert error.value.code in BASE_CODES, (name, error.value.code)


def test_swapped_encoders(toy_shelf: ToyShelf, files: dict[str, Path]) -> None:
    """Their widths add up to the same, so that only the order tells."""
    register_families()
    clips = {"clip_l": str(files["sd3/text_encoder_2"]), "clip_g": str(files["sd3/text_encoder"])}
    model = toy_shelf.options("sd3").model_copy(update=clips)
    source = open_source(model)
    with pytest.raises(UserError) as error:
        find_family("sd3", source).read(source, model, NoiseOptions())
    assert error.value.code == "clip-encoders-swapped"


def test_an_incomplete_file_is_reported_with_its_option(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """A hole that the header's first look does not find is found while it is loaded."""
    register_families()
    state = load_file(toy_shelf.paths("flux")["t5xxl"])
    del state["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(state, tmp_path / "t5.safetensors")
    model = toy_shelf.options("flux").model_copy(update={"t5xxl": str(tmp_path / "t5.safetensors")})
    source = open_source(model)
    family = find_family("flux", source)
    with pytest.raises(UserError, match=r"--t5xxl: .*t5.safetensors .*encoder\.block\.1") as error:
        load_family(family, family.read(source, model, NoiseOptions()), model)
    assert error.value.code == "network-tensors-missing"


def test_a_folder_of_an_autoencoder_that_does_not_say_its_scale(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Early ones do not; it is then the model's usual one."""
    folder = toy_shelf.paths("sd", "diffusers")[BASE] / "vae"
    config = (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(re.sub(r'\s*"scaling_factor": [\d.]+,', "", config))
    (tmp_path / "diffusion_pytorch_model.safetensors").symlink_to(folder / "diffusion_pytorch_model.safetensors")
    assert read(toy_shelf, "sd", "vae", tmp_path).latents.scale == 0.18215


@pytest.mark.parametrize(("keys", "kind"), [
    ((), "an empty file"),
    (("a.weight",), ""),
    (("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"),
     "a language model"),
    (("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",), "an OpenCLIP text encoder"),
    (("encoder.block.0.layer.0.SelfAttention.q.weight",), "part of a T5 text encoder"),
])  # fmt: skip
def test_what_keys_are_those_of(keys: tuple[str, ...], kind: str) -> None:
    assert describe_keys(keys) == kind
