"""Tokenizers: CLIP's from a folder or from the vocabulary in this package, T5's from a folder, and toys of both."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from sfumato.common import files
from sfumato.common.json_toml import decode_json
from sfumato.common.text import plural
from sfumato.common.text_files import read_text_file
from sfumato.errors import UserError
from sfumato.families.source import read_json
from sfumato.formats.header import DOWNLOAD_AGAIN

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5Tokenizer

Pair = tuple[str, str]

CLIP_LENGTH = 77  # positions, with begin and end token
SHIPPED_MERGES = Path(__file__).parent / "assets" / "clip_merges.txt.gz"
CLIP_BEGIN, CLIP_END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKEN_ID = 1 << 31
MAX_EXTRA_IDS = 10_000  # T5 has 100; the library makes a token for each
WORD_END = "</w>"
T5_ON_HUB = (
    ("google/t5-v1_1-xxl", "spiece.model"),
    ("black-forest-labs/FLUX.1-dev", "tokenizer_2/tokenizer.json"),
    ("black-forest-labs/FLUX.1-schnell", "tokenizer_2/tokenizer.json"),
)
T5_SPECIALS = ("<pad>", "</s>", "<unk>")


def load_clip_tokenizer(
    folder: Path | None = None, *, pad_with_zero: bool = False, merges: Sequence[str] | None = None
) -> CLIPTokenizer:
    """CLIP's tokenizer with OpenAI's ids.

    folder: with tokenizer.json, or vocab.json and merges.txt. None: the vocabulary in this package. merges: of a
    checkpoint, instead of those in this package; "a b" makes the token ab of a and b. pad_with_zero: pads with id 0
    instead of the end token, as encoders trained with OpenCLIP expect. Id 0 is also the token "!" inside a word; it is
    not made a special token, so that "wow!" keeps its ids as in OpenCLIP. Raises UserError where the folder has no
    CLIP vocabulary.
    """
    from transformers import CLIPTokenizer

    if folder is not None:
        vocabulary = _read_vocabulary(folder)
    else:
        vocabulary = _load_shipped_vocabulary() if merges is None else _make_vocabulary(merges)
    pairs: Any = list(vocabulary.merges)  # annotated as strings in transformers, whose BPE model takes pairs
    with catch_tokenizer_faults(folder or "the checkpoint"):
        tokenizer = CLIPTokenizer(vocabulary.ids, pairs, model_max_length=CLIP_LENGTH)
    for token in sorted(vocabulary.added, key=vocabulary.added.__getitem__):
        tokenizer.add_tokens(token)
        if tokenizer.convert_tokens_to_ids(token) != vocabulary.added[token]:
            raise UserError(
                f"{folder}: the id of the added token {token!r} does not follow the vocabulary",
                code="clip-added-token-gap",
            )
    if pad_with_zero:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a CLIP tokenizer for transformers, also for older versions, which read only vocab.json and merges.txt."""
    tokenizer.save_pretrained(folder)
    vocabulary = _read_tokenizer_json(folder / "tokenizer.json")
    files.write_text(folder / "vocab.json", json.dumps(vocabulary.ids, ensure_ascii=False))
    files.write_text(folder / "merges.txt", _format_merges(vocabulary.merges))


def count_tokens(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption, without begin and end token."""
    return [len(ids) for ids in tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids]


def check_vocabulary_size(tokens: int, rows: int, *, owner: str) -> None:
    """Raise UserError where a tokenizer has not as many tokens as its encoder's embedding has rows."""
    if tokens != rows:
        raise UserError(
            f"the tokenizer has {plural(tokens, 'token')}, the text encoder {rows}",
            code="tokenizer-vocabulary-mismatch",
            fix=f"give the folder of the tokenizer of {owner} with --tokenizer",
        )


def load_t5_tokenizer(folder: Path | None, *, max_length: int = 512, option: str = "--tokenizer") -> T5Tokenizer:
    """T5's tokenizer from a folder with tokenizer.json or spiece.model; it adds an end token and no begin token.

    option: what the fix of the error names.
    """
    if folder is None or not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise UserError(
            f"{folder} holds neither tokenizer.json nor spiece.model" if folder else "no T5 tokenizer was given",
            code="t5-tokenizer-missing",
            fix=f"put either file of google/t5-v1_1-xxl into a folder and give the folder with {option}",
        )
    from transformers import T5Tokenizer

    for file in folder.iterdir():  # the library would wait for a named pipe
        files.refuse_special_file(file)
    with catch_tokenizer_faults(folder):
        check_extra_ids(folder)
        tokenizer = T5Tokenizer.from_pretrained(folder, model_max_length=max_length, local_files_only=True)
        tokenizer("a", padding="max_length", max_length=max_length)  # some faults show only here
    return tokenizer


def check_extra_ids(folder: Path) -> None:
    """Raise ValueError where the folder asks for more extra tokens than can be meant."""
    path = folder / "tokenizer_config.json"
    content = decode_json(files.read_file(path)) if path.is_file() else {}
    asked = content.get("extra_ids", 0) if isinstance(content, dict) else 0
    if isinstance(asked, int | float) and asked > MAX_EXTRA_IDS:
        raise ValueError(f"{asked:.3g} extra tokens" if asked < 1e300 else "endless extra tokens")


@contextmanager
def catch_tokenizer_faults(where: Path | str) -> Iterator[None]:
    """UserError for whatever the libraries raise on damaged files; tokenizers raises nothing but plain Exceptions."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise UserError(
            f"the tokenizer in {where} is damaged ({reason})", code="tokenizer-damaged", fix=DOWNLOAD_AGAIN
        ) from error


def find_in_hub_cache(locations: Sequence[tuple[str, str]]) -> Path | None:
    """The folder of the first file that is in the hub's cache; downloads nothing. locations: (repository, file)."""
    from huggingface_hub import try_to_load_from_cache

    for repository, file in locations:
        path = try_to_load_from_cache(repository, file)
        if isinstance(path, str):
            return Path(path).parent
    return None


def write_toy_clip_tokenizer(folder: Path, words: Iterable[str]) -> int:
    """Write a small CLIP tokenizer in which each of `words` is one token; returns the size of its vocabulary.

    Everything else is encoded byte by byte, as in the real one. The begin and end tokens have the two highest ids.
    words: of lower case letters.
    """
    merges: list[Pair] = []
    for word in words:
        assert set(word) <= set(ascii_lowercase), f"{word!r} is not a lower case word"
        while len(pieces := apply_merges((*word[:-1], word[-1] + WORD_END), merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    ids = _make_ids(merges)
    files.write_text(folder / "vocab.json", json.dumps(ids, ensure_ascii=False))
    files.write_text(folder / "merges.txt", _format_merges(merges))
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": CLIP_BEGIN,
        "eos_token": CLIP_END,
        "unk_token": CLIP_END,
        "pad_token": CLIP_END,
        "model_max_length": CLIP_LENGTH,
    }
    files.write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2))
    return len(ids)


def write_toy_t5_tokenizer(folder: Path, words: Iterable[str]) -> int:
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
    """The data of a CLIP tokenizer. added: token -> id of those after the vocabulary."""

    ids: dict[str, int]
    merges: Sequence[Pair]
    added: dict[str, int] = field(default_factory=dict)


@cache
def _load_shipped_vocabulary() -> Vocabulary:
    return _make_vocabulary(gzip.decompress(SHIPPED_MERGES.read_bytes()).decode().splitlines())


def _make_vocabulary(lines: Iterable[str]) -> Vocabulary:
    merges = [_parse_pair(line) for line in lines]
    return Vocabulary(ids=_make_ids(merges), merges=merges)


def _read_vocabulary(folder: Path) -> Vocabulary:
    whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    if whole.is_file():
        vocabulary = _read_tokenizer_json(whole)
    elif vocab.is_file() and merges.is_file():
        lines = read_text_file(merges).splitlines()
        lines = lines[1:] if lines and lines[0].startswith("#version") else lines
        added = folder / "added_tokens.json"
        vocabulary = Vocabulary(
            ids=read_json(vocab),
            merges=[_parse_pair(line) for line in lines if line],
            added=read_json(added) if added.is_file() else {},
        )
    else:
        raise UserError(
            f"{folder} holds no CLIP tokenizer",
            code="clip-tokenizer-missing",
            fix="give a folder with tokenizer.json, or with vocab.json and merges.txt, or remove the option",
        )
    for token in (CLIP_BEGIN, CLIP_END):
        if token not in vocabulary.ids:
            raise UserError(
                f"{folder} holds no CLIP tokenizer: its vocabulary lacks {token}",
                code="clip-vocabulary-incomplete",
            )
    _check_vocabulary(folder, vocabulary)
    new = {token: i for token, i in vocabulary.added.items() if token not in vocabulary.ids}
    return Vocabulary(ids=vocabulary.ids, merges=vocabulary.merges, added=new)


def _read_tokenizer_json(path: Path) -> Vocabulary:
    """The vocabulary inside a tokenizer.json; its merges are pairs, or strings in older files."""
    content = read_json(path)
    model = content.get("model", {})
    kind = (model.get("type", "BPE"), model.get("end_of_word_suffix")) if isinstance(model, dict) else None
    if kind != ("BPE", WORD_END):
        raise UserError(f"{path} is not a CLIP tokenizer", code="clip-tokenizer-kind")
    try:
        merges: list[Pair] = []
        for merge in model["merges"]:
            first, second = _parse_pair(merge) if isinstance(merge, str) else merge
            merges.append((first, second))
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return Vocabulary(ids=model["vocab"], merges=merges, added=added)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged", code="clip-tokenizer-json-damaged", fix=DOWNLOAD_AGAIN) from error


def _check_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    """Raise UserError where tokens have no ids of their own, or merges are missing: captions would get other ids."""
    for table in (vocabulary.ids, vocabulary.added):
        if not isinstance(table, dict) or not all(type(i) is int and 0 <= i < MAX_TOKEN_ID for i in table.values()):
            raise UserError(
                f"{folder}: its tokens are not numbered", code="clip-vocabulary-damaged", fix=DOWNLOAD_AGAIN
            )
    if len(set(vocabulary.ids.values())) < len(vocabulary.ids):
        raise UserError(f"{folder}: two of its tokens have one id", code="clip-vocabulary-id-twice", fix=DOWNLOAD_AGAIN)
    letters = _list_byte_letters()
    single = {*letters, *(letter + WORD_END for letter in letters)}
    merged = {first + second for first, second in vocabulary.merges if isinstance(first, str)}
    reachable = merged | single
    missing = [token for token in vocabulary.ids if token not in reachable and not token.startswith("<")]
    unknown = sorted(merged - vocabulary.ids.keys())
    if missing or unknown:
        what = f"merges of {plural(len(missing), 'token')}" if missing else f"tokens of {plural(len(unknown), 'merge')}"
        raise UserError(
            f"{folder} lacks the {what}, e.g. {(missing or unknown)[0]!r}: a file of it is cut short or damaged",
            code="clip-merges-incomplete",
            fix=DOWNLOAD_AGAIN,
        )


def _format_merges(merges: Sequence[Pair]) -> str:
    return "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""])


def _parse_pair(merge: str) -> Pair:
    first, separator, second = merge.partition(" ")
    if not (first and separator and second) or " " in second:
        raise UserError(f"not a line of a CLIP tokenizer's merges: {merge!r}", code="clip-merges-line")
    return first, second


def _make_ids(merges: Sequence[Pair]) -> dict[str, int]:
    """Token -> id in CLIP's order: 256 bytes, 256 bytes at a word's end, one token per merge, begin and end of text."""
    letters = _list_byte_letters()
    tokens = [*letters, *(letter + WORD_END for letter in letters), *map("".join, merges), CLIP_BEGIN, CLIP_END]
    return {token: i for i, token in enumerate(tokens)}


def _list_byte_letters() -> list[str]:
    """A visible letter for each byte, in the order of CLIP's ids: first the printable bytes as they are."""
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
