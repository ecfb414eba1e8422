"""CLIP's ids against those recorded from OpenAI's own tokenizer; T5's against sentencepiece; toy tokenizers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sfumato.errors import UserError
from sfumato.families import _tokenizers
from sfumato.families._tokenizers import (
    load_clip_tokenizer,
    load_t5_tokenizer,
    write_toy_clip_tokenizer,
    write_toy_t5_tokenizer,
)

# Made with open_clip 3.3's SimpleTokenizer, which is OpenAI's; texts that its ftfy step leaves alone.
RECORDED = json.loads((Path(__file__).parents[1] / "goldens" / "clip_tokens.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shipped():
    return load_clip_tokenizer()


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["text"][:12])
def test_the_shipped_vocabulary_gives_openai_ids(shipped, case):
    assert shipped(case["text"]).input_ids == case["ids"]


def test_well_known_ids(shipped):
    assert shipped("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert shipped("hello world").input_ids == [49406, 3306, 1002, 49407]
    assert len(shipped) == 49408


def test_long_captions_are_cut_at_77_and_short_ones_end_in_the_end_token(shipped):
    long = shipped("cat " * 200, truncation=True).input_ids
    assert len(long) == 77
    assert long[-1] == 49407
    assert shipped("cat", padding="max_length").input_ids == [49406, 2368] + [49407] * 75


def test_padding_with_zero_leaves_exclamation_marks_alone():
    tokenizer = load_clip_tokenizer(pad_with_zero=True)
    assert tokenizer("hello! wow!!!", padding="max_length").input_ids[:8] == [49406, 3306, 256, 2781, 995, 49407, 0, 0]
    assert tokenizer.pad_token_id == 0


@pytest.mark.parametrize("from_folder", [False, True])
def test_a_tokenizer_is_built_quickly(tmp_path, shipped, from_folder):
    """Work that grows with the square of the vocabulary takes a minute."""
    shipped.save_pretrained(tmp_path)  # the import of transformers is not what is measured
    _tokenizers._load_shipped_vocabulary.cache_clear()
    start = time.process_time()
    load_clip_tokenizer(tmp_path if from_folder else None)
    assert time.process_time() - start < 5.0  # about 0.06 s and 0.4 s


def test_each_tokenizer_is_its_own(shipped):
    """Textual inversion adds tokens; the next run in the process must not see them."""
    other = load_clip_tokenizer()
    other.add_tokens("newword")
    assert len(other) == len(load_clip_tokenizer()) + 1
    assert shipped("newword").input_ids != other("newword").input_ids


@pytest.mark.parametrize("legacy", [False, True], ids=["pairs", "strings"])
def test_a_saved_tokenizer_json_is_read_back(tmp_path, shipped, legacy):
    shipped.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    if legacy:
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    again = load_clip_tokenizer(tmp_path)
    for case in RECORDED:
        assert again(case["text"]).input_ids == case["ids"]


def test_added_tokens_keep_their_ids(tmp_path):
    tokenizer = load_clip_tokenizer()
    tokenizer.add_tokens(["skstoken", "skstoken1"])
    tokenizer.save_pretrained(tmp_path)
    assert load_clip_tokenizer(tmp_path)("a skstoken1").input_ids == [49406, 320, 49409, 49407]


def test_toy_words_are_one_token_each_and_end_is_the_highest_id(tmp_path):
    words = ["cat", "cats", "scatter", "at", "banana", "nana", "a", "cat"]
    size = write_toy_clip_tokenizer(tmp_path, words)
    toy = load_clip_tokenizer(tmp_path)
    assert len(toy) == size
    ids = [toy(word).input_ids for word in words]
    assert all(len(each) == 3 for each in ids)
    assert ids[0][0] == size - 2
    assert ids[0][2] == size - 1 == toy.eos_token_id
    assert len(set(map(tuple, ids))) == len(set(words))
    assert toy.decode(toy("Cats, über 7!").input_ids, skip_special_tokens=True) == "cats , über 7 !"


def test_transformers_reads_the_toy_folder_the_same_way(tmp_path):
    from transformers import AutoTokenizer

    write_toy_clip_tokenizer(tmp_path, ["red", "square"])
    text = "a red square, squared!"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == load_clip_tokenizer(tmp_path)(text).input_ids


@pytest.mark.parametrize(
    ("breakage", "code"),
    [
        ("empty", "clip-tokenizer-missing"),
        ("json", "model-json-invalid"),
        ("no_end", "clip-vocabulary-incomplete"),
        ("merges", "clip-merges-line"),
    ],
)
def test_a_folder_that_is_no_tokenizer_is_the_users_mistake(tmp_path, breakage, code):
    if breakage != "empty":
        write_toy_clip_tokenizer(tmp_path, ["cat"])
    if breakage == "json":
        (tmp_path / "vocab.json").write_text("{")
    if breakage == "no_end":
        (tmp_path / "vocab.json").write_text('{"a": 0}')
    if breakage == "merges":
        (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(UserError) as error:
        load_clip_tokenizer(tmp_path)
    assert error.value.code == code


def test_t5_from_a_sentencepiece_file_agrees_with_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = Path(__file__).parents[2] / "LICENSE"
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "spiece"), vocab_size=300, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2,
    )  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    tokenizer = load_t5_tokenizer(tmp_path)
    for text in ["the Licensor grants You", "A cat, two  cats!", "ünïcode ﬁne ½ 日本", "", " lead"]:
        assert tokenizer(text).input_ids == [*reference.encode(text), 1]
    assert len(tokenizer("the " * 600, truncation=True).input_ids) == 512


def test_toy_t5(tmp_path):
    size = write_toy_t5_tokenizer(tmp_path, ["a", "cat", "photo", "of"])
    tokenizer = load_t5_tokenizer(tmp_path, max_length=16)
    ids = tokenizer("a photo of cats", padding="max_length").input_ids
    assert tokenizer.convert_ids_to_tokens(ids[:6]) == ["▁a", "▁photo", "▁of", "▁cat", "s", "</s>"]
    assert ids[6:] == [0] * 10
    assert len(tokenizer) == size


def test_a_missing_t5_tokenizer_names_the_files(tmp_path):
    with pytest.raises(UserError, match=r"spiece\.model.*--tokenizer") as error:
        load_t5_tokenizer(tmp_path)
    assert error.value.code == "t5-tokenizer-missing"
    with pytest.raises(UserError) as error:
        load_t5_tokenizer(None)
    assert error.value.code == "t5-tokenizer-missing"


def test_merges_alone_make_the_same_tokenizer_as_the_folder(tmp_path: Path) -> None:
    """transformers reads the folder; ours is made of what a checkpoint brings along."""
    from transformers import AutoTokenizer

    write_toy_clip_tokenizer(tmp_path, ["robot", "background", "blue"])
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    text = "a robot on a blue background, unheard-of"
    assert load_clip_tokenizer(merges=merges)(text).input_ids == AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
    assert load_clip_tokenizer(merges=merges)("robot").input_ids != load_clip_tokenizer()("robot").input_ids


def damage(folder: Path, file: str, change: Callable[[str], str]) -> str:
    """The code of the error with one file of a CLIP folder changed."""
    write_toy_clip_tokenizer(folder, ["cat", "dog", "photo"])
    text = (folder / file).read_text(encoding="utf-8")
    (folder / file).write_text(change(text), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_clip_tokenizer(folder)
    assert str(folder) in error.value.what or "merges" in error.value.what
    return error.value.code


@pytest.mark.parametrize("lines", [1, 2, 5])
def test_merges_that_are_cut_short_are_noticed(tmp_path, lines):
    """The tokenizer would be built, and give other ids."""
    cut = lambda text: "\n".join(text.splitlines()[:-lines]) + "\n"  # noqa: E731
    assert damage(tmp_path, "merges.txt", cut) == "clip-merges-incomplete"


def test_merges_of_another_vocabulary_are_noticed(tmp_path):
    assert damage(tmp_path, "merges.txt", lambda text: text + "z z\n") == "clip-merges-incomplete"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("[]", "model-json-no-object"),
        ("{", "model-json-invalid"),
        ("[" * 100_000, "model-json-invalid"),
        ('{"a": 1.5}', "clip-vocabulary-incomplete"),
    ],
)
def test_vocabularies_that_are_none(tmp_path, content, code):
    assert damage(tmp_path, "vocab.json", lambda _: content) == code


def test_two_tokens_with_one_id_are_noticed(tmp_path):
    assert damage(tmp_path, "vocab.json", lambda text: text.replace('"b": 65', '"b": 64')) == "clip-vocabulary-id-twice"


def test_an_id_that_is_no_number_is_noticed(tmp_path):
    assert (
        damage(tmp_path, "vocab.json", lambda text: text.replace('"b": 65', '"b": "65"')) == "clip-vocabulary-damaged"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "Unigram", "vocab": 3}}', "\udcff"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_t5_tokenizer_is_one_line(tmp_path, file, content):
    write_toy_t5_tokenizer(tmp_path, ["cat"])
    (tmp_path / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        load_t5_tokenizer(tmp_path)
    assert error.value.code == "tokenizer-damaged"
    assert str(tmp_path) in error.value.what
    assert "\n" not in error.value.what


@pytest.mark.parametrize("count", [10_001, 10**200, 10**400])
def test_a_t5_tokenizer_with_endless_extra_tokens(tmp_path, count):
    """The library would make a token for each."""
    write_toy_t5_tokenizer(tmp_path, ["cat"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": count}))
    with pytest.raises(UserError, match="extra tokens") as error:
        load_t5_tokenizer(tmp_path)
    assert error.value.code == "tokenizer-damaged"


@pytest.mark.skipif(os.name == "nt", reason="there are no named pipes there")
def test_a_named_pipe_in_a_t5_folder_is_not_waited_for(tmp_path):
    write_toy_t5_tokenizer(tmp_path, ["cat"])
    os.mkfifo(tmp_path / "special_tokens_map.json")
    with pytest.raises(UserError) as error:
        load_t5_tokenizer(tmp_path)
    assert error.value.code == "file-is-special"
