"""Gemma's tokenizer from a tokenizer.json, a sentencepiece model or a file of weights with one, and a toy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from sfumato.common.files import read_file, write_bytes, write_text
from sfumato.errors import UserError
from sfumato.families._tokenizers import apply_merges, catch_tokenizer_faults, find_in_hub_cache
from sfumato.families.source import read_json
from sfumato.formats.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

GEMMA_ON_HUB = (
    ("Alpha-VLLM/Lumina-Image-2.0", "tokenizer/tokenizer.json"),
    ("google/gemma-2-2b", "tokenizer.json"),
    ("google/gemma-2-2b-it", "tokenizer.json"),
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_PAD, _END, _BEGIN, _UNKNOWN, _MASK = "<pad>", "<eos>", "<bos>", "<unk>", "<mask>"
_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

GemmaTokens = Sequence[tuple[int, int]]  # id, index in the text where the token ends


@dataclass(frozen=True, kw_only=True)
class GemmaTokenizer:
    """Text -> ids."""

    tokenize: Callable[[str], GemmaTokens]  # without begin and end token
    size: int
    begin_id: int
    pad_id: int
    save_pretrained: Callable[[Path], None]  # writes a folder that `load_gemma_tokenizer` reads; transformers' name

    def encode(self, text: str, length: int) -> list[int]:
        """Ids of the begin token and the text's tokens, `length` at most."""
        return [self.begin_id, *(token for token, _ in self.tokenize(text)[: length - 1])]

    def find_ends(self, text: str, length: int) -> list[int]:
        """Where in the text each token of `encode` ends, except the begin token."""
        return [end for _, end in self.tokenize(text)[: length - 1]]

    def with_letters(self, letters: str) -> GemmaTokenizer:
        """A copy in which each of these letters, with the space before it, is a token after the vocabulary."""

        def tokenize(text: str) -> GemmaTokens:
            tokens: list[tuple[int, int]] = []
            start = 0
            for match in re.finditer(f" ?([{letters}])", text):
                tokens += ((token, start + end) for token, end in self.tokenize(text[start : match.start()]))
                tokens.append((self.size + letters.index(match[1]), match.end()))
                start = match.end()
            return [*tokens, *((token, start + end) for token, end in self.tokenize(text[start:]))]

        return replace(self, tokenize=tokenize, size=self.size + len(letters))


def load_gemma_tokenizer(folder: Path) -> GemmaTokenizer:
    """Raises UserError where the folder holds no Gemma tokenizer."""
    for name, read in zip(TOKENIZER_FILES, (_load_json, _load_model), strict=True):
        if (folder / name).is_file():
            return read(folder / name)
    raise UserError(
        f"{folder} holds neither {' nor '.join(TOKENIZER_FILES)}",
        code="gemma-tokenizer-missing",
        fix="give a folder with either file of google/gemma-2-2b",
    )


def find_gemma_tokenizer(folders: Iterable[Path], file: Checkpoint, keys: Iterable[str]) -> GemmaTokenizer:
    """From the first folder with one, else from the file of weights under one of `keys`, else from the hub's cache.

    Raises UserError where there is none.
    """
    for folder in folders:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return load_gemma_tokenizer(folder)
    for key in keys:
        if key in file.header.tensors:
            return parse_sentencepiece(file.read(key), str(file.header.path))
    cached = find_in_hub_cache(GEMMA_ON_HUB)
    if cached is None:
        raise UserError(
            "no Gemma tokenizer was found",
            code="gemma-tokenizer-not-found",
            fix="put tokenizer.json or tokenizer.model of google/gemma-2-2b into a folder and give it with --tokenizer",
        )
    return load_gemma_tokenizer(cached)


def parse_sentencepiece(model: Tensor, where: str) -> GemmaTokenizer:
    """From the sentencepiece model in some files of weights, a tensor of its bytes. where: the file's name."""
    return _load_sentencepiece(bytes(model.numpy().tobytes()), where)


def _load_json(path: Path) -> GemmaTokenizer:
    from tokenizers import Tokenizer

    content = read_json(path)
    model = content.get("model", {})
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise UserError(f"{path} is no Gemma tokenizer", code="gemma-tokenizer-kind")
    with catch_tokenizer_faults(path):
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode("a", add_special_tokens=False)  # some faults show only here

    def tokenize(text: str) -> GemmaTokens:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return list(zip(encoding.ids, (end for _, end in encoding.offsets), strict=True))

    def save(folder: Path) -> None:
        write_text(folder / TOKENIZER_FILES[0], json.dumps(content))

    return _make_tokenizer(str(path), tokenize, tokenizer.get_vocab_size(), tokenizer.token_to_id, save)


def _load_model(path: Path) -> GemmaTokenizer:
    return _load_sentencepiece(read_file(path), str(path))


def _load_sentencepiece(model: bytes, where: str) -> GemmaTokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        processor: Any = SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(
            f"the tokenizer in {where} is no sentencepiece model", code="gemma-sentencepiece-invalid"
        ) from error

    def tokenize(text: str) -> GemmaTokens:
        ids = processor.encode(text)
        return list(zip(ids, find_ends([processor.id_to_piece(id_) for id_ in ids]), strict=True))

    def find_id(token: str) -> int | None:
        id_ = processor.piece_to_id(token)
        return None if id_ == processor.unk_id() else id_

    def save(folder: Path) -> None:
        write_bytes(folder / TOKENIZER_FILES[1], model)

    return _make_tokenizer(where, tokenize, processor.get_piece_size(), find_id, save)


def find_ends(pieces: Iterable[str]) -> Iterator[int]:
    """Where in the text each piece ends; letters outside the vocabulary are bytes of UTF-8, e.g. <0xC3>."""
    end = 0
    for piece in pieces:
        byte = _BYTE.fullmatch(piece)
        if byte is None:
            end += len(piece)
        elif int(byte[1], 16) & 0xC0 != 0x80:  # no continuation of an earlier byte's letter
            end += 1
        yield end


def _make_tokenizer(
    where: str,
    tokenize: Callable[[str], GemmaTokens],
    size: int,
    find_id: Callable[[str], int | None],
    save: Callable[[Path], None],
) -> GemmaTokenizer:
    begin, pad = find_id(_BEGIN), find_id(_PAD)
    if begin is None or pad is None:
        raise UserError(
            f"{where} is no Gemma tokenizer: its vocabulary lacks {_BEGIN} or {_PAD}",
            code="gemma-vocabulary-incomplete",
        )
    return GemmaTokenizer(tokenize=tokenize, size=size, begin_id=begin, pad_id=pad, save_pretrained=save)


def write_toy_gemma_tokenizer(folder: Path, words: Iterable[str], *, size: int = 0) -> int:
    """Write a small Gemma tokenizer in which each of `words`, with a space before it or not, is one token.

    Everything else is encoded by letters and bytes. size: of the vocabulary, where that should be larger than the words
    need; unused tokens fill it. Returns the vocabulary's size.
    """
    from transformers import GemmaTokenizer as Library

    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(words):
        assert set(word) <= set(ascii_lowercase), f"{word!r} is not a lower case word"
        for letters in (tuple(word), (_SPACE, *word)):
            while len(pieces := apply_merges(letters, merges)) > 1:
                merges.append((pieces[0], pieces[1]))
    specials = (_PAD, _END, _BEGIN, _UNKNOWN, _MASK)
    letters = (_SPACE, *(chr(code) for code in range(ord("!"), ord("~") + 1)))
    pieces = (*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *map("".join, merges))
    ids = {token: i for i, token in enumerate((*pieces, *(f"<unused{i}>" for i in range(size - len(pieces)))))}
    folder.mkdir(parents=True, exist_ok=True)
    Library(vocab=ids, merges=merges, add_bos_token=True).save_pretrained(folder)  # type: ignore[arg-type]
    return len(ids)
