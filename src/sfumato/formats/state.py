"""Training state on disk: a tree of plain values and tensors, whole or not at all, without pickle.

A state is a folder with `state.safetensors` (every tensor, named by its path in the tree) and `state.json` (the tree,
checksums, and facts about the run). The folder is made under another name and renamed when complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import __version__
from sfumato.common import files
from sfumato.errors import UserError
from sfumato.formats.checkpoint import TensorFile, room_for, write_safetensors

log = logging.getLogger(__name__)
TENSORS, TREE = "state.safetensors", "state.json"
FOREIGN = ("train_state.json", "optimizer.bin", "random_states_0.pkl")  # what other programs put into their states
VERSION = 1


def save_state(folder: Path, state: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, numbers, texts, None and tensors; `info` is plain JSON.

    A kill at any moment leaves the older folder of that name or this one, complete: in its place, or beside it where
    `newest_complete` finds it. Raises DiskFull where there is no room, UserError for a value of another kind.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "", tensors)
    with room_for(folder), files.atomic_folder(folder) as temporary:
        write_safetensors(temporary / TENSORS, tensors)
        content = {
            "version": VERSION,
            "program": f"sfumato {__version__}",
            "torch": torch.__version__,
            "saved_at": time.time(),
            "sha256": _digest(temporary / TENSORS),
            "info": info,
            "tree": tree,
        }
        files.write_text(temporary / TREE, json.dumps({**content, "seal": _seal(content)}))


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, info), tensors on the CPU. Raises UserError when the folder is not a complete state."""
    fault = fault_of(folder)
    if fault:
        raise UserError(f"{folder} is not a complete state: {fault}")
    content = _content(folder)
    with TensorFile(folder / TENSORS) as file:
        return _unflatten(content["tree"], file), content["info"]


def newest_complete(path: Path) -> Path:
    """The state that `path` is, or the newest complete one inside it; those skipped on the way are named.

    Where `path` is a state that was being replaced when its run was killed, what lies ready beside it counts.
    """
    if not path.exists() and not any(files.folder_copies(path)):
        raise UserError(f"{path} does not exist, so there is no state to resume from")
    is_state = not path.is_dir() or (path / TREE).is_file() or _is_foreign(path)
    candidates = [*([path] if is_state else _states_in(path)), *files.folder_copies(path)]
    for state in sorted(candidates, key=_saved_at, reverse=True):
        fault = fault_of(state)
        if fault is None:
            return state
        log.warning("skipping %s, which is not a complete state: %s", state, fault)
    if is_state:
        fix = "give the folder that holds all states of the run, and the newest complete one is taken"
        raise UserError(f"{path} is not a complete state: {fault_of(path)}", fix=fix)
    raise UserError(f"{path} holds no complete state", fix="give the folder of a state, its name ends in -state")


def fault_of(folder: Path) -> str | None:
    """What keeps a folder from being a complete state, or None."""
    try:
        content = _content(folder)
        return None if content["sha256"] == _digest(folder / TENSORS) else f"{TENSORS} is damaged"
    except (FileNotFoundError, NotADirectoryError) as error:
        return "it was saved by another program" if _is_foreign(folder) else f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)


def _content(folder: Path) -> dict[str, Any]:
    """What state.json says; ValueError tells what is wrong with it."""
    try:
        content = json.loads((folder / TREE).read_text(encoding="utf-8"))
        version, seal = content["version"], content.pop("seal")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{TREE} is damaged") from None
    if version != VERSION:
        raise ValueError(f"it has version {version}, this program reads {VERSION}")
    if seal != _seal(content):
        raise ValueError(f"{TREE} is damaged")
    return content


def _saved_at(folder: Path) -> float:
    """Unix time, 0 where nobody knows."""
    try:
        return _content(folder)["saved_at"]
    except (OSError, ValueError):
        return 0.0


def _states_in(folder: Path) -> Iterator[Path]:
    """Folders that are states by name or content, those left by a kill in the middle of saving included."""
    for each in sorted(folder.iterdir()):
        if each.is_dir() and ("-state" in each.name or (each / TREE).is_file()):
            yield each


def _is_foreign(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FOREIGN)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(content: Mapping[str, Any]) -> str:
    """A checksum of state.json's own content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON; [kind, content] where JSON alone would lose the kind."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
            raise UserError(f"state: {path} is a {type(value).__name__} ({value.layout}), which cannot be saved")
        name = path
        while name in tensors:  # the keys 1 and "1" make the same path
            name += "#"
        tensors[name] = value.detach()
        return ["tensor", name]
    if isinstance(value, Mapping):
        items = [[_key(key, path), _flatten(each, f"{path}/{key}", tensors)] for key, each in value.items()]
        return ["dict", items]
    if isinstance(value, list | tuple):
        items = [_flatten(each, f"{path}/{i}", tensors) for i, each in enumerate(value)]
        return ["list" if isinstance(value, list) else "tuple", items]
    if isinstance(value, float) and not math.isfinite(value):
        return ["float", repr(float(value))]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"state: {path} is a {type(value).__name__}, which cannot be saved")


def _key(key: Any, path: str) -> Any:
    if not isinstance(key, int | str):
        raise UserError(f"state: the key {key!r} of {path or 'the state'} is neither text nor a whole number")
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
