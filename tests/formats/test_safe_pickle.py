"""Pickled files: harmless things beside the tensors are passed over, what would run code is refused, never run."""

from __future__ import annotations

import argparse
import builtins
import os
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.errors import UserError
from sfumato.formats.checkpoint import open_checkpoint
from sfumato.formats.safe_pickle import load_pickle

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


@pytest.fixture
def lightning() -> Iterator[ModuleType]:
    """Stands for a program that is installed where the file is made and not where it is read."""
    module: Any = ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    sys.modules |= {"pytorch_lightning": ModuleType("pytorch_lightning"), module.__name__: module}
    yield module
    for name in ("pytorch_lightning", module.__name__):
        sys.modules.pop(name, None)


def lists() -> defaultdict[str, list[int]]:
    found: defaultdict[str, list[int]] = defaultdict(list)
    found["a"].append(1)
    return found


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("beside", [
    {"d": lists(), "nested": defaultdict(dict, {"a": {"b": 1}})},
    {"f64": np.float64(1.5), "f32": np.float32(2), "i64": np.int64(3), "b": np.bool_(True), "array": np.arange(3)},
    {"o": OrderedDict(a=1), "c": Counter("aab"), "s": {1, 2}, "t": (1, None), "by": b"bytes"},
    {"args": argparse.Namespace(lr=1e-4, steps=[1, 2]), "path": PurePosixPath("/models")},
], ids=["defaultdict", "numpy", "plain", "objects"])  # fmt: skip
def test_harmless_things_are_passed_over(beside: dict[str, Any], zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": TENSORS, **beside}, path, _use_new_zipfile_serialization=zipped)
    with open_checkpoint(path) as file:
        assert set(file.keys()) == set(TENSORS)
        assert all(torch.equal(file.read(name), tensor) for name, tensor in TENSORS.items())


def test_values_of_containers_stay(tmp_path: Path) -> None:
    torch.save({"d": lists(), "n": np.float32(2.5), "a": np.arange(3)}, tmp_path / "m.ckpt")
    content = load_pickle(tmp_path / "m.ckpt")
    assert content["d"] == {"a": [1]}
    assert content["n"] == 2.5
    assert content["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_a_trainer_are_not_made(lightning: Any, zipped: bool, tmp_path: Path) -> None:
    """Its class as a key, as in the published files of 2022, an object with a state, and a dict of its own kind."""
    made = lightning.ModelCheckpoint()
    made.best = 3
    content = {
        "state_dict": TENSORS, "epoch": 7, "callbacks": {lightning.ModelCheckpoint: {"best": np.float32(1)}},
        "object": made, "hyper_parameters": lightning.AttributeDict(a=1),
    }  # fmt: skip
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    sys.modules.pop(lightning.__name__)
    with open_checkpoint(tmp_path / "m.ckpt") as file:
        assert set(file.keys()) == set(TENSORS)
        assert file.header.metadata == {"epoch": "7"}
    content = load_pickle(tmp_path / "m.ckpt")
    assert vars(content["object"]) == {}
    assert content["hyper_parameters"] == {"a": 1}


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["system", "exec", "open", "getattr", "load", "nested"])
def test_calls_are_refused_and_not_run(name: str, zipped: bool, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    write = f"open({str(seen)!r}, 'w').close()"
    calls = {
        "system": Call(os.system, f"touch {seen}"), "exec": Call(builtins.exec, write),
        "open": Call(open, str(seen), "w"),
        "getattr": Call(getattr, "a", "upper"), "load": Call(torch.load, str(seen)),
        "nested": defaultdict(list, {"a": [argparse.Namespace(b=Call(builtins.eval, write))]}),
    }  # fmt: skip
    torch.save({"state_dict": TENSORS, "x": calls[name]}, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    seen.unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"m\.ckpt") as error:
        open_checkpoint(tmp_path / "m.ckpt")
    assert error.value.code == "pickle-runs-code"
    assert not seen.exists()


@pytest.mark.parametrize("outer", ["state_dict", "params_ema", "params", "model"])
def test_where_programs_put_the_tensors(outer: str, tmp_path: Path) -> None:
    torch.save({outer: TENSORS, "step": 3}, tmp_path / "m.pth")
    with open_checkpoint(tmp_path / "m.pth") as file:
        assert set(file.keys()) == set(TENSORS)
