"""The base model of the demo: a small Stable Diffusion wired by hand, so that there is something to see.

Its autoencoder shrinks pictures to an eighth and blurs them back; its denoiser takes all that it sees for noise, so
that alone it paints haze. Every other weight of the denoiser is random: that is what a LoRA has to work with.

GroupNorm forgets the mean of what it is given. A value is therefore carried in a group with two guides, +GUIDE and
-GUIDE, which the norm shifts and shrinks alike: value - mean of the guides is the value again, shrunk.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.demo import toy_sd
from sfumato.demo.toy import WORDS
from sfumato.demo.weights import random_network
from sfumato.families import _clip, _tokenizers, _unet, _vae
from sfumato.formats.checkpoint import write_safetensors

WIDTH, GROUPS = 32, 8  # channels of the first level; with 4 to a norm's group
GUIDE = 4.0
LINEAR = 10.0  # far to the right SiLU changes nothing
SHRUNK = math.sqrt(2) / GUIDE  # by the norm: a group holds +GUIDE, -GUIDE and two small values
SCALING = 0.18215
CONTRAST = 2.0  # spread of latents over spread of pixels
SURE = -20.0  # log variance of the latents
CHATTER = 0.5  # how much of the random channels reaches the denoiser's output
NORM = {"norm_num_groups": GROUPS}
UNET_CONFIG = (
    toy_sd.UNET_CONFIG
    | NORM
    | {
        "block_out_channels": [WIDTH, 64, 64],
        "down_block_types": [*["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2],
    }
)
VAE_CONFIG = toy_sd.VAE_CONFIG | NORM | {"block_out_channels": [WIDTH] * 4}


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model, what to train it with, and how to make pictures with it."""

    title: str
    model: dict[str, Path]  # option -> path
    size: int  # pixels of a side
    sampler: str
    steps: int
    scale: float  # classifier-free guidance
    training: dict[str, str] = field(default_factory=dict)  # options that suit it


def make_base(folder: Path, *, seed: int = 0) -> Base:
    """Write the base model into `folder`."""
    words = _tokenizers.toy_tokenizer(folder / "tokenizer", WORDS)
    networks = {
        "unet": wired_unet(seed),
        "vae": wired_vae(),
        "text_encoder": random_network(_clip.build, toy_sd.clip_config(words), seed=seed, purpose="demo clip"),
    }
    path = folder / "haze.safetensors"
    tensors = toy_sd.single_file(networks)
    write_safetensors(path, tensors, {"sfumato.config": json.dumps({"unet": NORM, "vae": NORM})})
    return Base(
        title="toy model",
        model={"pretrained_model_name_or_path": path},
        size=96,
        sampler="euler_a",  # its fresh noise frees pictures that are stuck in the haze
        steps=60,
        scale=1.0,
        training={
            "train_batch_size": "8",
            "network_dim": "8",
            "network_alpha": "8",
            "learning_rate": "1e-2",
            "optimizer_args": "betas=0.9,0.99",
            "lr_scheduler": "cosine",
            "lr_warmup_steps": "20",
            "max_train_steps": "800",
        },
    )


@torch.no_grad()
def wired_unet(seed: int) -> Any:
    """A denoiser whose first and last layers pass its input on; the branches between may not touch that path."""
    unet = random_network(_unet.build, UNET_CONFIG, seed=seed, purpose="demo unet")
    kept = carriers(4)
    last, attention = unet.up_blocks[-1].resnets[-1], unet.up_blocks[-1].attentions[-1]
    enter(unet.conv_in, torch.eye(4))
    pick = torch.zeros(len(kept), last.conv_shortcut.in_channels)
    pick[range(len(kept)), kept - WIDTH] = 1.0  # the input comes back beside what the deeper levels made of it
    last.conv_shortcut.weight[kept], last.conv_shortcut.bias[kept] = pick[:, :, None, None], 0.0
    for layer in (last.conv2, attention.proj_out):
        layer.weight[kept], layer.bias[kept] = 0.0, 0.0
    unet.conv_out.weight *= CHATTER
    leave(unet.conv_norm_out, unet.conv_out, torch.eye(4))
    return unet


@torch.no_grad()
def wired_vae() -> Any:
    """An autoencoder whose latents are the colours of 8x8 pixels, and their brightness, which it does not need."""
    vae = random_network(_vae.build, VAE_CONFIG, seed=0, purpose="demo vae")
    for name, parameter in vae.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    gain = CONTRAST / SCALING
    colours = torch.cat([torch.eye(3), torch.full((1, 3), 1 / 3)]) * gain
    enter(vae.encoder.conv_in, torch.eye(3))
    for block in vae.encoder.down_blocks[:-1]:
        every_channel(block.downsamplers[0].conv, torch.tensor([0.5, 0.5, 0.0]))
    leave(vae.encoder.conv_norm_out, vae.encoder.conv_out, colours)
    vae.encoder.conv_out.bias[4:] = SURE
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.out_channels)[:, :, None, None])
    enter(vae.decoder.conv_in, torch.eye(4)[:3] / gain)
    for block in vae.decoder.up_blocks[:-1]:
        every_channel(block.upsamplers[0].conv, torch.tensor([0.25, 0.5, 0.25]))
    leave(vae.decoder.conv_norm_out, vae.decoder.conv_out, torch.eye(3))
    return vae


def carriers(count: int) -> Tensor:
    """Channels of the first `count` groups: the values first, then all +GUIDEs, then all -GUIDEs."""
    values = torch.arange(count) * (WIDTH // GROUPS)
    return torch.cat([values, values + 1, values + 2])


def enter(conv: Any, mix: Tensor) -> None:
    """Have `conv` write mix @ input, pixel by pixel, into the carriers, and set their guides; mix (values, inputs)."""
    kept = carriers(len(mix))
    value, above, below = kept.chunk(3)
    conv.weight[kept], conv.bias[kept] = 0.0, 0.0
    conv.weight[value, :, 1, 1] = mix
    conv.bias[above], conv.bias[below] = GUIDE, -GUIDE


def leave(norm: Any, conv: Any, mix: Tensor) -> None:
    """Have `conv` read mix @ values, after `norm` and SiLU, into its first outputs; mix (outputs, values)."""
    kept = carriers(mix.shape[1])
    value, above, below = kept.chunk(3)
    norm.weight[kept], norm.bias[kept] = 1.0, LINEAR
    conv.weight[:, kept], conv.bias[:] = 0.0, 0.0
    conv.weight[: len(mix), value, 1, 1] = mix / SHRUNK
    conv.weight[: len(mix), above, 1, 1] = conv.weight[: len(mix), below, 1, 1] = -mix / SHRUNK / 2


def every_channel(conv: Any, kernel: Tensor) -> None:
    """Have `conv` filter each channel on its own, with the same kernel along both axes."""
    each = torch.arange(conv.out_channels)
    conv.weight[each, each] = torch.outer(kernel, kernel)
