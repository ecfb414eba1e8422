"""Files with ComfyUI's names, applied by its rules: every tensor is taken, and the weights are those of `lora merge`.

Its rules, as facts. Of the diffusion model: `lora_unet_` and the key in the checkpoint, with _ for dots. Of CLIP-L
`lora_te1_` and the key in its file, of CLIP-G beside it `lora_te2_`; of T5 `lora_te` and a number, which is 1 and one
more for each CLIP beside it, and 3 also beside a lone CLIP. The change is alpha / rank * up @ down.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from families.toys import ToyShelf
from others.models import load_toy
from sfumato.cli.main import main
from tools.adapter_cases import ALL_PARTS, MODEL, draw_adapter, list_merged_files, make_merge_command

# Family -> prefix of keys in its files -> names; the file of an encoder has none.
PLACES: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "flux": {
        MODEL: {"": ("lora_unet_",)}, "clip_l": {"": ("lora_te1_",)}, "t5xxl": {"": ("lora_te2_", "lora_te3_")},
    },
    "chroma": {MODEL: {"": ("lora_unet_",)}, "t5xxl": {"": ("lora_te1_",)}},
    "sd3": {
        MODEL: {
            "model.diffusion_model.": ("lora_unet_",),
            "text_encoders.clip_l.transformer.": ("lora_te1_",),
            "text_encoders.clip_g.transformer.": ("lora_te2_",),
            "text_encoders.t5xxl.transformer.": ("lora_te3_",),
        },
        "clip_l": {"": ("lora_te1_",)}, "clip_g": {"": ("lora_te2_",)}, "t5xxl": {"": ("lora_te3_",)},
    },
    "lumina": {MODEL: {"": ("lora_unet_",)}},
}  # fmt: skip


def list_names(family: str, option: str, key: str) -> list[str]:
    """Under which names ComfyUI looks for the change of a weight."""
    if not key.endswith(".weight"):
        return []
    found: list[str] = []
    for prefix, names in PLACES[family].get(option, {}).items():
        if key.startswith(prefix):
            rest = key.removeprefix(prefix).removesuffix(".weight").replace(".", "_")
            found += [name + rest for name in names]
    return found


def apply(weight: Tensor, lora: dict[str, Tensor], name: str) -> Tensor:
    down, up = lora[f"{name}.lora_down.weight"], lora[f"{name}.lora_up.weight"]
    scale = float(lora[f"{name}.alpha"]) / len(down)
    return weight + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


@pytest.mark.full
@pytest.mark.parametrize("family", PLACES)
def test_every_layer_is_taken(family: str, toy_shelf: ToyShelf, tmp_path: Path, codes: list[str]) -> None:
    """Applied by hand to every file of the model, the exported file gives what a merge of the file itself gives."""
    arguments = {"network_args": ALL_PARTS[family]} if family in ALL_PARTS else {"network_train_unet_only": True}
    file = draw_adapter(load_toy(toy_shelf, family), tmp_path / "own.safetensors", **arguments)
    exported = tmp_path / "comfyui.safetensors"
    if main(["lora", "convert", str(file), str(exported), "--to", "comfyui", "--family", family]) != 0:
        assert codes == ["export-not-needed"]
        exported = file
    assert main(make_merge_command(toy_shelf, family, [file], tmp_path / "merged")) == 0
    lora = load_file(exported)
    taken: set[str] = set()
    for option, merged in list_merged_files(toy_shelf, family, tmp_path / "merged").items():
        before, after = load_file(toy_shelf.paths(family)[option]), load_file(merged)
        for key, weight in before.items():
            names = [name for name in list_names(family, option, key) if f"{name}.lora_up.weight" in lora]
            assert len(names) <= 1
            expected = weight
            for name in names:
                expected = apply(weight, lora, name)
                taken.update(end for end in lora if end.startswith(f"{name}."))
            torch.testing.assert_close(after[key], expected, rtol=0, atol=1e-5 * float(expected.abs().max()) + 1e-7)
    assert taken == lora.keys()


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_every_layer_of_a_unet_is_taken(family: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Files for models with a UNet are taken as they are: `lora_unet_` and the key of diffusers, of SDXL that of its
    checkpoint; `lora_te_` and transformers' key, or `lora_te1_` and `lora_te2_` where there are two encoders."""
    folder, single = toy_shelf.paths(family, "diffusers")[MODEL], toy_shelf.paths(family)[MODEL]
    file = draw_adapter(load_toy(toy_shelf, family), tmp_path / "own.safetensors", network_args={"conv_dim": 2})
    for model, output in ((folder, tmp_path / "folder"), (single, tmp_path / single.name)):
        assert main(["lora", "merge", str(file), "--model", str(model), "--save_to", str(output)]) == 0
    parts = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    parts = {"unet": "lora_unet_", "text_encoder": "lora_te_"} if family == "sd" else parts
    pairs: list[tuple[str, Tensor, Tensor]] = []  # name, weight before and after
    for part, prefix in parts.items():
        for path in (folder / part).glob("*.safetensors"):
            after = load_file(tmp_path / "folder" / part / path.name)
            for key, weight in load_file(path).items():
                level = "text_model." if part != "unet" and not key.startswith("text_") else ""
                pairs.append((prefix + make_name(level + key), weight, after[key]))
    if family == "sdxl":
        after, prefix = load_file(tmp_path / single.name), "model.diffusion_model."
        for key, weight in load_file(single).items():
            if key.startswith(prefix):
                pairs.append(("lora_unet_" + make_name(key.removeprefix(prefix)), weight, after[key]))
    lora, taken = load_file(file), set[str]()
    for name, weight, after_weight in pairs:
        expected = apply(weight, lora, name) if f"{name}.lora_up.weight" in lora else weight
        taken.update(key for key in lora if key.startswith(f"{name}."))
        error = 1e-5 * float(expected.abs().max()) + 1e-7
        torch.testing.assert_close(after_weight, expected, rtol=0, atol=error, msg=name)
    assert taken == lora.keys()


def make_name(key: str) -> str:
    return key.removesuffix(".weight").replace(".", "_")
