"""Toy models and images for the tests of methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from families.toys import ToyShelf
from methods.control_training import ControlShelf
from toy_runs import make_images

Toy = Mapping[str, Path]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(params=["sd", "sdxl", "flux", "chroma"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def toy(family: str, toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths(family)


@pytest.fixture(scope="session")
def sd(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("sd")


@pytest.fixture(scope="session")
def control_shelf(toy_shelf: ToyShelf, tmp_path_factory: pytest.TempPathFactory) -> ControlShelf:
    return ControlShelf(toy_shelf, tmp_path_factory.mktemp("control"))
