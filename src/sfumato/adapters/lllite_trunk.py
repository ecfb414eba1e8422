"""The networks that read the control image for ControlNet-LLLite's second version, and the latents for version 2.1.

Structure and names of tensors are those of sd-scripts' anima_train_control_net_lllite.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRUNK_SIDE = 16  # pixels of the image that become one of the trunk's
MASK_SIDE = 8  # pixels of a mask beside one of the latents
DILATIONS = (1, 2, 4, 8)  # of the pyramid's branches
_COLORS = 3
_MOST_GROUPS = 8


@dataclass(frozen=True, kw_only=True)
class LLLiteSizes:
    """What its options choose."""

    width: int  # of a module's layers
    image_width: int  # of what the trunk gives
    trunk_width: int
    residual_blocks: int
    has_pyramid: bool = False
    dilations: tuple[int, ...] = DILATIONS  # of its branches
    image_channels: int = 3  # 4: and a mask, of what is to be filled in
    hides_masked: bool = False  # whether the image is gray where the mask is
    latent_channels: int = 0  # of the autoencoder whose latents it reads instead of the image; 0: the image itself
    latent_side: int = MASK_SIDE  # pixels of the image that become one of the latents'

    @property
    def reads_mask(self) -> bool:
        return self.image_channels > _COLORS


def make_norm(channels: int) -> nn.GroupNorm:
    """With eight groups, or fewer where these do not divide the channels."""
    groups = _MOST_GROUPS
    while channels % groups:
        groups //= 2
    return nn.GroupNorm(groups, channels)


class ResidualBlock(nn.Module):
    """Normalization before each of its convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = make_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.norm2 = make_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al. 2017): several dilations and the image's mean."""

    def __init__(self, channels: int, dilations: Sequence[int]) -> None:
        super().__init__()

        def make_branch(inputs: int, dilation: int) -> nn.Sequential:
            kernel, around = (3, dilation) if dilation > 1 else (1, 0)
            convolution = nn.Conv2d(inputs, channels, kernel_size=kernel, padding=around, dilation=dilation)
            return nn.Sequential(convolution, make_norm(channels), nn.SiLU())

        self.branches = nn.ModuleList(make_branch(channels, dilation) for dilation in dilations)
        self.global_conv = make_branch(channels, 1)
        self.proj = make_branch(channels * (len(dilations) + 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [branch(x) for branch in self.branches]
        whole = self.global_conv(x.mean((2, 3), keepdim=True)).expand_as(x)
        return self.proj(torch.cat([*seen, whole], dim=1))


class Trunk(nn.Module):
    """Gives (B, image_width, h, w) of the control image, normalized over the channels."""

    def __init__(self, sizes: LLLiteSizes) -> None:
        super().__init__()
        width = sizes.trunk_width
        self.make_stem(sizes)
        self.resblocks = nn.ModuleList(ResidualBlock(width) for _ in range(sizes.residual_blocks))
        self.aspp = Pyramid(width, sizes.dilations) if sizes.has_pyramid else None
        self.proj = nn.Conv2d(width, sizes.image_width, kernel_size=1)
        self.out_norm = nn.LayerNorm(sizes.image_width)

    @abstractmethod
    def make_stem(self, sizes: LLLiteSizes) -> None:
        """The layers of `read`."""

    @abstractmethod
    def read(self, image: Tensor, mask: Tensor | None) -> Tensor:
        """(B, trunk_width, h, w) of the image."""

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.read(image, mask)
        for block in self.resblocks:
            hidden = block(hidden)
        hidden = hidden if self.aspp is None else self.aspp(hidden)
        return self.out_norm(self.proj(hidden).movedim(1, -1)).movedim(-1, 1)


class PixelTrunk(Trunk):
    """Of pixels (B, C, H, W), the mask among their channels; h and w are H / 16 and W / 16."""

    def make_stem(self, sizes: LLLiteSizes) -> None:
        width = sizes.trunk_width
        self.conv1 = nn.Conv2d(sizes.image_channels, width // 2, kernel_size=4, stride=4)
        self.norm1 = make_norm(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, kernel_size=3, padding=1)
        self.norm2 = make_norm(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, kernel_size=4, stride=4)
        self.norm3 = make_norm(width)

    def read(self, image: Tensor, mask: Tensor | None) -> Tensor:
        hidden = F.silu(self.norm1(self.conv1(image)))
        hidden = F.silu(self.norm2(self.conv2(hidden)))
        return F.silu(self.norm3(self.conv3(hidden)))


class LatentTrunk(Trunk):
    """Of latents (B, C, 2 h, 2 w) and a mask (B, 1, 16 h, 16 w) of 1 and -1, where it reads one."""

    def make_stem(self, sizes: LLLiteSizes) -> None:
        width, channels, self.reads_mask = sizes.trunk_width, sizes.latent_channels, sizes.reads_mask
        if self.reads_mask:
            self.mask_conv1 = nn.Conv2d(1, 4, kernel_size=2, stride=2)
            self.mask_conv2 = nn.Conv2d(4, 8, kernel_size=3, stride=2, padding=1)
            self.mask_conv3 = nn.Conv2d(8, channels, kernel_size=3, stride=2, padding=1)
        self.lat_conv1 = nn.Conv2d(channels * (1 + self.reads_mask), width, kernel_size=3, padding=1)
        self.lat_norm1 = make_norm(width)
        self.lat_conv2 = nn.Conv2d(width, width, kernel_size=2, stride=2)
        self.lat_norm2 = make_norm(width)

    def read(self, image: Tensor, mask: Tensor | None) -> Tensor:
        if self.reads_mask:
            assert mask is not None
            seen = F.silu(self.mask_conv2(F.silu(self.mask_conv1(mask))))
            image = torch.cat([image, self.mask_conv3(seen)], dim=1)
        hidden = F.silu(self.lat_norm1(self.lat_conv1(image)))
        return F.silu(self.lat_norm2(self.lat_conv2(hidden)))
