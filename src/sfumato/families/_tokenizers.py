"""Tokenizers: CLIP's from a folder or from the vocabulary shipped here, T5's from a folder, and toy ones for tests."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from sfumato.common import files
from sfumato.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5Tokenizer

Pair = tuple[str, str]

CLIP_LENGTH = 77
SHIPPED_MERGES = Path(__file__).parent / "assets" / "clip_merges.txt.gz"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
T5_ON_HUB = (
    ("google/t5-v1_1-xxl", "spiece.model"),
    ("black-forest-labs/FLUX.1-dev", "tokenizer_2/tokenizer.json"),
    ("black-forest-labs/FLUX.1-schnell", "tokenizer_2/tokenizer.json"),
)
T5_SPECIALS = ("<pad>", "</s>", "<unk>")


def clip_tokenizer(
    folder: Path | None = None, *, pad_with_zero: bool = False, merges: Sequence[str] | None = None
) -> CLIPTokenizer:
    """CLIP's tokenizer with OpenAI's ids, from `folder` (tokenizer.json, or vocab.json and merges.txt) or as shipped.

    `merges`, which a checkpoint may bring along, stand in for the shipped ones: "a b" makes the token ab of a and b.

    `pad_with_zero` is what encoders trained with OpenCLIP expect: the end of a short prompt is filled with id 0
    instead of the end token. Id 0 is also the token "!" inside a word; it is not made a special token, so that
    "wow!" keeps its own ids as in OpenCLIP. Raises UserError where the folder does not hold a CLIP vocabulary.
    """
    from transformers import CLIPTokenizer

    if folder is not None:
        vocabulary = _read_vocabulary(folder)
    else:
        vocabulary = _shipped_vocabulary() if merges is None else _vocabulary_of(merges)
    pairs: Any = list(vocabulary.merges)  # annotated as strings in transformers, whose BPE model takes pairs
    tokenizer = CLIPTokenizer(vocabulary.ids, pairs, model_max_length=CLIP_LENGTH)
    for token in sorted(vocabulary.added, key=vocabulary.added.__getitem__):
        tokenizer.add_tokens(token)
        if tokenizer.convert_tokens_to_ids(token) != vocabulary.added[token]:
            raise UserError(f"{folder}: the added token {token!r} does not follow the vocabulary without a gap")
    if pad_with_zero:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """A CLIP tokenizer as transformers reads it, older versions included, which know only the last two files."""
    tokenizer.save_pretrained(folder)
    vocabulary = _from_whole_file(folder / "tokenizer.json")
    files.write_text(folder / "vocab.json", json.dumps(vocabulary.ids, ensure_ascii=False))
    files.write_text(folder / "merges.txt", _merges_text(vocabulary.merges))


def lengths(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption, without those that begin and end it."""
    return [len(ids) for ids in tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids]


def t5_tokenizer(folder: Path | None, *, max_length: int = 512, option: str = "--tokenizer") -> T5Tokenizer:
    """T5's tokenizer from a folder with tokenizer.json or spiece.model; the end token is added, no begin token.

    `option` is what the error tells the user to set.
    """
    if folder is None or not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        missing = f"{folder} holds neither tokenizer.json nor spiece.model" if folder else "no T5 tokenizer was given"
        raise UserError(
            missing, fix=f"put either file of google/t5-v1_1-xxl into a folder and give the folder with {option}"
        )
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(folder, model_max_length=max_length, local_files_only=True)


def t5_in_hub_cache() -> Path | None:
    """The folder of a T5 tokenizer that was downloaded before, by whatever program; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    for repository, file in T5_ON_HUB:
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return Path(found).parent
    return None


def toy_tokenizer(folder: Path, words: Iterable[str]) -> int:
    """Write a small CLIP tokenizer in which each of `words` is one token; returns the size of its vocabulary.

    Everything else falls apart into bytes, as in the real one, so any caption can be encoded. The begin and end
    tokens have the two highest ids, as CLIP's pooling expects. `words` are lower case letters only.
    """
    merges: list[Pair] = []
    for word in words:
        assert set(word) <= set(ascii_lowercase), f"{word!r} is not a lower case word"
        while len(pieces := apply_merges((*word[:-1], word[-1] + WORD_END), merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    ids = _ids_of(merges)
    files.write_text(folder / "vocab.json", json.dumps(ids, ensure_ascii=False))
    files.write_text(folder / "merges.txt", _merges_text(merges))
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "model_max_length": CLIP_LENGTH,
    }
    files.write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2))
    return len(ids)


def toy_t5_tokenizer(folder: Path, words: Iterable[str]) -> int:
    """Write a small T5 tokenizer in which each of `words` is one token; returns the size of its vocabulary.

    Printable ASCII outside the words is encoded letter by letter; anything else becomes the unknown token.
    """
    from transformers import T5Tokenizer

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    scores = [*((token, 0.0) for token in T5_SPECIALS), ("▁", -5.0), *((letter, -10.0) for letter in letters)]
    scores += [("▁" + word, -1.0) for word in dict.fromkeys(words)]
    folder.mkdir(parents=True, exist_ok=True)
    T5Tokenizer(vocab=scores, extra_ids=0).save_pretrained(folder)
    return len(scores)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What tells one CLIP tokenizer from another; `added` are tokens that were put behind the vocabulary later."""

    ids: dict[str, int]
    merges: Sequence[Pair]
    added: dict[str, int] = field(default_factory=dict)


@cache
def _shipped_vocabulary() -> Vocabulary:
    return _vocabulary_of(gzip.decompress(SHIPPED_MERGES.read_bytes()).decode().splitlines())


def _vocabulary_of(lines: Iterable[str]) -> Vocabulary:
    merges = [_pair(line) for line in lines]
    return Vocabulary(ids=_ids_of(merges), merges=merges)


def _read_vocabulary(folder: Path) -> Vocabulary:
    whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    if whole.is_file():
        vocabulary = _from_whole_file(whole)
    elif vocab.is_file() and merges.is_file():
        lines = merges.read_text(encoding="utf-8").splitlines()
        lines = lines[1:] if lines and lines[0].startswith("#version") else lines
        later = folder / "added_tokens.json"
        vocabulary = Vocabulary(
            ids=_read_json(vocab),
            merges=[_pair(line) for line in lines if line],
            added=_read_json(later) if later.is_file() else {},
        )
    else:
        raise UserError(
            f"{folder} holds no CLIP tokenizer",
            fix="give a folder with tokenizer.json, or with vocab.json and merges.txt; or leave the option out",
        )
    for token in (BEGIN, END):
        if token not in vocabulary.ids:
            raise UserError(f"{folder} holds no CLIP tokenizer: its vocabulary lacks {token}")
    new = {token: i for token, i in vocabulary.added.items() if token not in vocabulary.ids}
    return Vocabulary(ids=vocabulary.ids, merges=vocabulary.merges, added=new)


def _from_whole_file(path: Path) -> Vocabulary:
    """The vocabulary inside a tokenizer.json; its merges are pairs, or strings in older files."""
    content = _read_json(path)
    model = content.get("model", {})
    if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != WORD_END:
        raise UserError(f"{path} is not a CLIP tokenizer")
    return Vocabulary(
        ids=model["vocab"],
        merges=[_pair(merge) if isinstance(merge, str) else (merge[0], merge[1]) for merge in model["merges"]],
        added={token["content"]: token["id"] for token in content.get("added_tokens", [])},
    )


def _merges_text(merges: Sequence[Pair]) -> str:
    return "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error


def _pair(merge: str) -> Pair:
    first, separator, second = merge.partition(" ")
    if not (first and separator and second) or " " in second:
        raise UserError(f"not a line of a CLIP tokenizer's merges: {merge!r}")
    return first, second


def _ids_of(merges: Sequence[Pair]) -> dict[str, int]:
    """CLIP's numbering: 256 bytes, the same at a word's end, one token per merge, begin and end of text."""
    letters = _byte_letters()
    tokens = [*letters, *(letter + WORD_END for letter in letters), *map("".join, merges), BEGIN, END]
    return {token: i for i, token in enumerate(tokens)}


def _byte_letters() -> list[str]:
    """A visible letter for each byte, in the order of CLIP's ids: first the printable bytes, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = range(256 - len(printable))
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in others]


def apply_merges(pieces: Sequence[str], merges: Sequence[Pair]) -> list[str]:
    """The pieces of one word after all merges, earliest first."""
    result = list(pieces)
    for first, second in merges:
        i = 0
        while i < len(result) - 1:
            if (result[i], result[i + 1]) == (first, second):
                result[i : i + 2] = [first + second]
            i += 1
    return result
