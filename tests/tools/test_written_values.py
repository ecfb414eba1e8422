"""Models with NaN and infinity: tools that pass them on say so, and make none themselves."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.formats.checkpoint import KEPT_FLOAT8, TOOL_DTYPES
from sfumato.tools.adapter_files.written_values import find_largest
from tools.adapter_cases import MODEL

LAYER = "single_blocks.0.linear1"
BROKEN = {"img_in.bias": ("1 of", math.nan), f"{LAYER}.bias": ("2 of", math.inf)}
COMMANDS = {
    "lora merge": "lora merge {lora} --model {broken} --save_to {out}",
    "in half": "lora merge {lora} --model {broken} --save_to {out} --save_precision fp16",
    "model merge": "model merge {flux} {broken} --save_to {out} --save_precision bf16",
    "model convert": "model convert {broken} {out}",
    "model quantize": "model quantize {broken} --save_to {out}",
    "metadata set": "metadata set {broken} a=b --save_to {out}",
}
FAULTS = {
    "a sum": ("lora merge {lora} --model {flux} --ratios 3e38 --save_to {out}", "tool-result-not-finite"),
    "of models": ("model merge {large} {flux} --ratios 3e38 1 --save_to {out}", "tool-result-not-finite"),
    "of adapters": ("lora merge {lora_large} --ratios 3e38 --save_to {out}", "tool-result-not-finite"),
    "in half": ("model merge {large} {large} --save_to {out} --save_precision fp16", "tool-value-beyond-dtype"),
    "a whole model": ("model convert {sd} {out} --save_precision fp16 --tokenizer {words}", "tool-value-beyond-dtype"),
    "to other names": ("lora convert {lora_large} {out} --to diffusers --save_precision fp16", "lora-overflows-dtype"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *(d for d in TOOL_DTYPES.values() if d)], ids=str)
def test_the_largest_value_of_each_dtype(dtype: torch.dtype) -> None:
    """Of float8 each of its 256 numbers."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype) if dtype.itemsize == 1 else torch.tensor(
        [0, -3.5, 2, math.nan, math.inf, -math.inf], dtype=dtype
    )  # fmt: skip
    for number in numbers.split(1):
        value = abs(float(number.float()))
        assert find_largest(number) == (value if math.isfinite(value) else math.inf)
    whole = numbers[numbers.float().isfinite()]
    assert find_largest(whole) == float(whole.float().abs().max())
    if dtype not in KEPT_FLOAT8[:1] or dtype.itemsize > 1:
        assert find_largest(numbers) == math.inf


@pytest.fixture(scope="module")
def files(toy_shelf: ToyShelf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, flux = tmp_path_factory.mktemp("values"), toy_shelf.paths("flux")[MODEL]
    state = load_file(flux)
    for key, (count, value) in BROKEN.items():
        state[key][: int(count[0])] = value
    save_file(state, folder / "broken.safetensors")
    save_file(
        {**load_file(flux), "img_in.bias": torch.full_like(state["img_in.bias"], 1e6)}, folder / "large.safetensors"
    )
    rows, columns = state[f"{LAYER}.weight"].shape
    name = "lora_unet_" + LAYER.replace(".", "_")
    for stem, size in (("lora", 1.0), ("lora_large", 1e6)):
        pair = {f"{name}.lora_down.weight": torch.ones(2, columns), f"{name}.alpha": torch.tensor(2.0)}
        save_file({**pair, f"{name}.lora_up.weight": torch.full((rows, 2), size)}, folder / f"{stem}.safetensors")
    whole = load_file(toy_shelf.paths("sd")[MODEL])
    whole["model.diffusion_model.out.2.bias"].fill_(1e6)
    save_file(whole, folder / "sd.safetensors")
    return {"flux": flux, "words": toy_shelf.paths("sd")["tokenizer"], **{path.stem: path for path in folder.iterdir()}}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_an_input_has_is_reported(
    name: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.safetensors"
    assert main([word.format(**files, out=output) for word in COMMANDS[name].split()]) == 0
    (line,) = re.findall(r"warning: .*", capsys.readouterr().out)
    assert line.startswith(f"warning: {files['broken']} has NaN or infinity in 2 tensors")
    written = load_file(output)
    for key, (count, _) in BROKEN.items():
        assert f"{key} ({count} {len(written[key]):,} numbers)" in line
        assert int((~written[key].isfinite()).sum()) == int(count[0])


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_tool_would_make_is_refused(name: str, files: dict[str, Path], tmp_path: Path, codes: list[str]) -> None:
    command, code = FAULTS[name]
    assert main([word.format(**files, out=tmp_path / "out.safetensors") for word in command.split()]) == 2
    assert codes == [code]
    assert not list(tmp_path.iterdir())


def test_what_a_mistyped_path_means(
    files: dict[str, Path], tmp_path: Path, codes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mein Ordner").mkdir()
    (tmp_path / "Übung 1.safetensors").write_bytes(files["lora"].read_bytes())
    assert main(["lora", "inspect", str(tmp_path / "Übung.safetensors")]) == 2
    for output in ("mein Ordner", "a.txt", "v1.5"):
        assert main(["lora", "merge", str(files["lora"]), "--save_to", str(tmp_path / output)]) == 2
    assert codes == ["tensor-file-missing", "tool-output-is-folder", "tool-output-suffix", "tool-output-suffix"]
    lines = capsys.readouterr().err.splitlines()
    for line, end in zip(
        lines, ("Übung 1.safetensors?", "to write", "/a.safetensors", "/v1.5.safetensors"), strict=True
    ):
        assert line.endswith(end)
