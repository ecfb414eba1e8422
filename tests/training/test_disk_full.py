"""A disk that fills up while a run saves: training goes on, what stood stays whole, and the end says so."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import sfumato.train
from families.toys import ToyShelf
from sfumato.errors import UserError
from sfumato.formats.state import find_newest_state, load_state
from toy_runs import equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy

ROOM = 8192  # bytes that any one file may have: less than an adapter's and a state's
LIMITED = f"""
import resource, sys
from sfumato.cli.main import entry
resource.setrlimit(resource.RLIMIT_FSIZE, ({ROOM}, {ROOM}))
entry()
"""


@contextmanager
def small_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".tmp", ".old")]


@pytest.mark.full
def test_a_failed_save_keeps_the_older_and_training_goes_on(
    toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No room for what is saved after step 2; there is again at the end."""
    normal = sfumato.train.run_due_saves

    def saves_due(run, step: int) -> None:
        if step == 2:
            with small_files():
                normal(run, step)
        else:
            normal(run, step)

    toy, images = toy_shelf.paths("sd"), make_images(tmp_path / "images")
    options = {"max_train_steps": 3, "save_every_n_steps": 1, "save_last_n_steps": 1, "save_state": True}
    straight = train_toy(toy, images, tmp_path / "straight", **options)
    monkeypatch.setattr("sfumato.train.run_due_saves", saves_due)
    with pytest.raises(UserError, match=r"2 saves .*lora-step00000002-state") as caught:
        train_toy(toy, images, tmp_path / "full", **options)
    assert caught.value.code == "saves-failed"
    full = tmp_path / "full"
    assert [row["step"] for row in read_metrics(full)] == [1, 2, 3]
    assert equal_tensors(read_weights(full), read_weights(straight))
    # Of the first step all is left, since nothing came after it that could take its place.
    saved = {path.name for path in full.glob("lora-step*")}
    assert saved == {"lora-step00000001.safetensors", "lora-step00000001-state"}
    assert load_state(full / "lora-step00000001-state")[0]["counters"]["step"] == 1
    assert not half_written(full)


@pytest.mark.full
def test_a_disk_that_stays_full_ends_in_one_line_and_an_exit_code(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    toy, images, output = toy_shelf.paths("sd"), make_images(tmp_path / "images"), tmp_path / "out"
    options = {"max_train_steps": 2, "save_every_n_steps": 1, "save_state": True}
    train_toy(toy, images, output, **options)
    names = ("lora.safetensors", "lora-step00000001.safetensors", "lora-state/state.safetensors")
    before = {name: (output / name).read_bytes() for name in names}
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, "train", *make_arguments(toy, images, output, **options, seed=8)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: training is complete, but 4 saves failed; the last: lora-state after step 2:")
    assert "file too large" in last
    assert "Traceback" not in ended.stderr
    assert {name: (output / name).read_bytes() for name in names} == before
    assert load_state(find_newest_state(output))[0]["counters"]["step"] == 2
    assert [row["step"] for row in read_metrics(output)] == [1, 2]
    assert not half_written(output)
