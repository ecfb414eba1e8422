"""`sfumato doctor`: what it says of packages, extras, places and cards."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sfumato.cli.main import main
from sfumato.common.text import GIB
from sfumato.config.presets import list_presets
from sfumato.errors import Problems
from sfumato.tools import doctor

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_the_report_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "12GB"]) == 0
    shown = capsys.readouterr().out
    for title in ("Device", "Packages", "Extras", "Places", "What fits"):
        assert f"\n{title}\n" in shown
    assert "  sd15-lora-12gb" in shown
    assert "sd15-lora-16gb" not in shown


def test_every_extra_is_explained() -> None:
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras) - {"test", "recipe"}  # only work on sfumato itself needs those


def test_a_package_that_is_missing_or_too_old_is_a_problem() -> None:
    problems = Problems()
    lines = list(
        doctor.describe_packages(
            [Requirement("numpy>=99"), Requirement("no-such-package"), Requirement("torch")], problems
        )
    )
    assert [error.code for error in problems.found] == ["package-unfit", "package-unfit"]
    assert 'pip install --upgrade "numpy>=99"' in str(problems.found[0])
    assert lines[1].split()[1] == "missing"


def test_an_extra_that_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"heif": "images"})
    lines = list(doctor.describe_extras([Requirement('no-such-package; extra == "heif"'), Requirement("numpy")]))
    assert lines[0].endswith("missing: no-such-package")
    assert lines[1].strip() == 'pip install "sfumato[heif]"'


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(doctor, "list_places", lambda: {"caches": file / "below"})
    problems = Problems()
    list(doctor.describe_places(problems))
    assert [error.code for error in problems.found] == ["folder-not-writable"]


@pytest.mark.parametrize("memory", [4, 7.8, 12, 23.6, 80])
def test_what_fits_is_for_no_larger_card(memory: float) -> None:
    fitting = doctor.find_fitting(int(memory * GIB))
    assert all(preset.card <= memory / 0.95 for preset in fitting)
    assert len({preset.title for preset in fitting}) == len(fitting)
    titles = {preset.title for preset in list_presets().values()}
    assert (memory < 7) == (not fitting)
    assert memory < 80 or {preset.title for preset in fitting} == titles
