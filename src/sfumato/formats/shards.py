"""Models in several files: shards, the index that lists them, and which file of a folder to read."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sfumato.common.files import read_file
from sfumato.common.json_toml import decode_json
from sfumato.common.text import list_some, plural
from sfumato.errors import UserError
from sfumato.formats.header import DOWNLOAD_AGAIN, TensorHeader, read_header

INDEX_NAME = re.compile(r".+\.(safetensors|bin)\.index(\.\w+)?\.json")  # the second: of a variant, e.g. fp16
WEIGHT_ENDINGS = (  # of files with weights in folders of diffusers, in the formats of all libraries
    ".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".h5", ".index.json",
)  # fmt: skip
SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})((?:\.\w+)?\.(?:safetensors|bin))")
NETWORK_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of files by diffusers and transformers


def find_network_file(folder: Path) -> Path | None:
    """The file or index to read of a network's folder; what diffusers would read comes first.

    That is safetensors before pickled files, both before variants in half precision, shards without an index last.
    """
    for variant in ("", ".*"):
        for ending in ("safetensors", "bin"):
            for stem in NETWORK_STEMS:
                for pattern in _list_patterns(stem, variant, ending):
                    found = sorted(folder.glob(pattern))
                    if found:
                        return found[0]
    return None


def _list_patterns(stem: str, variant: str, ending: str) -> list[str]:
    """Of the whole file, of the index, and of the first shard."""
    shard = "-00001-of-?????"
    return [
        f"{stem}{variant}.{ending}",
        f"{stem}.{ending}.index{variant}.json",
        f"{stem}{shard}{variant}.{ending}",
        *([f"{stem}{variant}{shard}.{ending}"] if variant else []),
    ]


def is_sharded(path: Path) -> bool:
    """Whether the path is a folder, an index, or one of several shards."""
    return path.is_dir() or bool(INDEX_NAME.fullmatch(path.name) or SHARD_NAME.fullmatch(path.name))


def find_shard_files(path: Path) -> list[Path]:
    """The files of the model that an index lists or a shard belongs to; else `path` alone."""
    if INDEX_NAME.fullmatch(path.name):
        return [path.with_name(name) for name in sorted(set(_read_index(path).values()))]
    return list_shard_files(path)


def read_sharded_headers(path: Path | str) -> dict[Path, TensorHeader]:
    """File -> header of a sharded model: of a `*.safetensors.index.json`, a folder that holds one, or one shard.

    A folder with a single safetensors file counts as one shard. Raises UserError where shards are missing or disagree
    with the index.
    """
    path = Path(path)
    main = _find_main_file(path) if path.is_dir() else path
    if not main.name.endswith(".json"):
        return {shard: read_header(shard) for shard in list_shard_files(main)}
    weight_map = _read_index(main)
    headers = {main.parent / name: read_header(main.parent / name) for name in sorted(set(weight_map.values()))}
    for file, header in headers.items():
        listed = {key for key, name in weight_map.items() if name == file.name}
        differing = sorted(listed ^ set(header.tensors))
        if differing:
            raise UserError(
                f"{main} and {file.name} disagree about {plural(len(differing), 'tensor')}, e.g. {differing[0]!r}",
                code="shard-index-mismatch",
                fix=DOWNLOAD_AGAIN,
            )
    return headers


def list_shard_files(path: Path) -> list[Path]:
    """All shards of the model that `path` is one of, by its name (x-00002-of-00003.safetensors); else `path` alone."""
    match = SHARD_NAME.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count, ending = match.groups()
    return [path.with_name(f"{stem}-{i:05d}-of-{count}{ending}") for i in range(1, int(count) + 1)]


def _find_main_file(folder: Path) -> Path:
    """The index of a folder, else its only safetensors file; variants (model.fp16.safetensors) come second."""
    indexes = sorted(folder.glob("*.safetensors.index*.json"))
    files = indexes or [file for file in sorted(folder.glob("*.safetensors")) if list_shard_files(file)[0] == file]
    plain = {".safetensors", ".safetensors.index.json"}
    candidates = [file for file in files if "".join(file.suffixes) in plain] or files
    if not candidates:
        raise UserError(f"{folder} holds no safetensors file", code="model-folder-empty")
    if len(candidates) > 1:
        raise UserError(
            f"{folder} holds several models: {list_some([file.name for file in candidates])}",
            code="model-folder-ambiguous",
            fix="name the file instead of the folder",
        )
    return candidates[0]


def _is_file_name(name: str) -> bool:
    """Whether it is a file's name alone, which a file system can have."""
    return name == Path(name).name and 0 < len(os.fsencode(name)) < 256 and "\0" not in name


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index file."""
    try:
        weight_map = decode_json(read_file(path))["weight_map"]
        are_names = all(isinstance(name, str) and _is_file_name(name) for name in weight_map.values())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", code="shard-index-missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not an index of safetensors files ({error!r})", code="shard-index-damaged", fix=DOWNLOAD_AGAIN
        ) from None
    if not are_names or not weight_map:
        raise UserError(
            f"{path} must map tensors to files in its own folder", code="shard-index-invalid", fix=DOWNLOAD_AGAIN
        )
    return weight_map
