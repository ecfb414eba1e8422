"""Trains sfumato-tiny's autoencoder: 64 pixels to 16 x 16 x 4 latents; goes on where the last sitting stopped.

python recipes/tiny/autoencoder.py WORK [--minutes M] [--decoder]
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import torch
import torch.nn.functional as F
from concepts import COLOURS, CONCEPTS
from torch import Tensor

from sfumato.memory.host import keep_freed_memory

CONFIG = {
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 4,
    "norm_num_groups": 4,  # at least 4 channels to a group: fewer is nearly instance norm, and loses the colours
    "scaling_factor": 0.18215,
}
STEPS, DECODER_STEPS, BATCH = 2_400, 2_000, 16
CROPS = 0.8  # share of the steps on 32 x 32 crops, which are four times as quick
RATE, WARM_UP = 2e-3, 200
KL = 1e-5
AVERAGE = 0.995
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; the next call goes on")
    parser.add_argument("--steps", type=int, help=f"[default: {STEPS}, with --decoder {DECODER_STEPS}]")
    parser.add_argument("--decoder", action="store_true", help="train the decoder on alone; latents stay as they are")
    asked = parser.parse_args()
    keep_freed_memory()
    pictures.fetch(asked.work)
    task = refining(asked.work, asked.steps) if asked.decoder else learning(asked.work, asked.steps)
    train(task, asked.work, asked.minutes)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What trains, and how long."""

    state: Path
    vae: Any
    average: Any
    steps: int
    cropped: float  # share of the steps on crops

    def parameters(self) -> list:
        return [parameter for parameter in self.vae.parameters() if parameter.requires_grad]


def learning(work: Path, steps: int | None) -> Task:
    vae, average = new_autoencoder(), new_autoencoder()
    state = work / "autoencoder-state.pt"
    return Task(state=state, vae=vae, average=average, steps=steps or STEPS, cropped=CROPS)


def refining(work: Path, steps: int | None) -> Task:
    """Only what makes pictures of latents, so that a denoiser that was trained on these latents stays right."""
    vae, average = (trained_autoencoder(work / "autoencoder-state.pt") for _ in range(2))
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    state = work / "decoder-state.pt"
    return Task(state=state, vae=vae, average=average, steps=steps or DECODER_STEPS, cropped=0.0)


def new_autoencoder() -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(SEED)
    return AutoencoderKL.from_config(CONFIG)


def trained_autoencoder(state: Path) -> Any:
    vae = new_autoencoder()
    vae.load_state_dict(torch.load(state, weights_only=True)["average"])
    return vae


def train(task: Task, work: Path, minutes: float) -> None:
    """Every drawing of both packages but each twentieth, and the base's concepts as often as all others together."""
    learned, kept = drawings(work)
    optimizer = torch.optim.AdamW(task.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    step = 0
    if task.state.is_file():
        saved = torch.load(task.state, weights_only=True)
        task.vae.load_state_dict(saved["vae"])
        task.average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    began = time.monotonic()
    while step < task.steps and time.monotonic() - began < 60 * minutes:
        loss = train_step(task, optimizer, learned, step)
        step += 1
        average_into(task.average, task.vae)
        if step % 100 == 0 or step == task.steps:
            quality = f"held-out {psnr(task.average, kept):.2f} dB"
            print(f"{step} loss {loss:.4f} {quality} {time.monotonic() - began:.0f} s", flush=True)
            save(task, optimizer, step)
    save(task, optimizer, step)


def save(task: Task, optimizer: Any, step: int) -> None:
    content = {"vae": task.vae.state_dict(), "average": task.average.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content | {"step": step}, task.state.with_suffix(".new"))
    task.state.with_suffix(".new").replace(task.state)


def drawings(work: Path) -> tuple[list, list]:
    """Drawings to learn and drawings held out."""
    learned, kept = [], []
    for package in pictures.PACKAGES:
        names = pictures.names_of(work, package)
        found = pictures.sprites(work, package, names)
        kept += [found[name] for name in names[::20]]
        learned += [found[name] for i, name in enumerate(names) if i % 20]
    own = pictures.sprites(work, "fluent-emoji-flat", CONCEPTS.values())
    return learned + list(own.values()) * (len(learned) // len(own)), kept


def train_step(task: Task, optimizer: Any, learned: list, step: int) -> float:
    crop = step < task.cropped * task.steps
    pixels = batch_of(learned, np.random.default_rng((SEED, step)), BATCH, crop=crop)
    for group in optimizer.param_groups:
        group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / task.steps))
    torch.manual_seed(step)
    posterior = task.vae.encode(pixels).latent_dist
    loss = distance(task.vae.decode(posterior.sample()).sample, pixels) + KL * posterior.kl().mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def batch_of(learned: list, rng: np.random.Generator, count: int, *, crop: bool) -> Tensor:
    """(count, 3, 64, 64) or crops of 32 in [-1, 1], with backgrounds of any colour."""
    chosen = [learned[int(i)] for i in rng.integers(len(learned), size=count)]
    colours = list(COLOURS.values())
    shades = [
        colours[int(rng.integers(len(colours)))] if rng.random() < 0.5 else tuple(rng.integers(0, 256, 3))
        for _ in chosen
    ]
    scenes = [
        pictures.scene(one, shade, rng, sides=(40, 60), shift=2) for one, shade in zip(chosen, shades, strict=True)
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    if not crop:
        return pixels.contiguous()
    places = rng.integers(0, 33, (count, 2))
    return torch.stack([one[:, y : y + 32, x : x + 32] for one, (y, x) in zip(pixels, places, strict=True)])


def distance(made: Tensor, wanted: Tensor) -> Tensor:
    """L1 + MSE + half the L1 of the differences between neighbours, which keeps edges sharp."""
    edges = sum((made.diff(dim=axis) - wanted.diff(dim=axis)).abs().mean() for axis in (2, 3))
    return F.l1_loss(made, wanted) + F.mse_loss(made, wanted) + 0.5 * edges


@torch.no_grad()
def average_into(average: Any, vae: Any) -> None:
    for mean, now in zip(average.parameters(), vae.parameters(), strict=True):
        mean.lerp_(now, 1 - AVERAGE)


@torch.no_grad()
def psnr(vae: Any, drawings: list) -> float:
    """Peak signal to noise of drawings that were held out, in dB."""
    pixels = batch_of(drawings, np.random.default_rng(SEED), 64, crop=False)
    made = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return float(10 * torch.log10(4 / F.mse_loss(made, pixels)))


if __name__ == "__main__":
    main()
