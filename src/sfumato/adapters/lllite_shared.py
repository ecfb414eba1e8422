"""The second version of ControlNet-LLLite: one trunk reads the control image for all layers of any network.

Structure and names of tensors are those of sd-scripts' anima_train_control_net_lllite.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.adapters.control_modules import ControlModules, pad_image
from sfumato.adapters.lllite_trunk import TRUNK_SIDE, LatentTrunk, LLLiteSizes, PixelTrunk
from sfumato.common.seeds import seed_of
from sfumato.formats.controlled import ControlledLayer

TRUNK = "lllite_conditioning1"


class SharedModule(nn.Module):
    """The layers beside one controlled layer."""

    def __init__(self, layer: ControlledLayer, sizes: LLLiteSizes, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.depth_embed = nn.Parameter(torch.zeros(sizes.image_width))
        self.down = nn.Linear(layer.inputs, sizes.width)
        self.mid = nn.Linear(sizes.width + sizes.image_width, sizes.width)
        self.cond_to_film = nn.Linear(sizes.image_width, 2 * sizes.width)
        self.up = nn.Linear(sizes.width, layer.inputs)
        for last in (self.cond_to_film, self.up):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """x (B, tokens, channels), what the trunk gives (B, tokens, image_width) -> the change of x."""
        seen = seen + self.depth_embed.to(seen)
        scale, shift = self.cond_to_film(seen).chunk(2, dim=-1)
        hidden = self.mid(torch.cat([seen, F.silu(self.down(x)).to(seen)], dim=-1))
        hidden = F.silu(hidden * (1 + scale) + shift)
        hidden = F.dropout(hidden, self.dropout, self.training) if self.dropout else hidden
        return self.up(hidden)


class SharedLLLite(ControlModules):
    """The second version: the trunk runs once in each forward of the network, before its first layer."""

    version = 2

    def __init__(
        self, layers: Mapping[str, ControlledLayer], sizes: LLLiteSizes, *, dropout: float = 0.0, seed: int = 0
    ) -> None:
        """layers: by name in files. seed: of what is drawn, whatever was drawn before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "new LLLite"))
            made: dict[str, nn.Module] = {TRUNK: LatentTrunk(sizes) if sizes.latent_channels else PixelTrunk(sizes)}
            made |= {name: SharedModule(layer, sizes, dropout) for name, layer in layers.items()}
        super().__init__(layers, made, (sizes.width, sizes.image_width))
        self.sizes = sizes
        self.mask: Tensor | None = None  # (B, 1, H, W) of 1 and -1, beside latents
        self._seen: dict[int, Tensor] = {}  # pixels a side of a token -> what the trunk gave (B, tokens, image_width)
        self._text_lengths: int | Tensor = 0  # tokens of text before the image's, one number or (B,)

    @property
    def reads_mask(self) -> bool:
        return self.sizes.reads_mask

    @property
    def reads_latents(self) -> bool:
        return self.sizes.latent_channels > 0

    def set_image(self, image: Tensor | None, strength: float = 1.0, mask: Tensor | None = None) -> None:
        """One that reads a mask changes nothing without it."""
        if image is not None and self.reads_mask and mask is None:
            image = None
        if image is not None and mask is not None and self.reads_mask and not self.reads_latents:
            image = join_mask(image, mask, hides_masked=self.sizes.hides_masked)
        self.mask = None if mask is None or not self.reads_latents else 2 * (mask >= 0.5).float() - 1
        super().set_image(image, strength)

    def begin_forward(self, arguments: Mapping[str, Any]) -> None:
        assert self.image is not None
        scale = self.sizes.latent_side if self.reads_latents else 1  # pixels a side of one that the trunk reads
        image = pad_image(self.image, 2 if self.reads_latents else TRUNK_SIDE)
        mask = None if self.mask is None else pad_image(self.mask.to(image), TRUNK_SIDE)
        grid = self.parts[TRUNK](image, mask)
        height, width = (scale * length for length in self.image.shape[-2:])
        self._seen = {}
        for side in {layer.token_side for layer in self.layers.values()}:
            size = (-(-height // side), -(-width // side))
            resized = grid if size == tuple(grid.shape[-2:]) else F.adaptive_avg_pool2d(grid, size)
            self._seen[side] = resized.flatten(2).transpose(1, 2)
        self._text_lengths = find_text_lengths(arguments)

    def change_input(self, layer: ControlledLayer, x: Tensor) -> Tensor:
        seen, module = self._seen[layer.token_side], self.parts[layer.name]
        count, start = seen.shape[1], self._text_lengths if layer.follows_text else 0
        if isinstance(start, int):
            own = x[:, start : start + count]
            changed = own + self.strength * self.image_strength * module(own, seen).to(x)
            return torch.cat([x[:, :start], changed, x[:, start + count :]], dim=1)
        places = start[:, None] + torch.arange(count, device=x.device)
        places = places[..., None].expand(-1, -1, x.shape[-1])
        change = module(x.gather(1, places), seen)
        return x.scatter_add(1, places, self.strength * self.image_strength * change.to(x))

    def file_metadata(self) -> Mapping[str, object]:
        sizes = self.sizes
        kinds = dict.fromkeys(layer.layer_kind for layer in self.layers.values())
        facts: dict[str, object] = {
            "version": self.version,
            "cond_emb_dim": sizes.image_width,
            "cond_dim": sizes.trunk_width,
            "cond_resblocks": sizes.residual_blocks,
            "use_aspp": str(sizes.has_pyramid).lower(),
            "mlp_dim": sizes.width,
            "target_layers": ",".join(kinds),
            "target_atomics": ",".join(kinds),
            "cond_in_channels": sizes.image_channels,
            "inpaint_masked_input": str(sizes.hides_masked).lower(),
        }
        if self.reads_latents:
            facts["cond_input_space"] = "latent"
        if sizes.has_pyramid:
            facts["aspp_dilations"] = ",".join(map(str, sizes.dilations))
        return {f"lllite.{name}": value for name, value in facts.items()}


def join_mask(image: Tensor, mask: Tensor, *, hides_masked: bool) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] and masks (B, 1, H, W) in [0, 1] -> (B, 4, H, W); 1 is filled in, -1 stays."""
    mask = (mask >= 0.5).to(image)
    return torch.cat([image * (1 - mask) if hides_masked else image, 2 * mask - 1], dim=1)


def find_text_lengths(arguments: Mapping[str, Any]) -> int | Tensor:
    """Tokens of text that a network puts before those of the image, for each sample where it packs them."""
    mask, text = arguments.get("encoder_attention_mask"), arguments.get("encoder_hidden_states")
    if isinstance(mask, Tensor):
        return mask.sum(1)
    return text.shape[1] if isinstance(text, Tensor) else 0
