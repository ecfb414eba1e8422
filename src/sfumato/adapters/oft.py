"""OFT as sd-scripts has it: Diag-OFT with a number of blocks instead of their size, and a limit that is alpha."""

from __future__ import annotations

from typing import Self

import torch

from sfumato.adapters.base import ADAPTERS, AdapterRequest
from sfumato.adapters.diag_oft import OFT_BLOCKS, OFT_PARTS, DiagOFT
from sfumato.config.base import Options, option
from sfumato.formats.groups import LayerGroup

SPELLINGS: dict[str, str] = {}


class OftOptions(Options):
    """The arguments of OFT."""

    divided: bool = option(False, "blocks of its own for each layer of a fused one, e.g. of qkv")


@ADAPTERS.register("oft")
class OFT(DiagOFT):
    """In files its layers of the denoiser are called oft_unet_..."""

    label = "OFT"
    reads_weights = True
    spellings = SPELLINGS  # files of it are Diag-OFT's
    files_of = "diag_oft"
    options_class = OftOptions
    dim_meaning = "the number of blocks, which divides the rows of every weight; --network_alpha limits the norm of Q"
    uses_alpha = True
    renamed = ("lora_unet_", "oft_unet_")

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        """Blocks of 0."""
        options, device = request.options, group.layers[0].weight.device
        assert isinstance(options, OftOptions)
        heights = [len(layer.weight) for layer in group.layers] if options.divided else [group.num_rows]
        names = OFT_PARTS if options.divided else (OFT_BLOCKS,)
        tensors = {
            name: torch.zeros(request.rank, height // request.rank, height // request.rank, device=device)
            for name, height in zip(names, heights, strict=False)
        }
        return cls(group, tensors, alpha=request.alpha)

    @classmethod
    def allows_dim(cls, group: LayerGroup, dim: int, options: Options) -> bool:
        assert isinstance(options, OftOptions)
        heights = [len(layer.weight) for layer in group.layers] if options.divided else [group.num_rows]
        return all(height % dim == 0 for height in heights)

    @property
    def known_rank(self) -> int:
        return len(self.blocks[0])
