"""Files of textual inversion: the vectors that a word stands for, of one or of several text encoders.

Stable Diffusion 1 and 2: `emb_params`. Others: the encoders' names, clip_l, clip_g, t5xxl, gemma2_2b, as ComfyUI reads
them. Files with adapters may hold the same beside the layers, under bundle_emb.WORD.NAME.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.common.files import write_folder_atomically
from sfumato.common.text import list_some
from sfumato.data.batch import Tensors
from sfumato.errors import UserError
from sfumato.formats.checkpoint import open_checkpoint
from sfumato.formats.hashed_file import write_hashed_file

BUNDLE = "bundle_emb."
LONE_NAME = "emb_params"  # where the model has one text encoder, whose file other programs know by nothing else
LONE_IN_BUNDLE = "string_to_param.*"
OTHER_NAMES = {"t5": "t5xxl", LONE_IN_BUNDLE: LONE_NAME}  # of other programs
WORD_KEY = "ss_token_string"  # of a file's metadata
UNSAFE_IN_NAMES = re.compile(r'[<>:"/\\|?*\x00-\x1f]')


@dataclass(frozen=True, kw_only=True)
class EmbeddingFile:
    """The vectors of one word."""

    path: Path
    vectors: Mapping[str, Tensor]  # name in the file -> (vectors, width)
    word: str = ""  # that the file's metadata names

    def select_vectors(self, names: Mapping[str, str], widths: Mapping[str, int]) -> dict[str, Tensor]:
        """Text encoder -> its vectors; UserError where one has none, or some of another width.

        names: text encoder -> its name in files. widths: numbers of a vector.
        """
        found: dict[str, Tensor] = {}
        for part, name in names.items():
            is_lone = len(names) == len(self.vectors) == 1  # such a tensor may have any name
            vectors = next(iter(self.vectors.values())) if is_lone else self.vectors.get(name)
            if vectors is None or vectors.shape[1] != widths[part]:
                has = ", ".join(f"{key} of {tensor.shape[1]} numbers" for key, tensor in self.vectors.items())
                needs = ", ".join(f"{names[part]} of {widths[part]}" for part in names)
                raise UserError(
                    f"{self.path} is for another model: it holds vectors {has}, this model needs {needs}",
                    code="embedding-of-other-model",
                    fix="give a file that was trained for this kind of model",
                )
            found[part] = vectors
        counts = {part: len(vectors) for part, vectors in found.items()}
        if len(set(counts.values())) > 1:
            raise UserError(f"{self.path} holds different numbers of vectors: {counts}", code="embedding-counts-differ")
        return found


def read_embedding_file(path: Path) -> EmbeddingFile:
    """A file of any program. UserError where it holds no vectors of tokens, or values that are not finite."""
    with open_checkpoint(path) as file:
        tensors = {key: file.read(key) for key in file.header.tensors}
        word = file.header.metadata.get(WORD_KEY, "")
    return EmbeddingFile(path=path, vectors=check_vectors(path, tensors), word=word)


def read_bundled_embeddings(path: Path) -> dict[str, EmbeddingFile]:
    """Word -> its vectors, of a file with adapters; empty for a file without and for a folder."""
    if not path.is_file():
        return {}
    by_word: dict[str, Tensors] = defaultdict(dict)
    with open_checkpoint(path) as file:
        for key in file.header.tensors:
            name = next((name for name in list_bundled_names() if key.endswith(f".{name}")), "")
            if key.startswith(BUNDLE) and name:
                by_word[key[len(BUNDLE) : -len(name) - 1]][name] = file.read(key)
    return {
        word: EmbeddingFile(path=path, vectors=check_vectors(path, tensors), word=word)
        for word, tensors in by_word.items()
    }


def list_bundled_names() -> Iterable[str]:
    """The names of encoders in bundles."""
    return (LONE_IN_BUNDLE, LONE_NAME, "clip_l", "clip_g", "t5xxl", "t5", "gemma2_2b")


def is_bundled(key: str) -> bool:
    """Whether a key of a file is that of vectors beside an adapter."""
    return key.startswith(BUNDLE) and any(key.endswith(f".{name}") for name in list_bundled_names())


def check_vectors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vectors as (count, width) in float32 under their names here."""
    bad = [key for key, tensor in tensors.items() if tensor.ndim not in (1, 2) or not tensor.is_floating_point()]
    if bad or not tensors:
        raise UserError(
            f"{path} is no file of textual inversion: {list_some(bad or ['it holds no tensors'])}",
            code="embedding-file-kind",
            fix="give a file with emb_params, clip_l, clip_g, t5xxl or gemma2_2b",
        )
    vectors = {OTHER_NAMES.get(key, key): torch.atleast_2d(tensor).float() for key, tensor in tensors.items()}
    broken = [key for key, tensor in vectors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{path}: {list_some(broken)} has values that are not finite (NaN or infinite)", code="embedding-not-finite"
        )
    return vectors


def write_embedding_folder(
    path: Path,
    words: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    suffix: str,
) -> None:
    """A folder with a file for each word, named by it."""
    with write_folder_atomically(path) as folder:
        for word, vectors in words.items():
            name = f"{name_file(word, words)}{suffix}"
            write_hashed_file(folder / name, vectors, {**metadata, WORD_KEY: word}, dtype)


def name_file(word: str, words: Iterable[str]) -> str:
    """A word without the letters that some systems do not allow in names; with its number where others are alike."""
    plain = {other: UNSAFE_IN_NAMES.sub("", other) for other in words}
    alike = [other for other, name in plain.items() if name.lower() == plain[word].lower()]
    return plain[word] if len(alike) == 1 and plain[word] else f"{plain[word]}{list(plain).index(word) + 1}"


def bundle_vectors(word: str, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys and tensors of a word in a file with adapters."""
    names = {name: LONE_IN_BUNDLE if name == LONE_NAME else name for name in vectors}
    return {f"{BUNDLE}{word}.{names[name]}": tensor for name, tensor in vectors.items()}
