"""An exercise: a model family that nobody has heard of, in this one file, trains, saves and resumes unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes, Tensors
from sfumato.diffusion.objective import LatentSpec, RectifiedFlow
from sfumato.families.base import FAMILIES, Family
from sfumato.families.blueprint import Blueprint, Sampling
from sfumato.families.part import Builder, Network, PartSpec
from sfumato.families.source import Source
from sfumato.families.weights import Weights
from sfumato.formats.keymap import KeyMap, KeyRule, make_identity_map
from toy_runs import equal_tensors, make_images, read_metrics, read_weights, train_toy

KEYS = KeyMap([KeyRule("mix.qk", ("query", "key")), KeyRule("{*}", ("{*}",))])


class Denoiser(nn.Module):
    """Per-pixel, with a stacked pair of layers as real transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        pixels = x.permute(0, 2, 3, 1)
        extra = torch.stack([t, text], -1)[:, None, None].expand(*pixels.shape[:3], 2)
        seen = torch.cat([pixels, extra.to(pixels)], -1)
        return (self.out(self.query(seen) * torch.sigmoid(self.key(seen))).permute(0, 3, 1, 2),)


class Letters(nn.Module):
    """A text encoder: one number for a caption."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(128, 1)

    def forward(self, codes: Tensor) -> Tensor:
        return self.table(codes).squeeze(-1)


def spec(name: str, key_map: KeyMap, prefix: str, *targets: str) -> PartSpec:
    return PartSpec(
        name=name, key_map=key_map, key_prefix=f"{name}.", adapter_map=key_map, adapter_prefix=prefix,
        targets=targets,
    )  # fmt: skip


@FAMILIES.register("exercise")
class Exercise(Family):
    name = "exercise"
    text_parts = ("letters",)
    bucket_step = 32
    sampling = Sampling(width=64, height=64, steps=4, scale=1.0, guidance=None, size_multiple=32)

    @classmethod
    def detect(cls, source: Source) -> bool:
        return "denoiser.mix.qk.weight" in source.shapes

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        specs = (
            spec("denoiser", KEYS, "lora_unet", "query", "key", "out"),
            spec("letters", make_identity_map(), "lora_te", "table"),
            spec("vae", make_identity_map(), ""),
        )
        networks: dict[str, Network] = {}
        for part in specs:
            weights = Weights(file=source.file, key_map=part.key_map, prefix=part.key_prefix)
            networks[part.name] = Network(spec=part, config={}, weights=weights)
        return Blueprint(
            source=source, title="Exercise", base_model_version="exercise", architecture="exercise",
            networks=networks, text_parts=cls.text_parts,
            objective=RectifiedFlow(grid=lambda scheduler, steps, tokens: scheduler.set_timesteps(steps)),
            latents=LatentSpec(channels=3, downscale=8, patch=1, scale=1.0, shift=0.0, size_multiple=32),
        )  # fmt: skip

    @classmethod
    def builders(cls, blueprint: Blueprint) -> Mapping[str, Builder]:
        return {
            "denoiser": lambda _: Denoiser(),
            "letters": lambda _: Letters(),
            "vae": lambda _: nn.Conv2d(3, 3, 8, stride=8),
        }

    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        counts: list[Tensor] = []
        for caption in captions:
            codes = torch.tensor([min(ord(letter), 127) for letter in caption + " "])
            counts.append(torch.bincount(codes, minlength=128))
        return [{"number": number} for number in self.parts[part].module(torch.stack(counts).float())]

    def text_fingerprint(self, part: str) -> str:
        return ""

    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        return {"text": features["letters"]["number"]}

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return self.vae(pixels) + 0.1 * noise

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents, scale_factor=8)

    def make_inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        return {"x": noisy, "t": t / 1000, "text": conditioning["text"]}


def checkpoint(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    parts: dict[str, Any] = {"denoiser": Denoiser(), "letters": Letters(), "vae": nn.Conv2d(3, 3, 8, stride=8)}
    maps = {"denoiser": KEYS, "letters": make_identity_map(), "vae": make_identity_map()}
    state: dict[str, Tensor] = {}
    for name, module in parts.items():
        original = maps[name].to_original(module.state_dict())
        state |= {f"{name}.{key}": tensor.detach() for key, tensor in original.items()}
    save_file(state, folder / "exercise.safetensors")
    return {"pretrained_model_name_or_path": folder / "exercise.safetensors"}


def test_a_new_family_trains_saves_samples_and_resumes(tmp_path: Path) -> None:
    toy, images = checkpoint(tmp_path), make_images(tmp_path / "images")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    options = {"max_train_steps": 8, "cache_latents": True, "timestep_sampling": "uniform", "bucket_reso_steps": 32}
    straight = train_toy(toy, images, tmp_path / "straight", **options, sample_prompts=prompts, sample_every_n_steps=8)
    parts = tmp_path / "parts"
    train_toy(toy, images, parts, **options, save_every_n_steps=3, save_state=True)
    train_toy(toy, images, parts, **options, resume=parts / "lora-step00000003-state")
    assert equal_tensors(read_weights(straight), read_weights(parts))
    assert read_metrics(straight) == read_metrics(parts)
    names = {name.partition(".")[0] for name in read_weights(straight)}
    assert names == {"lora_unet_mix_qk", "lora_unet_out", "lora_te_table"}
    assert read_weights(straight)["lora_unet_mix_qk.lora_up.weight"].shape == (16, 2)
    assert len(list((straight / "sample").iterdir())) == 1


def test_full_training_of_a_new_family(tmp_path: Path) -> None:
    """Its denoiser, text encoder included, back into the one file; the rest keeps its bytes."""
    toy, images = checkpoint(tmp_path), make_images(tmp_path / "images")
    options = {"method": "full", "network_dim": None, "train_text_encoder": True, "max_train_steps": 2}
    found = read_weights(
        train_toy(toy, images, tmp_path / "out", **options, timestep_sampling="uniform", bucket_reso_steps=32)
    )
    before = load_file(toy["pretrained_model_name_or_path"])
    assert found.keys() == before.keys()
    moved = {name for name in found if not torch.equal(found[name], before[name])}
    assert moved == {name for name in before if not name.startswith("vae.")}
