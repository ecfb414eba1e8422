"""Training state on disk: a tree of plain values and tensors, whole or not at all, without pickle.

A state is a folder with `state.safetensors` (every tensor, named by its path in the tree) and `state.json` (the tree,
the checksum of the tensors, and facts about the run). The folder is made under another name and renamed when complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import __version__, files
from sfumato.errors import UserError
from sfumato.formats.checkpoint import TensorFile, write_safetensors

log = logging.getLogger(__name__)
TENSORS, TREE = "state.safetensors", "state.json"
VERSION = 1


def save_state(folder: Path, state: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, numbers, texts, None and tensors; `info` is plain JSON.

    A kill at any moment leaves the older folder of that name or this one, complete.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "", tensors)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        write_safetensors(temporary / TENSORS, tensors)
        content = {
            "version": VERSION,
            "program": f"sfumato {__version__}",
            "torch": torch.__version__,
            "sha256": _digest(temporary / TENSORS),
            "info": info,
            "tree": tree,
        }
        files.write_text(temporary / TREE, json.dumps(content))
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, info); raises UserError when the folder is not a complete state."""
    fault = fault_of(folder)
    if fault:
        raise UserError(f"{folder} is not a complete state: {fault}")
    content = json.loads((folder / TREE).read_text(encoding="utf-8"))
    with TensorFile(folder / TENSORS) as file:
        return _unflatten(content["tree"], file), content["info"]


def newest_complete(path: Path) -> Path:
    """The state that `path` is, or the newest complete one inside it; those skipped on the way are named."""
    if (path / TREE).is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist, so there is no state to resume from")
    states = [each for each in path.iterdir() if each.is_dir() and each.name.rstrip("0123456789.").find("-state") > 0]
    for state in sorted(states, key=lambda each: each.stat().st_mtime_ns, reverse=True):
        fault = fault_of(state)
        if fault is None:
            return state
        log.warning("skipping %s, which is not a complete state: %s", state, fault)
    raise UserError(f"{path} holds no complete state", fix="give the folder of a state, its name ends in -state")


def fault_of(folder: Path) -> str | None:
    """What keeps a folder from being a complete state, or None."""
    try:
        content = json.loads((folder / TREE).read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            return f"it has version {content['version']}, this program reads {VERSION}"
        return None if content["sha256"] == _digest(folder / TENSORS) else f"{TENSORS} is damaged"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (ValueError, KeyError):
        return f"{TREE} is damaged"


def _replace(temporary: Path, folder: Path) -> None:
    """Put the finished folder in place; an older one steps aside first and goes when the new one stands."""
    aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.old") if folder.exists() else None
    if aside:
        folder.rename(aside)
    temporary.rename(folder)
    files.sync(folder.parent)
    if aside:
        shutil.rmtree(aside)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON; [kind, content] where JSON alone would lose the kind."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return ["tensor", path]
    if isinstance(value, Mapping):
        items = [[_key(key), _flatten(each, f"{path}/{key}", tensors)] for key, each in value.items()]
        return ["dict", items]
    if isinstance(value, list | tuple):
        items = [_flatten(each, f"{path}/{i}", tensors) for i, each in enumerate(value)]
        return ["list" if isinstance(value, list) else "tuple", items]
    if isinstance(value, float) and not math.isfinite(value):
        return ["float", repr(value)]
    assert value is None or isinstance(value, bool | int | float | str), f"{path} is a {type(value).__name__}"
    return value


def _key(key: Any) -> Any:
    assert isinstance(key, int | str), f"the key {key!r} is neither text nor a whole number"
    return key


def _unflatten(value: Any, file: TensorFile) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return file.read(content)
    if kind == "dict":
        return {key: _unflatten(each, file) for key, each in content}
    if kind == "float":
        return float(content)
    items = [_unflatten(each, file) for each in content]
    return items if kind == "list" else tuple(items)
