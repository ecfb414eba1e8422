"""Where a model is: a path, or the folder in the hub's cache for a name on the hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sfumato.common.library_call import call_library, give_reason
from sfumato.config.paths import suggest_path
from sfumato.errors import UserError
from sfumato.formats.shards import NETWORK_STEMS, find_network_file

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")  # folders, no lone checkpoints
HUB_VARIANTS = ("*.fp16.*", "*.non_ema.*")
HUB_UNUSED = ("safety_checker/*", "feature_extractor/*")
# What a model is downloaded as, in this order, until it has weights: (further files, files to leave out).
HUB_ATTEMPTS = (((), HUB_VARIANTS), (("*/*.bin",), HUB_VARIANTS), (("*/*.bin",), ("*.non_ema.*",)))
HUB_FOLDERS = "*/*"
HUB_TOKENIZER = ("*.json", "*.txt", "*.model")
# A network alone, until it has weights: (files beside its configuration, files to leave out).
NETWORK_ATTEMPTS = (
    (tuple(f"{stem}*.safetensors" for stem in NETWORK_STEMS), HUB_VARIANTS),
    (tuple(f"{stem}*.bin" for stem in NETWORK_STEMS), HUB_VARIANTS),
    (("*.safetensors",), ()),
)


def find_path(name: str) -> Path:
    """The path of a file or folder, or the folder in the hub's cache for a name on the hub (owner/name).

    Downloads what the cache lacks unless HF_HUB_OFFLINE is set. Raises UserError where nothing is found.
    """
    return _find(name, _download)


def find_network_path(name: str) -> Path:
    """The same of one network: on the hub, the files at the top of its folder, e.g. of an autoencoder or ControlNet."""
    return _find(name, _download_network)


def find_tokenizer_path(name: str) -> Path:
    """The same of a tokenizer; the weights that lie beside it are not downloaded."""
    return _find(name, _download_tokenizer)


def _find(name: str, fetch: Callable[[str], Path]) -> Path:
    path = Path(name)
    if path.exists():
        return path
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{path} does not exist", code="model-path-missing", fix=suggest_path(path))
    download = call_library(partial(fetch, name))
    error = download.exception()  # not found, no access, no connection, a malformed name, a connection that breaks
    if error is None:
        return download.result()
    if isinstance(error, UserError):
        raise error
    raise UserError(
        f"{name} is no file or folder, and the hub did not provide a model of this name ({give_reason(error)})",
        code="hub-model-unavailable",
        fix="give the path of a checkpoint, or download the model first",
    ) from error


def _download(name: str) -> Path:
    """The folder of a model in the hub's cache: safetensors where it has them, else pickled files, else variants."""
    from huggingface_hub import snapshot_download

    folder = Path()
    for more, without in HUB_ATTEMPTS:
        wanted, unwanted = [*HUB_FILES, *more], [*without, *HUB_UNUSED]
        folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
        networks = [config.parent for config in folder.glob("*/config.json")]
        if networks and all(find_network_file(network) for network in networks):
            break
    return folder


def _download_network(name: str) -> Path:
    """The folder of a network in the hub's cache; of a whole model where the network is in a folder of its own."""
    from huggingface_hub import snapshot_download

    for more, without in NETWORK_ATTEMPTS:
        folder = Path(
            snapshot_download(name, allow_patterns=["*.json", *more], ignore_patterns=[HUB_FOLDERS, *without])
        )
        if find_network_file(folder) or any(folder.glob("*.safetensors")):
            return folder
    return _download(name)


def _download_tokenizer(name: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=[*HUB_TOKENIZER], ignore_patterns=[HUB_FOLDERS]))
