"""What is particular to Lumina-Image 2.0: masks, the system prompt, files in several layouts, metadata."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.lumina_toys import CAPTIONS, SYSTEM, Options, load, prediction, state, write_whole_model
from families.toys import ToyShelf, in_pieces
from sfumato.config import ModelOptions
from sfumato.errors import UserError
from sfumato.families import _vae, lumina, register_families
from sfumato.families.checkpoint_saving import save_single_file
from sfumato.families.encoding import encode_captions, encode_with_grad
from sfumato.families.part import DENOISER_PREFIX
from sfumato.families.source import open_source
from toy_runs import equal_tensors, make_images, read_weights, train_toy


@pytest.fixture(scope="session")
def toy(toy_shelf: ToyShelf) -> Options:
    return {name: str(path) for name, path in toy_shelf.paths("lumina").items() if name != "tokenizer"}


@pytest.fixture(scope="session")
def tokenizer(toy_shelf: ToyShelf) -> tuple[str]:
    return (str(toy_shelf.paths("lumina")["tokenizer"]),)


def test_text_beyond_the_mask_changes_nothing(toy: Options) -> None:
    model = load(**toy)
    assert encode_with_grad(model, "gemma2", CAPTIONS)["mask"].sum(1).unique().numel() == 2
    clean = prediction(model, CAPTIONS)
    assert torch.equal(prediction(model, CAPTIONS, spoil=1000.0), clean)
    torch.testing.assert_close(prediction(model, CAPTIONS, spoil=9.0, longer=7), clean, rtol=0, atol=1e-5)
    torch.testing.assert_close(prediction(model, CAPTIONS[:1]), clean[:1], rtol=0, atol=1e-5)


def test_features_are_cut_to_the_captions_tokens_whatever_stands_beside(toy: Options) -> None:
    model = load(**toy)
    together = model.encode_text("gemma2", CAPTIONS)
    for caption, found in zip(CAPTIONS, together, strict=True):
        (alone,) = model.encode_text("gemma2", [caption])
        assert found["mask"].all()
        assert found["hidden"].shape == alone["hidden"].shape
        torch.testing.assert_close(found["hidden"], alone["hidden"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_features_equal_the_pipelines(toy: Options, toy_shelf: ToyShelf) -> None:
    """Which pads every caption to 256 tokens."""
    from diffusers import Lumina2Pipeline

    pipe = Lumina2Pipeline.from_pretrained(toy_shelf.paths("lumina", "diffusers")["pretrained_model_name_or_path"])
    hidden, mask = pipe._get_gemma_prompt_embeds(CAPTIONS)
    assert mask.shape == (2, 256)
    for found, theirs, real in zip(load(**toy).encode_text("gemma2", CAPTIONS), hidden, mask, strict=True):
        torch.testing.assert_close(found["hidden"], theirs[real.bool()], rtol=0, atol=1e-5)


def test_the_longest_caption(toy: Options) -> None:
    long = "cat " * 400
    assert len(load(**toy).encode_text("gemma2", [long])[0]["hidden"]) == 256
    assert len(load(**toy, gemma2_max_token_length=299).encode_text("gemma2", [long])[0]["hidden"]) == 299
    assert prediction(load(**toy, gemma2_max_token_length=299), [long]).isfinite().all()
    with pytest.raises(UserError, match="299") as error:
        load(**toy, gemma2_max_token_length=300)
    assert error.value.code == "gemma2-length-exceeded"


def test_a_system_prompt_stands_before_captions(toy: Options) -> None:
    """But not before a negative prompt, and not where there are no words. It is read as it is, brackets too."""
    plain, model = load(**toy), load(**toy, system_prompt=SYSTEM)

    def words(text: str, **how: bool) -> Tensor:
        return encode_captions(model, "gemma2", [text], **how)[0]["hidden"]

    def bare(text: str) -> Tensor:
        return encode_captions(plain, "gemma2", [text])[0]["hidden"]

    whole = f"{SYSTEM} <Prompt Start> a cat"
    assert torch.equal(words("a cat"), bare(whole))
    assert torch.equal(words("a cat", weighted=True), bare(whole))
    assert torch.equal(words("a cat", negative=True), bare("a cat"))
    assert torch.equal(words(""), bare(""))
    heavy, light = words("a (cat:2)", weighted=True), bare(whole)
    torch.testing.assert_close(heavy[-1], 2 * light[-1])
    assert torch.equal(heavy[:-1], light[:-1])
    assert model.text_fingerprint("gemma2") != plain.text_fingerprint("gemma2")


def test_training_with_a_system_prompt(toy: Options, tokenizer: tuple[str], tmp_path: Path) -> None:
    """Equals training on captions that begin with it; live, frozen and cached text agree."""
    images, longer = make_images(tmp_path / "images", 2), make_images(tmp_path / "longer", 2)
    for path in longer.glob("*/*.txt"):
        path.write_text("you draw <Prompt Start> " + path.read_text())
    options = {"max_train_steps": 2, "tokenizer": tokenizer[0], "network_train_unet_only": True}
    paths = {name: Path(path) for name, path in toy.items()}
    system = {"system_prompt": "you draw"}
    wanted = train_toy(paths, longer, tmp_path / "wanted", **options)
    frozen = train_toy(paths, images, tmp_path / "frozen", **options, **system)
    cache = {"cache_text_encoder_outputs_to_disk": True, "cache_dir": tmp_path / "cache"}
    cached = train_toy(paths, images, tmp_path / "cached", **options, **system, **cache)
    without = train_toy(paths, images, tmp_path / "without", **options, **cache)
    assert equal_tensors(read_weights(wanted), read_weights(frozen))
    assert equal_tensors(read_weights(wanted), read_weights(cached))
    assert not equal_tensors(read_weights(wanted), read_weights(without))


def test_layouts_of_other_programs(toy: Options, tokenizer: tuple[str], tmp_path: Path) -> None:
    """A prefixed transformer with the norm that nothing uses; the text encoder without its level, and with its head."""
    expected = prediction(load(**toy), CAPTIONS)
    dit = {DENOISER_PREFIX + key: tensor for key, tensor in state(toy["pretrained_model_name_or_path"]).items()}
    dit[DENOISER_PREFIX + "norm_final.weight"] = torch.ones(96)
    save_file(dit, tmp_path / "dit.safetensors")
    gemma = {key.removeprefix("model."): tensor for key, tensor in state(toy["gemma2"]).items()}
    save_file(gemma | {"lm_head.weight": torch.ones(1)}, tmp_path / "gemma.safetensors")
    vae = {_vae.VAE_PREFIX + key: tensor for key, tensor in state(toy["ae"]).items()}
    save_file(vae, tmp_path / "vae.safetensors")
    other = load(
        pretrained_model_name_or_path=str(tmp_path / "dit.safetensors"), gemma2=str(tmp_path / "gemma.safetensors"),
        ae=str(tmp_path / "vae.safetensors"), tokenizer=tokenizer,
    )  # fmt: skip
    assert torch.equal(prediction(other, CAPTIONS), expected)
    assert equal_tensors(other.vae.state_dict(), load(**toy).vae.state_dict())


def test_a_file_that_holds_everything(toy: Options, tokenizer: tuple[str], tmp_path: Path) -> None:
    path = write_whole_model(toy, tmp_path / "whole.safetensors")
    model = load(pretrained_model_name_or_path=str(path), tokenizer=tokenizer)
    assert torch.equal(prediction(model, CAPTIONS), prediction(load(**toy), CAPTIONS))
    every = {name: part.module.state_dict().keys() for name, part in model.parts.items()}
    save_single_file(model, tmp_path / "again.safetensors", {}, changed=every)
    assert equal_tensors(load_file(tmp_path / "again.safetensors"), load_file(path))
    parts = load(**toy | {"gemma2": str(path), "ae": str(path)})  # the options may name it, too
    assert torch.equal(prediction(parts, CAPTIONS), prediction(model, CAPTIONS))


def test_files_in_several_parts(toy: Options, toy_shelf: ToyShelf, tokenizer: tuple[str], tmp_path: Path) -> None:
    """The transformer by its index; the text encoder as a folder, without and with its configuration."""
    expected = prediction(load(**toy), CAPTIONS)
    dit = in_pieces(load_file(toy["pretrained_model_name_or_path"]), tmp_path / "dit", "model")
    gemma = in_pieces(load_file(toy["gemma2"]), tmp_path / "gemma", "model")
    options = toy | {"pretrained_model_name_or_path": str(dit), "gemma2": str(gemma.parent)}
    assert torch.equal(prediction(load(**options, tokenizer=tokenizer), CAPTIONS), expected)
    published = toy_shelf.paths("lumina", "diffusers")["pretrained_model_name_or_path"]
    shutil.copy(published / "text_encoder" / "config.json", gemma.parent)
    assert torch.equal(prediction(load(**options, tokenizer=tokenizer), CAPTIONS), expected)


@pytest.mark.full
def test_a_diffusers_folder_in_several_parts(toy_shelf: ToyShelf, toy: Options, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_shelf.paths("lumina", "diffusers")["pretrained_model_name_or_path"], tmp_path / "all")
    for network, name in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        index = in_pieces(load_file(folder / network / f"{name}.safetensors"), tmp_path / network, name)
        (folder / network / f"{name}.safetensors").unlink()
        for path in index.parent.iterdir():
            shutil.move(path, folder / network / path.name)
    model = load(pretrained_model_name_or_path=str(folder))
    torch.testing.assert_close(prediction(model, CAPTIONS), prediction(load(**toy), CAPTIONS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_stored_in_less(toy: Options, tokenizer: tuple[str], tmp_path: Path, kind: torch.dtype) -> None:
    """Equal to the model of the rounded weights in float32."""
    low, rounded = dict(toy), dict(toy)
    for name in ("pretrained_model_name_or_path", "gemma2"):
        tensors = {key: tensor.to(kind) for key, tensor in state(toy[name]).items()}
        low[name], rounded[name] = (str(tmp_path / f"{which}_{name}.safetensors") for which in ("low", "rounded"))
        save_file(tensors, low[name])
        save_file({key: tensor.float() for key, tensor in tensors.items()}, rounded[name])
    expected = prediction(load(**rounded, tokenizer=tokenizer), CAPTIONS)
    assert torch.equal(prediction(load(**low, tokenizer=tokenizer), CAPTIONS), expected)
    assert not torch.equal(prediction(load(**toy), CAPTIONS), expected)


@pytest.mark.parametrize("missing", ["gemma2", "ae"])
def test_missing_components_are_named(toy: Options, missing: str) -> None:
    with pytest.raises(UserError, match=f"--{missing}") as error:
        load(**{name: path for name, path in toy.items() if name != missing})
    assert error.value.code == "network-file-missing"


def test_another_text_encoder_is_refused(toy: Options, toy_shelf: ToyShelf) -> None:
    with pytest.raises(UserError, match=r"--gemma2: .*Gemma 2.*T5") as error:
        load(**toy | {"gemma2": str(toy_shelf.paths("flux")["t5xxl"])})
    assert error.value.code == "network-kind-mismatch"


@pytest.mark.full
def test_other_models_are_not_taken_for_it(toy: Options, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    register_families()
    for family in ("sd", "sdxl", "flux"):
        assert not lumina.Lumina.detect(open_source(toy_shelf.options(family)))
        assert not lumina.Lumina.detect(open_source(toy_shelf.options(family, "diffusers")))
    relative = {  # of the same line, with other modulation
        key.replace("adaLN_modulation.1", "adaLN_modulation.0"): tensor
        for key, tensor in state(toy["pretrained_model_name_or_path"]).items()
    }
    save_file(relative, tmp_path / "relative.safetensors")
    assert not lumina.Lumina.detect(
        open_source(ModelOptions(pretrained_model_name_or_path=str(tmp_path / "relative.safetensors")))
    )


def metadata(path: Path) -> Mapping[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_metadata_is_that_of_sd_scripts(toy: Options, tokenizer: tuple[str], tmp_path: Path) -> None:
    golden = json.loads((Path(__file__).parents[1] / "goldens" / "metadata_keys.json").read_text())
    case = next(each for each in find_tables(golden, lambda each: each.get("case") == "lumina2 lora"))
    paths = {name: Path(path) for name, path in toy.items()}
    options = {"max_train_steps": 1, "tokenizer": tokenizer[0], "network_module": "networks.lora_lumina"}
    found = metadata(
        train_toy(paths, make_images(tmp_path / "images", 2), tmp_path / "out", **options) / "lora.safetensors"
    )
    for name in ("architecture", "implementation"):
        assert found[f"modelspec.{name}"] == case["metadata"][f"modelspec.{name}"]
    assert found["ss_base_model_version"] == "lumina2"
    assert found["ss_network_module"] == "networks.lora_lumina"
    (only,) = (each["lumina"] for each in find_tables(golden, lambda each: isinstance(each.get("lumina"), list)))
    assert set(only) <= set(found)


def find_tables(content: Any, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Every table inside nested JSON that is as wanted."""
    tables: list[dict[str, Any]] = []
    if isinstance(content, dict):
        tables += [content] if wanted(content) else []
        content = list(content.values())
    if isinstance(content, list):
        for part in content:
            tables += find_tables(part, wanted)
    return tables
