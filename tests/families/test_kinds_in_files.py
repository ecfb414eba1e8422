"""Keys and shapes of other kinds than LoRA at full size, from headers alone, against sd-scripts' files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_keys import golden, shapes_in_file
from sfumato.config import Config, ModelOptions, NetworkOptions, OptimOptions
from sfumato.config.run import LoopOptions
from sfumato.families.detection import describe_model
from sfumato.families.published import write_published
from sfumato.methods.adapter_builder import AdapterBuilder
from sfumato.methods.adapter_settings import make_adapter_settings

VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {  # golden -> model, --network_module, --network_args
    "dylora_sd15": ("sd15", "networks.dylora", {"unit": 4}),
    "dylora_sd15_conv": ("sd15", "networks.dylora", {"unit": 4, "conv_dim": 4, "conv_alpha": 1}),
    "dylora_sdxl": ("sdxl", "networks.dylora", {"unit": 4}),
    "lora_fa_sd15": ("sd15", "networks.lora_fa", {}),
    "lora_fa_sdxl": ("sdxl", "networks.lora_fa", {}),
    "oft_sdxl": ("sdxl", "networks.oft", {}),
    "oft_sdxl_all_linear": ("sdxl", "networks.oft", {"enable_all_linear": True}),
    "oft_sdxl_conv": ("sdxl", "networks.oft", {"enable_conv": True}),
    "oft_flux": ("flux-dev", "networks.oft_flux", {}),
    "oft_flux_all_linear": ("flux-dev", "networks.oft_flux", {"enable_all_linear": True}),
}


@pytest.mark.parametrize(
    "variant",
    [name if name == "oft_flux" else pytest.param(name, marks=pytest.mark.full) for name in VARIANTS],
)
def test_keys_and_shapes_are_those_of_sd_scripts(variant: str, tmp_path: Path) -> None:
    model, module, arguments = VARIANTS[variant]
    network = NetworkOptions(network_module=module, network_args=arguments, network_dim=4, network_alpha=1.0)
    config = Config(
        model=ModelOptions(pretrained_model_name_or_path=str(write_published(model, tmp_path / "model"))),
        network=network,
        optim=OptimOptions(learning_rate=1e-4),
        loop=LoopOptions(seed=1),
    )
    _, blueprint = describe_model(config)
    settings = make_adapter_settings(config, blueprint)
    groups = {part: blueprint.networks[part].groups(every=True) for part in settings.specs}
    assert shapes_in_file(AdapterBuilder(config).build(settings, groups)) == golden(variant)
