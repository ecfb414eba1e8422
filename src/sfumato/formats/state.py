"""Training states on disk: a tree of plain values and tensors, without pickle; complete or not there at all.

A state is a folder with `state.safetensors` (every tensor, named by its path in the tree) and `state.json` (the tree,
checksums, and facts about the run). The folder is made under another name and renamed when complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfumato import __version__
from sfumato.common import files
from sfumato.common.json_toml import decode_json
from sfumato.errors import InternalError, UserError
from sfumato.formats.checkpoint import TensorFile
from sfumato.formats.checkpoint_writer import catch_disk_full, make_specs, write_stream

log = logging.getLogger(__name__)
TENSORS_FILE, TREE_FILE = "state.safetensors", "state.json"
FOREIGN_FILES = ("train_state.json", "optimizer.bin", "random_states_0.pkl")  # files of other programs' states
STATE_VERSION = 1


class StateTree(NamedTuple):
    """A tree of dicts, lists, tuples, numbers, texts, None and tensors, taken apart."""

    tree: Any  # as JSON
    tensors: dict[str, Tensor]  # by their paths in the tree


def flatten_state(state: Mapping[str, Any], shared: tuple[type[Tensor], ...] = ()) -> StateTree:
    """shared: the classes of tensors that are made whole when they are written. InternalError for any other value."""
    tensors: dict[str, Tensor] = {}
    return StateTree(_flatten(state, "", tensors, (Tensor, nn.Parameter, *shared)), tensors)


def save_state(folder: Path, state: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Write a tree; `info` is plain JSON. Raises InternalError for a value that is no part of trees, and DiskFull."""
    write_state(folder, flatten_state(state), info)


def write_state(
    folder: Path, state: StateTree, info: Mapping[str, Any], make: Callable[[str, Tensor], Tensor] | None = None
) -> None:
    """Write a state. make: gives the tensor that is written, from its path and the one in the state.

    A kill at any moment leaves the older folder of that name or this one, complete: in its place, or beside it where
    `find_newest_state` finds it. Raises DiskFull.
    """
    tree, tensors = state
    with catch_disk_full(folder), files.write_folder_atomically(folder) as temporary:
        write_stream(
            temporary / TENSORS_FILE,
            make_specs(tensors, None),
            lambda name: make(name, tensors[name]) if make else tensors[name],
        )
        content = {
            "version": STATE_VERSION,
            "program": f"sfumato {__version__}",
            "torch": torch.__version__,
            "saved_at": time.time(),
            "sha256": _hash_file(temporary / TENSORS_FILE),
            "info": info,
            "tree": tree,
        }
        files.write_text(temporary / TREE_FILE, json.dumps({**content, "seal": _hash_content(content)}))


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, info), tensors on the CPU. Raises UserError where the folder is not a complete state."""
    fault = find_fault(folder)
    if fault:
        raise _incomplete_error(folder, fault)
    content = _read_tree(folder)
    with TensorFile(folder / TENSORS_FILE) as file:
        return _unflatten(content["tree"], file.read), content["info"]


class StateOutline(NamedTuple):
    """A complete state without its tensors."""

    folder: Path
    tree: dict[str, Any]  # None in place of each tensor
    info: dict[str, Any]


def read_newest_outline(path: Path, name: str = "") -> StateOutline:
    """The outline of `find_newest_state`."""
    folder = find_newest_state(path, name)
    content = _read_tree(folder)
    return StateOutline(folder, _unflatten(content["tree"], lambda name: None), content["info"])


class StatePosition(NamedTuple):
    """Where a state stands among others: later ones are greater."""

    has_name: bool  # whether it is of a run of the wanted name
    run_time: float  # when the last state of the same run was saved, Unix time
    step: int
    saved_at: float  # Unix time; the clock may have been set back since the state before


def find_newest_state(path: Path, name: str = "") -> Path:
    """The state that `path` is, or the newest complete one inside it; each one that is skipped is reported.

    The newest of a run is the one with the most steps. Of several runs, the one of this name counts first, then the one
    that saved last. Where `path` is a state that was being replaced when its run was killed, the complete copy beside
    it counts. Raises UserError where there is none.
    """
    if not path.exists() and not any(files.list_folder_copies(path)):
        raise UserError(f"{path} does not exist, so there is no state to resume from", code="state-missing")
    is_state = not path.is_dir() or (path / TREE_FILE).is_file() or _is_foreign(path)
    candidates = [*([path] if is_state else _list_states(path)), *files.list_folder_copies(path)]
    positions = _read_positions(candidates, name)
    for state in sorted(candidates, key=positions.__getitem__, reverse=True):
        fault = find_fault(state)
        if fault is None:
            return state
        log.warning("skipping %s, which is not a complete state: %s", state, fault)
    if is_state:
        fix = "give the folder with all states of the run; the newest complete one is used"
        raise _incomplete_error(path, find_fault(path) or "", fix)
    raise UserError(
        f"{path} holds no complete state",
        code="no-complete-state",
        fix="give the folder of a state, its name ends in -state",
    )


def _incomplete_error(folder: Path, fault: str, fix: str = "") -> UserError:
    return UserError(f"{folder} is not a complete state: {fault}", code="state-incomplete", fix=fix)


def find_fault(folder: Path) -> str | None:
    """Why a folder is not a complete state; None where it is one."""
    try:
        content = _read_tree(folder)
        return None if content["sha256"] == _hash_file(folder / TENSORS_FILE) else f"{TENSORS_FILE} is damaged"
    except (FileNotFoundError, NotADirectoryError) as error:
        return "it was saved by another program" if _is_foreign(folder) else f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)


def _read_tree(folder: Path) -> dict[str, Any]:
    """The content of state.json; ValueError says what is wrong with it."""
    try:
        content = decode_json(files.read_file(folder / TREE_FILE))
        version, seal = content["version"], content.pop("seal")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{TREE_FILE} is damaged") from None
    if version != STATE_VERSION:
        raise ValueError(f"it has version {version}, this program reads {STATE_VERSION}")
    if seal != _hash_content(content):
        raise ValueError(f"{TREE_FILE} is damaged")
    return content


def is_newest_of_run(folder: Path) -> bool:
    """Whether no state beside this one is of the same run and has more steps."""
    own = _read_facts(folder)
    beside = [_read_facts(other) for other in _list_states(folder.parent)]
    return all(other["run"] != own["run"] or other["step"] <= own["step"] for other in beside)


def remove_useless_copies(folder: Path, name: str) -> None:
    """Remove what a kill has left of a run's states, where it is incomplete or a complete state is in its place."""
    own = re.compile(rf"\.({re.escape(name)}(?:-step\d+|-\d+)?-state)\.\w+\.(?:tmp|old)")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (match := own.fullmatch(path.name)) and (find_fault(path) or not find_fault(folder / match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _read_positions(states: Sequence[Path], name: str) -> dict[Path, StatePosition]:
    facts = {state: _read_facts(state) for state in states}
    run_times: dict[str, float] = {}
    for each in facts.values():
        run_times[each["run"]] = max(each["saved_at"], run_times.get(each["run"], 0.0))
    return {
        state: StatePosition(each["name"] == name, run_times[each["run"]], each["step"], each["saved_at"])
        for state, each in facts.items()
    }


def _read_facts(folder: Path) -> dict[str, Any]:
    """run, name, step and saved_at of a state; empty or 0 where they are unknown."""
    facts: dict[str, Any] = {"run": "", "name": "", "step": 0, "saved_at": 0.0}
    try:
        content = _read_tree(folder)
    except (OSError, ValueError):
        return facts
    info = {key: content["info"][key] for key in ("run", "name") if key in content["info"]}
    return {**facts, **info, "step": _find_step(content["tree"]), "saved_at": content["saved_at"]}


def _find_step(tree: Any) -> int:
    """Among the counters of a run, or at the top of a tree without them; 0 where it is not there."""
    items = {str(key): value for key, value in tree[1]} if isinstance(tree, list) and tree[0] == "dict" else {}
    if "counters" in items:
        return _find_step(items["counters"])
    return items["step"] if isinstance(items.get("step"), int) else 0


def _list_states(folder: Path) -> Iterator[Path]:
    """Folders that are states by name or content, including those that a kill interrupted."""
    for child in sorted(folder.iterdir()):
        if child.is_dir() and ("-state" in child.name or (child / TREE_FILE).is_file()):
            yield child


def _is_foreign(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FOREIGN_FILES)


def _hash_file(path: Path) -> str:
    with files.open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_content(content: Mapping[str, Any]) -> str:
    """A checksum of state.json's own content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _flatten(value: Any, path: str, tensors: dict[str, Tensor], kinds: tuple[type[Tensor], ...]) -> Any:
    """The tree as JSON; [kind, content] where plain JSON would lose the kind."""
    if isinstance(value, Tensor):
        if type(value) not in kinds or value.layout != torch.strided:
            raise InternalError(f"state: {path} is a {type(value).__name__} ({value.layout}), which cannot be saved")
        name = path
        while name in tensors:  # the keys 1 and "1" make the same path
            name += "#"
        tensors[name] = value.detach()
        return ["tensor", name]
    if isinstance(value, Mapping):
        items = [
            [_check_key(key, path), _flatten(item, f"{path}/{key}", tensors, kinds)] for key, item in value.items()
        ]
        return ["dict", items]
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{path}/{i}", tensors, kinds) for i, item in enumerate(value)]
        return ["list" if isinstance(value, list) else "tuple", items]
    if isinstance(value, float) and not math.isfinite(value):
        return ["float", repr(float(value))]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InternalError(f"state: {path} is a {type(value).__name__}, which cannot be saved")


def _check_key(key: Any, path: str) -> Any:
    if not isinstance(key, int | str):
        raise InternalError(f"state: the key {key!r} of {path or 'the state'} is neither text nor a whole number")
    return key


def _unflatten(value: Any, read: Callable[[str], Any]) -> Any:
    """The tree of JSON; read: tensor's name -> what stands in its place."""
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return read(content)
    if kind == "dict":
        return {key: _unflatten(item, read) for key, item in content}
    if kind == "float":
        return float(content)
    items = [_unflatten(item, read) for item in content]
    return items if kind == "list" else tuple(items)
