"""Autoencoders in the layouts that other programs write decode to what diffusers' own class gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.toys import ToyShelf
from sfumato.errors import UserError
from sfumato.families import _vae
from sfumato.families.part import Part
from sfumato.families.source import Source

SCALING = {"scaling_factor": 0.18215}
LDM_NAMES = {".attn_1.q.": ".attn_1.to_q.", ".attn_1.k.": ".attn_1.to_k.", ".attn_1.v.": ".attn_1.to_v.",
             ".attn_1.proj_out.": ".attn_1.to_out.0."}  # fmt: skip
OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
TRAINING = {
    "loss.logvar": torch.tensor(0.0), "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 4, 1, 1),
    "loss.discriminator.main.0.weight": torch.zeros(4, 3, 2, 2), "model_ema.decay": torch.tensor(0.9),
    "model_ema.decoderconv_inweight": torch.ones(2),
}  # fmt: skip
State = dict[str, Tensor]


def rename(state: State, names: dict[str, str], *, flat: bool = False) -> State:
    """flat: 1x1 kernels of attention become matrices."""
    renamed: State = {}
    for key, tensor in state.items():
        flatten = flat and ".attn_1." in key and tensor.ndim == 4
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = tensor[:, :, 0, 0].clone() if flatten else tensor
    return renamed


def with_prefix(state: State, prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


LAYOUTS: dict[str, Callable[[State, State], State]] = {  # from the state in LDM's names and in diffusers'
    "ldm": lambda ldm, ours: ldm,
    "ldm, kl": lambda ldm, ours: ldm | TRAINING,
    "ldm, prefixed": lambda ldm, ours: with_prefix(ldm | TRAINING, "first_stage_model."),
    "ldm, vae.": lambda ldm, ours: with_prefix(ldm, "vae."),
    "ldm, to_q": lambda ldm, ours: rename(ldm, LDM_NAMES),
    "ldm, to_q, flat": lambda ldm, ours: rename(ldm, LDM_NAMES, flat=True),
    "ldm, query": lambda ldm, ours: rename(rename(ldm, LDM_NAMES), OLD_NAMES),
    "ldm, half a file more": lambda ldm, ours: ldm | {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)},
    "diffusers": lambda ldm, ours: ours,
    "diffusers, kl": lambda ldm, ours: ours | TRAINING,
    "diffusers, query": lambda ldm, ours: rename(ours, OLD_NAMES),
    "diffusers, prefixed": lambda ldm, ours: with_prefix(ours | TRAINING, "first_stage_model."),
    "diffusers, vae.": lambda ldm, ours: with_prefix(ours, "vae."),
}


@pytest.fixture(scope="module")
def reference(toy_shelf: ToyShelf) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(toy_shelf.paths("sd", "diffusers")["pretrained_model_name_or_path"] / "vae")


@pytest.fixture(scope="module")
def ldm(toy_shelf: ToyShelf) -> State:
    whole = load_file(toy_shelf.paths("sd")["pretrained_model_name_or_path"])
    return {key.removeprefix(_vae.VAE_PREFIX): t for key, t in whole.items() if key.startswith(_vae.VAE_PREFIX)}


def load(path: Path) -> Any:
    network = _vae.read_vae_option(Source(path), SCALING)
    part = Part(network, _vae.build, dtype=torch.float32, device=torch.device("cpu"))
    part.load()
    return part.module


@torch.no_grad()
def same_output(module: Any, reference: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    latents, pixels = torch.randn(1, 4, 4, 4, generator=generator), torch.randn(1, 3, 32, 32, generator=generator)
    decoded = torch.equal(module.decode(latents).sample, reference.decode(latents).sample)
    return decoded and torch.equal(module.encode(pixels).latent_dist.mean, reference.encode(pixels).latent_dist.mean)


@pytest.mark.parametrize(("layout", "pickled"), [*((layout, False) for layout in LAYOUTS), ("ldm, kl", True)])
def test_every_layout(layout: str, pickled: bool, ldm: State, reference: Any, tmp_path: Path) -> None:
    state = LAYOUTS[layout](ldm, dict(reference.state_dict()))
    path = tmp_path / ("vae.pt" if pickled else "vae.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, path) if pickled else save_file(state, path)
    assert same_output(load(path), reference)


@pytest.mark.parametrize(("ending", "old"), [("safetensors", True), ("bin", True), ("bin", False), ("fp16.bin", False)])
def test_every_folder(ending: str, old: bool, reference: Any, tmp_path: Path) -> None:
    reference.save_config(tmp_path)
    state = rename(dict(reference.state_dict()), OLD_NAMES if old else {})
    path = tmp_path / f"diffusion_pytorch_model.{ending}"
    torch.save(state, path) if ending.endswith("bin") else save_file(state, path)
    assert same_output(load(tmp_path), reference)


@pytest.mark.parametrize("spoiled", ["decoder.up.0.block.9.conv1.weight", "encoder.conv_in.lora_A.weight"])
def test_what_would_change_the_result_is_refused(spoiled: str, ldm: State, tmp_path: Path) -> None:
    save_file(ldm | {spoiled: torch.ones(2, 2)}, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=spoiled.split(".")[-2]) as error:
        load(tmp_path / "vae.safetensors")
    assert error.value.code in ("network-keys-unknown", "network-key-unexpected")
