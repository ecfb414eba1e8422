"""Gemma 2 as a text encoder: its tokenizers against transformers' and sentencepiece's, and what is read off it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from families.toys import ToyShelf
from sfumato.errors import UserError
from sfumato.families import _gemma2
from sfumato.families._gemma2_tokenizer import (
    GEMMA_ON_HUB,
    load_gemma_tokenizer,
    parse_sentencepiece,
    write_toy_gemma_tokenizer,
)
from sfumato.families._tokenizers import find_in_hub_cache
from sfumato.families.source import select_fields

TEXTS = ["the Licensor grants You", "A cat, two  cats!", "ünïcode ﬁne ½ 日本", "", " lead", "a\nb\tc <eos> d"]


def test_a_sentencepiece_model_is_read_as_by_its_own_library(pieces: Path) -> None:
    import sentencepiece

    reference: Any = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    tokenizer = load_gemma_tokenizer(pieces)
    assert (tokenizer.size, tokenizer.pad_id, tokenizer.begin_id) == (600, 0, 2)
    for text in TEXTS:
        assert tokenizer.encode(text, 512) == [2, *reference.encode(text)]


def test_the_same_from_the_bytes_in_a_file_of_weights(pieces: Path) -> None:
    model = torch.frombuffer(bytearray((pieces / "tokenizer.model").read_bytes()), dtype=torch.uint8)
    ours, theirs = parse_sentencepiece(model, "here"), load_gemma_tokenizer(pieces)
    assert all(ours.encode(text, 512) == theirs.encode(text, 512) for text in TEXTS)
    with pytest.raises(UserError, match="here"):
        parse_sentencepiece(model[:100], "here")


def test_both_kinds_of_files_agree(pieces: Path, tmp_path: Path) -> None:
    """transformers makes a tokenizer.json of the model; ids and places in the text are equal."""
    from transformers import GemmaTokenizer

    library: Any = GemmaTokenizer.from_pretrained(pieces)
    library.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    first, second = load_gemma_tokenizer(pieces), load_gemma_tokenizer(tmp_path)
    for text in TEXTS[:-1]:  # marks of special tokens are words for the one, tokens for the other
        found = library(text, return_offsets_mapping=True, add_special_tokens=False)
        assert list(first.tokenize(text)) == list(second.tokenize(text))
        ends = [end for _, end in found.offset_mapping]
        assert list(second.tokenize(text)) == list(zip(found.input_ids, ends, strict=True))


def test_a_toy_is_read_as_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    words = ["a", "cat", "cats", "scatter", "at", "photo", "and", "an"]
    size = write_toy_gemma_tokenizer(tmp_path, words)
    ours, library = load_gemma_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.size == size == len(library)
    for text in [*TEXTS[:-1], "a photo and a cat", "scatter cats at an cat"]:
        assert ours.encode(text, 512) == library(text).input_ids
    for word in words:
        assert len(ours.encode(word, 512)) == len(ours.encode(f"cat {word}", 512)) - 1 == 2


def test_long_captions_are_cut(tmp_path: Path) -> None:
    """The begin token counts, as in transformers."""
    from transformers import AutoTokenizer

    write_toy_gemma_tokenizer(tmp_path, ["cat"])
    tokenizer, library = load_gemma_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "cat " * 30
    assert tokenizer.encode(text, 8) == library(text, truncation=True, max_length=8).input_ids
    assert len(tokenizer.encode(text, 8)) == 8
    ids, mask = _gemma2.tokenize(tokenizer, [text, "cat", ""], 8)
    assert ids.shape == mask.shape == (3, 8)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [8, 2, 1]
    assert ids[2].tolist() == [2, *[0] * 7]


@pytest.mark.parametrize("breakage", ["empty", "json", "other", "vocabulary"])
def test_a_folder_that_is_no_tokenizer_is_the_users_mistake(tmp_path: Path, breakage: str) -> None:
    if breakage != "empty":
        write_toy_gemma_tokenizer(tmp_path, ["cat"])
    path = tmp_path / "tokenizer.json"
    if breakage == "json":
        path.write_text("{")
    if breakage == "other":
        path.write_text('{"model": {"type": "WordPiece", "vocab": {}}}')
    if breakage == "vocabulary":
        path.write_text(path.read_text().replace("<bos>", "<begin>"))
    with pytest.raises(UserError):
        load_gemma_tokenizer(tmp_path)


def test_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub lays it out: snapshots of a commit that a reference names."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_in_hub_cache(GEMMA_ON_HUB) is None
    repository = tmp_path / "models--google--gemma-2-2b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    write_toy_gemma_tokenizer(repository / "snapshots" / "abc", ["cat"])
    assert find_in_hub_cache(GEMMA_ON_HUB) == repository / "snapshots" / "abc"


@torch.no_grad()
def test_the_last_but_one_state_is_read(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """What transformers' own model, loaded by itself, gives after all layers but the last, without the last norm."""
    from transformers import Gemma2Model

    folder = toy_shelf.paths("lumina", "diffusers")["pretrained_model_name_or_path"] / "text_encoder"
    shutil.copytree(folder, tmp_path / "gemma")
    library: Any = Gemma2Model.from_pretrained(tmp_path / "gemma")
    config = select_fields(library.config.to_dict(), _gemma2.GEMMA2_FIELDS)
    ours: Any = _gemma2.build(config).eval()
    ours.load_state_dict(library.state_dict())
    assert ours.config._attn_implementation == "eager"  # the only one that bounds the scores as in training
    assert ours.config.attn_logit_softcapping == 50.0
    ids, mask = torch.tensor([[2, 7, 8, 9], [2, 7, 0, 0]]), torch.tensor([[True] * 4, [True, True, False, False]])
    seen: list[torch.Tensor] = []
    library.layers[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    library(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(_gemma2.encode_tokens(ours, ids, mask), seen[0], rtol=0, atol=1e-6)
