"""What is particular to Stable Diffusion 3: files in several layouts, masks, encoders that are absent or dropped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.sd3_toys import (
    CAPTIONS,
    checkpoint,
    conditioning,
    elsewhere,
    load,
    part_of,
    prediction,
    read,
    separate,
    without,
)
from families.toys import ToyShelf
from sfumato.config import ModelOptions
from sfumato.data.batch import Sizes
from sfumato.errors import SeveralErrors, UserError
from sfumato.families._sd3_text import ENCODER_LOCATIONS, find_t5_device
from sfumato.families.encoding import encode_with_grad

VARIANTS = ("3-medium", "3.5-medium", "3.5-large")


@pytest.fixture(scope="module")
def toy(toy_shelf: ToyShelf) -> dict[str, Path]:
    return toy_shelf.paths("sd3")


@pytest.fixture(scope="module")
def file(toy: Mapping[str, Path]) -> dict[str, Tensor]:
    return load_file(toy["pretrained_model_name_or_path"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_which_model_it_is(variant: str, toy_shelf: ToyShelf) -> None:
    """The names in sd-scripts' adapter files."""
    kind = {"3-medium": "medium", "3.5-medium": "5-medium", "3.5-large": "5-large"}[variant]
    for layout in ("original", "diffusers"):
        found = read(**checkpoint(toy_shelf.paths("sd3", layout, variant)))
        assert (found.base_model_version, found.architecture) == (kind, f"stable-diffusion-3-{kind}")
        assert found.title == f"Stable Diffusion {variant.replace('-', ' ')}"
        assert (found.latents.scale, found.latents.shift, found.latents.channels) == (1.5305, 0.0609, 16)
        assert (found.notes, found.objective.space) == ((), "sigma_scaled")  # images are compared, not velocities


def test_files_of_their_own(toy: Mapping[str, Path], file: Mapping[str, Tensor], tmp_path: Path) -> None:
    """Each network in a file, and a checkpoint that holds one of the encoders."""
    expected = prediction(load(**checkpoint(toy)), CAPTIONS)
    pieces = separate(file, tmp_path)
    transformer = Path(pieces.pop("pretrained_model_name_or_path"))
    assert torch.equal(prediction(load(**elsewhere(transformer, toy), **pieces), CAPTIONS), expected)
    save_file(without(file, "clip_g", "t5"), tmp_path / "incl_l.safetensors")
    given = {name: pieces[name] for name in ("clip_g", "t5xxl")}
    mixed = load(**elsewhere(tmp_path / "incl_l.safetensors", toy), **given)
    assert torch.equal(prediction(mixed, CAPTIONS), expected)


def test_an_option_goes_before_what_the_checkpoint_holds(
    toy: Mapping[str, Path], file: Mapping[str, Tensor], tmp_path: Path
) -> None:
    name = "text_projection.weight"
    clip = part_of(file, ENCODER_LOCATIONS["clip_g"].prefix)
    save_file(clip | {name: 2 * clip[name]}, tmp_path / "clip_g.safetensors")
    model = load(**checkpoint(toy), clip_g=tmp_path / "clip_g.safetensors")
    assert torch.equal(model.parts["clip_g"].module.state_dict()[name], 2 * clip[name])


def test_a_transformer_in_diffusers_names_and_in_shards(
    toy: Mapping[str, Path], file: Mapping[str, Tensor], toy_shelf: ToyShelf, tmp_path: Path
) -> None:
    expected = prediction(load(**checkpoint(toy)), CAPTIONS)
    pieces = separate(file, tmp_path)
    folder = toy_shelf.paths("sd3", "diffusers")["pretrained_model_name_or_path"]
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for number, keys in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        save_file({key: state[key] for key in keys}, tmp_path / f"part{number}.safetensors")
    index = {key: f"part{number % 2}.safetensors" for number, key in enumerate(sorted(state))}
    (tmp_path / "dit.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_file(state, tmp_path / "dit.safetensors")
    del pieces["pretrained_model_name_or_path"]
    for name in ("dit.safetensors", "dit.safetensors.index.json"):
        assert torch.equal(prediction(load(**elsewhere(tmp_path / name, toy), **pieces), CAPTIONS), expected)


def test_everything_missing_is_reported_at_once(file: Mapping[str, Tensor], tmp_path: Path) -> None:
    pieces = separate(file, tmp_path)
    with pytest.raises(SeveralErrors) as several:
        read(pretrained_model_name_or_path=pieces["pretrained_model_name_or_path"])
    assert several.value.codes == ["network-file-missing", "network-file-missing", "autoencoder-missing"]
    assert [error.fix.split()[-2] for error in several.value.errors] == ["--clip_l", "--clip_g", "--vae"]
    for option, given in (("clip_g", "t5xxl"), ("t5xxl", "vae")):
        with pytest.raises(UserError, match=f"--{option}") as error:
            read(**{**pieces, option: pieces[given]})
        assert error.value.code == "network-kind-mismatch"


def test_weights_stored_in_eight_bits(toy: Mapping[str, Path], file: Mapping[str, Tensor], tmp_path: Path) -> None:
    """As checkpoints with T5 in float8 are published, the rest in float16: exactly the model of the rounded weights."""
    stored = {}
    for name, tensor in file.items():
        dtype = torch.float8_e4m3fn if name.startswith(ENCODER_LOCATIONS["t5"].prefix) else torch.float16
        stored[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    wide = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    save_file(stored, tmp_path / "narrow.safetensors")
    save_file(wide, tmp_path / "wide.safetensors")
    found = [load(**elsewhere(tmp_path / f"{name}.safetensors", toy)) for name in ("narrow", "wide")]
    assert torch.equal(prediction(found[0], CAPTIONS), prediction(found[1], CAPTIONS))
    half = load(torch.bfloat16, **elsewhere(tmp_path / "narrow.safetensors", toy))
    assert {tensor.dtype for tensor in half.denoiser.state_dict().values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in half.parts["t5"].module.state_dict().values()} == {torch.bfloat16}


def test_clip_l_without_a_projection_is_one_with_the_identity(
    toy: Mapping[str, Path], file: Mapping[str, Tensor], tmp_path: Path
) -> None:
    key = ENCODER_LOCATIONS["clip_l"].prefix + "text_projection.weight"
    save_file({**file, key: torch.eye(len(file[key]))}, tmp_path / "with.safetensors")
    save_file({name: tensor for name, tensor in file.items() if name != key}, tmp_path / "lacks.safetensors")
    found = [load(**elsewhere(tmp_path / f"{name}.safetensors", toy)) for name in ("with", "lacks")]
    torch.testing.assert_close(prediction(found[1], CAPTIONS), prediction(found[0], CAPTIONS), rtol=0, atol=1e-6)
    with_projection, without_projection = (model.parts["clip_l"].groups() for model in found)
    assert [group.name for group in with_projection] == [group.name for group in without_projection]


def test_without_t5_there_are_zeros(
    toy: Mapping[str, Path], toy_shelf: ToyShelf, file: Mapping[str, Tensor], tmp_path: Path
) -> None:
    """As many as CLIP has tokens; against diffusers' pipeline without its third encoder."""
    from diffusers import StableDiffusion3Pipeline

    save_file(without(file, "t5"), tmp_path / "sd3.safetensors")
    options = elsewhere(tmp_path / "sd3.safetensors", toy)
    model = load(**options)
    assert model.text_parts == ("clip_l", "clip_g")
    assert (model.blueprint.title, model.blueprint.notes) == ("Stable Diffusion 3 medium, without T5-XXL", ())
    folder = toy_shelf.paths("sd3", "diffusers")["pretrained_model_name_or_path"]
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    theirs, _, pooled, _ = pipe.encode_prompt(
        CAPTIONS, None, None, max_sequence_length=77, do_classifier_free_guidance=False
    )
    ours = conditioning(model, CAPTIONS)
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours["pooled_projections"], pooled, rtol=0, atol=1e-5)
    asked = read(**options, apply_t5_attn_mask=True, t5xxl_dtype="bf16", t5xxl_max_token_length=256)
    assert sum("has no effect without T5-XXL" in note for note in asked.notes) == 2


def test_text_beyond_the_masks_changes_nothing(toy: Mapping[str, Path]) -> None:
    model = load(**checkpoint(toy), apply_t5_attn_mask=True, apply_lg_attn_mask=True)
    for part in model.text_parts:
        mask = encode_with_grad(model, part, CAPTIONS)["mask"]
        assert mask.dtype == torch.bool
        assert mask.sum(1).unique().numel() == 2
    clean, spoilt = prediction(model, CAPTIONS), prediction(model, CAPTIONS, spoil=1000.0)
    assert torch.equal(clean, spoilt)
    torch.testing.assert_close(prediction(model, CAPTIONS[:1]), clean[:1], rtol=0, atol=1e-5)


def test_masked_text_is_zeros_behind_the_words(toy: Mapping[str, Path]) -> None:
    """T5 does not attend to its padding; CLIP could not, since it stands behind the end."""
    plain = load(**checkpoint(toy))
    whole = conditioning(plain, CAPTIONS)
    masked = conditioning(load(**checkpoint(toy), apply_t5_attn_mask=True, apply_lg_attn_mask=True), CAPTIONS)
    assert torch.equal(masked["pooled_projections"], whole["pooled_projections"])
    ours, theirs = masked["encoder_hidden_states"], whole["encoder_hidden_states"]
    assert ours.shape == theirs.shape == (2, 77 + 256, 256)
    assert torch.equal(ours[0, :4], theirs[0, :4])  # begin, two words, end
    assert not ours[0, 4:77].any()
    encoder: Any = plain.parts["t5"].module
    tokens = plain.tokenizers["t5"](CAPTIONS[:1], return_tensors="pt")
    length = tokens.input_ids.shape[1]
    with torch.no_grad():
        alone = encoder(input_ids=tokens.input_ids).last_hidden_state[0]
    torch.testing.assert_close(ours[0, 77 : 77 + length], alone, rtol=0, atol=1e-5)
    assert not ours[0, 77 + length :].any()
    assert (theirs[0, 77 : 77 + length] - alone).abs().max() > 1e-3


def test_lengths_and_masks_name_the_cache_entries(toy: Mapping[str, Path]) -> None:
    variants = [{}, {"apply_t5_attn_mask": True}, {"t5xxl_max_token_length": 32}, {"apply_lg_attn_mask": True}]
    models = [load(**checkpoint(toy), **options) for options in variants]
    names = [tuple(map(model.text_fingerprint, model.text_parts)) for model in models]
    assert len(set(names)) == 4
    assert names[0][:2] == names[1][:2] == names[2][:2]
    assert names[0][2] == names[3][2]
    assert conditioning(models[2], CAPTIONS)["encoder_hidden_states"].shape[1] == 77 + 32


def test_precision_and_device_of_t5(toy: Mapping[str, Path]) -> None:
    model = load(**checkpoint(toy), t5xxl_dtype="bf16", t5xxl_device="cpu")
    assert {p.dtype for p in model.parts["t5"].module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parts["clip_g"].module.parameters()} == {torch.float32}
    expected = prediction(load(**checkpoint(toy)), CAPTIONS)
    torch.testing.assert_close(prediction(model, CAPTIONS), expected, rtol=0, atol=0.1)
    with pytest.raises(UserError, match="gpu") as error:
        find_t5_device("gpu")
    assert error.value.code == "t5-device-missing"
    with pytest.raises(ValueError, match="is not a precision"):
        ModelOptions(t5xxl_dtype="int8")


def test_a_dropped_encoder_leaves_zeros(toy: Mapping[str, Path]) -> None:
    model = load(**checkpoint(toy), apply_t5_attn_mask=True)
    features = {part: encode_with_grad(model, part, CAPTIONS) for part in model.text_parts}
    dropped = torch.tensor([True, False])
    sizes = Sizes.from_size(2, 64, 64)
    whole = model.condition(features, sizes, None)
    lost = {part: model.drop_text(part, found, dropped) for part, found in features.items()}
    assert not lost["t5"]["mask"][0].any()
    clip, pooled, width = slice(0, 77), "pooled_projections", 64  # CLIP-L's part of both
    without_l = model.condition({**features, "clip_l": lost["clip_l"]}, sizes, None)
    hidden = without_l["encoder_hidden_states"]
    assert not hidden[0, clip, :width].any()
    assert not without_l[pooled][0, :width].any()
    assert torch.equal(hidden[0, clip, width:], whole["encoder_hidden_states"][0, clip, width:])
    assert torch.equal(hidden[1], whole["encoder_hidden_states"][1])
    without_t5 = model.condition({**features, "t5": lost["t5"]}, sizes, None)["encoder_hidden_states"]
    assert not without_t5[0, 77:].any()
    assert torch.equal(without_t5[:, clip], whole["encoder_hidden_states"][:, clip])
    assert not model.condition(lost, sizes, None)[pooled][0].any()
