"""Previews and validation that need more memory than there is: said once, and training goes on without them."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from families.toys import ToyShelf
from parallel.pairs import run_strategies
from sfumato.parallel.all_reduce import AllReduce
from sfumato.parallel.single import Single
from sfumato.training.memory_shortage import give_up_where_short, run_within_memory
from toy_runs import make_images, read_metrics, train_toy


def test_nothing_of_the_failed_work_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error's frames hold what was on the device; the cache is emptied once they are gone."""
    kept: list[weakref.ref[torch.Tensor]] = []
    alive_when_emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive_when_emptied.append(kept[0]() is not None))

    def work() -> None:
        activations = torch.zeros(4)
        kept.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    assert run_within_memory(work, Single(torch.device("cpu"))) == "OutOfMemoryError: tried to allocate 20 GiB"
    assert alive_when_emptied == [False]
    assert run_within_memory(lambda: None, Single(torch.device("cpu"))) == ""
    assert len(alive_when_emptied) == 1


def test_where_one_process_lacks_memory_all_give_up() -> None:
    class Run:
        def __init__(self, parallel: AllReduce) -> None:
            self.parallel, self.given_up = parallel, set[str]()

    def act(parallel: AllReduce) -> tuple[bool, set[str], bool]:
        run: Any = Run(parallel)
        first = give_up_where_short(run, "previews", "20 GiB" if parallel.rank else "")
        return first, run.given_up, give_up_where_short(run, "validation", "")

    assert run_strategies(act) == [(True, {"previews"}, False)] * 2


@pytest.mark.full
def test_training_goes_on_without_and_tries_no_more(
    toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def fail(name: str) -> Any:
        def work(*given: Any, **more: Any) -> Any:
            tried.append(name)
            raise torch.OutOfMemoryError(f"no room for {name}")

        return work

    monkeypatch.setattr("sfumato.training.previews.generate_batch", fail("the preview"))
    monkeypatch.setattr("sfumato.training.validation.sample_losses", fail("the validation"))
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1\na dog --w 64 --h 64 --s 1\n")
    log = tmp_path / "log.txt"
    output = train_toy(
        toy_shelf.paths("sd"), make_images(tmp_path / "images"), tmp_path / "out", max_train_steps=3,
        sample_prompts=tmp_path / "prompts.txt", sample_every_n_steps=1, sample_at_first=True, validation_split=0.5,
        validate_every_n_steps=1, console_log_file=log, network_train_unet_only=True,
    )  # fmt: skip
    assert tried == ["the preview", "the validation"]
    assert log.read_text().count("no further previews in this run") == 1
    assert log.read_text().count("no further validation in this run") == 1
    assert "Traceback" not in log.read_text()
    assert len(read_metrics(output)) == 3
