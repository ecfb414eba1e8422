"""Which state is resumed, and what is said of a run that differs from the saved one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.errors import UserError
from sfumato.formats.state import find_newest_state
from sfumato.training.run_state import compare_options
from toy_runs import make_arguments, make_images, train_toy

Toy = Mapping[str, Path]


@pytest.fixture(scope="module")
def toy(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("sd")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), name="2_thing")


@pytest.fixture(scope="module")
def first(toy: Toy, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_toy(toy, images, tmp_path_factory.mktemp("first"), max_train_steps=1, save_state=True)


def warnings_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.partition("WARNING ")[2] for line in capsys.readouterr().err.splitlines() if "WARNING " in line]


@pytest.mark.full
@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"network_dim": 8}, "--network_dim was 2, now it is 8"),
        ({"network_train_unet_only": True}, "--network_train_unet_only was not set, now it is True"),
        ({"network_args": "conv_dim=4"}, "--network_args was not set, now it is conv_dim=4"),
    ],
)
def test_other_ranks_and_layers_are_one_line(
    options: dict[str, Any], fact: str, toy: Toy, images: Path, first: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        train_toy(toy, images, tmp_path / "out", **options, resume=first / "lora-state")
    assert caught.value.code == "resume-weights-mismatch"
    assert fact in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_every_difference_is_a_line_and_what_differs_by_nature_none(
    toy: Toy, images: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images, tmp_path / "images")
    for path in (tmp_path / "images" / "2_thing").glob("[01].*"):
        path.unlink()
    options = {
        "learning_rate": "2e-3", "max_train_steps": 2, "output_name": "other", "save_state": False,
        "console_log_level": "INFO", "cache_latents": True, "max_data_loader_n_workers": 1, "train_batch_size": 2,
    }  # fmt: skip
    argv = make_arguments(toy, tmp_path / "images", tmp_path / "out", resume=first / "lora-state", **options)
    assert main(["train", *argv]) == 0
    assert warnings_of(capsys) == [
        "--learning_rate was 0.001, now it is 0.002",
        "--max_train_steps was 1, now it is 2",
        "--train_batch_size was not set, now it is 2",
        "the batch size of dataset 1 was 1, now it is 2",
        "2_thing of the dataset had 5 images, now it has 3",
    ]


@pytest.mark.full
@pytest.mark.parametrize("change", ["caption", "content", "name", "folder"])
def test_changes_that_keep_the_number_of_images(
    change: str, toy: Toy, images: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(images, tmp_path / "images") / "2_thing"
    expected = {
        "caption": ["the images of 2_thing in the dataset have other captions"],
        "content": ["the images of 2_thing in the dataset have other file sizes"],
        "name": ["the images of 2_thing in the dataset have other file names"],
        "folder": ["the 5 images of 2_thing are gone from the dataset", "the 5 images of 2_dog are new in the dataset"],
    }
    if change == "caption":
        (folder / "0.txt").write_text("another caption")
    elif change == "content":
        shutil.copy(folder / "2.png", folder / "0.png")
        (folder / "0.png").write_bytes((folder / "0.png").read_bytes() + b"\0")
    elif change == "name":
        (folder / "0.png").rename(folder / "00.png")
        (folder / "0.txt").rename(folder / "00.txt")
    else:
        folder.rename(folder.with_name("2_dog"))
    argv = make_arguments(toy, folder.parent, tmp_path / "out", resume=first / "lora-state", max_train_steps=2)
    assert main(["train", *argv]) == 0
    assert [line for line in warnings_of(capsys) if "dataset" in line] == expected[change]


def test_options_without_effect_on_the_result_are_not_compared() -> None:
    before = {"resume": "a", "output_dir": "x", "logging_dir": "y", "max_grad_norm": "2.0"}
    assert compare_options(before, {"output_dir": "z", "huggingface_repo_id": "me/it"}) == {
        "max_grad_norm": "--max_grad_norm was 2.0, now it is not set"
    }


def set_clock(monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    monkeypatch.setattr("sfumato.formats.state.time.time", lambda: now)


@pytest.mark.full
def test_the_newest_state_of_a_run_has_the_most_steps(
    toy: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock was set back after the first save. A run that was started later counts before both."""
    options = {"save_state": True, "save_every_n_steps": 1}
    normal = find_newest_state.__globals__["write_state"]
    times = iter([1000.0, 500.0, 400.0])

    def save(*given: Any) -> None:
        set_clock(monkeypatch, next(times))
        normal(*given)

    with monkeypatch.context() as patch:
        patch.setattr("sfumato.training.saving.write_state", save)
        train_toy(toy, images, tmp_path, max_train_steps=3, **options)
    assert find_newest_state(tmp_path).name == "lora-state"
    shutil.rmtree(tmp_path / "lora-state")
    assert find_newest_state(tmp_path).name == "lora-step00000002-state"
    set_clock(monkeypatch, 2000.0)
    train_toy(toy, images, tmp_path, max_train_steps=1, output_name="new", save_state=True)
    assert find_newest_state(tmp_path).name == "new-state"
    assert find_newest_state(tmp_path, "lora").name == "lora-step00000002-state"


@pytest.mark.full
def test_going_on_from_an_older_state_is_a_run_of_its_own(
    toy: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_toy(toy, images, tmp_path, max_train_steps=4, save_state=True, save_every_n_steps=1)
    older = tmp_path / "lora-step00000001-state"
    train_toy(toy, images, tmp_path, max_train_steps=2, save_state=True, resume=older)
    assert read_run(tmp_path / "lora-state") != read_run(older)
    assert find_newest_state(tmp_path).name == "lora-state"
    train_toy(toy, images, tmp_path, max_train_steps=3, save_state=True, resume=tmp_path / "lora-state")


def read_run(state: Path) -> str:
    return json.loads((state / "state.json").read_text())["info"]["run"]


def test_a_new_run_over_a_finished_one_says_so_once(
    toy: Toy, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = make_arguments(toy, images, tmp_path, max_train_steps=1, save_state=True)
    assert main(["train", *argv]) == 0
    assert not [line for line in warnings_of(capsys) if "replaces" in line]
    (tmp_path / ".lora-state.0123abcd.tmp").mkdir()  # what kills have left
    (tmp_path / ".lora-step00000002.safetensors.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / ".lora2-state.0123abcd.tmp").mkdir()  # of another run
    assert main(["train", *argv]) == 0
    (line,) = [line for line in warnings_of(capsys) if "replaces" in line]
    assert "lora.safetensors" in line
    assert [path.name for path in tmp_path.glob(".*")] == [".lora2-state.0123abcd.tmp"]
