"""`sfumato model quantize` and `model inspect`: what is stored is what ComfyUI's library and training would store."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.toys import ToyShelf
from others.models import compute_output
from quantization.meant import FLOAT8, INT8, hadamard, round_scaled
from sfumato.cli.main import main
from sfumato.config.memory import MemoryOptions
from sfumato.formats.checkpoint import TensorFile, open_checkpoint
from sfumato.quantization.weight import QuantizedWeight
from sfumato.tools.quantized_layers import LAYOUTS, Bits, LayerWeight, fit_layout, round_weight
from tools.adapter_cases import MODEL, load_files

HADAMARD = {size: hadamard(size) for size in (4, 16, 64, 256)}
BITS: tuple[Bits, ...] = ("fp8", "int8", "int8_rotated")


@pytest.fixture(scope="module")
def flux(toy_shelf: ToyShelf) -> Path:
    return toy_shelf.paths("flux")[MODEL]


def quantize(source: Path, output: Path, *more: str) -> int:
    return main(["model", "quantize", str(source), "--save_to", str(output), *more])


def round_for_comfyui(weight: Tensor, bits: str) -> Tensor:
    """One scale for all of a float8 weight, one for each row of int8; rotated in groups of 256, 64, 16 or 4."""
    if bits == "fp8":
        scale = weight.abs().max() / 448
        return (weight / scale).to(FLOAT8).float() * scale
    if bits == "int8":
        return round_scaled(weight, 0, INT8)
    size = next(size for size in (256, 64, 16, 4) if weight.shape[1] % size == 0)
    matrix = HADAMARD[size]
    turned = round_scaled(torch.cat([part @ matrix for part in weight.split(size, 1)], 1), 0, INT8)
    return torch.cat([part @ matrix for part in turned.split(size, 1)], 1)


def list_block_weights(state: dict[str, Tensor]) -> set[str]:
    return {key for key, tensor in state.items() if "_blocks." in key and key.endswith("weight") and tensor.ndim == 2}


@pytest.mark.parametrize("bits", BITS)
def test_for_comfyui(bits: str, flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, dtypes and numbers; the error in the report is that of what is read; all else keeps its bytes."""
    output = tmp_path / "q.safetensors"
    assert quantize(flux, output, "--bits", bits, "--verbose") == 0
    lines = capsys.readouterr().out.splitlines()
    before, after = load_file(flux), load_file(output)
    weights = list_block_weights(before)
    modules = {key.removesuffix(".weight") for key in weights}
    expected = {f"{module}.{name}" for module in modules for name in ("weight_scale", "comfy_quant")}
    assert after.keys() - before.keys() == expected
    assert all(torch.equal(after[key], before[key]) for key in before.keys() - weights)
    with safe_open(output, "pt") as file:
        layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    assert layers.keys() == modules
    with open_checkpoint(output) as file:
        for key in sorted(weights):
            module = key.removesuffix(".weight")
            described = json.loads(bytes(after[f"{module}.comfy_quant"].tolist()))
            assert described == layers[module]
            assert described["format"] == ("float8_e4m3fn" if bits == "fp8" else "int8_tensorwise")
            assert after[f"{module}.weight_scale"].shape == (() if bits == "fp8" else (len(before[key]), 1))
            found, meant = file.read(key, dtype=torch.float32), round_for_comfyui(before[key], bits)
            torch.testing.assert_close(found, meant, rtol=1e-4, atol=1e-6)
            error = float((found - before[key]).norm() / before[key].norm())
            assert f"  {error:.3%} {key}" in lines


@pytest.mark.full
@pytest.mark.parametrize("bits", BITS)
def test_comfyui_would_write_the_same(bits: str, flux: Path, tmp_path: Path) -> None:
    """ComfyUI's own library: the same numbers and scales, which it reads as the same weights."""
    layouts: Any = pytest.importorskip("comfy_kitchen.tensor")
    assert quantize(flux, tmp_path / "q.safetensors", "--bits", bits) == 0
    before, after = load_file(flux), load_file(tmp_path / "q.safetensors")
    for key in list_block_weights(before):
        module, weight = key.removesuffix(".weight"), before[key]
        described = json.loads(bytes(after[f"{module}.comfy_quant"].tolist()))
        turned = {name: described[name] for name in described if name.startswith("convrot")}
        layout = layouts.TensorCoreFP8Layout if bits == "fp8" else layouts.TensorWiseINT8Layout
        numbers, own = layout.quantize(weight, **({} if bits == "fp8" else {"per_channel": True, **turned}))
        assert torch.equal(numbers.view(torch.uint8), after[key].view(torch.uint8))
        torch.testing.assert_close(own.scale, after[f"{module}.weight_scale"].reshape(own.scale.shape))
        read = layout.dequantize(
            after[key], layout.Params(scale=own.scale, orig_dtype=torch.float32, orig_shape=weight.shape, **turned)
        )
        with open_checkpoint(tmp_path / "q.safetensors") as file:
            torch.testing.assert_close(read, file.read(key, dtype=torch.float32), rtol=1e-5, atol=1e-6)


MEMORY = {
    "fp8": MemoryOptions(fp8_scaled=True),
    "int8": MemoryOptions(int8_base=True),
    "int8_rotated": MemoryOptions(int8_base=True, rotate_inputs=True),
}


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        ("flux", "int8_rotated"),
        *(pytest.param("sd", bits, marks=pytest.mark.full) for bits in BITS),
    ],
)
def test_for_training(family: str, bits: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Without an option the denoiser is kept as the options would keep it: its weights are the same, to the bit."""
    source, output = toy_shelf.paths(family)[MODEL], tmp_path / "q.safetensors"
    assert quantize(source, output, "--bits", bits, "--to", "training") == 0
    expected = load_files(toy_shelf, family, files={}, memory=MEMORY[bits])
    found = load_files(toy_shelf, family, files={MODEL: output})
    kept = [
        (name, weight, found.denoiser.get_parameter(name))
        for name, weight in expected.denoiser.named_parameters()
        if isinstance(weight.data, QuantizedWeight)
    ]
    assert len(kept) > 20
    for name, wanted, own in kept:
        assert isinstance(own.data, QuantizedWeight), name
        columns, block = wanted.shape[1:].numel(), 64 if bits == "fp8" else 128
        if columns <= block or columns % block == 0:  # else blocks are narrower in files
            assert torch.equal(own.data.decode(), wanted.data.decode()), name


@pytest.mark.parametrize("bits", BITS)
def test_a_convolution(bits: Bits) -> None:
    """A kernel counts with the columns, where rows are rotated as where they have their scales."""
    weight = torch.randn(24, 32, 3, 3)
    layout = fit_layout(LAYOUTS["training", bits], weight.shape)
    found = round_weight(weight, LayerWeight(key="a.weight", block="a", layout=layout, shape=tuple(weight.shape)))
    rows, columns = weight.flatten(1), layout.format.block
    size = layout.format.rotation or 1
    assert size == (16 if bits == "int8_rotated" else 1)
    if size > 1:
        rows = torch.cat([part @ hadamard(size) for part in rows.split(size, 1)], 1)
    meant = torch.cat([round_scaled(part, 0, layout.format.dtype) for part in rows.split(columns, 1)], 1)
    scales = found.scales.repeat_interleave(columns, 1)[:, : rows.shape[1]]
    torch.testing.assert_close(found.numbers.flatten(1).float() * scales, meant, rtol=1e-4, atol=1e-6)
    assert found.error == pytest.approx(float((meant - rows).norm() / rows.norm()), rel=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("family", ["sdxl", "sd3", "chroma", "lumina"])
def test_every_family(family: str, toy_shelf: ToyShelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Merged adapters, inspection and another precision: tools read the file as the model that it is."""
    source, output = toy_shelf.paths(family)[MODEL], tmp_path / "q.safetensors"
    assert quantize(source, output, "--bits", "int8", "--save_precision", "bf16") == 0
    assert main(["model", "inspect", str(output)]) == 0
    out = capsys.readouterr().out
    assert f"family    {family}" in out
    assert "weights in int8 with a scale for each row" in out
    plain = compute_output(load_files(toy_shelf, family, files={}))
    found = compute_output(load_files(toy_shelf, family, files={MODEL: output}))
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.1


@pytest.mark.full
@pytest.mark.parametrize("bits", ["fp8", "int8"])
def test_an_open_clip_encoder(bits: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Of Stable Diffusion XL's second encoder the weights of three layers in one keep their bytes, as no reader looks
    for scales of theirs; the rest is rounded as ComfyUI would round it, and runs so."""
    source, output = toy_shelf.paths("sdxl")[MODEL], tmp_path / "q.safetensors"
    assert quantize(source, output, "--bits", bits, "--parts", "clip_g") == 0
    before, after = load_file(source), load_file(output)
    prefix = "conditioner.embedders.1.model.transformer.resblocks."
    blocks = {key for key in before if key.startswith(prefix) and before[key].ndim == 2}
    fused = {key for key in blocks if key.endswith("in_proj_weight")}
    layers = {key for key in blocks if key.endswith(".weight")}
    assert fused | layers == blocks
    assert len(layers) == 3 * len(fused) > 3
    assert all(torch.equal(after[key], before[key]) for key in before.keys() - layers)
    with open_checkpoint(output) as file:
        for key in layers:
            meant = round_for_comfyui(before[key], bits)
            torch.testing.assert_close(file.read(key, dtype=torch.float32), meant, rtol=1e-4, atol=1e-6)
    save_file(
        {**before, **{key: round_for_comfyui(before[key], bits) for key in layers}}, tmp_path / "meant.safetensors"
    )
    expected = compute_output(load_files(toy_shelf, "sdxl", files={MODEL: tmp_path / "meant.safetensors"}), "clip_g")
    found = compute_output(load_files(toy_shelf, "sdxl", files={MODEL: output}), "clip_g")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("program", ["comfyui", "training"])
def test_each_weight_is_read_once(program: str, flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and scales of a weight are made together, wherever they lie in the file."""
    reads: Counter[str] = Counter()
    read = TensorFile.read

    def count(self: TensorFile, name: str, **options: Any) -> Tensor:
        reads[name] += 1
        return read(self, name, **options)

    monkeypatch.setattr(TensorFile, "read", count)
    assert quantize(flux, tmp_path / "q.safetensors", "--to", program) == 0
    assert set(reads.values()) == {1}
    assert reads.keys() == load_file(flux).keys()


FAULTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "a folder": ("{folder}", (), "quantize-folder"),
    "another part": ("{flux}", ("--parts", "unet"), "quantize-part-missing"),
    "not finite": ("{broken}", (), "quantize-not-finite"),
    "truncated": ("{cut}", (), "tensor-file-truncated"),
    "no model": ("{none}", (), "model-family-unknown"),
}


@pytest.fixture(scope="module")
def fault_files(toy_shelf: ToyShelf, flux: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("faults")
    state = load_file(flux)
    state["single_blocks.0.linear1.weight"][0, 0] = float("nan")
    save_file(state, folder / "broken.safetensors")
    (folder / "cut.safetensors").write_bytes(flux.read_bytes()[:-100])
    save_file({"a.weight": torch.ones(2, 2)}, folder / "none.safetensors")
    others = {path.stem: path for path in folder.glob("*.safetensors")}
    return {"flux": flux, "folder": toy_shelf.paths("flux", "diffusers")[MODEL], **others}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_write_nothing(name: str, fault_files: dict[str, Path], tmp_path: Path, codes: list[str]) -> None:
    source, more, code = FAULTS[name]
    assert quantize(Path(source.format(**fault_files)), tmp_path / "q.safetensors", *more) == 2
    assert codes == [code]
    assert not list(tmp_path.iterdir())


def test_the_source_is_not_the_output(flux: Path, tmp_path: Path, codes: list[str]) -> None:
    own = tmp_path / "m.safetensors"
    own.write_bytes(flux.read_bytes())
    assert quantize(own, own) == 2
    assert codes == ["tool-output-is-input"]
    assert own.read_bytes() == flux.read_bytes()


def test_inspect(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts as safetensors has them; keys of no network; files of no family."""
    state = load_file(flux)
    path = tmp_path / "more.safetensors"
    save_file({**state, "further.weight": torch.ones(2), "logvar": torch.ones(3)}, path, {"modelspec.title": "A" * 500})
    assert main(["model", "inspect", str(path)]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("  denoiser"))
    assert row.split()[1:3] == [str(len(state)), f"{sum(tensor.numel() for tensor in state.values()):,}"]
    assert "of no network: further.weight" in out
    assert "not needed: logvar" in out
    assert "A" * 101 not in out
    save_file({"a.weight": torch.ones(2, 3)}, path)
    assert main(["model", "inspect", str(path)]) == 2
    out = capsys.readouterr().out
    assert "family    unknown" in out
    assert "all tensors" in out
