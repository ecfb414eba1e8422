"""`sfumato lora merge` into a model: it runs as attached, all else is copied, faults write nothing."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.toys import ToyShelf
from others.models import compute_output, load_toy
from sfumato.cli.main import main
from sfumato.families.base import Family
from sfumato.methods.inference_adapters import InferenceAdapters
from tools.adapter_cases import (
    ALL_PARTS,
    MODEL,
    draw_adapter,
    list_merged_files,
    load_files,
    make_merge_command,
)
from toy_runs import equal_tensors

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"network_args": {}},
    "split": {"network_args": {"split_qkv": True}},
    "lokr": {"network_module": "networks.lokr", "network_args": {"factor": 4}},
    "loha": {"network_module": "networks.loha"},
    "dora": {"network_args": {"dora_wd": True}},
    "dora, columns": {"network_args": {"dora_wd": True, "wd_on_output": False}},
    "full": {"network_module": "full_difference"},
    "norm": {"network_args": {"train_norm": True}},
    "ia3": {"network_module": "ia3"},
    "glora": {"network_module": "glora", "network_alpha": 0.3},
    "oft": {"network_module": "oft"},
    "diag-oft": {"network_module": "diag_oft"},
    "boft": {"network_module": "boft", "network_dim": 384},
    "oft v2": {"network_module": "oft_v2"},
    "boft v2": {"network_module": "boft_v2"},
    "tucker": {"network_args": {"conv_dim": 2, "use_tucker": True}},
    "pissa": {"network_args": {"pissa": True}},
    "lora_fa": {"network_module": "networks.lora_fa", "network_args": {}},
    "dylora": {"network_module": "networks.dylora", "network_args": {"unit": 1}},
    "scalar": {"network_args": {"use_scalar": True}},
}
FAMILIES = ("sd", "sdxl", "flux", "flux_kontext", "sd3", "chroma", "lumina")
FUSED = ("flux", "flux_kontext", "sd3", "chroma", "lumina")
# Every kind of docs/adapters.md on every family, several in one model: each changes what it would change alone.
GROUPS = (
    ("plain", "lokr", "oft"), ("loha", "dora", "diag-oft"), ("dora, columns", "full", "boft"),
    ("ia3", "glora", "oft v2"), ("norm", "scalar", "boft v2"), ("pissa", "lora_fa", "dylora"),
)  # fmt: skip
FAST = (("flux", ("plain",)), ("sd", ("dora",)), ("sd3", ("lokr",)))


def list_cases() -> list[Any]:
    every = [(family, kinds) for family in FAMILIES for kinds in GROUPS]
    every += [(family, ("split" if family in FUSED else "tucker",)) for family in FAMILIES]
    slow = [pytest.param(*case, marks=pytest.mark.full, id=f"{case[0]}-{'+'.join(case[1])}") for case in every]
    return [*(pytest.param(*case, id=f"{case[0]}-{case[1][0]}") for case in FAST), *slow]


def attach(model: Family, files: Sequence[Path], strength: float, *, parts: Sequence[str] = ()) -> dict[str, Tensor]:
    """The outputs of networks, by default of all, with files attached."""
    adapters = InferenceAdapters(model, [(file, strength) for file in files])
    found = {part: compute_output(model, part) for part in parts or ("denoiser", *model.text_parts)}
    for engine in chain.from_iterable(file.engines for file in adapters.files):
        engine.detach()
    return found


def kind_options(family: str, kind: str) -> dict[str, Any]:
    options = dict(KINDS[kind])
    if options.get("network_module", "networks.lora").startswith("networks."):
        options["network_args"] = {**options.get("network_args", {}), **ALL_PARTS.get(family, {})}
    return options


@pytest.mark.parametrize(("family", "kinds"), list_cases())
def test_merged_runs_as_attached(family: str, kinds: Sequence[str], toy_shelf: ToyShelf, tmp_path: Path) -> None:
    variant = "3.5-medium" if family == "sd3" and "norm" in kinds else ""  # SD3 itself has no norm with a weight
    model = load_toy(toy_shelf, family, variant)
    paths = {kind: tmp_path / f"{i}.safetensors" for i, kind in enumerate(kinds)}
    files = [draw_adapter(model, path, **kind_options(family, kind)) for kind, path in paths.items()]
    plain = compute_output(model, "denoiser")
    expected = attach(model, files, 0.7)
    command = make_merge_command(toy_shelf, family, files, tmp_path / "out", variant)
    assert main([*command, "--ratios", *["0.7"] * len(files)]) == 0
    written = list_merged_files(toy_shelf, family, tmp_path / "out", variant)
    merged = load_files(toy_shelf, family, variant, files=written)
    for part, output in expected.items():
        error = (compute_output(merged, part) - output).abs().max() / output.abs().max()
        assert error < 1e-5, (part, float(error))
    for file in files:
        alone = attach(model, [file], 0.7, parts=["denoiser"])["denoiser"]
        assert (alone - plain).abs().max() > 1e-3, f"{file.name} must matter"


@pytest.fixture(scope="module")
def flux(toy_shelf: ToyShelf) -> Family:
    return load_toy(toy_shelf, "flux")


@pytest.fixture(scope="module")
def small(flux: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that changes the blocks of the transformer alone."""
    folder = tmp_path_factory.mktemp("small")
    return draw_adapter(flux, folder / "small.safetensors", network_train_unet_only=True)


def read_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    """Key -> dtype and bytes, read by hand."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + size])
    entries.pop("__metadata__", None)
    return {key: (entry["dtype"], data[8 + size :][slice(*entry["data_offsets"])]) for key, entry in entries.items()}


def command_for(
    toy_shelf: ToyShelf, files: list[Path], output: Path, *more: object, model: Path | None = None
) -> list[str]:
    model = model or toy_shelf.paths("flux")[MODEL]
    return ["lora", "merge", *map(str, files), "--model", str(model), "--save_to", str(output), *map(str, more)]


def test_what_is_not_changed_is_copied_byte_for_byte(toy_shelf: ToyShelf, small: Path, tmp_path: Path) -> None:
    source = save_as(toy_shelf.paths("flux")[MODEL], tmp_path / "bf16.safetensors", torch.bfloat16)
    assert main(command_for(toy_shelf, [small], tmp_path / "out.safetensors", model=source)) == 0
    before, after = read_bytes(source), read_bytes(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if before[key] != after[key]}
    assert {before[key][0] for key in changed} == {after[key][0] for key in changed} == {"BF16"}
    assert changed == {f"{layer}.weight" for layer in list_original_names(small)}
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["modelspec.merged_from"] == "bf16, small"


def save_as(source: Path, target: Path, dtype: torch.dtype) -> Path:
    save_file({key: tensor.to(dtype) for key, tensor in load_file(source).items()}, target)
    return target


def list_original_names(file: Path) -> set[str]:
    """FLUX's keys of the layers of a file in the kohya format."""
    names: set[str] = set()
    for key in load_file(file):
        name = key.partition(".")[0].removeprefix("lora_unet_")
        block, number, rest = re.fullmatch(r"(double_blocks|single_blocks)_(\d+)_(.+)", name).groups()  # pyright: ignore
        rest = re.sub(r"^(img|txt)_(attn|mlp|mod)_", r"\1_\2.", rest).replace("modulation_lin", "modulation.lin")
        names.add(f"{block}.{number}.{rest}")
    return names


def test_sums_are_rounded_once(toy_shelf: ToyShelf, small: Path, tmp_path: Path) -> None:
    """Twice the same file is once at the sum of the strengths, in bfloat16 to the bit."""
    source = save_as(toy_shelf.paths("flux")[MODEL], tmp_path / "bf16.safetensors", torch.bfloat16)
    twice, once = tmp_path / "twice.safetensors", tmp_path / "once.safetensors"
    assert main([*command_for(toy_shelf, [small, small], twice, model=source), "--ratios", "0.5", "0.25"]) == 0
    assert main([*command_for(toy_shelf, [small], once, model=source), "--ratios", "0.75"]) == 0
    first, second = load_file(twice), load_file(once)
    differing = sum(int((first[key] != second[key]).sum()) for key in first)
    assert differing <= sum(tensor.numel() for tensor in first.values()) // 10000  # where a sum lies between two


def test_weights_with_scales_stay_so(toy_shelf: ToyShelf, small: Path, tmp_path: Path) -> None:
    """Eight-bit weights are changed as the product with their scale and get a new scale; others keep their bits."""
    plain, state = load_file(toy_shelf.paths("flux")[MODEL]), dict[str, torch.Tensor]()
    scaled = {key for key, tensor in plain.items() if "blocks" in key and tensor.ndim == 2}
    for key, tensor in plain.items():
        if key in scaled:
            scale = tensor.abs().max() / 448
            state[key] = (tensor / scale).to(torch.float8_e4m3fn)
            state[key.replace(".weight", ".scale_weight")] = scale.reshape(1)
        else:
            state[key] = tensor
    source, output = tmp_path / "scaled.safetensors", tmp_path / "out.safetensors"
    save_file(state, source)
    assert main(command_for(toy_shelf, [small], output, model=source)) == 0
    found, exact = load_file(output), tmp_path / "exact.safetensors"
    assert main(command_for(toy_shelf, [small], exact)) == 0
    expected = load_file(exact)
    assert {key: tensor.dtype for key, tensor in found.items()} == {key: tensor.dtype for key, tensor in state.items()}
    for key in scaled:
        value = found[key].float() * found[key.replace(".weight", ".scale_weight")]
        assert (value - expected[key]).abs().max() <= expected[key].abs().max() / 14, key  # 3 bits, twice
    assert main([*command_for(toy_shelf, [small], exact, model=source), "--save_precision", "bf16"]) == 0
    assert {tensor.dtype for tensor in load_file(exact).values()} == {torch.bfloat16}


def test_folders_of_diffusers_and_pickled_files(toy_shelf: ToyShelf, flux: Family, small: Path, tmp_path: Path) -> None:
    folder = toy_shelf.paths("flux", "diffusers")[MODEL]
    assert main(command_for(toy_shelf, [small], tmp_path / "folder", model=folder)) == 0
    expected = attach(flux, [small], 1.0)["denoiser"]
    merged = load_files(toy_shelf, "flux", files={MODEL: tmp_path / "folder"})
    torch.testing.assert_close(compute_output(merged), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    for name in ("text_encoder", "vae", "tokenizer"):
        for path in (folder / name).iterdir():
            assert path.read_bytes() == (tmp_path / "folder" / name / path.name).read_bytes()
    assert main(command_for(toy_shelf, [small], tmp_path / "model.ckpt")) == 0
    state = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert main(command_for(toy_shelf, [small], tmp_path / "model.safetensors")) == 0
    assert equal_tensors(state, load_file(tmp_path / "model.safetensors"))


FAULTS: dict[str, tuple[list[str], str]] = {
    "another family": (["{sd}", "--model", "{model}"], "adapter-names-unmatched"),
    "another size": (["{wide}", "--model", "{model}"], "adapter-shape-mismatch"),
    "truncated": (["{cut}", "--model", "{model}"], "tensor-file-truncated"),
    "model truncated": (["{small}", "--model", "{cutmodel}"], "tensor-file-truncated"),
    "too few ratios": (["{small}", "{small}", "--ratios", "1", "--model", "{model}"], "merge-ratio-count"),
    "no encoder": (["{all}", "--model", "{model}"], "merge-part-missing"),
    "encoder not written": (["{all}", "--model", "{model}", "--clip_l", "{clip_l}"], "merge-part-not-written"),
    "written without input": (
        ["{small}", "--model", "{model}", "--clip_l_save_to", "x.safetensors"], "merge-encoder-input-missing",
    ),
    "block weights": (["{small}", "--model", "{model}", "--lbws", "[1,2]"], "block-weights-invalid"),
    "blocks of a UNet": (
        ["{small}", "--model", "{model}", "--lbws", "[1,1,1,1,1,1,1,1,1,1,1,1]"], "block-weights-without-unet",
    ),
    "beyond half": (["{large}", "--model", "{model}", "--save_precision", "fp16"], "tool-value-beyond-dtype"),
    "rank with a model": (["{small}", "--model", "{model}", "--new_rank", "2"], "merge-rank-with-model"),
}  # fmt: skip


@pytest.fixture(scope="module")
def fault_files(
    toy_shelf: ToyShelf, flux: Family, small: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder, paths = tmp_path_factory.mktemp("faults"), toy_shelf.paths("flux")
    state = load_file(small)
    wide = {key: torch.cat([tensor] * 2, 1) if "lora_down" in key else tensor for key, tensor in state.items()}
    save_file(wide, folder / "wide.safetensors")
    large = {key: tensor * 1e9 if "lora_up" in key else tensor for key, tensor in state.items()}
    save_file(large, folder / "large.safetensors")
    (folder / "cut.safetensors").write_bytes(small.read_bytes()[:-100])
    (folder / "cutmodel.safetensors").write_bytes(paths[MODEL].read_bytes()[:-100])
    other = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(2, 8)}
    save_file(
        {**other, "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.ones(8, 2)},
        folder / "sd.safetensors",
    )
    return {
        "small": small, "all": draw_adapter(flux, folder / "all.safetensors"), "model": paths[MODEL],
        "clip_l": paths["clip_l"], **{path.stem: path for path in folder.glob("*.safetensors")},
    }  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_leave_the_output_as_it_was(
    name: str, fault_files: dict[str, Path], tmp_path: Path, codes: list[str]
) -> None:
    words, code = FAULTS[name]
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"older")
    assert main(["lora", "merge", *(word.format(**fault_files) for word in words), "--save_to", str(output)]) == 2
    assert codes == [code]
    assert output.read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


def test_an_input_is_never_the_output(toy_shelf: ToyShelf, small: Path, tmp_path: Path, codes: list[str]) -> None:
    model = save_as(toy_shelf.paths("flux")[MODEL], tmp_path / "model.safetensors", torch.float32)
    (tmp_path / "link.safetensors").symlink_to(model)
    before = model.read_bytes()
    for output in (model, tmp_path / "link.safetensors"):
        assert main(command_for(toy_shelf, [small], output, model=model)) == 2
    assert codes == ["tool-output-is-input"] * 2
    assert model.read_bytes() == before


def test_no_space(
    toy_shelf: ToyShelf, small: Path, tmp_path: Path, codes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(command_for(toy_shelf, [small], tmp_path / "out.safetensors")) == 2
    assert codes == ["disk-too-small"]
    assert not list(tmp_path.iterdir())


def test_block_weights(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """A list of zeros but for one block changes that block alone; text encoders are BASE."""
    model = load_toy(toy_shelf, "sd")
    file = draw_adapter(model, tmp_path / "a.safetensors")
    source = toy_shelf.paths("sd")[MODEL]
    for place, pattern in ((0, r"cond_stage_model\..+"), (2, r"model\.diffusion_model\.input_blocks\.1\..+")):
        numbers = [0] * 26
        numbers[place] = 1
        output = tmp_path / f"{place}.safetensors"
        command = command_for(toy_shelf, [file], output, "--lbws", str(numbers), model=source)
        assert main(command) == 0
        before, after = load_file(source), load_file(output)
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        assert changed
        assert all(re.fullmatch(pattern, key) for key in changed), changed


@pytest.mark.full
def test_nothing_heavy_is_imported(toy_shelf: ToyShelf, small: Path, tmp_path: Path) -> None:
    """Merging needs torch alone, whatever the family."""
    words = command_for(toy_shelf, [small], tmp_path / "out.safetensors")
    program = f"""
import sys
from sfumato.cli.main import main
assert main({words!r}) == 0
heavy = [name for name in ("diffusers", "transformers", "accelerate") if name in sys.modules]
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
