"""ControlNet-LLLite: each layer's input is changed by a few small layers that read the input and a control image.

Structure and names of tensors are those of sd-scripts' sdxl_train_control_net_lllite.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.adapters.control_modules import ControlModules, pad_image
from sfumato.common.seeds import seed_of
from sfumato.formats.controlled import ControlledLayer

# Pixels a side of a token -> strides of the convolutions.
_STRIDES = {4: (4,), 8: (4, 2), 16: (4, 4), 32: (4, 4, 2), 64: (4, 4, 4)}


class LLLiteModule(nn.Module):
    """The layers beside one controlled layer. width: of theirs. image_width: of what is read from the image."""

    def __init__(self, layer: ControlledLayer, width: int, image_width: int, dropout: float) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = dropout
        strides = _STRIDES[layer.token_side]
        channels = [3, *[image_width // 2] * (len(strides) - 1), image_width]
        convolutions: list[nn.Module] = []
        for i, stride in enumerate(strides):
            convolutions += [nn.ReLU()] if i else []
            convolutions.append(nn.Conv2d(channels[i], channels[i + 1], kernel_size=stride, stride=stride))
        self.conditioning1 = nn.Sequential(*convolutions)
        self.down = nn.Sequential(nn.Linear(layer.inputs, width), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(width + image_width, width), nn.ReLU())
        last = nn.Linear(width, layer.inputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.up = nn.Sequential(last)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """x (B, tokens, channels), image (B, 3, H, W) in [-1, 1] -> the change of x."""
        image = pad_image(image, self.layer.token_side)
        read = self.conditioning1(image).flatten(2).transpose(1, 2)
        hidden = self.mid(torch.cat([read, self.down(x)], dim=-1))
        hidden = F.dropout(hidden, self.dropout, self.training) if self.dropout else hidden
        return self.up(hidden)


class LLLite(ControlModules):
    """The first version, for UNets: every module reads the control image by itself."""

    version = 1

    def __init__(
        self,
        layers: Mapping[str, ControlledLayer],
        *,
        width: int,
        image_width: int,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """layers: by name in files. seed: of what is drawn, whatever was drawn before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "new LLLite"))
            made = {name: LLLiteModule(layer, width, image_width, dropout) for name, layer in layers.items()}
        super().__init__(layers, made, (width, image_width))

    def iterate(self) -> Iterator[LLLiteModule]:
        for module in self.parts.values():
            assert isinstance(module, LLLiteModule)
            yield module

    def change_input(self, layer: ControlledLayer, x: Tensor) -> Tensor:
        assert self.image is not None
        change = self.parts[layer.name](x, self.image.to(x))
        return x + self.strength * self.image_strength * change.to(x)

    def file_metadata(self) -> Mapping[str, object]:
        return {}
