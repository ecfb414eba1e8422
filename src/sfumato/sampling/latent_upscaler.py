"""A residual network that sharpens latents of enlarged images, with the tensor names of sd-scripts' latent upscaler.

It works on what the autoencoder gives, before scaling, and adds a correction to it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.encoding import encode_images
from sfumato.formats.checkpoint import open_checkpoint

CHANNELS, WIDTH, LAST_WIDTH = 4, 128, 64  # of the latents, of the blocks, of the last convolutions
BLOCKS, SKIPPED = 20, 4  # residual blocks; each so many of them are bridged together


class UpscalerBlock(nn.Module):
    """Two normalized convolutions beside the identity; rectified at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.conv2, self.bn2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(inner)))


class LatentUpscaler(nn.Module):
    """(B, 4, h, w) -> the same shape: latents as the autoencoder gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        for number in range(1, BLOCKS + 1):
            self.add_module(f"resblock{number}", UpscalerBlock())
        self.conv2, self.bn2 = nn.Conv2d(WIDTH, LAST_WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(LAST_WIDTH)
        self.conv3, self.bn3 = nn.Conv2d(LAST_WIDTH, LAST_WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(LAST_WIDTH)
        self.conv_final = nn.Conv2d(LAST_WIDTH, CHANNELS, 1)

    def forward(self, latents: Tensor) -> Tensor:
        x = bridged = F.relu(self.bn1(self.conv1(latents)))
        for number in range(1, BLOCKS + 1):
            x = self.get_submodule(f"resblock{number}")(x)
            if number % SKIPPED == 0:
                x = bridged = x + bridged
        x = F.relu(self.bn2(self.conv2(x)))
        return latents + self.conv_final(self.bn3(self.conv3(x)))


def load_upscaler(path: Path) -> LatentUpscaler:
    """The network of a safetensors or pickled file, in float32. UserError where the file holds another one."""
    with open_checkpoint(path) as file:
        tensors = {name: file.read(name) for name in file.keys()}  # noqa: SIM118
    network = LatentUpscaler()
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        odd = sorted(set(found.items()) ^ set(expected.items()))
        raise UserError(
            f"{path} holds no latent upscaler: {len(odd)} of its tensors are others, e.g. {odd[0][0]}",
            code="upscaler-unsuitable",
            fix="give the weights of such a network: twenty residual blocks of 128 channels",
        )
    network.load_state_dict(tensors)
    return network.float().eval()


@torch.no_grad()
def upscale_images(model: Family, network: LatentUpscaler, images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> scaled latents of them at this size, (height, width) in pixels."""
    spec = model.latents
    if spec.channels != CHANNELS:
        raise UserError(
            f"the latent upscaler takes latents of {CHANNELS} channels, those of this model have {spec.channels}",
            code="upscaler-of-other-latents",
            fix="give a model of Stable Diffusion",
        )
    larger = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    latents = encode_images(model, larger, None, vae_batch_size=1).to(model.device)
    network = network.to(model.device)
    raw = latents / spec.scale + spec.shift
    return (torch.cat([network(row[None]) for row in raw]) - spec.shift) * spec.scale
