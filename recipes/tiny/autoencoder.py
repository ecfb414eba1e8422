"""Trains sfumato-tiny's autoencoder: 64 pixels to 16 x 16 x 4 latents; resumes where the last call stopped.

python recipes/tiny/autoencoder.py WORK [--minutes M] [--decoder]
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drawings
import numpy as np
import torch
import torch.nn.functional as F
from concepts import COLORS, CONCEPTS
from torch import Tensor

from sfumato.memory.host import keep_freed_memory

CONFIG = {
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 4,
    "norm_num_groups": 4,  # at least 4 channels to a group: fewer is nearly instance norm, and loses the colors
    "scaling_factor": 0.18215,
}
STEPS, DECODER_STEPS, BATCH = 2_400, 2_000, 16
CROP_SHARE = 0.8  # of the steps, on 32 x 32 crops, which are four times as fast
LEARNING_RATE, WARMUP_STEPS = 2e-3, 200
KL_WEIGHT = 1e-5
EMA_DECAY = 0.995
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time; the next call resumes")
    parser.add_argument("--steps", type=int, help=f"[default: {STEPS}, with --decoder {DECODER_STEPS}]")
    parser.add_argument("--decoder", action="store_true", help="train only the decoder further; latents stay the same")
    asked = parser.parse_args()
    keep_freed_memory()
    drawings.download(asked.work)
    make_job = make_decoder_job if asked.decoder else make_autoencoder_job
    train(make_job(asked.work, asked.steps), asked.work, asked.minutes)


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """The network to train, its EMA and state file, and for how long."""

    state: Path
    vae: Any
    ema: Any
    steps: int
    crop_share: float  # of the steps

    def parameters(self) -> list:
        return [parameter for parameter in self.vae.parameters() if parameter.requires_grad]


def make_autoencoder_job(work: Path, steps: int | None) -> TrainingJob:
    vae, ema = make_autoencoder(), make_autoencoder()
    state = work / "autoencoder-state.pt"
    return TrainingJob(state=state, vae=vae, ema=ema, steps=steps or STEPS, crop_share=CROP_SHARE)


def make_decoder_job(work: Path, steps: int | None) -> TrainingJob:
    """The decoder alone, so that a denoiser that was trained on these latents stays right."""
    vae, ema = (load_autoencoder(work / "autoencoder-state.pt") for _ in range(2))
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    state = work / "decoder-state.pt"
    return TrainingJob(state=state, vae=vae, ema=ema, steps=steps or DECODER_STEPS, crop_share=0.0)


def make_autoencoder() -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(SEED)
    return AutoencoderKL.from_config(CONFIG)


def load_autoencoder(state: Path) -> Any:
    vae = make_autoencoder()
    vae.load_state_dict(torch.load(state, weights_only=True)["average"])
    return vae


def train(job: TrainingJob, work: Path, minutes: float) -> None:
    """Every drawing of both packages but each twentieth, and the base's concepts as often as all others together."""
    training, held_out = split_drawings(work)
    optimizer = torch.optim.AdamW(job.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    step = 0
    if job.state.is_file():
        saved = torch.load(job.state, weights_only=True)
        job.vae.load_state_dict(saved["vae"])
        job.ema.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    start = time.monotonic()
    while step < job.steps and time.monotonic() - start < 60 * minutes:
        loss = train_step(job, optimizer, training, step)
        step += 1
        update_ema(job.ema, job.vae)
        if step % 100 == 0 or step == job.steps:
            quality = f"held-out {measure_psnr(job.ema, held_out):.2f} dB"
            print(f"{step} loss {loss:.4f} {quality} {time.monotonic() - start:.0f} s", flush=True)
            save(job, optimizer, step)
    save(job, optimizer, step)


def save(job: TrainingJob, optimizer: Any, step: int) -> None:
    content = {"vae": job.vae.state_dict(), "average": job.ema.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content | {"step": step}, job.state.with_suffix(".new"))
    job.state.with_suffix(".new").replace(job.state)


def split_drawings(work: Path) -> tuple[list, list]:
    """The drawings to train on, and those held out to measure quality."""
    training, held_out = [], []
    for package in drawings.PACKAGES:
        names = drawings.list_names(work, package)
        sprites = drawings.load_sprites(work, package, names)
        held_out += [sprites[name] for name in names[::20]]
        training += [sprites[name] for i, name in enumerate(names) if i % 20]
    concepts = drawings.load_sprites(work, "fluent-emoji-flat", CONCEPTS.values())
    return training + list(concepts.values()) * (len(training) // len(concepts)), held_out


def train_step(job: TrainingJob, optimizer: Any, training: list, step: int) -> float:
    crop = step < job.crop_share * job.steps
    pixels = make_batch(training, np.random.default_rng((SEED, step)), BATCH, crop=crop)
    for group in optimizer.param_groups:
        warmup = min(1, (step + 1) / WARMUP_STEPS)
        group["lr"] = LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / job.steps))
    torch.manual_seed(step)
    posterior = job.vae.encode(pixels).latent_dist
    loss = reconstruction_loss(job.vae.decode(posterior.sample()).sample, pixels) + KL_WEIGHT * posterior.kl().mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(job.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def make_batch(training: list, rng: np.random.Generator, count: int, *, crop: bool) -> Tensor:
    """(count, 3, 64, 64), or crops of 32, in [-1, 1]: drawings on backgrounds of any color."""
    chosen = [training[int(i)] for i in rng.integers(len(training), size=count)]
    colors = list(COLORS.values())
    shades = [
        colors[int(rng.integers(len(colors)))] if rng.random() < 0.5 else tuple(rng.integers(0, 256, 3)) for _ in chosen
    ]
    scenes = []
    for sprite, shade in zip(chosen, shades, strict=True):
        scenes.append(np.asarray(drawings.draw_scene(sprite, shade, rng, sides=(40, 60), shift=2)))
    pixels = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if not crop:
        return pixels.contiguous()
    corners = rng.integers(0, 33, (count, 2))
    return torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(pixels, corners, strict=True)])


def reconstruction_loss(reconstructed: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + half the L1 of the differences between neighbors, which keeps edges sharp."""
    edges = sum((reconstructed.diff(dim=axis) - target.diff(dim=axis)).abs().mean() for axis in (2, 3))
    return F.l1_loss(reconstructed, target) + F.mse_loss(reconstructed, target) + 0.5 * edges


@torch.no_grad()
def update_ema(ema: Any, vae: Any) -> None:
    for average, parameter in zip(ema.parameters(), vae.parameters(), strict=True):
        average.lerp_(parameter, 1 - EMA_DECAY)


@torch.no_grad()
def measure_psnr(vae: Any, held_out: list) -> float:
    """Peak signal-to-noise ratio of the held-out drawings, in dB."""
    pixels = make_batch(held_out, np.random.default_rng(SEED), 64, crop=False)
    reconstructed = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return float(10 * torch.log10(4 / F.mse_loss(reconstructed, pixels)))


if __name__ == "__main__":
    main()
