"""Gemma's tokenizer from a tokenizer.json, a sentencepiece model or one inside a weight file, and a toy one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from sfumato.errors import UserError
from sfumato.families._tokenizers import apply_merges
from sfumato.families.source import read_json

if TYPE_CHECKING:
    from torch import Tensor

ON_HUB = (
    ("Alpha-VLLM/Lumina-Image-2.0", "tokenizer/tokenizer.json"),
    ("google/gemma-2-2b", "tokenizer.json"),
    ("google/gemma-2-2b-it", "tokenizer.json"),
)
FILES = ("tokenizer.json", "tokenizer.model")
PAD, END, BEGIN, UNKNOWN, MASK = "<pad>", "<eos>", "<bos>", "<unk>", "<mask>"
SPACE = "▁"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")

Tokens = Sequence[tuple[int, int]]  # id, and where in the text the token ends


@dataclass(frozen=True, kw_only=True)
class GemmaTokenizer:
    """Text -> tokens, without any that only mark something."""

    tokens: Callable[[str], Tokens]
    size: int
    begin: int
    pad: int

    def ids(self, text: str, length: int) -> list[int]:
        """The begin token and the text's, cut to `length` in all."""
        return [self.begin, *(token for token, _ in self.tokens(text)[: length - 1])]

    def ends(self, text: str, length: int) -> list[int]:
        """Where in the text each token of `ids` behind the first ends."""
        return [end for _, end in self.tokens(text)[: length - 1]]


def from_folder(folder: Path) -> GemmaTokenizer:
    """Raises UserError where the folder holds no Gemma tokenizer."""
    for name, read in zip(FILES, (_from_json, _from_model), strict=True):
        if (folder / name).is_file():
            return read(folder / name)
    raise UserError(
        f"{folder} holds neither {' nor '.join(FILES)}", fix="give a folder with either file of google/gemma-2-2b"
    )


def from_bytes(model: Tensor, where: str) -> GemmaTokenizer:
    """The sentencepiece model that some files of weights carry along, a tensor of its bytes."""
    return _from_sentencepiece(bytes(model.numpy().tobytes()), where)


def in_hub_cache() -> Path | None:
    """The folder of a Gemma tokenizer that was downloaded before, by whatever program; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    for repository, file in ON_HUB:
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _from_json(path: Path) -> GemmaTokenizer:
    from tokenizers import Tokenizer

    content = read_json(path)
    if content.get("model", {}).get("type") != "BPE":
        raise UserError(f"{path} is no Gemma tokenizer")
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def tokens(text: str) -> Tokens:
        found = tokenizer.encode(text, add_special_tokens=False)
        return list(zip(found.ids, (end for _, end in found.offsets), strict=True))

    return _checked(str(path), tokens, tokenizer.get_vocab_size(), tokenizer.token_to_id)


def _from_model(path: Path) -> GemmaTokenizer:
    return _from_sentencepiece(path.read_bytes(), str(path))


def _from_sentencepiece(model: bytes, where: str) -> GemmaTokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        processor: Any = SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(f"the tokenizer in {where} is no sentencepiece model") from error

    def tokens(text: str) -> Tokens:
        ids = processor.encode(text)
        return list(zip(ids, ends_of([processor.id_to_piece(each) for each in ids]), strict=True))

    def id_of(token: str) -> int | None:
        found = processor.piece_to_id(token)
        return None if found == processor.unk_id() else found

    return _checked(where, tokens, processor.get_piece_size(), id_of)


def ends_of(pieces: Iterable[str]) -> Iterator[int]:
    """Where in the text each piece ends; letters outside the vocabulary are the bytes of their UTF-8, as <0xC3>."""
    place = 0
    for piece in pieces:
        byte = BYTE.fullmatch(piece)
        if byte is None:
            place += len(piece)
        elif int(byte[1], 16) & 0xC0 != 0x80:  # else it goes on with the letter that an earlier one began
            place += 1
        yield place


def _checked(
    where: str, tokens: Callable[[str], Tokens], size: int, id_of: Callable[[str], int | None]
) -> GemmaTokenizer:
    begin, pad = id_of(BEGIN), id_of(PAD)
    if begin is None or pad is None:
        raise UserError(f"{where} is no Gemma tokenizer: its vocabulary lacks {BEGIN} or {PAD}")
    return GemmaTokenizer(tokens=tokens, size=size, begin=begin, pad=pad)


def toy_gemma_tokenizer(folder: Path, words: Iterable[str]) -> int:
    """Write a small Gemma tokenizer in which each of `words`, with a space before it or not, is one token.

    Everything else falls apart into letters and bytes, so any caption can be encoded. Gives the vocabulary's size.
    """
    from transformers import GemmaTokenizer as Library

    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(words):
        assert set(word) <= set(ascii_lowercase), f"{word!r} is not a lower case word"
        for letters in (tuple(word), (SPACE, *word)):
            while len(pieces := apply_merges(letters, merges)) > 1:
                merges.append((pieces[0], pieces[1]))
    specials = (PAD, END, BEGIN, UNKNOWN, MASK)
    letters = (SPACE, *(chr(code) for code in range(ord("!"), ord("~") + 1)))
    pieces = (*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *map("".join, merges))
    ids = {token: i for i, token in enumerate(pieces)}
    folder.mkdir(parents=True, exist_ok=True)
    Library(vocab=ids, merges=merges, add_bos_token=True).save_pretrained(folder)  # type: ignore[arg-type]
    return len(ids)
