"""`sfumato lora merge` of adapters alone: the one file changes a model as all of them do together."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from families.toys import ToyShelf
from others.models import compute_output, compute_with_file, load_toy
from sfumato.cli.main import main
from sfumato.compat.launch import main as run_script
from sfumato.families.base import Family
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.tools.adapter_files.compare import compare_adapters, find_cosine
from tools.adapter_cases import MODEL, draw_adapter


@pytest.fixture(scope="module")
def flux(toy_shelf: ToyShelf) -> Family:
    return load_toy(toy_shelf, "flux")


@pytest.fixture(scope="module")
def files(flux: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    kinds = {
        "two": {"network_dim": 2},
        "three": {"network_dim": 3, "network_alpha": 1.0},
        "split": {"network_args": {"split_qkv": True}},
        "loha": {"network_module": "networks.loha"},
        "lokr": {"network_module": "networks.lokr", "network_args": {"factor": 4}},
        "dora": {"network_args": {"dora_wd": True}},
        "full": {"network_module": "full_difference"},
        "oft": {"network_module": "oft_v2"},
        "glora": {"network_module": "glora", "network_alpha": 0.3},
    }
    options = {"network_train_unet_only": True}
    return {
        name: draw_adapter(flux, folder / f"{name}.safetensors", seed=1000 * i, **options, **kinds[name])
        for i, name in enumerate(kinds)
    }


def compute_with_both(model: Family, strengths: list[tuple[Path, float]]) -> torch.Tensor:
    adapters = InferenceAdapters(model, strengths)
    found = compute_output(model)
    for engine in chain.from_iterable(file.engines for file in adapters.files):
        engine.detach()
    return found


@pytest.mark.parametrize("shuffle", [False, True])
def test_concatenation_is_exact(
    shuffle: bool, flux: Family, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Different ranks and alphas, a negative ratio, and layers with ranks of their own."""
    output, names, ratios = tmp_path / "out.safetensors", ("two", "three", "split"), (0.5, -1.5, 0.8)
    command = ["lora", "merge", *(str(files[name]) for name in names), "--save_to", str(output), "--ratios"]
    assert main([*command, *map(str, ratios), *(["--shuffle"] if shuffle else [])]) == 0
    assert "exact" in capsys.readouterr().out
    expected = compute_with_both(flux, [(files[name], ratio) for name, ratio in zip(names, ratios, strict=True)])
    found = compute_with_file(flux, output)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.full
@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_any_kind_becomes_low_rank(name: str, flux: Family, files: dict[str, Path], tmp_path: Path) -> None:
    """At a rank that is enough the sum of different kinds is exact."""
    output = tmp_path / "out.safetensors"
    command = ["lora", "merge", str(files["two"]), str(files[name]), "--save_to", str(output), "--new_rank", "500"]
    assert main(command) == 0
    expected = compute_with_both(flux, [(files["two"], 1.0), (files[name], 1.0)])
    torch.testing.assert_close(
        compute_with_file(flux, output), expected, rtol=0, atol=2e-5 * float(expected.abs().max())
    )


@pytest.mark.parametrize("name", ["dora", *(pytest.param(each, marks=pytest.mark.full) for each in ("oft", "glora"))])
def test_kinds_that_read_weights_become_low_rank(
    name: str, flux: Family, files: dict[str, Path], toy_shelf: ToyShelf, tmp_path: Path
) -> None:
    """With the base model; at a rank that is enough the LoRA does what the file does, at a strength, too."""
    output = tmp_path / "out.safetensors"
    command = ["lora", "merge", str(files[name]), "--save_to", str(output), "--new_rank", "500", "--ratios", "0.5"]
    assert main([*command, "--base_model", str(toy_shelf.paths("flux")[MODEL])]) == 0
    expected = compute_with_both(flux, [(files[name], 0.5)])
    found = compute_with_file(flux, output)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


def test_the_nearest_of_a_rank(files: dict[str, Path], tmp_path: Path) -> None:
    """Truncated singular values of the whole sum, as torch computes them."""
    output = tmp_path / "out.safetensors"
    words = ["--models", str(files["two"]), str(files["three"]), "--ratios", "1", "0.5", "--new_rank", "3"]
    assert run_script(["networks/svd_merge_lora.py", *words, "--save_to", str(output)]) == 0
    first, second, found = load_file(files["two"]), load_file(files["three"]), load_file(output)
    for key in found:
        if not key.endswith("lora_up.weight"):
            continue
        name = key.removesuffix(".lora_up.weight")
        whole = 1.5 * multiply(first, name) + 0.5 / 3 * multiply(second, name)
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        nearest = (u[:, :3] * s[:3]) @ vh[:3]
        torch.testing.assert_close(multiply(found, name), nearest, rtol=0, atol=1e-5 * float(s[0]))
        assert float(found[f"{name}.alpha"]) == len(found[f"{name}.lora_down.weight"]) == 3


def multiply(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return state[f"{name}.lora_up.weight"] @ state[f"{name}.lora_down.weight"]


def test_metadata(files: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    assert main(["lora", "merge", str(files["two"]), str(files["three"]), "--save_to", str(output)]) == 0
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "toy"
    assert metadata["modelspec.merged_from"] == "two, three"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("5", "5")
    assert metadata["ss_network_module"] == "networks.lora"
    assert {"sshs_model_hash", "sshs_legacy_hash"} <= metadata.keys()
    assert main(["lora", "merge", str(files["two"]), "--save_to", str(output), "--no_metadata"]) == 0
    with safe_open(output, "pt") as file:
        assert not [name for name in file.metadata() if name.startswith("modelspec")]


@pytest.mark.parametrize(
    ("names", "more", "code"),
    [
        (("two", "dora"), (), "adapter-change-needs-model"),
        (("two", "loha"), (), "join-rank-missing"),
        (("two",), ("--ratios", "1", "2"), "merge-ratio-count"),
        (("two", "three"), ("--ratios", "0", "0"), "join-nothing-left"),
    ],
)
def test_faults(
    names: tuple[str, ...], more: tuple[str, ...], code: str, files: dict[str, Path], tmp_path: Path, codes: list[str]
) -> None:
    command = ["lora", "merge", *(str(files[name]) for name in names), "--save_to", str(tmp_path / "out.safetensors")]
    assert main([*command, *more]) == 2
    assert codes == [code]
    assert not list(tmp_path.iterdir())


def test_inspect_and_check(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Norm and effective rank of a block against whole matrices; a file with a zero change is not good."""
    assert main(["lora", "inspect", str(files["two"])]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "single_transformer_blocks.0" in line)
    state = load_file(files["two"])
    names = {key.rpartition(".lora_up")[0] for key in state if "single_blocks_0_" in key and "lora_up" in key}
    norm = sum(float((1.5 * multiply(state, name)).norm() ** 2) for name in names) ** 0.5
    assert row.split()[1:5] == [str(len(names)), "2", "3", f"{norm:.4g}"]
    assert main(["lora", "check", str(files["two"])]) == 0
    name = sorted(names)[0]
    from safetensors.torch import save_file

    state[f"{name}.lora_up.weight"].zero_()
    save_file(state, tmp_path / "zero.safetensors")
    assert main(["lora", "check", str(tmp_path / "zero.safetensors")]) == 2
    out = capsys.readouterr().out
    assert "1 of 26 changes are 0" in out
    state[f"{name}.lora_up.weight"].fill_(float("nan"))
    save_file(state, tmp_path / "nan.safetensors")
    assert run_script(["networks/check_lora_weights.py", "-s", str(tmp_path / "nan.safetensors")]) == 2
    assert "NAN OR INFINITE" in capsys.readouterr().out


def test_compare(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Cosine against whole matrices, overlap against torch's angles; a file with itself, and with its opposite."""
    found = compare_adapters(files["two"], files["three"])
    first, second = load_file(files["two"]), load_file(files["three"])
    names = [key.removesuffix(".alpha") for key in first if key.endswith(".alpha")]
    one = torch.cat([1.5 * multiply(first, name).flatten() for name in names])
    other = torch.cat([multiply(second, name).flatten() / 3 for name in names])
    assert find_cosine(found.shared) == pytest.approx(float(torch.cosine_similarity(one, other, dim=0)), abs=1e-5)
    up = "lora_unet_single_blocks_0_linear2.lora_up.weight"
    spaces = [torch.linalg.svd(state[up], full_matrices=False).U for state in (first, second)]
    angles = torch.linalg.svdvals(spaces[0].t() @ spaces[1])
    assert any(pair.outputs == pytest.approx(float(angles.square().mean()), abs=1e-5) for pair in found.shared)
    assert main(["lora", "compare", str(files["two"]), str(files["two"])]) == 0
    assert "push the same way (cosine 1.00)" in capsys.readouterr().out
    assert main(["lora", "compare", str(files["two"]), str(files["loha"])]) == 0


def test_files_that_cannot_be_compared(files: dict[str, Path], codes: list[str]) -> None:
    assert main(["lora", "compare", str(files["two"]), str(files["dora"])]) == 2
    assert codes == ["adapter-change-needs-model"]
