"""Mistakes that users make: their error codes, one clear last line, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.demo.toy import write_toy
from sfumato.errors import InternalError
from toy_runs import make_arguments, make_images

Case = Callable[[Mapping[str, Path], Path], list[str]]


@pytest.fixture(scope="module")
def toy(toy_shelf: ToyShelf) -> Mapping[str, Path]:
    return toy_shelf.paths("sd")


def with_images(toy: Mapping[str, Path], folder: Path, **options: object) -> list[str]:
    return make_arguments(toy, make_images(folder / "images"), folder / "out", **options)


def missing_model(toy: Mapping[str, Path], folder: Path) -> list[str]:
    return with_images({"pretrained_model_name_or_path": folder / "nowhere.safetensors"}, folder)


def truncated_model(toy: Mapping[str, Path], folder: Path) -> list[str]:
    path = folder / "torn.safetensors"
    path.write_bytes(Path(toy["pretrained_model_name_or_path"]).read_bytes()[:-1000])
    return with_images({"pretrained_model_name_or_path": path}, folder)


def not_a_model(toy: Mapping[str, Path], folder: Path) -> list[str]:
    path = folder / "letter.safetensors"
    path.write_text("Dear reader")
    return with_images({"pretrained_model_name_or_path": path}, folder)


def other_family(toy: Mapping[str, Path], folder: Path) -> list[str]:
    paths = write_toy("flux", folder / "flux")
    return with_images({"pretrained_model_name_or_path": paths["pretrained_model_name_or_path"]}, folder, family="sd")


def no_images(toy: Mapping[str, Path], folder: Path) -> list[str]:
    (folder / "images" / "10_cat").mkdir(parents=True)
    return make_arguments(toy, folder / "images", folder / "out")


def no_captions(toy: Mapping[str, Path], folder: Path) -> list[str]:
    images = make_images(folder / "images", name="2_")
    for caption in images.rglob("*.txt"):
        caption.unlink()
    return make_arguments(toy, images, folder / "out")


def unknown_option(toy: Mapping[str, Path], folder: Path) -> list[str]:
    return [*with_images(toy, folder), "--lerning_rate", "1e-4"]


def wrong_type(toy: Mapping[str, Path], folder: Path) -> list[str]:
    return with_images(toy, folder, max_train_steps="many")


def unknown_key(toy: Mapping[str, Path], folder: Path) -> list[str]:
    config = folder / "options.toml"
    config.write_text("[training]\nlearning_rat = 1e-4\n")
    return [*with_images(toy, folder), "--config_file", str(config)]


def unknown_dataset_key(toy: Mapping[str, Path], folder: Path) -> list[str]:
    images = make_images(folder / "images")
    config = folder / "data.toml"
    config.write_text(
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{images}/2_cat"\nnum_repeat = 2\n'
    )
    return make_arguments(toy, images, folder / "out", train_data_dir=None, dataset_config=config)


def unwritable_output(toy: Mapping[str, Path], folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return make_arguments(toy, make_images(folder / "images"), folder / "file" / "out")


def nothing_trains(toy: Mapping[str, Path], folder: Path) -> list[str]:
    return with_images(toy, folder, unet_lr=0, text_encoder_lr=0)


def foreign_weights(toy: Mapping[str, Path], folder: Path) -> list[str]:
    import torch
    from safetensors.torch import save_file

    weights = {f"lora_unet_nowhere.lora_{side}.weight": torch.zeros(2, 2) for side in ("down", "up")}
    save_file(weights, folder / "foreign.safetensors")
    return with_images(toy, folder, network_weights=folder / "foreign.safetensors", dim_from_weights=True)


def no_state(toy: Mapping[str, Path], folder: Path) -> list[str]:
    (folder / "empty").mkdir()
    return with_images(toy, folder, resume=folder / "empty")


CASES: dict[Case, tuple[str, tuple[str, ...]]] = {  # code, and what the last line names
    missing_model: ("path-missing", ("nowhere.safetensors",)),
    truncated_model: ("tensor-file-truncated", ("torn.safetensors", "bytes")),
    not_a_model: ("not-safetensors", ("letter.safetensors",)),
    other_family: ("model-family-mismatch", ("'flux'", "'sd'")),
    no_images: ("subset-without-images", ("10_cat",)),
    no_captions: ("captions-missing", ("caption",)),
    unknown_option: ("option-unknown", ("--lerning_rate", "learning_rate")),
    wrong_type: ("option-type-wrong", ("max_train_steps", "many")),
    unknown_key: ("config-key-misspelled", ("options.toml", "learning_rat", "learning_rate")),
    unknown_dataset_key: ("dataset-key-unknown", ("data.toml", "num_repeat", "num_repeats")),
    unwritable_output: ("folder-not-writable", ("--output_dir",)),
    nothing_trains: ("learning-rates-all-zero", ("learning rate",)),
    foreign_weights: ("adapter-names-unmatched", ("foreign.safetensors", "lora_unet_nowhere")),
    no_state: ("no-complete-state", ("empty", "state")),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_mistake_is_one_clear_last_line(
    case: Case, toy: Mapping[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], codes: list[str]
) -> None:
    code, words = CASES[case]
    argv = case(toy, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", *argv]) == 2
    printed = capfd.readouterr().err
    assert codes == [code], printed
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for word in words:
        assert word.lower() in last.lower(), last
    written = [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.is_file()]
    assert not written


def test_all_faults_come_at_once(
    toy: Mapping[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], codes: list[str]
) -> None:
    """Model, data and output are checked together, so that a user does not fix them one by one."""
    (tmp_path / "images" / "10_cat").mkdir(parents=True)
    argv = make_arguments(
        {"pretrained_model_name_or_path": tmp_path / "nowhere"}, tmp_path / "images", tmp_path / "out"
    )
    (tmp_path / "nowhere").mkdir()
    assert main(["train", *argv]) == 2
    printed = capfd.readouterr().err
    assert codes == ["model-family-unknown", "subset-without-images"]
    assert "nowhere" in printed
    assert "10_cat" in printed


def test_an_internal_error_has_a_traceback_and_a_last_line_of_its_own(
    toy: Mapping[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours is never called a mistake of the user."""

    def fail(*args: object, **options: object) -> None:
        raise InternalError("no rule for unet.x")

    monkeypatch.setattr("sfumato.families.sd.StableDiffusion.read", fail)
    assert main(["train", *with_images(toy, tmp_path)]) == 1
    lines = capfd.readouterr().err.strip().splitlines()
    assert any(line.startswith("Traceback") for line in lines)
    assert lines[-1] == "error: internal error, please report it: no rule for unet.x"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(toy: Mapping[str, Path], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert main(["train", *make_arguments(toy, make_images(tmp_path / "images"), tmp_path / "locked" / "out")]) == 2
