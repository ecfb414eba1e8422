"""What is particular to Stable Diffusion 2, to longer captions, and to what --v2 and --v_parameterization say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.loading import load_model, read_model
from families.toys import ToyShelf
from keys import CLIP_H, CLIP_L, UNETS, on_meta, round_trip, same, shapes_of, tagged, to_ours
from sfumato.config import ModelOptions, load_config
from sfumato.errors import UserError
from sfumato.families import _clip, _open_clip, _tokenizers, _unet
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.checkpoint_saving import save_single_file
from sfumato.families.encoding import encode_with_grad
from sfumato.plan import make_run_plan
from toy_runs import make_arguments, make_images, read_metrics, train_toy

PREFIX = "cond_stage_model.model."
Toy = Mapping[str, Path]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def first(toy_shelf: ToyShelf) -> Path:
    return toy_shelf.paths("sd")["pretrained_model_name_or_path"]


@pytest.fixture(scope="module")
def second(toy_shelf: ToyShelf) -> Path:
    return toy_shelf.paths("sd", variant="2")["pretrained_model_name_or_path"]


@pytest.fixture(scope="module")
def folder_v(toy_shelf: ToyShelf) -> Path:
    return toy_shelf.paths("sd", "diffusers", "2-v")["pretrained_model_name_or_path"]


def read(path: Path, **options: Any) -> Blueprint:
    return read_model(ModelOptions(pretrained_model_name_or_path=str(path), **options))


def load(path: Path, **options: Any) -> Family:
    return load_model(ModelOptions(pretrained_model_name_or_path=str(path), **options), family="sd")


def test_text_encoder_keys() -> None:
    """Rows at their real numbers; the last of 24 layers and the projection have no counterpart."""
    whole = on_meta(lambda: _clip.build(CLIP_H | {"num_hidden_layers": 24}))
    file = round_trip(_open_clip.key_map(projected=False), tagged(whole, columns=1))
    file |= {"text_projection": torch.zeros(1024, 1024), "logit_scale": torch.zeros(())}
    used = on_meta(lambda: _clip.build(CLIP_H))
    shapes = {name: tensor.shape for name, tensor in tagged(used, columns=1).items()}
    ours = to_ours(_open_clip.key_map(projected=False, unused=23), file, shapes)
    assert set(ours) == set(used.state_dict())
    checkpoint = {PREFIX + name: tensor for name, tensor in file.items()}
    theirs = single_file_utils.convert_open_clip_checkpoint(used, checkpoint, PREFIX)
    same({"text_model." + name: tensor for name, tensor in ours.items()}, theirs)


def test_unet_keys_and_configuration() -> None:
    config = UNETS["sd21_linearproj"]
    unet = on_meta(lambda: _unet.build(config))
    original = round_trip(_unet.key_map(config), tagged(unet))
    assert len(original) == 686
    file = {"model.diffusion_model." + name: tensor for name, tensor in original.items()}
    same(tagged(unet), single_file_utils.convert_ldm_unet_checkpoint(file, dict(unet.config)))
    real = _unet.key_map(config).to_original(unet.state_dict())
    found = _unet.config_from_shapes({name: tuple(tensor.shape) for name, tensor in real.items()})
    found |= _unet.count_heads(found)
    assert {name: found[name] for name in config} == config
    encoder = shapes_of(on_meta(lambda: _clip.build(CLIP_H)))
    assert _open_clip.config_from_shapes(encoder) == CLIP_H


@pytest.mark.parametrize(
    ("version", "v", "title", "base", "architecture"),
    [
        (1, False, "Stable Diffusion 1.x", "sd_v1", "stable-diffusion-v1"),
        (1, True, "Stable Diffusion 1.x, predicting v", "sd_v1_v", "stable-diffusion-v1"),
        (2, False, "Stable Diffusion 2.x", "sd_v2", "stable-diffusion-v2-512"),
        (2, True, "Stable Diffusion 2.x, predicting v", "sd_v2_v", "stable-diffusion-v2-768-v"),
    ],
)
def test_what_a_checkpoint_is_called(
    first: Path, second: Path, version: int, v: bool, title: str, base: str, architecture: str
) -> None:
    blueprint = read(first if version == 1 else second, v_parameterization=v)
    assert (blueprint.title, blueprint.base_model_version, blueprint.architecture) == (title, base, architecture)
    assert blueprint.objective.predicts == ("v" if v else "epsilon")
    assert blueprint.metadata == {"ss_v2": version == 2}


def test_v2_is_checked(first: Path, second: Path) -> None:
    with pytest.raises(UserError, match=r"1\.x.*--v2") as error:
        read(first, v2=True)
    assert error.value.code == "v2-version-mismatch"
    assert read(second, v2=True).notes == ()


def test_what_the_scheduler_of_a_folder_says(folder_v: Path, toy_shelf: ToyShelf) -> None:
    used = read(folder_v)
    assert (used.objective.predicts, used.notes, len(used.declared)) == ("v", (), 1)
    repeated = read(folder_v, v_parameterization=True)
    assert (repeated.objective.predicts, repeated.notes, repeated.declared) == ("v", (), ())
    other = read(folder_v, v_parameterization=False)
    assert (other.objective.predicts, len(other.notes), other.declared) == ("epsilon", 1, ())
    plain = toy_shelf.paths("sd", "diffusers", "2")["pretrained_model_name_or_path"]
    (note,) = read(plain, v_parameterization=True).notes
    assert note.startswith("--v_parameterization: ")


@pytest.mark.parametrize(
    ("metadata", "predicts"),
    [
        ({"modelspec.prediction_type": "v"}, "v"),
        ({"modelspec.prediction_type": "v_prediction"}, "v"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.prediction_type": "something new"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
        ({"ss_base_model_version": "sd_v2_v"}, "v"),
        ({"ss_base_model_version": "sd_v2"}, "epsilon"),
        ({}, "epsilon"),
    ],
)
def test_what_the_metadata_of_a_file_says(
    metadata: dict[str, str], predicts: str, second: Path, tmp_path: Path
) -> None:
    path = tmp_path / "declared.safetensors"
    save_file(load_file(second), path, metadata)
    blueprint = read(path)
    assert (blueprint.objective.predicts, blueprint.notes) == (predicts, ())
    assert len(blueprint.declared) == (predicts == "v")
    assert read(path, v_parameterization=True).objective.predicts == "v"
    assert bool(read(path, v_parameterization=True).notes) == (metadata.get("modelspec.prediction_type") == "epsilon")


def test_a_note_is_shown_and_with_strict_an_error(first: Path, images: Path, tmp_path: Path) -> None:
    save_file(load_file(first), tmp_path / "e.safetensors", {"modelspec.prediction_type": "epsilon"})
    shutil.copytree(first.parent / "tokenizer", tmp_path / "tokenizer")
    command = make_arguments(
        {"pretrained_model_name_or_path": tmp_path / "e.safetensors"}, images, tmp_path, v_parameterization=True
    )
    (note,) = make_run_plan(load_config(command), processes=1).notes
    with pytest.raises(UserError) as error:
        make_run_plan(load_config([*command, "--strict"]), processes=1)
    assert error.value.what == note
    assert "--v_parameterization" in note


def test_a_depth_model_is_refused(first: Path, tmp_path: Path) -> None:
    tensors = load_file(first)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(tensors | {name: torch.zeros(32, 5, 3, 3)}, tmp_path / "depth.safetensors")
    with pytest.raises(UserError, match=r"\b5\b.*\b4\b") as error:
        read(tmp_path / "depth.safetensors")
    assert error.value.code == "denoiser-variant-unsupported"


def test_the_unused_layer_stays_in_the_file(second: Path, tmp_path: Path) -> None:
    model = load(second)
    assert len(model.parts["clip"].module.encoder.layers) == 2  # pyright: ignore
    with torch.no_grad():
        for parameter in model.parts["clip"].module.parameters():
            parameter.add_(1)
    changed = model.parts["clip"].module.state_dict()
    save_single_file(model, tmp_path / "again.safetensors", {}, changed={"clip": changed})
    before, after = load_file(second), load_file(tmp_path / "again.safetensors")
    kept = [name for name in before if "resblocks.2." in name or name.endswith(("text_projection", "logit_scale"))]
    assert len(kept) == 14
    assert all(torch.equal(before[name], after[name]) for name in kept)
    fused = PREFIX + "transformer.resblocks.1.attn.in_proj_weight"
    torch.testing.assert_close(after[fused], before[fused] + 1)
    words = (str(second.parent / "tokenizer"),)
    changed = load(tmp_path / "again.safetensors", tokenizer=words).parts["clip"].module.state_dict()
    same(changed, model.parts["clip"].module.state_dict())


@pytest.mark.full
def test_a_folder_saved_as_one_file_is_the_same_model(folder_v: Path, tmp_path: Path) -> None:
    """The file has only the layers that are used, so the last of them must not be dropped again."""
    model = load(folder_v, v_parameterization=True)
    _pretend_depth(folder_v, tmp_path)
    deep = load(tmp_path / "deep", v_parameterization=True)
    save_single_file(deep, tmp_path / "one.safetensors", {}, changed={})
    again = load(tmp_path / "one.safetensors", v_parameterization=True, tokenizer=(str(folder_v / "tokenizer"),))
    same(again.parts["clip"].module.state_dict(), deep.parts["clip"].module.state_dict())
    same(again.denoiser.state_dict(), model.denoiser.state_dict())


def _pretend_depth(folder: Path, target: Path) -> None:
    """A copy of the folder whose text encoder has 23 layers, as the published one."""
    import shutil

    shutil.copytree(folder, target / "deep")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config["num_hidden_layers"] = 23
    (target / "deep" / "text_encoder" / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    for name, tensor in dict(weights).items():
        if ".layers.0." in name:
            weights |= {name.replace(".layers.0.", f".layers.{i}."): tensor.clone() for i in range(2, 23)}
    save_file(weights, target / "deep" / "text_encoder" / "model.safetensors")


@pytest.mark.full
def test_a_ckpt_file_is_the_same_model(second: Path, tmp_path: Path) -> None:
    """As published: nested under state_dict beside numbers."""
    torch.save({"state_dict": load_file(second), "global_step": 875000}, tmp_path / "model.ckpt")
    folder = str(second.parent / "tokenizer")
    one, other = load(second), load(tmp_path / "model.ckpt", tokenizer=(folder,))
    for part in one.parts:
        same(one.parts[part].module.state_dict(), other.parts[part].module.state_dict())
    same(one.vae.state_dict(), other.vae.state_dict())


def test_padding_and_the_layer_against_diffusers(folder_v: Path) -> None:
    from diffusers import StableDiffusionPipeline

    model = load(folder_v, v_parameterization=True)
    pipe = StableDiffusionPipeline.from_pretrained(folder_v)
    theirs, _ = pipe.encode_prompt("a red cup", "cpu", 1, False)
    torch.testing.assert_close(encode_with_grad(model, "clip", ["a red cup"])["hidden"], theirs, rtol=0, atol=1e-5)
    earlier = load(folder_v, v_parameterization=True, clip_skip=2)
    ids = pipe.tokenizer(["a red cup"], padding="max_length", return_tensors="pt").input_ids
    mask = torch.full((77, 77), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        by_hand = pipe.text_encoder.encoder.layers[0](pipe.text_encoder.embeddings(ids), mask)
        by_hand = pipe.text_encoder.final_layer_norm(by_hand)
    torch.testing.assert_close(encode_with_grad(earlier, "clip", ["a red cup"])["hidden"], by_hand, rtol=0, atol=1e-5)
    ids = _clip.tokenize(
        _tokenizers.load_clip_tokenizer(folder_v / "tokenizer", pad_with_zero=True), ["a"], torch.device("cpu")
    )
    assert (ids[0, 3:] == 0).all()


@pytest.mark.parametrize("pad_with_zero", [False, True])
def test_one_chunk_is_what_the_tokenizer_gives(pad_with_zero: bool) -> None:
    tokenizer = _tokenizers.load_clip_tokenizer(pad_with_zero=pad_with_zero)
    captions = ["", "a photo of a cat!", "cat " * 100]
    theirs = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(_clip.tokenize(tokenizer, captions, torch.device("cpu")), theirs)


@pytest.mark.parametrize("words", [0, 1, 74, 75, 76, 150, 200, 225, 300])
@pytest.mark.parametrize("pad_with_zero", [False, True])
def test_chunks_against_the_closed_form(words: int, pad_with_zero: bool) -> None:
    """An encoder that gives each token's id back shows what lies at each of 227 positions."""
    tokenizer: Any = _tokenizers.load_clip_tokenizer(pad_with_zero=pad_with_zero)
    begin, end, pad, cat = 49406, 49407, 0 if pad_with_zero else 49407, 2368
    other = "a cat"
    rows = _clip.tokenize(tokenizer, [other, "cat " * words], torch.device("cpu"), chunks=3)
    assert rows.shape == (6, 77)  # the rows of a caption follow each other
    assert (rows[:, 0] == begin).all()
    whole = _clip.join_chunks(rows[..., None].float(), 3)[1, :, 0].int().tolist()
    inside = min(words, 225)
    expected = [begin]
    for chunk in range(3):
        here = max(0, min(75, inside - 75 * chunk))
        expected += ([cat] * here + [end] + [pad] * 74)[:75]
        assert rows[3 + chunk].tolist() == [begin] + ([cat] * here + [end] + [pad] * 75)[:76]
    expected.append(end if inside == 225 else pad)
    assert whole == expected
    assert len(whole) == 227


def test_a_model_with_longer_captions(first: Path) -> None:
    short, long = load(first), load(first, max_token_length=150)
    words = "cat dog red " * 40
    hidden = encode_with_grad(long, "clip", ["a cat", words])["hidden"]
    assert hidden.shape[1] == 152
    torch.testing.assert_close(
        hidden[:, :76], encode_with_grad(short, "clip", ["a cat", words])["hidden"][:, :76], rtol=0, atol=1e-5
    )
    second_chunk = encode_with_grad(short, "clip", ["cat dog red " * 25 + " ".join(words.split()[75:])])["hidden"]
    torch.testing.assert_close(second_chunk[:, :76], hidden[1:, :76], rtol=0, atol=1e-5)
    rest = encode_with_grad(short, "clip", [" ".join(words.split()[75:])])["hidden"]
    torch.testing.assert_close(hidden[1:, 76:], rest[:, 1:], rtol=0, atol=1e-5)


def test_text_encoder_configuration_from_shapes() -> None:
    assert _clip.config_from_shapes(shapes_of(on_meta(lambda: _clip.build(CLIP_L)))) == CLIP_L


@pytest.mark.full
def test_training_on_v(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """The header of the adapter file says what it was made for; longer captions train, too."""
    toy = toy_shelf.paths("sd", variant="2")
    output = train_toy(toy, images, tmp_path, v_parameterization=True, max_token_length=150, max_train_steps=2)
    with safe_open(output / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
        ups: list[Tensor] = [file.get_tensor(name) for name in file.keys() if "lora_up" in name]  # noqa: SIM118
    assert all(up.any() for up in ups)
    assert metadata["ss_v2"] == "True"
    assert metadata["ss_base_model_version"] == "sd_v2_v"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["ss_max_token_length"] == "150"
    assert all(0 < row["loss/current"] < 100 for row in read_metrics(output))
