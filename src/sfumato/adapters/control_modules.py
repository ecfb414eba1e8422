"""What both versions of LLLite share: modules hooked to the inputs of layers, and the control image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sfumato.formats.controlled import ControlledLayer

Hook = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]


class ControlModules(nn.Module, ABC):
    """The modules of one network by their names in files. Subclasses make them and compute what they change."""

    version: ClassVar[int]

    def __init__(
        self, layers: Mapping[str, ControlledLayer], parts: Mapping[str, nn.Module], widths: tuple[int, int]
    ) -> None:
        """layers: those that are changed, by name in files. parts: all that is in a file. widths: --network_dim and
        --cond_emb_dim.
        """
        super().__init__()
        self.layers = layers
        self.widths = widths
        self.parts = nn.ModuleDict(parts)
        self.image: Tensor | None = None  # (B, C, H, W), what is read; None: nothing is changed
        self.strength = 1.0
        self.image_strength = 1.0  # of this image, beside it
        self._handles: list[RemovableHandle] = []

    def attach(self, network: nn.Module) -> None:
        """From now on the network's layers have their inputs changed."""
        self._handles.append(network.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        for layer in self.layers.values():
            hooked = network.get_submodule(layer.path)
            self._handles.append(hooked.register_forward_pre_hook(self._make_hook(layer)))

    def detach(self) -> None:
        """The network's layers have their own inputs again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def reads_mask(self) -> bool:
        """Whether it reads a mask beside the image."""
        return False

    @property
    def reads_latents(self) -> bool:
        """Whether its image is the latents of the control image."""
        return False

    def set_image(self, image: Tensor | None, strength: float = 1.0, mask: Tensor | None = None) -> None:
        """For every forward until the next call. image: (B, 3, H, W) in [-1, 1], or latents. mask: (B, 1, H, W) in
        [0, 1], for those that read one.
        """
        self.image, self.image_strength = image, strength

    @property
    def is_active(self) -> bool:
        return self.image is not None and self.strength != 0

    def _before_forward(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.is_active:
            self.begin_forward(kwargs)

    def _make_hook(self, layer: ControlledLayer) -> Hook:
        def change_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not self.is_active:
                return None
            x, *others = inputs
            return (self.change_input(layer, x), *others)

        return change_input

    def begin_forward(self, arguments: Mapping[str, Any]) -> None:
        """Called before each of the network's forwards in which something is changed. arguments: the network's."""
        return

    @abstractmethod
    def change_input(self, layer: ControlledLayer, x: Tensor) -> Tensor:
        """x (B, tokens, channels) as the layer reads it."""

    @abstractmethod
    def file_metadata(self) -> Mapping[str, object]:
        """The metadata of its files, plain values."""


def pad_image(image: Tensor, side: int) -> Tensor:
    """To a whole number of tokens with this side, as a UNet rounds up when it halves its latents."""
    height, width = image.shape[-2:]
    padding = (0, -width % side, 0, -height % side)
    return F.pad(image, padding, mode="replicate") if any(padding) else image
