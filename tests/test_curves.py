"""No number moved: five steps of every family and method, against the stored curves."""

from __future__ import annotations

from pathlib import Path

import pytest

from curves import CASES, FOLDER, differences, machine, stored_curve, train_case
from families.toys import ToyShelf


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_curve_is_as_stored(name: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """To the bit where processor and libraries are those of the stored file, else within 1e-5."""
    stored = stored_curve(name)
    exact = {key: stored[key] for key in machine()} == machine()
    assert not list(differences(stored, train_case(CASES[name], toy_shelf, tmp_path), exact=exact))


def test_every_stored_curve_has_its_case() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(CASES)


def test_a_moved_number_is_found() -> None:
    stored = {"loss/current": [1.0, 2.0], "grad_norm": [0.5, 0.25], "tensors": "a"}
    moved = {**stored, "loss/current": [1.0, 2.0001]}
    assert len(list(differences(stored, moved, exact=False))) == 1
    assert not list(differences(stored, {**stored, "loss/current": [1.0, 2.0 + 1e-9], "tensors": "b"}, exact=False))
    assert (
        len(list(differences(stored, {**stored, "loss/current": [1.0, 2.0 + 1e-9], "tensors": "b"}, exact=True))) == 2
    )
