"""`sfumato train` refuses what cannot fit the GPU: by a bound, near it by a rehearsal that is remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rehearsing import needs_rehearsal
from sfumato.cli.main import main
from sfumato.config import Config, load_config
from sfumato.errors import UserError
from sfumato.plan import make_run_plan
from sfumato.tools import memory_check
from sfumato.tools.memory_check import check_memory, find_bound
from sfumato.tools.rehearsal_stages import Stage
from sfumato.tools.rehearse import ALLOWANCE, rehearse_plan
from sfumato.tools.rehearse_apart import rehearse_apart
from toy_runs import make_arguments, make_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


class Rehearsals:
    """Stands for rehearsals: counts them, and gives a peak of one's choice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.peak = 0, 0
        monkeypatch.setattr(memory_check, "rehearse_apart", self.rehearse)
        monkeypatch.setattr(memory_check, "is_supported", lambda: True)

    def rehearse(self, plan: object, *, saves: bool) -> list[Stage]:
        self.count += 1
        return [Stage(name=name, peak=peak, resident={}, largest=(), waits=()) for name, peak in self.list_peaks()]

    def list_peaks(self) -> list[tuple[str, int]]:
        return [("loading", self.peak // 2), ("training step", self.peak)]


@pytest.fixture
def rehearsals(monkeypatch: pytest.MonkeyPatch) -> Rehearsals:
    return Rehearsals(monkeypatch)


@pytest.fixture
def make_config(toy_shelf, images, tmp_path):
    def make(**options: Any) -> Config:
        argv = make_arguments(toy_shelf.paths("sd"), images, tmp_path / "out", cache_dir=tmp_path / "cache", **options)
        return load_config(argv)

    return make


def find_size(config: Config) -> int:
    bound = find_bound(config)
    assert bound is not None
    return bound.size


class TestBound:
    def test_what_cannot_fit_is_refused(self, make_config, rehearsals):
        """One byte decides. No rehearsal is needed."""
        config = make_config()
        size = find_size(config)
        with pytest.raises(UserError) as error:
            check_memory(config, size - 1)
        assert error.value.code == "run-exceeds-gpu"
        assert "--no_memory_check" in error.value.fix
        assert rehearsals.count == 0

    def test_what_is_far_below_is_not_rehearsed(self, make_config, rehearsals):
        config = make_config()
        check_memory(config, int(find_size(config) / 0.69))
        assert rehearsals.count == 0

    def test_it_can_be_switched_off(self, make_config, rehearsals):
        check_memory(make_config(memory_check=False, no_memory_check=True), 1)
        assert rehearsals.count == 0

    def test_nothing_is_done_without_a_gpu(self, make_config, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(memory_check, "find_bound", pytest.fail)
        check_memory(make_config())

    def test_faults_are_left_to_training(self, make_config):
        check_memory(make_config(text_encoder_lr="0", unet_lr="0"), 1)

    def test_the_command(self, toy_shelf, images, tmp_path, monkeypatch, codes):
        monkeypatch.setattr(memory_check, "find_memory", lambda: 1000)
        argv = make_arguments(toy_shelf.paths("sd"), images, tmp_path / "out")
        assert main(["train", *argv]) == 2
        assert codes == ["run-exceeds-gpu"]
        assert not (tmp_path / "out").exists()


class TestRehearsal:
    @pytest.mark.full
    def test_it_is_remembered_by_configuration(self, make_config, rehearsals):
        """What a step does not depend on changes nothing."""
        config = make_config()
        size = find_size(config)
        rehearsals.peak = size
        for same in (config, config, make_config(output_name="other", max_train_steps=9)):
            check_memory(same, size)
        assert rehearsals.count == 1
        for number, other in enumerate(({"network_dim": 3}, {"train_batch_size": 2}, {"resolution": 128}), 2):
            changed = make_config(**other)
            rehearsals.peak = find_size(changed)
            check_memory(changed, rehearsals.peak)
            assert rehearsals.count == number

    def test_what_it_finds_is_refused_each_time(self, make_config, rehearsals):
        config = make_config()
        total = find_size(config)
        rehearsals.peak = total + 1
        for _ in range(2):
            with pytest.raises(UserError) as error:
                check_memory(config, total)
            assert error.value.code == "run-exceeds-gpu"
            assert "training step" in str(error.value)
        assert rehearsals.count == 1

    def test_a_tight_fit_is_a_warning(self, make_config, rehearsals, capsys, monkeypatch):
        monkeypatch.setattr(memory_check, "NEAR", 0.0)
        config, total = make_config(), 2 * ALLOWANCE
        rehearsals.peak = total - ALLOWANCE
        check_memory(config, total)
        assert "warning" not in capsys.readouterr().err
        check_memory(config, total - 1)
        assert "warning" in capsys.readouterr().err

    @pytest.mark.full
    def test_a_failed_one_does_not_stop_training(self, make_config, rehearsals, monkeypatch, caplog):
        def fail(plan: object, *, saves: bool) -> list[Stage]:
            raise RuntimeError("no rule for this operator")

        monkeypatch.setattr(memory_check, "rehearse_apart", fail)
        config = make_config()
        check_memory(config, find_size(config))
        assert "no rule for this operator" in caplog.text

    def test_several_processes_have_the_bound_alone(self, make_config, rehearsals, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        config = make_config()
        check_memory(config, find_size(config))
        with pytest.raises(UserError):
            check_memory(config, 1)
        monkeypatch.setenv("RANK", "1")
        check_memory(config, 1)
        assert rehearsals.count == 0

    @pytest.mark.full
    @needs_rehearsal
    def test_a_real_one(self, make_config):
        """The toy's activations need more than its weights, so the bound lets it pass and the rehearsal does not."""
        config = make_config(network_train_unet_only=True)
        with pytest.raises(UserError) as error:
            check_memory(config, find_size(config) + 1000)
        assert error.value.code == "run-exceeds-gpu"
        assert "at least" not in str(error.value)


@needs_rehearsal
@pytest.mark.full
def test_a_process_of_its_own_finds_the_same(make_config):
    config = make_config(cache_latents=True)
    ours = rehearse_plan(make_run_plan(config, processes=1))
    assert [(stage.name, stage.peak) for stage in rehearse_apart(config)] == [(s.name, s.peak) for s in ours]
