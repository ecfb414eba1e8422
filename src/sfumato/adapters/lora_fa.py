"""LoRA-FA (Zhang et al. 2023, eq. 4): LoRA whose down matrix stays as drawn, so that inputs need not be kept."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sfumato.adapters.base import ADAPTERS
from sfumato.adapters.lora import LoRA

SPELLINGS: dict[str, str] = {}


@ADAPTERS.register("lora_fa")
class LoraFA(LoRA):
    """Trains the up matrix alone. In files it is a LoRA."""

    label = "LoRA-FA"
    spellings = SPELLINGS  # files of it are LoRA's
    files_of = "lora"

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "lora_up", self.lora_up
