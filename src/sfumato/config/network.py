"""Options of the adapter that is trained beside the model."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from sfumato.common.names import NETWORK_MODULES, PLANNED_NETWORK_MODULES
from sfumato.common.registry import did_you_mean
from sfumato.config.base import Options, option
from sfumato.config.values import Arguments, FilePath, FilePaths, Floats


def known_module(name: str) -> str:
    if name in PLANNED_NETWORK_MODULES:
        raise ValueError(f"is not available yet (comes with {PLANNED_NETWORK_MODULES[name]})")
    if name not in NETWORK_MODULES:
        raise ValueError(f"is not known; {did_you_mean(name, [*NETWORK_MODULES, *PLANNED_NETWORK_MODULES])}")
    return name


class NetworkOptions(Options):
    """Adapter"""

    network_module: Annotated[str, AfterValidator(known_module)] | None = option(
        None, "kind of adapter, as networks.lora; without it plain LoRA"
    )
    network_dim: int | None = option(None, "rank; without it 4", ge=1)
    network_alpha: float = option(1.0, "the adapter is scaled by alpha / rank; 0 means alpha = rank", ge=0)
    network_args: Arguments = option({}, "further arguments of the adapter, as conv_dim=4 rank_dropout=0.1")
    network_weights: FilePath | None = option(None, "adapter file to go on from", path="file")
    dim_from_weights: bool = option(False, "take ranks and alphas from --network_weights")
    network_train_unet_only: bool = option(False, "adapt only the denoiser")
    network_train_text_encoder_only: bool = option(False, "adapt only the text encoders")
    network_dropout: float | None = option(None, "chance to drop each value inside the adapter", ge=0, lt=1)
    scale_weight_norms: float | None = option(None, "largest norm that a layer's change may have", gt=0)
    base_weights: FilePaths = option((), "adapter files merged into the model before training", path="file")
    base_weights_multiplier: Floats = option((), "strengths of --base_weights, in their order; 1 where missing")

    @property
    def adapter(self) -> str:
        """Our name of the adapter that is asked for."""
        return NETWORK_MODULES[self.network_module] if self.network_module else "lora"
