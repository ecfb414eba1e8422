"""`sfumato lora convert` for ComfyUI and from every toy: names alone change, and what is written is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families.toys import ToyShelf
from others.models import load_toy
from sfumato.adapters.kinds import read_adapter_file, restore_adapter
from sfumato.cli.main import main
from sfumato.config import Config, NetworkOptions, OptimOptions
from sfumato.config.run import LoopOptions
from sfumato.families.adapter_names import match_adapter_file
from sfumato.families.base import Family
from sfumato.methods import make_method


def attach_lora(model: Family, path: Path) -> Any:
    """A LoRA on every default layer, and its file; its alpha / rank is no power of two."""
    config = Config(
        network=NetworkOptions(network_dim=2, network_alpha=3.0),
        optim=OptimOptions(learning_rate=1.0),
        loop=LoopOptions(seed=1),
    )
    method: Any = make_method(config)
    method.prepare(model)
    for i, parameter in enumerate(method.modules.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    method.write(model, path, {}, None)
    return method


CHROMA_T5 = "encoder_block_0_layer_0_SelfAttention_q"
CHROMA_LAYER = "lora_unet_double_blocks_0_img_mlp_0"


def lora(name: str, rows: int = 16, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        f"{name}.lora_down.weight": torch.randn(2, 4).to(dtype),
        f"{name}.lora_up.weight": torch.randn(rows, 2).to(dtype),
        f"{name}.alpha": torch.tensor(1.0, dtype=dtype),
    }  # fmt: skip


def test_t5_of_chroma_for_comfyui(tmp_path: Path, codes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The names that sd-scripts writes become those that ComfyUI looks for; all values stay."""
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    state = lora(f"lora_te3_{CHROMA_T5}") | lora(CHROMA_LAYER)
    save_file(state, source, {"ss_base_model_version": "chroma"})
    command = ["lora", "convert", str(source), str(target), "--to", "comfyui", "--family", "chroma"]
    assert main(command) == 0
    found = load_file(target)
    assert {key.replace("lora_te1_", "lora_te3_") for key in found} == set(state)
    assert all(torch.equal(found[key.replace("lora_te3_", "lora_te1_")].float(), state[key].float()) for key in state)
    assert capsys.readouterr().out.splitlines() == [f"{target}: 1 LoRA of t5, 1 LoRA of denoiser; 6 tensors"]
    assert main([*command[:2], str(target), str(tmp_path / "c.safetensors"), *command[4:]]) == 2
    assert codes == ["export-not-needed"]


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_files_that_comfyui_reads(family: str, toy_shelf: ToyShelf, tmp_path: Path, codes: list[str]) -> None:
    model = load_toy(toy_shelf, family)
    attach_lora(model, tmp_path / "a.safetensors")
    assert (
        main(["lora", "convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "comfyui"])
        == 2
    )
    assert codes == ["export-not-needed"]
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(("family", "variant"), [
    ("sd", ""), ("sd", "2"), ("sdxl", ""), ("sd3", ""), ("sd3", "3.5-medium"), ("flux", ""), ("flux", "schnell"),
    ("chroma", ""), ("lumina", ""),
])  # fmt: skip
def test_every_toy_is_exported_and_read_back(family: str, variant: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Our own export is one of the layouts that are read: the same ranks, the same changes."""
    model = load_toy(toy_shelf, family, variant)
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    method = attach_lora(model, source)
    parts = {adapter.group.part for adapter in method.engine}
    removed = sorted(part for part in parts if not type(model).components[part].takes_lora)
    without = ["--without", ",".join(removed)] if removed else []
    assert main(["lora", "convert", str(source), str(target), "--to", "diffusers", *without]) == 0
    assert "lora_adapter_metadata" not in read_adapter_file(target).metadata
    specs = {name: part.spec for name, part in model.parts.items() if part.spec.targets}
    groups = {name: model.parts[name].groups(every=True) for name in specs}
    ours, again = (
        {
            name: restore_adapter(own.kinds, own.group, own.make_tensors())
            for name, own in match_adapter_file(read_adapter_file(file), specs, groups).items()
        }
        for file in (source, target)
    )
    assert set(again) == {name for name, adapter in ours.items() if adapter.group.part not in removed}
    for name, adapter in again.items():
        assert adapter.known_rank == ours[name].known_rank
        for i in range(len(adapter.group.layers)):
            torch.testing.assert_close(adapter.delta(i), ours[name].delta(i), rtol=0, atol=1e-6)
