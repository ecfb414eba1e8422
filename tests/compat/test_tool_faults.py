"""Every script for LoRA files and checkpoints with every kind of bad input: one clear line, exit code 2, nothing is
written, no input changes; and with inputs in other formats, which work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.toys import ToyShelf
from sfumato.compat.file_tools import FILE_TOOLS
from sfumato.compat.launch import main as run_script
from tools.adapter_cases import MODEL

# Script -> its words; {name}: a good input, of which each in turn is replaced by a bad one.
SCRIPTS = {
    "networks/merge_lora": "--sd_model {sd} --models {sd_lora} --save_to OUT",
    "networks/sdxl_merge_lora": "--sd_model {sdxl} --models {sdxl_lora} --save_to OUT",
    "networks/flux_merge_lora": "--flux_model {flux} --models {flux_lora} --save_to OUT",
    "networks/svd_merge_lora": "--models {flux_lora} {flux_lora2} --ratios 1 0.5 --save_to OUT",
    "networks/extract_lora_from_models": "--model_org {sd} --model_tuned {sd2} --save_to OUT",
    "networks/flux_extract_lora": "--model_org {flux} --model_tuned {flux2} --save_to OUT",
    "networks/resize_lora": "--model {flux_lora} --new_rank 2 --save_to OUT",
    "networks/extract_lora_from_dylora": "--model {flux_lora} --unit 2 --save_to OUT",
    "networks/convert_flux_lora": "--dst ai-toolkit --src_path {flux_lora} --dst_path OUT",
    "networks/check_lora_weights": "{flux_lora}",
    "networks/lora_interrogator": "--sd_model {sd} --model {sd_lora}",
    "tools/convert_diffusers20_original_sd": "{sd} OUT --fp16",
    "tools/convert_diffusers_to_flux": "--diffusers_path {folder} --save_to OUT",
    "tools/merge_models": "--models {flux} {flux2} --output OUT",
    "tools/merge_sd3_safetensors": "--dit {sd3} --output OUT",
    "tools/show_metadata": "--model {flux_lora}",
}
FAST = ("networks/flux_merge_lora", "networks/resize_lora")
SLOTS = {name: [word for word in words.split() if word.startswith("{")] for name, words in SCRIPTS.items()}
WRITERS = [name for name, words in SCRIPTS.items() if "OUT" in words]


def mark(names: list[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.full) for name in names]


@dataclass(frozen=True)
class Bench:
    """Good inputs of all scripts, by name."""

    good: dict[str, Path]

    def fill(self, script: str, output: Path, **replaced: Path) -> list[str]:
        words = [word.format(**{**self.good, **replaced}) for word in SCRIPTS[script].split()]
        return [f"{script}.py", *(str(output) if word == "OUT" else word for word in words)]


def draw_lora(path: Path, model: Path, layers: dict[str, str], seed: int) -> Path:
    generator, state = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    with safe_open(model, "pt") as file:
        for name, key in layers.items():
            rows, columns = file.get_slice(key).get_shape()
            state[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator)
            state[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator)
            state[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(state, path, {"ss_network_dim": "4"})
    return path


def tune(path: Path, source: Path, part: str) -> Path:
    state = load_file(source)
    key = next(key for key in state if part in key)
    save_file({**state, key: state[key] + torch.randn(state[key].shape)}, path)
    return path


@pytest.fixture(scope="module")
def bench(toy_shelf: ToyShelf, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    models = {family: toy_shelf.paths(family)[MODEL] for family in ("sd", "sdxl", "flux", "sd3")}
    down = "lora_unet_down_blocks_{}_attentions_0_transformer_blocks_0_attn1_to_q"
    layers = {  # name in the file -> key in the model
        "sd": {
            down.format(0): "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (
                "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
            ),
        },
        "sdxl": {down.format(1): "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight"},
        "flux": {
            "lora_unet_double_blocks_0_img_mlp_0": "double_blocks.0.img_mlp.0.weight",
            "lora_unet_single_blocks_0_linear1": "single_blocks.0.linear1.weight",
        },
    }
    good = {
        f"{name}_lora": draw_lora(folder / f"{name}_lora.safetensors", models[name], own, 1)
        for name, own in layers.items()
    }
    good["flux_lora2"] = draw_lora(folder / "flux_lora2.safetensors", models["flux"], layers["flux"], 2)
    good["sd2"] = tune(folder / "sd2.safetensors", models["sd"], "attn1.to_q.weight")
    good["flux2"] = tune(folder / "flux2.safetensors", models["flux"], "img_mlp.0.weight")
    return Bench({**models, **good, "folder": toy_shelf.paths("flux", "diffusers")[MODEL]})


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def cut(good: Path, path: Path) -> Path:
    if not good.is_dir():
        path.write_bytes(good.read_bytes()[:-100])
        return path
    copied = Path(shutil.copytree(good, path.with_suffix("")))
    weights = next((copied / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    return copied


def write_text(good: Path, path: Path) -> Path:
    path.write_text("<html>please log in</html>" * 9)
    return path


def write_empty(good: Path, path: Path) -> Path:
    path.write_bytes(b"")
    return path


def write_other(good: Path, path: Path) -> Path:
    save_file({"a.weight": torch.ones(2, 2)}, path)
    return path


def write_code(good: Path, path: Path) -> Path:
    torch.save({"state_dict": {"a": torch.ones(2)}, "more": Evil()}, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


def make_folder(good: Path, path: Path) -> Path:
    path.with_suffix("").mkdir()
    return path.with_suffix("")


NO_FOLDER = "flux-folder-missing"  # of a script that takes a folder, or one of its files
# Kind of fault -> what makes it of a good input, and the codes that may name it: of a model, an adapter, any file.
FAULTS: dict[str, tuple[Callable[[Path, Path], Path], set[str]]] = {
    "missing": (lambda good, path: path, {"model-path-missing", "tensor-file-missing", "adapter-path-missing"}),
    "truncated": (cut, {"tensor-file-truncated"}),
    "text": (write_text, {"not-safetensors", NO_FOLDER}),
    "empty": (write_empty, {"not-safetensors", NO_FOLDER}),
    "of no model": (
        write_other,
        {
            "model-family-unknown", "adapter-file-without-adapter", "models-of-several-kinds", "metadata-missing",
            NO_FOLDER,
        },
    ),
    "code": (write_code, {"pickle-runs-code", "not-safetensors", NO_FOLDER}),
    "an empty folder": (
        make_folder,
        {
            "model-family-unknown", "adapter-folder-unclear", "model-folder-empty", "tensor-file-is-folder",
            "tool-output-is-file",
        },
    ),
}  # fmt: skip


def list_files(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("script", mark(list(SCRIPTS)))
def test_bad_inputs(
    script: str, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], codes: list[str]
) -> None:
    output = tmp_path / "out" / "x.safetensors"
    output.parent.mkdir()
    output.write_bytes(b"older")
    for slot in SLOTS[script]:
        for kind, (spoil, allowed) in FAULTS.items():
            name = slot.strip("{}")
            bad = spoil(bench.good[name], tmp_path / f"{name} {kind}.safetensors".replace(" ", "_"))
            assert run_script(bench.fill(script, output, **{name: bad})) == 2, (slot, kind)
            said = capsys.readouterr()
            last = (said.err or said.out).splitlines()[-1]  # a check has its finding in the report
            assert last.startswith("error: " if said.err else "problem: "), (slot, kind, last)
            assert not codes or codes[-1] in allowed, (slot, kind, last)
            codes.clear()
    assert list_files(output.parent) == {"x.safetensors": b"older"}
    assert not Path("pwned").exists()


@pytest.mark.parametrize("script", mark(WRITERS))
def test_bad_outputs(
    script: str, bench: Bench, tmp_path: Path, codes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over an input, inside of a file, over a folder, on a full disk, under another ending."""
    (tmp_path / "file").write_bytes(b"file")
    (tmp_path / "folder.safetensors").mkdir()
    first = SLOTS[script][0].strip("{}")
    own = tmp_path / f"own{bench.good[first].suffix}"
    copy = shutil.copytree if bench.good[first].is_dir() else shutil.copyfile
    copy(bench.good[first], own)
    before = list_files(tmp_path)
    inside = own / "transformer" / next((own / "transformer").glob("*.safetensors")).name if own.is_dir() else own
    assert run_script(bench.fill(script, inside, **{first: own})) == 2
    assert run_script(bench.fill(script, tmp_path / "file" / "x.safetensors")) == 2
    assert run_script(bench.fill(script, tmp_path / "folder.safetensors")) == 2
    expected = ["tool-output-is-input", "folder-not-writable", "tool-output-is-folder"]
    if not script.startswith("tools/convert_"):  # of these a name without an ending is a folder
        assert run_script(bench.fill(script, tmp_path / "x.txt")) == 2
        expected.append("tool-output-suffix")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert run_script(bench.fill(script, tmp_path / "x.safetensors")) == 2
    assert codes == [*expected, "disk-too-small"]
    assert list_files(tmp_path) == before


def convert(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: tensor.to(dtype) if tensor.ndim > 1 else tensor for key, tensor in state.items()}


@pytest.mark.parametrize("script", mark([name for name in WRITERS if name != "tools/convert_diffusers_to_flux"]))
def test_inputs_in_other_formats(script: str, bench: Bench, tmp_path: Path) -> None:
    """Pickled, in bfloat16 and in float8: what is written has the good file's tensors, nearly."""
    name = SLOTS[script][0].strip("{}")
    state = load_file(bench.good[name])
    torch.save({"state_dict": state}, tmp_path / "pickled.ckpt")
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float8_e4m3fn, "fp8")):
        save_file(convert(state, dtype), tmp_path / f"{label}.safetensors")
    for path in bench.good[name].parent.glob("*tokenizer*"):
        (tmp_path / path.name).symlink_to(path)
    shapes: list[dict[str, torch.Size]] = []
    for path in (bench.good[name], *sorted(tmp_path.glob("*.*t*"))):
        folder = tmp_path / f"out {path.name}"
        assert run_script(bench.fill(script, folder / "x.safetensors", **{name: path})) == 0, path
        (written,) = folder.glob("*.safetensors")
        found = load_file(written)
        assert all(tensor.float().isfinite().all() for tensor in found.values())
        shapes.append({key: tensor.shape for key, tensor in found.items()})
    if "extract" not in script or "dylora" in script:  # rounded models differ in every layer
        assert all(each == shapes[0] for each in shapes)


def test_every_script_is_here() -> None:
    files = {name for name in FILE_TOOLS if name.startswith("networks/")}
    assert files <= SCRIPTS.keys()
