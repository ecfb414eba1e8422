"""The files of tokenizer folders. A folder that is accepted must tokenize, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fuzz.target import Setup, target
from sfumato.families._gemma2_tokenizer import load_gemma_tokenizer, write_toy_gemma_tokenizer
from sfumato.families._tokenizers import (
    load_clip_tokenizer,
    load_t5_tokenizer,
    write_toy_clip_tokenizer,
    write_toy_t5_tokenizer,
)

WORDS = ["cat", "dog", "photo"]
TEXT = "a photo of a cat, the dog é 猫!"
JSON_TOKENS = (
    b"null",
    b"[]",
    b"{}",
    b"-1",
    b"1e999",
    b'"\\ud800"',
    b'": 0, "',
    b'"type": "BPE"',
    b'["a", "b"]',
    b'"a b"',
)


def clip_folder(folder: Path, file: str) -> Setup:
    write_toy_clip_tokenizer(folder, WORDS)
    (folder / "added_tokens.json").write_text("{}", encoding="utf-8")
    return replace_file(folder / file, lambda: load_clip_tokenizer(folder)(TEXT))


def replace_file(path: Path, read: Callable[[], object]) -> Setup:
    """The folder with one of its files damaged."""

    def write_and_read(data: bytes) -> object:
        path.write_bytes(data)
        return read()

    return Setup(seeds=[path.read_bytes()], read=write_and_read)


@target(*JSON_TOKENS, share=0.4)
def clip_vocab(folder: Path) -> Setup:
    return clip_folder(folder, "vocab.json")


@target(b"\n", b" ", b"#version: 0.2\n", b"c at</w>", b"</w>", share=0.4)
def clip_merges(folder: Path) -> Setup:
    return clip_folder(folder, "merges.txt")


@target(*JSON_TOKENS, b'{"<new>": 517}', share=0.3)
def clip_added_tokens(folder: Path) -> Setup:
    return clip_folder(folder, "added_tokens.json")


@target(*JSON_TOKENS, share=0.3)
def clip_tokenizer_json(folder: Path) -> Setup:
    write_toy_clip_tokenizer(folder / "parts", WORDS)
    content = json.loads(load_clip_tokenizer(folder / "parts").backend_tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return replace_file(folder / "tokenizer.json", lambda: load_clip_tokenizer(folder)(TEXT))


@target(*JSON_TOKENS, share=0.2)
def t5_tokenizer_json(folder: Path) -> Setup:
    write_toy_t5_tokenizer(folder, WORDS)
    return replace_file(folder / "tokenizer.json", lambda: load_t5_tokenizer(folder)(TEXT))


@target(*JSON_TOKENS, share=0.1)
def t5_tokenizer_config(folder: Path) -> Setup:
    write_toy_t5_tokenizer(folder, WORDS)
    return replace_file(folder / "tokenizer_config.json", lambda: load_t5_tokenizer(folder)(TEXT))


@target(*JSON_TOKENS, share=0.2)
def gemma_tokenizer_json(folder: Path) -> Setup:
    write_toy_gemma_tokenizer(folder, WORDS)
    return replace_file(folder / "tokenizer.json", lambda: load_gemma_tokenizer(folder).encode(TEXT, 20))
