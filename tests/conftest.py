"""What every test runs under: no network, one thread, caches of its own."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from families.toys import ToyShelf
from sfumato.cli import exits
from sfumato.errors import SeveralErrors, UserError

# One thread: toy networks are slower with more, sums become reproducible, and several workers share the cores. The
# environment is for the processes that tests start; the hub reads it when it is first imported.
torch.set_num_threads(1)
# A forked process makes a new pool of threads at its first sum; two threads that come to it together fail.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

TOY_HELPERS = {"ToyShelf", "write_toy", "train_toy", "build_toy_run", "load_model"}  # what such a module imports

settings.register_profile("house", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a module that builds or trains toy models belong to the family tier; the unit tier does neither."""
    for item in items:
        fast = item.get_closest_marker("fast_for")
        if fast and not any(name in item.name for name in fast.args):
            item.add_marker(pytest.mark.full)
        module = getattr(item, "module", None)
        if TOY_HELPERS & vars(module).keys() and not item.get_closest_marker("full"):
            item.add_marker(pytest.mark.family)


@pytest.fixture(autouse=True, scope="session")
def own_caches(tmp_path_factory: pytest.TempPathFactory):
    """The user's cache folder stays out of the tests, those that start other processes included."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
            patch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def memory_is_given_back():
    """Unlike one run, thousands of tests in one process should not keep the most that any of them took."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfumato.training.model_setup.keep_freed_memory", lambda: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def nothing_waits_for_the_disk():
    """No test cuts the power, and waiting is a tenth of a short run. tests/common/test_files.py sees what is synced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def toy_shelf(tmp_path_factory: pytest.TempPathFactory) -> ToyShelf:
    """Toy models of every family, each written when it is first asked for."""
    return ToyShelf(tmp_path_factory.mktemp("toys"))


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The code of every fault that a command reports, in order."""
    seen: list[str] = []
    report = exits.report_error

    def report_error(error: UserError) -> None:
        seen.extend(error.codes if isinstance(error, SeveralErrors) else [error.code])
        report(error)

    monkeypatch.setattr(exits, "report_error", report_error)
    return seen
