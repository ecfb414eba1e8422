"""`sfumato lora extract` and `resize`: what was merged comes back, the full rank is exact, smaller ones the nearest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from families.toys import ToyShelf
from others.models import compute_with_file, load_toy
from sfumato.cli.main import main
from sfumato.compat.launch import main as run_script
from sfumato.families.base import Family
from tools.adapter_cases import (
    MODEL,
    draw_adapter,
    list_encoder_options,
    list_merged_files,
    make_merge_command,
)

FAMILIES = ("sd", "sdxl", "flux", "sd3", "chroma", "lumina")
CONVOLUTIONS = {"sd": {"conv_dim": 2}, "sdxl": {"conv_dim": 2}}


def make_extract_command(toy_shelf: ToyShelf, family: str, merged: dict[str, Path], output: Path) -> list[str]:
    paths = toy_shelf.paths(family)
    command = ["lora", "extract", "--model_org", str(paths[MODEL]), "--model_tuned", str(merged[MODEL])]
    for option in list_encoder_options(toy_shelf, family):
        command += [f"--{option}", str(paths[option]), f"--{option}_tuned", str(merged[option])]
    return [*command, "--save_to", str(output)]


def multiply(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    down, up = state[f"{name}.lora_down.weight"].flatten(1), state[f"{name}.lora_up.weight"].flatten(1)
    return float(state[f"{name}.alpha"]) / len(down) * up @ down


@pytest.mark.parametrize(
    "family", [each if each == "flux" else pytest.param(each, marks=pytest.mark.full) for each in FAMILIES]
)
def test_what_was_merged_is_extracted(family: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    model = load_toy(toy_shelf, family)
    file = draw_adapter(model, tmp_path / "a.safetensors", network_args=CONVOLUTIONS.get(family, {}))
    assert main(make_merge_command(toy_shelf, family, [file], tmp_path / "out")) == 0
    merged, output = list_merged_files(toy_shelf, family, tmp_path / "out"), tmp_path / "back.safetensors"
    command = make_extract_command(toy_shelf, family, merged, output)
    conv = ["--conv_dim", "2"] if family in CONVOLUTIONS else []
    assert main([*command, "--dim", "2", *conv]) == 0
    before, after = load_file(file), load_file(output)
    assert before.keys() == after.keys()
    names = [key.removesuffix(".alpha") for key in before if key.endswith(".alpha")]
    for name in names:
        expected = multiply(before, name)
        torch.testing.assert_close(
            multiply(after, name), expected, rtol=0, atol=2e-6 + 1e-5 * float(expected.abs().max())
        )
        assert before[f"{name}.lora_up.weight"].shape == after[f"{name}.lora_up.weight"].shape
    assert main([*command, "--dim", "2", *conv, "--exact"]) == 0
    assert torch.isfinite(torch.cat([tensor.flatten() for tensor in load_file(output).values()])).all()


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "flux", "lumina"])
def test_norm_layers_are_merged_and_extracted(family: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    model = load_toy(toy_shelf, family)
    options = {"network_args": {"train_norm": True}, "network_train_unet_only": True}
    file = draw_adapter(model, tmp_path / "a.safetensors", **options)
    assert main(make_merge_command(toy_shelf, family, [file], tmp_path / "out")) == 0
    merged, output = list_merged_files(toy_shelf, family, tmp_path / "out"), tmp_path / "back.safetensors"
    assert main([*make_extract_command(toy_shelf, family, merged, output), "--dim", "2", "--norms"]) == 0
    before, after = load_file(file), load_file(output)
    norms = [key for key in before if key.endswith(("w_norm", "b_norm"))]
    assert norms
    assert before.keys() == after.keys()
    for key in norms:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-6)
    expected = compute_with_file(model, file)
    scale = float(expected.abs().max())
    torch.testing.assert_close(compute_with_file(model, output), expected, rtol=0, atol=1e-4 * scale)


@pytest.fixture(scope="module")
def flux(toy_shelf: ToyShelf) -> Family:
    return load_toy(toy_shelf, "flux")


@pytest.fixture(scope="module")
def file(flux: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("file")
    return draw_adapter(flux, folder / "a.safetensors", network_dim=4, network_train_unet_only=True)


def tune(toy_shelf: ToyShelf, path: Path) -> Path:
    """A transformer of which one layer, one bias and one norm differ."""
    state = load_file(toy_shelf.paths("flux")[MODEL])
    state["double_blocks.0.img_mlp.0.weight"] += 0.1 * torch.randn(state["double_blocks.0.img_mlp.0.weight"].shape)
    state["double_blocks.0.img_mlp.0.bias"] += 1
    state["double_blocks.0.img_attn.norm.query_norm.scale"] += 1
    save_file(state, path)
    return path


def test_what_an_adapter_cannot_have_is_said(
    toy_shelf: ToyShelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, output = tune(toy_shelf, tmp_path / "tuned.safetensors"), tmp_path / "x.safetensors"
    command = ["lora", "extract", "--model_org", str(toy_shelf.paths("flux")[MODEL]), "--model_tuned", str(tuned)]
    assert (
        main(
            [*command, "--save_to", str(output), "--dynamic_method", "sv_fro", "--dynamic_param", "0.5", "--dim", "64"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "denoiser: 1 layer," in out
    assert "2 other tensors differ" in out
    with safe_open(output, "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == ("flux1", "False")
    assert 1 < int(metadata["ss_network_dim"]) < 64
    assert main([*command, "--save_to", str(output), "--network_module", "lokr"]) == 0
    assert {key.rpartition(".")[2] for key in load_file(output)} == {"lokr_w1", "lokr_w2", "alpha"}
    script = ["networks/flux_extract_lora.py", *command[2:], "--save_to", str(output), "--mem_eff_safe_open"]
    assert run_script(script) == 0
    state = load_file(output)
    largest = max(float(tensor.abs().max()) for key, tensor in state.items() if not key.endswith("alpha"))
    values = torch.cat([tensor.flatten() for key, tensor in state.items() if not key.endswith("alpha")])
    assert (values.abs() == largest).sum() >= values.numel() * 0.005, "clamped, as the script does"


@pytest.mark.parametrize(
    ("rank", "more"), [(4, []), (9, []), (4, ["--dynamic_method", "sv_fro", "--dynamic_param", "1"])]
)
def test_the_full_rank_is_exact(rank: int, more: list[str], flux: Family, file: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.safetensors"
    assert main(["lora", "resize", str(file), "--new_rank", str(rank), "--save_to", str(output), *more]) == 0
    expected = compute_with_file(flux, file)
    torch.testing.assert_close(
        compute_with_file(flux, output), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )
    before, after = load_file(file), load_file(output)
    assert {key: tensor.shape for key, tensor in before.items()} == {key: tensor.shape for key, tensor in after.items()}
    assert all(torch.allclose(before[key], after[key]) for key in before if key.endswith("alpha"))


def test_convolutions_are_resized_to_the_nearest(tmp_path: Path) -> None:
    """Of a kernel of 3 at its own rank of its own, and at its full rank exactly; LoCon's names."""
    names = {"lora_unet_down_blocks_0_resnets_0_conv1": (3, 3), "lora_unet_down_blocks_0_attentions_0_proj_in": (1, 1)}
    state: dict[str, torch.Tensor] = {}
    for name, kernel in names.items():
        state |= {f"{name}.lora_down.weight": torch.randn(4, 32, *kernel), f"{name}.alpha": torch.tensor(3.0)}
        state[f"{name}.lora_up.weight"] = torch.randn(32, 4, 1, 1)
    save_file(state, tmp_path / "a.safetensors")
    command = ["lora", "resize", str(tmp_path / "a.safetensors"), "--save_to", str(tmp_path / "b.safetensors")]
    for ranks in ((1, 2), (4, 4)):
        assert main([*command, "--new_rank", str(ranks[0]), "--new_conv_rank", str(ranks[1])]) == 0
        after = load_file(tmp_path / "b.safetensors")
        for name, kernel in names.items():
            rank = ranks[1] if kernel == (3, 3) else ranks[0]
            u, s, vh = torch.linalg.svd(multiply(state, name), full_matrices=False)
            nearest = (u[:, :rank] * s[:rank]) @ vh[:rank]
            torch.testing.assert_close(multiply(after, name), nearest, rtol=0, atol=1e-5 * float(s[0]))
            assert after[f"{name}.lora_down.weight"].shape == (rank, 32, *kernel)


def test_norms_stay_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    layer = f"{block}_attn1_to_q"
    norms = {f"{block}_norm1.w_norm": torch.randn(32), f"{block}_norm1.b_norm": torch.randn(32)}
    ranked = {f"{layer}.lora_down.weight": torch.randn(4, 32), f"{layer}.lora_up.weight": torch.randn(32, 4)}
    save_file({**ranked, f"{layer}.alpha": torch.tensor(2.0), **norms}, tmp_path / "both.safetensors")
    command = ["lora", "resize", str(tmp_path / "both.safetensors"), "--new_rank", "2"]
    assert main([*command, "--save_to", str(tmp_path / "smaller.safetensors")]) == 0
    after = load_file(tmp_path / "smaller.safetensors")
    assert len(after[f"{layer}.lora_down.weight"]) == 2
    assert all(torch.equal(after[key], norms[key]) for key in norms)
    save_file(norms, tmp_path / "both.safetensors")
    assert main([*command, "--save_to", str(tmp_path / "none.safetensors")]) == 2
    assert "no rank that could be cut" in capsys.readouterr().err


def test_resized_to_the_nearest(file: Path, tmp_path: Path) -> None:
    """alpha / rank stays; sd-scripts' script gives the same."""
    output, other = tmp_path / "r.safetensors", tmp_path / "s.safetensors"
    assert main(["lora", "resize", str(file), "--new_rank", "2", "--save_to", str(output)]) == 0
    script = ["networks/resize_lora.py", "--model", str(file), "--new_rank", "2", "--svd_lowrank_niter", "0"]
    assert run_script([*script, "--save_to", str(other)]) == 0
    before, after = load_file(file), load_file(output)
    assert all(torch.equal(tensor, after[key]) for key, tensor in load_file(other).items())
    for key in before:
        if key.endswith("alpha"):
            name = key.removesuffix(".alpha")
            u, s, vh = torch.linalg.svd(multiply(before, name), full_matrices=False)
            nearest = (u[:, :2] * s[:2]) @ vh[:2]
            torch.testing.assert_close(multiply(after, name), nearest, rtol=0, atol=1e-5 * float(s[0]))
            assert float(after[key]) / 2 == pytest.approx(float(before[key]) / 4)
    with safe_open(output, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_dim"] == "2"
    assert metadata["ss_training_comment"].startswith("resized to 2")


def test_names_without_alpha_stay_so(file: Path, tmp_path: Path) -> None:
    """diffusers' names in, diffusers' names out, at the same strength."""
    theirs, output = tmp_path / "theirs.safetensors", tmp_path / "r.safetensors"
    assert main(["lora", "convert", str(file), str(theirs), "--to", "diffusers"]) == 0
    assert main(["lora", "resize", str(theirs), "--new_rank", "4", "--save_to", str(output)]) == 0
    before, after = load_file(theirs), load_file(output)
    assert before.keys() == after.keys()
    for key in before:
        if key.endswith("lora_A.weight"):
            up = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(after[up] @ after[key], before[up] @ before[key], rtol=0, atol=1e-6)


def test_the_files_of_a_dylora(file: Path, tmp_path: Path) -> None:
    script = ["networks/extract_lora_from_dylora.py", "--model", str(file), "--unit", "1"]
    assert run_script([*script, "--save_to", str(tmp_path / "d.safetensors")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"d-000{rank}.safetensors" for rank in (1, 2, 3)]
    before, after = load_file(file), load_file(tmp_path / "d-0002.safetensors")
    for key, tensor in before.items():
        expected = tensor if key.endswith("alpha") else tensor[:2] if "lora_down" in key else tensor[:, :2]
        assert torch.equal(after[key], expected)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["extract", "--model_org", "{model}", "--model_tuned", "{model}"], "extract-nothing-differs"),
        (["extract", "--model_org", "{model}", "--model_tuned", "{sd}"], "extract-families-differ"),
        (["resize", "{file}", "--dynamic_method", "sv_fro"], "rank-method-number"),
        (["resize", "{file}", "--dynamic_method", "sv_fro", "--dynamic_param", "1.5"], "rank-method-number"),
        (["resize", "{loha}"], "resize-kind-unsupported"),
    ],
)
def test_faults(
    words: list[str], code: str, toy_shelf: ToyShelf, flux: Family, file: Path, tmp_path: Path, codes: list[str]
) -> None:
    output = tmp_path / "x.safetensors"
    if "{loha}" in words:
        draw_adapter(flux, tmp_path / "in" / "loha.safetensors", network_module="networks.loha")
    names = {"model": toy_shelf.paths("flux")[MODEL], "sd": toy_shelf.paths("sd")[MODEL], "file": file}
    names["loha"] = tmp_path / "in" / "loha.safetensors"
    assert main(["lora", *(word.format(**names) for word in words), "--save_to", str(output)]) == 2
    assert codes == [code]
    assert not output.exists()
