"""Whether the files and folders that options point to are there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from sfumato.common.registry import nearest
from sfumato.config.base import Option
from sfumato.config.schema import Config, vocabulary
from sfumato.errors import Problems

MODEL_ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")


def check_paths(config: Config, skip: Collection[str], place: Callable[[str], str], problems: Problems) -> None:
    """Add a problem for every path that does not exist or is a folder instead of a file, or the reverse."""
    for option in vocabulary().values():
        if option.facts.path and option.name not in skip:
            for path in named_paths(option, config):
                fault = missing(path, option)
                if fault:
                    problems.add(f"{place(option.name)}: {fault}", fix=neighbour(path))


def named_paths(option: Option, config: Config) -> Iterator[Path]:
    value = config.value(option.name)
    for each in value if isinstance(value, tuple) else (value,):
        if each is not None and (option.facts.path != "model" or looks_like_path(str(each))):
            yield Path(each)


def looks_like_path(name: str) -> bool:
    """A hub name has the form owner/name; everything else is meant to be on this machine."""
    rooted = name.startswith((".", "/", "\\", "~")) or "\\" in name or ":" in name
    return rooted or name.count("/") != 1 or name.endswith(("/", *MODEL_ENDINGS))


def missing(path: Path, option: Option) -> str:
    """What is wrong with the path, or nothing."""
    if not path.exists():
        return f"{path} does not exist"
    if option.facts.path == "file" and path.is_dir():
        return f"{path} is a folder, not a file"
    if option.facts.path == "folder" and not path.is_dir():
        return f"{path} is a file, not a folder"
    return ""


def neighbour(path: Path) -> str:
    """The most similar name in the same folder, or the part of the path that is missing."""
    if path.exists():
        return ""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    try:
        similar = nearest(path.name, [each.name for each in folder.iterdir()])
    except OSError:
        return ""
    return f"did you mean {folder / similar}?" if similar else ""
