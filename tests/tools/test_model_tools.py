"""`sfumato model ...`, `sfumato metadata ...` and their scripts: sums in closed form, round trips to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from families.toys import ToyShelf
from others.models import load_toy
from sfumato.cli.main import main
from sfumato.compat.launch import main as run_script
from sfumato.compat.model_tools import SD3_PREFIXES
from sfumato.families.foreign_keys import is_redundant
from sfumato.formats.hashes import calculate_adapter_hashes
from tools.adapter_cases import MODEL, draw_adapter
from toy_runs import equal_tensors


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def flux(toy_shelf: ToyShelf) -> Path:
    return toy_shelf.paths("flux")[MODEL]


def write_other(source: Path, path: Path) -> Path:
    """Other values, one tensor less and one more."""
    state = {key: tensor + 1 for key, tensor in load_file(source).items()}
    del state["img_in.bias"]
    save_file({**state, "further": torch.ones(2)}, path)
    return path


def test_the_weighted_sum(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, output = write_other(flux, tmp_path / "b.safetensors"), tmp_path / "out.safetensors"
    command = ["model", "merge", str(flux), str(other), "--save_to", str(output)]
    assert main([*command, "--ratios", "0.75", "0.25", "--show_skipped"]) == 0
    out = capsys.readouterr().out
    assert "lacks 1 tensor," in out
    assert "  further" in out
    before, after = load_file(flux), load_file(output)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor + (0 if key == "img_in.bias" else 0.25), rtol=0, atol=1e-6)
    script = ["tools/merge_models.py", "--models", str(flux), str(flux), "--output", str(output)]
    assert run_script([*script, "--saving_precision", "fp16"]) == 0
    assert equal_tensors(load_file(output), {key: tensor.half() for key, tensor in before.items()})
    assert read_metadata(output)["modelspec.merged_from"] == f"{flux.stem}, {flux.stem}"


@pytest.mark.full
def test_a_folder_is_written_by_a_fresh_process(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Nothing has imported diffusers' schedulers there."""
    paths = toy_shelf.paths("sd")
    words = ["model", "convert", str(paths[MODEL]), str(tmp_path / "folder"), "--tokenizer", str(paths["tokenizer"])]
    done = subprocess.run([sys.executable, "-m", "sfumato", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text())["_class_name"]


@pytest.mark.parametrize("command", ["model convert {sd} {out}", "metadata set {flux} a=b --save_to {out}"])
def test_no_space(
    command: str, flux: Path, toy_shelf: ToyShelf, tmp_path: Path, codes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    files = {"sd": toy_shelf.paths("sd")[MODEL], "flux": flux, "out": tmp_path / "out.safetensors"}
    assert main([word.format(**files) for word in command.split()]) == 2
    assert codes == ["disk-too-small"]
    assert not list(tmp_path.iterdir())


def test_the_denoiser_alone_and_old_names(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Some files of Stable Diffusion 1 lack a level in the text encoder's names."""
    sd = toy_shelf.paths("sd")[MODEL]
    state = load_file(sd)
    level = "cond_stage_model.transformer.text_model."
    assert any(key.startswith(level) for key in state)
    old = {key.replace(level, "cond_stage_model.transformer."): tensor * 3 for key, tensor in state.items()}
    save_file(old, tmp_path / "old.safetensors")
    output = tmp_path / "out.safetensors"
    assert main(["model", "merge", str(sd), str(tmp_path / "old.safetensors"), "--save_to", str(output)]) == 0
    after = load_file(output)
    floats = [key for key in state if key.startswith(level) and state[key].is_floating_point()]
    assert all(torch.allclose(after[key], 2 * state[key], atol=1e-5) for key in floats)
    assert main(["model", "merge", str(sd), str(sd), "--save_to", str(output), "--unet_only"]) == 0
    assert {key.partition(".")[0] for key in load_file(output)} == {"model"}


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_whole_models_to_folders_and_back(family: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    paths = toy_shelf.paths(family)
    tokenizers = ",".join(str(path) for name, path in paths.items() if name.startswith("tokenizer"))
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    assert main(["model", "convert", str(paths[MODEL]), str(folder), "--tokenizer", tokenizers]) == 0
    assert (folder / "model_index.json").is_file()
    script = [
        "tools/convert_diffusers20_original_sd.py",
        str(folder),
        str(back),
        "--epoch",
        "3",
        "--metadata",
        '{"a": "b"}',
    ]
    if family == "sd":
        assert run_script(script) == 0
        assert (read_metadata(back)["ss_epoch"], read_metadata(back)["a"]) == ("3", "b")
    else:
        assert main(["model", "convert", str(folder), str(back)]) == 0
    before, after = load_file(paths[MODEL]), load_file(back)
    missing = {key for key in before if key not in after}
    assert not [key for key in missing if not is_redundant(key)]
    assert equal_tensors({key: before[key] for key in after}, after)


@pytest.mark.parametrize(
    "family", ["flux", *(pytest.param(each, marks=pytest.mark.full) for each in ("sd3", "chroma", "lumina"))]
)
def test_the_denoiser_of_a_folder(family: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """The original keys, to the bit."""
    folder, output = toy_shelf.paths(family, "diffusers")[MODEL], tmp_path / "out.safetensors"
    if family == "flux":
        words = ["tools/convert_diffusers_to_flux.py", "--diffusers_path", str(folder), "--save_to", str(output)]
        assert run_script([*words, "--mem_eff_load_save"]) == 0
    else:
        assert main(["model", "convert", str(folder), str(output)]) == 0
    state, after = load_file(toy_shelf.paths(family)[MODEL]), load_file(output)
    before = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in state.items()}
    assert set(after) <= set(before)
    assert equal_tensors({key: before[key] for key in after}, after)
    assert any(key.endswith("weight") for key in after)
    left = [key for key in before if key not in after]
    assert all(key.startswith(("first_stage_model.", "text_encoders.", "vae.", "norm_final.")) for key in left), left


def test_one_file_of_several_networks(toy_shelf: ToyShelf, tmp_path: Path, codes: list[str]) -> None:
    """The networks of a published file, each in a file of its own, become that file again; keys that have their prefix
    keep it."""
    whole, script = load_file(toy_shelf.paths("sd3")[MODEL]), ["tools/merge_sd3_safetensors.py"]
    for option, prefix in SD3_PREFIXES.items():
        own = {key.removeprefix(prefix): tensor for key, tensor in whole.items() if key.startswith(prefix)}
        save_file(own, tmp_path / f"{option}.safetensors")
        script += [f"--{option}", str(tmp_path / f"{option}.safetensors")]
    output, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    assert run_script([*script, "--output", str(output)]) == 0
    assert equal_tensors(load_file(output), whole)
    assert run_script(["tools/merge_sd3_safetensors.py", "--dit", str(output), "--output", str(again)]) == 0
    assert equal_tensors(load_file(again), whole)
    flux = str(toy_shelf.paths("flux")[MODEL])
    swapped = [str(tmp_path / "dit.safetensors"), "--t5xxl", str(tmp_path / "clip_l.safetensors")]
    for words in ([flux], swapped):
        assert (
            run_script(["tools/merge_sd3_safetensors.py", "--dit", *words, "--output", str(tmp_path / "x.ckpt")]) == 2
        )
    assert codes[0] == "model-family-mismatch"
    assert not (tmp_path / "x.ckpt").exists()


def test_metadata(toy_shelf: ToyShelf, tmp_path: Path, capsys: pytest.CaptureFixture[str], codes: list[str]) -> None:
    file = tmp_path / "a.safetensors"
    draw_adapter(load_toy(toy_shelf, "flux"), file, network_train_unet_only=True)
    before = load_file(file)
    assert run_script(["tools/show_metadata.py", "--model", str(file)]) == 0
    assert json.loads(capsys.readouterr().out) == read_metadata(file)
    command = ["metadata", "set", str(file), "modelspec.title=Cats, a = b", "ss_network_dim="]
    assert main([*command, "--save_to", str(tmp_path / "b.safetensors")]) == 0
    changed = read_metadata(tmp_path / "b.safetensors")
    assert changed["modelspec.title"] == "Cats, a = b"
    assert "ss_network_dim" not in changed
    hashes = calculate_adapter_hashes(before, changed)
    assert (changed["sshs_model_hash"], changed["sshs_legacy_hash"]) == hashes
    assert main(["metadata", "strip", str(tmp_path / "b.safetensors")]) == 0
    assert set(read_metadata(tmp_path / "b.safetensors")) <= {
        "format", "ss_base_model_version", "sshs_model_hash", "sshs_legacy_hash",
    }  # fmt: skip
    assert equal_tensors(load_file(tmp_path / "b.safetensors"), before)
    assert main(["metadata", "set", str(file), "novalue"]) == 2
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    assert main(["metadata", "show", str(tmp_path / "plain.safetensors")]) == 2
    assert codes == ["metadata-entry-invalid", "metadata-missing"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["{flux}", "{sd}", "--save_to", "{out}"], "models-of-several-kinds"),
        (["{flux}", "{wide}", "--save_to", "{out}"], "model-shapes-differ"),
        (["{flux}", "{flux}", "--ratios", "1", "--save_to", "{out}"], "model-ratio-count"),
        (["{flux}", "--save_to", "{flux}"], "tool-output-is-input"),
    ],
)
def test_faults(words: list[str], code: str, flux: Path, toy_shelf: ToyShelf, tmp_path: Path, codes: list[str]) -> None:
    wide = {key: torch.cat([tensor, tensor]) for key, tensor in load_file(flux).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    names = {
        "flux": flux,
        "sd": toy_shelf.paths("sd")[MODEL],
        "wide": tmp_path / "wide.safetensors",
        "out": tmp_path / "o.safetensors",
    }
    before = flux.read_bytes()
    assert main(["model", "merge", *(word.format(**names) for word in words)]) == 2
    assert codes == [code]
    assert flux.read_bytes() == before


FAMILIES = ("sd", "sdxl", "flux", "sd3", "chroma", "lumina")


NAMED = tuple(family for family in FAMILIES if family != "sdxl")  # diffusers' names do not tell a toy's levels


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "family", [each if each == "flux" else pytest.param(each, marks=pytest.mark.full) for each in NAMED]
)
def test_names_there_and_back(family: str, split: bool, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """kohya -> AI-toolkit's names -> kohya: the same tensors to the bit, where alpha / rank is a power of two."""
    args = {"split_qkv": True} if split and family not in ("sd", "sdxl") else {}
    options = {"network_dim": 2, "network_alpha": 4.0, "network_train_unet_only": True}
    model = load_toy(toy_shelf, family)
    file = draw_adapter(model, tmp_path / "a.safetensors", network_args=args, **options)
    theirs, back = tmp_path / "theirs.safetensors", tmp_path / "back.safetensors"
    script = "networks/convert_flux_lora.py"
    if family == "flux":
        paths = ["--src_path", str(file), "--dst_path", str(theirs)]
        assert run_script([script, "--src", "sd-scripts", "--dst", "ai-toolkit", *paths]) == 0
        assert run_script([script, "--src_path", str(theirs), "--dst_path", str(back)]) == 0
    else:
        assert main(["lora", "convert", str(file), str(theirs), "--to", "aitoolkit", "--family", family]) == 0
        assert main(["lora", "convert", str(theirs), str(back), "--to", "kohya", "--family", family]) == 0
    before, after = load_file(file), load_file(back)
    assert before.keys() == after.keys()
    for key in before:
        if key.endswith("alpha"):
            name = key.removesuffix(".alpha")
            assert torch.equal(after[f"{name}.lora_down.weight"], before[f"{name}.lora_down.weight"])
            scale = float(before[key]) / len(before[f"{name}.lora_down.weight"])
            assert float(after[key]) == len(after[f"{name}.lora_down.weight"])
            assert torch.equal(after[f"{name}.lora_up.weight"], before[f"{name}.lora_up.weight"] * scale)
