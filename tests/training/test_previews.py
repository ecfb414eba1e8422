"""Previews while training: prompts are read anew each time, and nothing about them can stop or change the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from families.toys import ToyShelf
from sfumato.config.prompts import parse_line
from sfumato.errors import UserError
from sfumato.sample import generate_batch
from sfumato.training.previews import list_ignored_in_previews
from toy_runs import equal_tensors, make_images, read_metrics, read_weights, train_toy

LINE = " --w 64 --h 64 --s 1"


def prompts_of(output: Path) -> dict[str, list[str]]:
    """Step -> prompts of its pictures."""
    found: dict[str, list[str]] = {}
    for path in sorted((output / "sample").iterdir()):
        with Image.open(path) as image:
            found.setdefault(path.name.split("_")[1], []).append(image.info["prompt"])
    return found


@pytest.mark.full
def test_prompts_are_read_again_while_training(
    toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file changes, is damaged, goes away and comes back; training is as it would be without it."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a cat{LINE}\n")
    contents = iter([f"a dog{LINE}\na cup{LINE}\n", f"a dog{LINE} --ss nothing\n", "", f"a table{LINE}\n"])
    from sfumato.training import saving

    plain = saving.save_previews

    def then_changed(*given: Any) -> None:
        plain(*given)
        content = next(contents, None)
        if content == "":
            prompts.unlink()
        elif content is not None:
            prompts.write_text(content)

    toy, images = toy_shelf.paths("sd"), make_images(tmp_path / "images")
    without = train_toy(toy, images, tmp_path / "without", max_train_steps=5)
    for module in ("previews", "saving"):
        monkeypatch.setattr(f"sfumato.training.{module}.save_previews", then_changed)
    options = {"sample_prompts": prompts, "sample_every_n_steps": 1, "max_train_steps": 5}
    output = train_toy(toy, images, tmp_path / "out", **options)
    assert prompts_of(output) == {"000001": ["a cat"], "000002": ["a dog", "a cup"], "000005": ["a table"]}
    assert equal_tensors(read_weights(without), read_weights(output))
    assert read_metrics(without) == read_metrics(output)


def test_options_that_previews_ignore_are_listed() -> None:
    lines = list(list_ignored_in_previews(parse_line("a --d 1,2 --f x.png", where="")))
    assert [word in line for word, line in zip(("--d", "--f"), lines, strict=True)] == [True, True]
    assert not list(list_ignored_in_previews(parse_line("a --d 1", where="")))


@pytest.mark.parametrize(
    "error",
    [UserError("no such image", code="image-missing"), RuntimeError("shapes differ"), IndexError("past the end")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.full
def test_whatever_fails_is_a_warning(
    error: Exception, toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second preview of three, after half of the picture is made."""
    calls: list[int] = []

    def fails(*given: Any) -> list[torch.Tensor]:
        calls.append(1)
        found = generate_batch(*given)
        if len(calls) == 2:
            raise error
        return found

    monkeypatch.setattr("sfumato.training.previews.generate_batch", fails)
    log = tmp_path / "log.txt"
    (tmp_path / "prompts.txt").write_text(f"a cat{LINE}\n")
    options = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 1, "max_train_steps": 3}
    images = make_images(tmp_path / "images")
    output = train_toy(toy_shelf.paths("sd"), images, tmp_path / "out", **options, console_log_file=log)
    assert list(prompts_of(output)) == ["000001", "000003"]
    assert "making previews after step 2 failed" in log.read_text()
    assert f"{error}" in log.read_text()
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(("option", "period"), [("sample_every_n_steps", -1), ("sample_every_n_epochs", -3)])
def test_a_period_below_one_is_told_and_ignored(option: str, period: int, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    (tmp_path / "prompts.txt").write_text(f"a cat{LINE}\n")
    output = train_toy(
        toy_shelf.paths("sd"), make_images(tmp_path / "images", 1), tmp_path / "out", max_train_steps=1,
        sample_prompts=tmp_path / "prompts.txt", console_log_file=log, console_log_level="INFO", **{option: period},
    )  # fmt: skip
    assert not (output / "sample").exists()
    assert f"--{option} {period} is ignored: a period is at least 1" in log.read_text()


@pytest.mark.full
def test_a_control_image_without_a_control_network_is_told(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    (tmp_path / "prompts.txt").write_text(f"a cat{LINE} --cn edges.png\n")
    output = train_toy(
        toy_shelf.paths("sd"), make_images(tmp_path / "images", 1), tmp_path / "out", max_train_steps=2,
        sample_prompts=tmp_path / "prompts.txt", sample_every_n_steps=1, console_log_file=log,
    )  # fmt: skip
    assert log.read_text().count("--cn has no effect, there is no ControlNet") == 1
    assert prompts_of(output) == {"000001": ["a cat"], "000002": ["a cat"]}
