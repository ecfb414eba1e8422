"""Checks that the files and folders of path options exist."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from sfumato.common.files import refuse_special_file
from sfumato.common.registry import find_nearest
from sfumato.config.base import Option
from sfumato.config.frozen import FrozenAdapter
from sfumato.config.schema import Config, vocabulary
from sfumato.errors import Problems

AUTOENCODERS = ("vae", "ae")  # the encoders of images; the others are of text
MODEL_SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")


def check_paths(config: Config, skip: Collection[str], place: Callable[[str], str], problems: Problems) -> None:
    """Add a problem for every path that does not exist, or is a folder instead of a file or the reverse.

    skip: names of options that are not checked. place: name of an option -> where it was given, for messages.
    """
    for option in vocabulary().values():
        if option.facts.path and option.name not in skip and not may_be_absent(option, config):
            for path in list_paths(option, config):
                check_path(path, option, place(option.name), problems)


def may_be_absent(option: Option, config: Config) -> bool:
    """Whether a cache on disk may stand for a network whose file is not there, which the cache alone can say."""
    if option.facts.path != "encoder":
        return False
    cache = config.cache
    is_image = option.name in AUTOENCODERS
    return cache.cache_latents_to_disk if is_image else cache.cache_text_encoder_outputs_to_disk


def check_path(path: Path, option: Option, place: str, problems: Problems) -> None:
    with problems.catch():
        refuse_special_file(path, where=f"{place}: {path}")
    if not path.exists():
        problems.add(f"{place}: {path} does not exist", code="path-missing", fix=suggest_path(path))
    elif option.facts.path == "file" and path.is_dir():
        problems.add(f"{place}: {path} is a folder, not a file", code="path-is-a-folder")
    elif option.facts.path == "folder" and not path.is_dir():
        problems.add(f"{place}: {path} is a file, not a folder", code="path-is-a-file")


def list_paths(option: Option, config: Config) -> Iterator[Path]:
    """The paths in the value of an option; names on the hub are none."""
    value = config.value(option.name)
    for name in value if isinstance(value, tuple) else (value,):
        if isinstance(name, FrozenAdapter):
            yield name.path
        elif name is not None and (option.facts.path not in ("model", "encoder") or looks_like_path(str(name))):
            yield Path(name)


def looks_like_path(name: str) -> bool:
    """Whether a model's name is a local path; a name on the hub has the form owner/name."""
    rooted = name.startswith((".", "/", "\\", "~")) or "\\" in name or ":" in name
    return rooted or name.count("/") != 1 or name.endswith(("/", *MODEL_SUFFIXES))


def suggest_path(path: Path) -> str:
    """A fix for a missing path: the most similar name in its folder, or that the folder is missing, too."""
    if path.exists():
        return ""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    try:
        similar = find_nearest(path.name, [entry.name for entry in folder.iterdir()])
    except OSError:
        return ""
    return f"did you mean {folder / similar}?" if similar else ""
