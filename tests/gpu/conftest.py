"""The GPU tests skip where there is no CUDA device; each result is a line of JSON in a file that the terminal names."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from toy_runs import make_images

FOLDER = Path(__file__).parents[2] / "build" / "gpu"
RESULTS = FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
Record = Callable[..., None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if RESULTS.is_file():
        terminalreporter.write_line(f"results: {RESULTS}")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 3)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Call with facts: they become a line with the test's name and the device."""

    def write(**facts: Any) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        line = {"test": request.node.name, "device": torch.cuda.get_device_name(), "torch": torch.__version__, **facts}
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")

    return write


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
