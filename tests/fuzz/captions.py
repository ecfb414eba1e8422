"""Captions and prompts: from the bytes of their files to the ids and weights of their tokens."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz.subset import make_subset
from fuzz.target import Setup, target, through_file
from sfumato.common.text_files import decode_text, read_text_file
from sfumato.config.prompts import parse_line, read_prompts
from sfumato.data.captions import process_caption
from sfumato.data.find.caption_files import parse_captions
from sfumato.data.find.findings import Findings
from sfumato.data.find.metadata_source import NamedImages, read_entries
from sfumato.data.prompt_weighting import compute_token_weights, parse_weights, strip_weights
from sfumato.errors import Problems
from sfumato.families import _clip, _gemma2, _t5
from sfumato.families._gemma2_tokenizer import load_gemma_tokenizer, write_toy_gemma_tokenizer
from sfumato.families._tokenizers import load_clip_tokenizer, load_t5_tokenizer, write_toy_t5_tokenizer

CAPTION = "a photo of a (cat:1.3), [dog], {red|blue|green} ||| masterpiece, \\(text\\), ((deep)), <lora:x:1>\n"
CAPTION_SEEDS = (CAPTION.encode(), ("una foto, é, 猫, \U0001f431\n" * 3).encode(), CAPTION.encode("utf-16"))
WEIGHT_TOKENS = (
    b"(",
    b")",
    b"[",
    b"]",
    b":1.5)",
    b":1e300)",
    b":" + b"9" * 400 + b")",
    b"\\(",
    b"((((",
    b"))))",
    b"AND",
    b"BREAK",
)
CAPTION_TOKENS = (
    *WEIGHT_TOKENS,
    b"{a|b}",
    b"{{",
    b"}}",
    b"|||",
    b"{" * 50,
    b"<|endoftext|>",
    b"</s>",
    b"<bos>",
    b"a" * 5000,
)
PROMPTS = "a cat --n bad --w 512 --h 768 --d 1 --s 20 --l 7.5 --g 3 --ss euler --fs 3.0 --ctr 0.5\n# comment\na dog\n"
JSON_TOKENS = (b'"caption": ', b'"tags": [', b"null", b"[]", b"{}", b'"\\ud83d"', b'"\\ud83d\\ude00"', b"1e999", b"NaN")


def decode_argument(data: bytes) -> str:
    """As the words of a command line are decoded: foreign bytes become lone surrogates."""
    return data.decode("utf-8", "surrogateescape")


@target(*CAPTION_TOKENS)
def caption_text(_folder: Path) -> Setup:
    """A caption file, through all caption rules."""
    rules = make_subset(Path("a")).rules

    def read(data: bytes) -> object:
        text = decode_text(data, "a.txt")
        captions = list(parse_captions([text], [".txt"], str, make_subset(Path("a")), {}, []))
        return process_caption(captions[0], rules, Random(0), epoch=1, step=0, max_train_steps=10)

    return Setup(seeds=CAPTION_SEEDS, read=read)


@target(*JSON_TOKENS, *CAPTION_TOKENS)
def caption_json(_folder: Path) -> Setup:
    seeds = [json.dumps({"caption": CAPTION, "tags": ["a", "b"]}).encode(), json.dumps({"tags": "a, b"}).encode()]

    def read(data: bytes) -> object:
        """A fault of one file is stored by row: it is not raised."""
        text = decode_text(data, "a.json")
        caption = next(parse_captions([text], [".json"], lambda row: "a.json", make_subset(Path("a")), {}, []))
        return caption.encode("utf-8")

    return Setup(seeds=[*seeds, b'"a cat"'], read=read)


def collect_entries(path: Path) -> object:
    images = NamedImages(str(path), make_subset(path.parent))
    findings = Findings(Problems(), strict=False, notes=[])
    for where, key, fields in read_entries(path):
        images.add(where, key, fields)
    return [caption.encode("utf-8") for caption in images.captions], findings


@target(*JSON_TOKENS, b'{"a.png": {"caption": ')
def metadata_json(folder: Path) -> Setup:
    content = {"a.png": {"caption": CAPTION, "tags": "x, y"}, "b": {"tags": ["a"], "train_resolution": [512, 768]}}
    return Setup(seeds=[json.dumps(content).encode()], read=through_file(folder / "m.json", collect_entries))


@target(*JSON_TOKENS, b'{"image_path": "', b"\n{")
def metadata_lines(folder: Path) -> Setup:
    rows = [{"image_path": "a.png", "caption": CAPTION}, {"image_path": "b/c.png", "tags": ["a"]}]
    seed = "\n".join(map(json.dumps, rows)).encode()
    return Setup(seeds=[seed], read=through_file(folder / "m.jsonl", collect_entries))


@target(*WEIGHT_TOKENS)
def prompt_weights(_folder: Path) -> Setup:
    def read(data: bytes) -> object:
        pieces = parse_weights(decode_argument(data))
        plain = strip_weights(pieces)
        weights = compute_token_weights(pieces, range(len(plain) + 1))
        assert all(abs(weight) < 1e6 for weight in weights), "weights that a float32 can hold"
        return weights

    return Setup(seeds=CAPTION_SEEDS[:2], read=read)


@target(*CAPTION_TOKENS, b" --w 99999", b" --l .", b" --d ", b" --s -1", b" --n", b"\n--w 5", b" --g " + b"9" * 400)
def prompt_file_text(folder: Path) -> Setup:
    return Setup(seeds=[PROMPTS.encode()], read=through_file(folder / "p.txt", read_prompts))


@target(*JSON_TOKENS, b'"width": 1e30', b'"seed": ', b'"scale": NaN')
def prompt_file_json(folder: Path) -> Setup:
    content = [{"prompt": "a cat", "width": 512, "scale": 7.5, "seed": 3, "sample_sampler": "euler"}, "a dog --w 64"]
    return Setup(seeds=[json.dumps(content).encode()], read=through_file(folder / "p.json", read_prompts))


@target(b"[[prompt.subset]]", b"[prompt]", b"width = ", b"nan", b"-inf", b"1979-05-27T07:32:00Z", b"'''")
def prompt_file_toml(folder: Path) -> Setup:
    seed = b'[prompt]\nwidth = 512\nscale = 7.5\n[[prompt.subset]]\nprompt = "a cat"\n[[prompt.subset]]\nprompt = "b"\n'
    return Setup(seeds=[seed], read=through_file(folder / "p.toml", read_prompts))


@target(*WEIGHT_TOKENS, b" --w ")
def prompt_argument(_folder: Path) -> Setup:
    """--prompt of a command line."""
    seeds = PROMPTS.encode().splitlines()
    return Setup(seeds=seeds, read=lambda data: parse_line(decode_argument(data), where="--prompt"))


@target(share=0.3)
def text_file(folder: Path) -> Setup:
    return Setup(seeds=CAPTION_SEEDS, read=through_file(folder / "a.txt", read_text_file))


def tokenize_everywhere(tokenizers: tuple[Any, Any, Any], text: str) -> None:
    """A prompt as all families read it, with and without its weights."""
    clip, t5, gemma = tokenizers
    cpu = torch.device("cpu")
    for caption in (text, strip_weights(parse_weights(text))):
        _clip.tokenize(clip, [caption], cpu, chunks=3)
        _t5.tokenize(t5, [caption], 64)
        _gemma2.tokenize(gemma, [caption], 64)
    pieces = parse_weights(text)
    for weights in (_clip.make_clip_weights(clip, pieces, chunks=3), _t5.make_t5_weights(t5, pieces, 64)):
        assert bool(torch.isfinite(weights).all())


@target(*CAPTION_TOKENS, share=0.5)
def caption_tokens(folder: Path) -> Setup:
    """A caption file through the tokenizers of all families."""
    write_toy_t5_tokenizer(folder / "t5", ["cat", "dog"])
    write_toy_gemma_tokenizer(folder / "gemma", ["cat", "dog"])
    tokenizers = (load_clip_tokenizer(), load_t5_tokenizer(folder / "t5"), load_gemma_tokenizer(folder / "gemma"))
    return Setup(seeds=CAPTION_SEEDS, read=lambda data: tokenize_everywhere(tokenizers, decode_text(data, "a.txt")))


@target(*WEIGHT_TOKENS, share=0.5)
def prompt_tokens(folder: Path) -> Setup:
    """A prompt of the command line through the tokenizers of all families."""
    write_toy_t5_tokenizer(folder / "t5", ["cat", "dog"])
    write_toy_gemma_tokenizer(folder / "gemma", ["cat", "dog"])
    tokenizers = (load_clip_tokenizer(), load_t5_tokenizer(folder / "t5"), load_gemma_tokenizer(folder / "gemma"))

    def read(data: bytes) -> object:
        return tokenize_everywhere(tokenizers, parse_line(decode_argument(data), where="--prompt").prompt)

    return Setup(seeds=CAPTION_SEEDS[:2], read=read)
