"""ControlNet-LLLite: each layer's input is changed by a few small layers that read the input and a control image.

Structure and names of tensors are those of sd-scripts' sdxl_train_control_net_lllite.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sfumato.common.seeds import seed_of
from sfumato.common.text import list_some
from sfumato.errors import UserError
from sfumato.formats.checkpoint import open_checkpoint
from sfumato.formats.controlled import ControlledLayer

Hook = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]
_STRIDES = {8: (4, 2), 16: (4, 4), 32: (4, 4, 2), 64: (4, 4, 4)}  # pixels a side of a token -> of the convolutions


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


class LLLite(nn.Module):
    """The modules of one network, by their names in files, and the control image that they read."""

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
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "new LLLite"))
            made = {name: LLLiteModule(layer, width, image_width, dropout) for name, layer in layers.items()}
        self.parts = nn.ModuleDict(made)
        self.image: Tensor | None = None  # (B, 3, H, W) in [-1, 1]; None: nothing is changed
        self.strength = 1.0
        self._handles: list[RemovableHandle] = []

    def attach(self, network: nn.Module) -> None:
        """From now on the network's layers have their inputs changed."""
        for module in self.iterate():
            layer = network.get_submodule(module.layer.path)
            self._handles.append(layer.register_forward_pre_hook(self._make_hook(module)))

    def iterate(self) -> Iterator[LLLiteModule]:
        for module in self.parts.values():
            assert isinstance(module, LLLiteModule)
            yield module

    def set_image(self, image: Tensor | None) -> None:
        """For every forward until the next call. image: (B, 3, H, W) in [-1, 1]."""
        self.image = image

    def _make_hook(self, module: LLLiteModule) -> Hook:
        def change_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self.image is None or not self.strength:
                return None
            x, *others = inputs
            change = module(x, self.image.to(x))
            return (x + self.strength * change.to(x), *others)

        return change_input


def pad_image(image: Tensor, side: int) -> Tensor:
    """To a whole number of tokens with this side, as a UNet rounds up when it halves its latents."""
    height, width = image.shape[-2:]
    padding = (0, -width % side, 0, -height % side)
    return F.pad(image, padding, mode="replicate") if any(padding) else image


def read_lllite_file(path: Path, layers: Mapping[str, ControlledLayer], *, dropout: float = 0.0) -> LLLite:
    """The modules of a file. layers: those of the model, by name. UserError where the file is for another model."""
    with open_checkpoint(path) as file:
        state = {key: file.read(key, dtype=torch.float32) for key in file.keys()}  # noqa: SIM118
    names = {key.partition(".")[0] for key in state}
    unknown = sorted(names - set(layers))
    if unknown:
        raise UserError(
            f"{path} is no LLLite file for this model, which has no layer {list_some(unknown)}",
            code="lllite-layers-unknown",
            fix="give a file that was trained for the base model's family",
        )
    some = {name: layer for name, layer in layers.items() if name in names}
    width, image_width = read_widths(path, state)
    made = LLLite(some, width=width, image_width=image_width, dropout=dropout)
    expected = {name: tensor.shape for name, tensor in made.parts.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if differing:
        raise UserError(
            f"{path} is no LLLite file for this model: {list_some(differing)} are missing or of another shape",
            code="lllite-shapes-mismatch",
        )
    made.parts.load_state_dict(state)
    return made


def read_widths(path: Path, state: Mapping[str, Tensor]) -> tuple[int, int]:
    """--network_dim and --cond_emb_dim of a file."""
    down = next((tensor for key, tensor in state.items() if key.endswith(".down.0.weight")), None)
    middle = next((tensor for key, tensor in state.items() if key.endswith(".mid.0.weight")), None)
    if down is None or middle is None:
        raise UserError(f"{path} is no LLLite file: it has no down and mid layers", code="lllite-file-incomplete")
    return down.shape[0], middle.shape[1] - down.shape[0]
