"""Steps are followed one step late, and nothing of them is lost where the run saves or ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sfumato.training.outcomes as outcomes
import sfumato.training.saving as saving
from families.toys import ToyShelf
from sfumato.memory.device_memory import FreeMemory, forget_peak_memory, read_free_memory, read_peak_memory
from sfumato.training.outcomes import Outcome
from sfumato.training.run import Run
from toy_runs import make_images, read_metrics, train_toy


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 2)


@pytest.mark.full
def test_a_state_has_the_lines_of_all_its_steps(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[int, list[float]] = {}
    collect = saving.collect_state

    def count_lines(run: Run, step: int) -> Any:
        found[step] = [row["step"] for row in read_metrics(tmp_path / "out")]
        return collect(run, step)

    monkeypatch.setattr(saving, "collect_state", count_lines)
    options = {"max_train_steps": 3, "save_every_n_steps": 2, "save_state": True, "network_train_unet_only": True}
    train_toy(toy_shelf.paths("sd"), images, tmp_path / "out", **options)
    assert found == {2: [1, 2], 3: [1, 2, 3]}


@pytest.mark.full
def test_speed_is_in_every_line(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """Of the steps alone: a save that takes long does not count."""
    options = {"max_train_steps": 3, "gradient_accumulation_steps": 2, "network_train_unet_only": True}
    output = train_toy(toy_shelf.paths("sd"), images, tmp_path, **options)
    rows = read_metrics(output, keep_speed=True)
    for row in rows:
        product = row["speed/seconds_per_step"] * row["speed/images_per_second"]
        assert product == pytest.approx(2, rel=1e-2)  # two images in a step
        assert "memory/peak_gb" not in row


def test_a_full_gpu_is_told_of_once(
    toy_shelf: ToyShelf,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(outcomes, "read_free_memory", lambda device: FreeMemory(10**8, 12 * 10**9))
    slow = property(lambda outcome: 9.0 if outcome.step.index >= 7 else 1.0)
    monkeypatch.setattr(Outcome, "seconds_computing", slow)
    options = {"max_train_steps": 9, "network_train_unet_only": True, "cache_latents": True, "train_batch_size": 1}
    folder = make_images(tmp_path / "one", 1)  # of one size
    train_toy(toy_shelf.paths("sd"), folder, tmp_path / "out", **options)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "GB on the GPU are free" in line]
    assert "9.00 s instead of 1.00 s" in line


def test_what_a_gpu_says_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device, calls = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda of: calls.append(of) or 5)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda of: (3, 8))
    assert read_peak_memory(device) == 5
    forget_peak_memory(device)
    assert calls == [device, device]
    assert read_free_memory(device) == FreeMemory(free=3, total=8)
    forget_peak_memory(torch.device("cpu"))
    assert read_peak_memory(torch.device("cpu")) is None
    assert read_free_memory(torch.device("cpu")) is None
