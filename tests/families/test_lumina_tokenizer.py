"""Where Lumina-Image 2.0's tokenizer is found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families.lumina_toys import CAPTIONS, Options, load, prediction, write_whole_model
from families.toys import ToyShelf, in_pieces
from sfumato.demo import toy_lumina
from sfumato.errors import UserError
from sfumato.families import _lumina_files
from sfumato.families._gemma2_tokenizer import load_gemma_tokenizer


@pytest.fixture(scope="session")
def toy(toy_shelf: ToyShelf) -> Options:
    return {name: str(path) for name, path in toy_shelf.paths("lumina").items() if name != "tokenizer"}


@pytest.fixture(scope="session")
def tokenizer(toy_shelf: ToyShelf) -> tuple[str]:
    return (str(toy_shelf.paths("lumina")["tokenizer"]),)


def alone(toy: Options, folder: Path) -> Options:
    """The toy's files without the tokenizer beside them."""
    folder.mkdir(exist_ok=True)
    return {name: str(shutil.copy(path, folder)) for name, path in toy.items()}


def test_a_missing_tokenizer_says_what_to_put_where(
    toy: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError) as error:
        load(**alone(toy, tmp_path))
    assert error.value.code == "gemma-tokenizer-not-found"
    assert "--tokenizer" in error.value.fix


def test_a_tokenizer_in_the_hub_cache(
    toy: Options, tokenizer: tuple[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--Alpha-VLLM--Lumina-Image-2.0"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(tokenizer[0], repository / "snapshots" / "abc" / "tokenizer")
    model = load(**alone(toy, tmp_path / "alone"))
    assert torch.equal(prediction(model, CAPTIONS), prediction(load(**toy), CAPTIONS))


def test_a_tokenizer_beside_the_text_encoder(toy: Options, tokenizer: tuple[str], tmp_path: Path) -> None:
    """As the published folder of Gemma 2 has it."""
    options = alone(toy, tmp_path)
    folder = in_pieces(load_file(toy["gemma2"]), tmp_path / "gemma", "model").parent
    shutil.copy(Path(tokenizer[0]) / "tokenizer.json", folder)
    model = load(**options | {"gemma2": str(folder)})
    assert torch.equal(prediction(model, CAPTIONS), prediction(load(**toy), CAPTIONS))


@pytest.mark.parametrize("everything", [False, True])
def test_a_tokenizer_inside_the_weights(toy: Options, pieces: Path, tmp_path: Path, everything: bool) -> None:
    """Published files of the text encoder, and of the whole model, carry theirs along."""
    networks = toy_lumina.make_networks(600, seed=1)
    files = toy_lumina.single_files(networks)
    carried = torch.frombuffer(bytearray((pieces / "tokenizer.model").read_bytes()), dtype=torch.uint8)
    options = alone(toy, tmp_path)
    save_file(files["gemma2"] | {"spiece_model": carried}, options["gemma2"])
    if everything:
        path = write_whole_model(options, tmp_path / "whole.safetensors")
        tensors = load_file(path)
        del tensors[_lumina_files.LUMINA_TEXT_PREFIX + "spiece_model"]
        save_file(tensors | {"text_encoders.spiece_model": carried}, path)
        options = {"pretrained_model_name_or_path": str(path)}
    model: Any = load(**options)
    text = "the Licensor grants You"
    assert model.tokenizers["gemma2"].encode(text, 99) == load_gemma_tokenizer(pieces).encode(text, 99)
    assert len(model.encode_text("gemma2", [text])[0]["hidden"]) == len(load_gemma_tokenizer(pieces).encode(text, 99))


def test_a_tokenizer_of_another_model_is_refused(toy: Options, pieces: Path) -> None:
    with pytest.raises(UserError, match="600") as error:
        load(**toy, tokenizer=(str(pieces),))
    assert error.value.code == "tokenizer-vocabulary-mismatch"
