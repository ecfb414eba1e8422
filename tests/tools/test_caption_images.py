"""Captions by random models of three kinds: BLIP, GIT, and one with a conversation; against transformers' own calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from sfumato.cli.main import main
from sfumato.compat.launch import main as launch
from sfumato.tools.caption_images import remove_read_words

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["a", "picture", "of", "the", "cat", "dog", "red", "blue", "word", "sign", "with", "on", "it"],
]
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} BOT:"
)


def make_bert_tokenizer(folder: Path) -> BertTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer(str(folder / "vocab.txt"))


def save_blip(folder: Path) -> None:
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**SIZES, "vocab_size": len(WORDS), "encoder_hidden_size": 16, **tokens}
    config = BlipConfig(text_config=text, vision_config={**SIZES, "image_size": 16, "patch_size": 8}, projection_dim=8)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    BlipProcessor(images, make_bert_tokenizer(folder)).save_pretrained(folder)


def save_git(folder: Path) -> None:
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    vision = {**SIZES, "image_size": 16, "patch_size": 8}
    config = GitConfig(vision_config=vision, vocab_size=len(WORDS), **SIZES, **tokens)
    GitForCausalLM(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    GitProcessor(images, make_bert_tokenizer(folder)).save_pretrained(folder)


def save_llava(folder: Path) -> None:
    words = {word: i for i, word in enumerate([*WORDS, "<image>", "USER:", "BOT:"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images, fast, patch_size=8, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
    text = LlamaConfig(**SIZES, vocab_size=len(words), eos_token_id=3, pad_token_id=0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=words["<image>"], vision_feature_layer=-1
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("captioners")
    for name, save in {"blip": save_blip, "git": save_git, "llava": save_llava}.items():
        torch.manual_seed(0)
        save(folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, color in enumerate(("red", "green", "blue")):
        Image.linear_gradient("L").resize((20 + i, 20)).convert("RGB").save(folder / f"{color}.png")
    return folder


def read_captions(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text().strip() for path in folder.glob("*.txt")}


def call_transformers(folder: Path, path: Path, text: str | None, **arguments: Any) -> str:
    processor: Any = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    given = {"text": text} if text else {}
    inputs = processor(images=Image.open(path).convert("RGB"), **given, return_tensors="pt")
    torch.manual_seed(7)
    tokens = model.generate(**inputs, **arguments)
    start = inputs["input_ids"].shape[1] if text and "USER:" in text else 0
    return " ".join(processor.batch_decode(tokens[:, start:], skip_special_tokens=True)[0].split())


CHANCE = {"do_sample": True, "top_p": 0.9, "top_k": 0}
PLAIN = {"do_sample": False}


@pytest.mark.parametrize(
    ("kind", "prompt", "text", "words", "arguments"),
    [
        ("blip", "", None, ["--num_beams", "3"], {**PLAIN, "num_beams": 3}),
        ("blip", "", None, ["--top_p", "0.9", "--seed", "7"], CHANCE),
        ("blip", "a picture of", "a picture of", [], PLAIN),
        ("git", "", None, [], PLAIN),
        ("git", "", None, ["--num_beams", "2"], {**PLAIN, "num_beams": 2}),
        ("llava", "the word of {name}", "USER: <image> the word of red BOT:", [], PLAIN),
    ],
)
def test_captions_are_those_of_transformers(
    shelf: dict[str, Path], images: Path, kind: str, prompt: str, text: str | None, words: list[str],
    arguments: dict[str, Any],
) -> None:  # fmt: skip
    command = ["dataset", "caption", str(images), "--model", str(shelf[kind]), "--max_length", "6", "--prompt", prompt]
    assert main([*command, "--min_length", "3", *words]) == 0
    theirs = call_transformers(shelf[kind], images / "red.png", text, max_new_tokens=6, min_new_tokens=3, **arguments)
    captions = read_captions(images)
    assert len(captions) == 3
    assert captions["red"] == (theirs.removeprefix("a picture of ") if prompt == "a picture of" else theirs)
    assert captions["red"]


def test_a_batch_has_the_captions_of_its_images_alone(shelf: dict[str, Path], images: Path) -> None:
    command = ["dataset", "caption", str(images), "--model", str(shelf["llava"]), "--max_length", "4"]
    assert main([*command, "--prompt", "the {name} cat {caption}"]) == 0
    alone = read_captions(images)
    for path in images.glob("*.txt"):
        path.unlink()
    assert main([*command, "--prompt", "the {name} cat {caption}", "--batch_size", "3"]) == 0
    assert read_captions(images) == alone


def test_what_is_there_is_used_and_may_stay(shelf: dict[str, Path], images: Path, tmp_path: Path) -> None:
    (images / "red.txt").write_text("mine")
    command = ["dataset", "caption", str(images), "--model", str(shelf["git"]), "--max_length", "4"]
    assert main([*command, "--skip_existing"]) == 0
    captions = read_captions(images)
    assert captions.pop("red") == "mine"
    assert len(captions) == 2
    output = tmp_path / "captions.jsonl"
    assert main([*command, "--output_path", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Path(row["image_path"]).stem for row in rows] == ["blue", "green", "red"]
    assert rows[0]["caption"] == captions["blue"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ('a cat with the word "summer" on it', "a cat"),
        ("a sign that says 'stop here', at night", "a sign, at night"),
        ("a girl with the letters abc on her shirt and a hat", "a girl and a hat"),
        ("a man with a sign that reads hello on it", "a man"),
        ("a book and the name smith in the corner", "a book"),
        ("a cat on the table", "a cat on the table"),
        ("words are the theme", "words are the theme"),
    ],
)
def test_words_that_were_read(caption: str, expected: str) -> None:
    assert remove_read_words(caption) == expected


def test_a_model_that_describes_no_images(images: Path, tmp_path: Path, codes: list[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert main(["dataset", "caption", str(images), "--model", str(tmp_path)]) == 2
    assert codes == ["image-model-unavailable"]
    assert not read_captions(images)


@pytest.mark.parametrize(
    ("script", "kind", "option", "words"),
    [
        ("finetune/make_captions", "blip", "--caption_weights", ["--beam_search", "--num_beams", "2"]),
        (
            "finetune/make_captions.py",
            "blip",
            "--caption_weights",
            ["--top_p", "0.8", "--caption_extention", ".caption"],
        ),
        ("finetune/make_captions_by_git", "git", "--model_id", ["--remove_words", "--batch_size", "2"]),
    ],
)
def test_scripts(shelf: dict[str, Path], images: Path, script: str, kind: str, option: str, words: list[str]) -> None:
    assert launch([script, option, str(shelf[kind]), "--max_length", "7", *words, str(images)]) == 0
    captions = [path.read_text().strip() for path in images.glob("*.caption")]
    assert len(captions) == 3
    assert all(captions)
