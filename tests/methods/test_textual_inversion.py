"""Textual inversion: new words, whose vectors alone are trained, in every family; its files in other programs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from families.toys import ToyShelf
from rehearsing import needs_rehearsal
from sfumato.cli.main import main
from sfumato.config import load_config
from sfumato.errors import UserError
from sfumato.families.encoding import encode_with_grad
from sfumato.families.new_tokens import NewVectors
from sfumato.plan import make_run_plan
from sfumato.tools.rehearse import rehearse_plan
from sfumato.train import train_step
from toy_runs import build_toy_run, equal_tensors, make_arguments, make_images, read_metrics, train_toy

Toy = Mapping[str, Path]
WORD: dict[str, Any] = {
    "method": "textual_inversion",
    "network_dim": None,
    "token_string": "zwx",
    "num_vectors_per_token": 2,
    "learning_rate": "1e-2",
    "max_train_steps": 2,
}
CAPTION = "a photo of zwx, sitting"
NAMES = {
    "sd": ["emb_params"],
    "sdxl": ["clip_l", "clip_g"],
    "flux": ["clip_l", "t5xxl"],
    "sd3": ["clip_l", "clip_g", "t5xxl"],
    "chroma": ["t5xxl"],
    "lumina": ["gemma2_2b"],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_images(tmp_path_factory.mktemp("images"), 3)
    for path in (folder / "2_cat").glob("*.txt"):
        path.write_text(CAPTION)
    return folder


@pytest.fixture(scope="module")
def trained(toy_shelf: ToyShelf, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of Stable Diffusion 1."""
    output = tmp_path_factory.mktemp("trained")
    return train_toy(toy_shelf.paths("sd"), images, output, **WORD) / "lora.safetensors"


def encode(model: Any, words: Any, text: str) -> dict[str, Tensor]:
    """Text encoder and feature -> what it gives for a text."""
    features: dict[str, Tensor] = {}
    with torch.no_grad():
        for part in model.text_parts:
            found = encode_with_grad(model, part, [words.replace(text)])
            features |= {f"{part}.{name}": tensor for name, tensor in found.items()}
    return features


@pytest.mark.fast_for("[sd]", "lumina")
@pytest.mark.parametrize("family", NAMES)
def test_exactly_the_new_vectors_train(family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """And they start from the initial text, so that the model sees that text before the first step."""
    run = build_toy_run(toy_shelf.paths(family), images, tmp_path, **WORD, init_word="cat dog")
    model, method = run.model, run.method
    words = method.embeddings.words  # type: ignore[attr-defined]
    before, named = (encode(model, words, text) for text in ("a photo of zwx", "a photo of cat dog"))
    assert equal_tensors(before, named)
    modules = {name: part.module for name, part in model.parts.items() if part.is_loaded}
    frozen = {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in modules.items()}
    train_step(run, next(run.loader.steps()))
    for name, module in modules.items():
        assert equal_tensors(frozen[name], module.state_dict())
        assert all(weight.grad is None for weight in module.parameters())
    tables = list(method.modules["embeddings"].children())
    assert len(tables) == len(NAMES[family])
    for table in tables:
        assert isinstance(table, NewVectors)
        assert (table.vectors != table.initial).any(1).all()  # every vector, the first one included
    with method.disabled():
        assert equal_tensors(encode(model, words, "a photo of zwx"), named)
    assert not equal_tensors(encode(model, words, "a photo of zwx"), named)


@pytest.mark.fast_for("sd-")
@pytest.mark.parametrize(("family", "more"), [
    ("sd", {}), ("sdxl", {"full_bf16": True, "mixed_precision": "bf16"}), ("flux", {"ema_decay": 0.9}),
], ids=lambda value: f"{value}-" if isinstance(value, str) else "")  # fmt: skip
def test_resume_is_exact(family: str, more: dict[str, Any], toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    common = {**WORD, "max_train_steps": 3, "save_state": True, **more}
    toy = toy_shelf.paths(family)
    straight = train_toy(toy, images, tmp_path / "straight", **common)
    parts = train_toy(toy, images, tmp_path / "parts", **common, save_every_n_steps=2)
    train_toy(toy, images, parts, **common, resume=parts / "lora-step00000002-state")
    files = [load_file(output / "lora.safetensors") for output in (straight, parts)]
    assert equal_tensors(*files)
    assert list(files[0]) == sorted(NAMES[family])
    assert read_metrics(straight) == read_metrics(parts)
    with pytest.raises(UserError) as error:
        build_toy_run(toy, images, parts, **{**common, "token_string": ["zwx", "yqv"], "num_vectors_per_token": 1},
                      resume=parts / "lora-step00000002-state", output_name="other", caption_prefix="yqv")  # fmt: skip
    assert error.value.code == "resume-weights-mismatch"


@pytest.mark.parametrize("more", [
    {}, pytest.param({"method": "adapter", "network_dim": 2, "embedding_lr": "1e-1"}, marks=pytest.mark.full),
])  # fmt: skip
def test_generate_makes_the_preview_again(
    more: dict[str, Any], toy_shelf: ToyShelf, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the saved file, alone or inside that of an adapter; the vectors count."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("(zwx:1.2), standing --w 64 --h 64 --s 2 --d 5 --l 3 --n a cat\n")
    toy = toy_shelf.paths("sd")
    output = train_toy(toy, images, Path("out"), **{**WORD, "learning_rate": "1e-1", **more},
                       sample_prompts="prompts.txt", sample_every_n_steps=2, sample_at_first=True)  # fmt: skip
    first, last = sorted((output / "sample").iterdir())
    with Image.open(last) as image, Image.open(first) as untrained:
        pixels, before, command = np.asarray(image), np.asarray(untrained), image.info["command"]
        assert "in no file" in untrained.info["note"]
    assert (pixels != before).any()
    argv = shlex.split(command)[1:]
    place = argv.index("--pretrained_model_name_or_path") + 1
    argv[place] = str(toy["pretrained_model_name_or_path"])
    assert main(argv) == 0
    (made,) = Path("outputs").iterdir()
    assert np.array_equal(np.asarray(Image.open(made)), pixels)


@pytest.mark.full
def test_with_an_adapter_both_train(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """In one file, as other programs bundle them; training goes on from it with the vectors that it holds."""
    common = {**WORD, "method": "adapter", "network_dim": 2, "embedding_lr": "1e-1", "network_train_unet_only": True}
    output = train_toy(toy_shelf.paths("sdxl"), images, tmp_path / "a", **common)
    state = load_file(output / "lora.safetensors")
    vectors = {key: tensor for key, tensor in state.items() if not key.startswith("lora_unet_")}
    assert {key: tuple(t.shape) for key, t in vectors.items()} == {
        "bundle_emb.zwx.clip_l": (2, 64), "bundle_emb.zwx.clip_g": (2, 128)
    }  # fmt: skip
    run = build_toy_run(toy_shelf.paths("sdxl"), images, tmp_path / "b", **common,
                        network_weights=output / "lora.safetensors", output_name="more")  # fmt: skip
    tables = run.method.modules["embeddings"]
    assert all(torch.equal(table.vectors, vectors[f"bundle_emb.zwx.{part}"]) for part, table in tables.items())  # type: ignore[attr-defined]


def test_several_words_make_a_folder(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """A file for each, with its own number of vectors; each file starts its word again."""
    words = {"token_string": ["<zwx>", "yqv"], "num_vectors_per_token": [1, 3], "caption_prefix": "a <zwx> and YQV"}
    output = train_toy(toy_shelf.paths("sd"), images, tmp_path / "a", **{**WORD, **words, "max_train_steps": 1})
    files = [output / "lora" / name for name in ("yqv.safetensors", "zwx.safetensors")]
    assert sorted((output / "lora").iterdir()) == files
    assert [tuple(load_file(file)["emb_params"].shape) for file in files] == [(3, 64), (1, 64)]
    with safe_open(files[1], "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_token_string"] == "<zwx>"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    given = {**WORD, **words, "num_vectors_per_token": None, "weights": files[::-1]}
    run = build_toy_run(toy_shelf.paths("sd"), images, tmp_path / "b", **given)
    (table,) = run.method.modules["embeddings"].children()
    assert torch.equal(table.vectors, torch.cat([load_file(file)["emb_params"] for file in files[::-1]]))  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "more", "codes"), [
    ("sd", {"token_string": "cat", "caption_prefix": "cat"}, ["token-string-known"]),
    ("lumina", {"token_string": "cat", "caption_prefix": "cat"}, ["token-string-known"]),
    ("sd", {"token_string": "yqv"}, ["token-string-in-no-caption"]),
    ("sd", {"token_string": "zw"}, ["token-string-in-no-caption"]),  # a part of a word is another word
    ("sd", {"cache_text_encoder_outputs": True}, ["text-cache-of-trained-encoders"]),
    ("sd", {"learning_rate": "0"}, ["learning-rates-all-zero"]),
    ("sd", {"weights": "FILE", "num_vectors_per_token": 3}, ["embedding-vector-count"]),
    ("sdxl", {"weights": "FILE"}, ["embedding-of-other-model"]),
    ("sd", {"weights": "CHECKPOINT"}, ["embedding-file-kind"]),
])  # fmt: skip
def test_what_is_refused(
    family: str, more: dict[str, Any], codes: list[str], toy_shelf: ToyShelf, images: Path, trained: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    toy = toy_shelf.paths(family)
    places = {"FILE": trained, "CHECKPOINT": toy_shelf.paths("sd")["pretrained_model_name_or_path"]}
    given = {name: places.get(value, value) for name, value in more.items()}
    argv = make_arguments(toy, images, tmp_path, **{**WORD, **given})
    with pytest.raises(UserError) as error:
        make_run_plan(load_config(argv), processes=1)
    assert [each.code for each in vars(error.value).get("errors", [error.value])] == codes


def test_templates_need_no_captions(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 2, name="photos")
    for path in (images / "photos").glob("*.txt"):
        path.unlink()
    given = {**WORD, "use_style_template": True, "train_data_dir": images / "photos", "train_batch_size": 2}
    run = build_toy_run(toy_shelf.paths("sd"), images, tmp_path / "out", **given, init_word="red cat")
    steps = islice(run.loader.steps(), 2)
    captions = [caption for step in steps for batch in step.batches for caption in batch.captions]
    assert all(caption.endswith("in the style of zwx") for caption in captions)
    assert len(set(captions)) > 1


@pytest.mark.full
@needs_rehearsal
def test_the_plan_and_the_rehearsal(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    argv = make_arguments(toy_shelf.paths("sd"), images, tmp_path / "out", **WORD, init_word="cat")
    plan = make_run_plan(load_config(argv), processes=1)
    (part,) = plan.parts
    assert (part.part, part.parameters, part.learning_rate) == ("clip.embeddings", 2 * 64, 1e-2)
    assert any("1 in clip" in note and "2" in note for note in plan.notes)  # one token for two vectors
    stages = {stage.name: stage for stage in rehearse_plan(plan)}
    assert 0 < stages["training step"].resident["optimizer"] < 4096  # bytes: the vectors' alone
