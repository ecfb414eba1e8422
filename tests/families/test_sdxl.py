"""What is particular to Stable Diffusion XL: two encoders, sizes, key maps at the published configuration."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

import toy_runs
from families.loading import load_model, read_model
from families.toys import ToyShelf
from keys import CLIP_G, CLIP_L, UNETS, on_meta, round_trip, same, shapes_of, tagged
from sfumato.config import ModelOptions, NoiseOptions, load_config
from sfumato.data.batch import Sizes
from sfumato.errors import UserError
from sfumato.families import _clip, _open_clip, _unet, _vae, sdxl
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.encoding import encode_with_grad
from sfumato.families.part import DENOISER_PREFIX
from sfumato.families.sdxl import CLIP_G_KEYS
from sfumato.plan import make_run_plan
from toy_runs import make_arguments, make_images, read_weights, train_toy
from warm_python import run_ranks

CAPTIONS = ["a cat", "a red cup of coffee on a wooden table with a cat and a dog"]
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
LAST_OF_CLIP_L = "lora_te1_text_model_encoder_layers_1_"


@pytest.fixture(scope="module")
def toy(toy_shelf: ToyShelf) -> Mapping[str, Path]:
    return toy_shelf.paths("sdxl")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def read(path: Path, noise: NoiseOptions | None = None, **options: Any) -> Blueprint:
    return read_model(ModelOptions(pretrained_model_name_or_path=str(path), **options), noise)


def load(path: Path, **options: Any) -> Family:
    return load_model(ModelOptions(pretrained_model_name_or_path=str(path), **options), family="sdxl")


def test_unet_keys() -> None:
    config = UNETS["sdxl"]
    unet = on_meta(lambda: _unet.build(config))
    original = round_trip(_unet.key_map(config), tagged(unet))
    assert len(original) == 1680
    file = {"model.diffusion_model." + name: tensor for name, tensor in original.items()}
    same(tagged(unet), single_file_utils.convert_ldm_unet_checkpoint(file, dict(unet.config)))


def test_configuration_from_shapes() -> None:
    unet = on_meta(lambda: _unet.build(UNETS["sdxl"]))
    original = _unet.key_map(UNETS["sdxl"]).to_original(unet.state_dict())
    found = _unet.config_from_shapes({name: tuple(tensor.shape) for name, tensor in original.items()})
    found |= {"addition_time_embed_dim": 256, **_unet.count_heads(found)}
    assert {name: found[name] for name in UNETS["sdxl"]} == UNETS["sdxl"]
    assert shapes_of(on_meta(lambda: _unet.build(found))) == shapes_of(unet)


@pytest.mark.full
def test_second_encoder_keys() -> None:
    """Rows at their real numbers; the projection, which is transposed, whole."""
    encoder = on_meta(lambda: _open_clip.build_projected(CLIP_G))
    state = tagged(encoder, columns=1)
    state["text_projection.weight"] = torch.arange(1280 * 1280).reshape(1280, 1280)
    original = round_trip(CLIP_G_KEYS, state)
    assert len(original) == 32 * 12 + 5
    theirs = single_file_utils.convert_open_clip_checkpoint(encoder, original | {"logit_scale": torch.zeros(())}, "")
    same(state, theirs)


def test_encoder_configurations_from_shapes() -> None:
    for build, config, found in (
        (_clip.build, CLIP_L, _clip.config_from_shapes),
        (_open_clip.build_projected, CLIP_G, _open_clip.config_from_shapes),
    ):
        assert found(shapes_of(on_meta(lambda build=build, config=config: build(config)))) == config


def test_a_published_file_is_understood_from_its_header(tmp_path: Path) -> None:
    """A sparse file with every key of the full model: nothing but the header is read."""
    unet = on_meta(lambda: _unet.build(UNETS["sdxl"]))
    clip_l, clip_g = on_meta(lambda: _clip.build(CLIP_L)), on_meta(lambda: _open_clip.build_projected(CLIP_G))
    vae = on_meta(lambda: _vae.build(VAE))
    position_ids = "text_model.embeddings.position_ids"
    parts = {
        DENOISER_PREFIX: _unet.key_map(UNETS["sdxl"]).to_original(unet.state_dict()),
        sdxl.CLIP_L_PREFIX: _clip.key_map().to_original(clip_l.state_dict()) | {position_ids: torch.zeros(1, 77)},
        sdxl.CLIP_G_PREFIX: CLIP_G_KEYS.to_original(clip_g.state_dict()) | {"logit_scale": torch.zeros(())},
        _vae.VAE_PREFIX: _vae.key_map(4).to_original(vae.state_dict()),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, part in parts.items():
        shapes |= {prefix + name: tuple(tensor.shape) for name, tensor in part.items()}
    assert len(shapes) == 2515
    write_hollow(tmp_path / "xl.safetensors", shapes)
    blueprint = read(tmp_path / "xl.safetensors")
    networks = blueprint.networks
    config = dict(networks["denoiser"].config)
    assert {name: config[name] for name in UNETS["sdxl"]} == UNETS["sdxl"]
    assert (networks["clip_l"].config, networks["clip_g"].config) == (CLIP_L, CLIP_G)
    assert {name: len(networks[name].groups()) for name in ("denoiser", "clip_l", "clip_g")} == {
        "denoiser": 722, "clip_l": 72, "clip_g": 192,
    }  # fmt: skip


def write_hollow(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file in float16 whose data is one large hole."""
    entries: dict[str, Any] = {}
    place = 0
    for name, shape in shapes.items():
        end = place + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)


def test_text_is_read_before_the_last_layer_and_pooled_at_the_first_end(toy: Mapping[str, Path]) -> None:
    """Against the layers called by hand."""
    model = load(toy["pretrained_model_name_or_path"])
    encoder: Any = model.parts["clip_g"].module
    ids = model.tokenizers["clip_g"](CAPTIONS, padding="max_length", return_tensors="pt").input_ids  # pyright: ignore
    assert (ids[0, 4:] == 0).all()  # begin, two words, end, then padding with 0
    tower = encoder.text_model
    mask = torch.full((77, 77), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        x = tower.embeddings(ids)
        states = [x := layer(x, mask) for layer in tower.encoder.layers]
        last = tower.final_layer_norm(states[-1])
        ends = [row.index(model.tokenizers["clip_g"].eos_token_id) for row in ids.tolist()]  # pyright: ignore
        pooled = last[torch.arange(2), ends] @ encoder.text_projection.weight.T
        found = encode_with_grad(model, "clip_g", CAPTIONS)
    torch.testing.assert_close(found["hidden"], states[-2], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["pooled"], pooled, rtol=0, atol=1e-5)


def test_sizes_reach_the_denoiser_in_the_order_of_the_original(toy: Mapping[str, Path]) -> None:
    model = load(toy["pretrained_model_name_or_path"])
    features = {part: encode_with_grad(model, part, CAPTIONS) for part in model.text_parts}
    sizes = Sizes(
        original=torch.tensor([[1021, 768], [64, 64]]), crop=torch.tensor([[3, 5], [0, 0]]),
        target=torch.tensor([[512, 640], [64, 64]]),
    )  # fmt: skip
    conditioning = model.condition(features, sizes, None)
    assert conditioning["time_ids"].tolist()[0] == [1021.0, 768.0, 3.0, 5.0, 512.0, 640.0]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one = model.predict(x, torch.full((2,), 500.0), conditioning)
        plain = model.predict(x, torch.full((2,), 500.0), model.condition(features, Sizes.from_size(2, 64, 64), None))
    assert (one[0] - plain[0]).abs().max() > 1e-3
    torch.testing.assert_close(one[1], plain[1], rtol=0, atol=1e-6)


def test_longer_captions(toy: Mapping[str, Path]) -> None:
    """The first chunk is what a short caption has; the pooled vector is the first chunk's."""
    words = " ".join(["cat", "dog", "red"] * 40)
    path = toy["pretrained_model_name_or_path"]
    short, long = load(path), load(path, max_token_length=225)
    for part in ("clip_l", "clip_g"):
        whole, first = encode_with_grad(long, part, ["a cat", words]), encode_with_grad(short, part, ["a cat", words])
        assert whole["hidden"].shape[:2] == (2, 227)
        torch.testing.assert_close(whole["hidden"][:, :76], first["hidden"][:, :76], rtol=0, atol=1e-5)
        assert (whole["hidden"][1, 76:121] - whole["hidden"][0, 76:121]).abs().max() > 0.1
        assert long.text_fingerprint(part) != short.text_fingerprint(part)
    torch.testing.assert_close(
        encode_with_grad(long, "clip_g", [words])["pooled"],
        encode_with_grad(short, "clip_g", [words])["pooled"],
        rtol=0,
        atol=1e-5,
    )


def test_what_the_checkpoint_is(toy: Mapping[str, Path]) -> None:
    blueprint = read(toy["pretrained_model_name_or_path"])
    assert blueprint.base_model_version == "sdxl_base_v1-0"
    assert blueprint.architecture == "stable-diffusion-xl-v1-base"
    assert blueprint.latents.scale == 0.13025
    assert blueprint.objective.predicts == "epsilon"
    assert read(toy["pretrained_model_name_or_path"], v_parameterization=True).objective.predicts == "v"
    with pytest.raises(UserError) as error:
        read(toy["pretrained_model_name_or_path"], v2=True)
    assert error.value.code == "v2-version-mismatch"


def test_a_marked_v_prediction_file_is_trained_by_its_marks(toy: Mapping[str, Path], tmp_path: Path) -> None:
    tensors = load_file(toy["pretrained_model_name_or_path"])
    save_file(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "v.safetensors")
    marked = read(tmp_path / "v.safetensors")
    assert (marked.objective.predicts, marked.notes, len(marked.declared)) == ("v", (), 2)
    assert marked.objective.level(torch.tensor([999.0])).snr.item() == 0
    repeated = read(tmp_path / "v.safetensors", NoiseOptions(zero_terminal_snr=True), v_parameterization=True)
    assert (repeated.objective, repeated.notes, repeated.declared) == (marked.objective, (), ())
    plain = read(tmp_path / "v.safetensors", NoiseOptions(zero_terminal_snr=False), v_parameterization=False)
    assert (plain.objective.predicts, len(plain.notes), plain.declared) == ("epsilon", 2, ())
    assert plain.objective.level(torch.tensor([999.0])).snr.item() > 0


def test_clip_skip_has_no_effect_and_the_report_says_so(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    command = make_arguments(toy, images, tmp_path, clip_skip=2)
    assert make_run_plan(load_config(command), processes=1).notes == (
        "--clip_skip has no effect on a model of the family sdxl",
    )
    with pytest.raises(UserError, match="--clip_skip has no effect"):
        make_run_plan(load_config([*command, "--strict"]), processes=1)


@pytest.mark.full
def test_a_file_in_diffusers_names_is_read(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    first = train_toy(toy, images, tmp_path / "first", network_train_unet_only=True)
    blueprint = read(toy["pretrained_model_name_or_path"])
    groups = blueprint.networks["denoiser"].groups()
    other = {group.name: "lora_unet_" + group.paths[0].replace(".", "_") for group in groups}
    renamed = {f"{other[key.partition('.')[0]]}.{key.partition('.')[2]}": t for key, t in read_weights(first).items()}
    assert "lora_unet_down_blocks_1_attentions_0_proj_in.alpha" in renamed
    save_file(renamed, tmp_path / "diffusers.safetensors")
    again = train_toy(
        toy, images, tmp_path / "again", network_train_unet_only=True, dim_from_weights=True, learning_rate="1e-12",
        network_weights=tmp_path / "diffusers.safetensors",
    )  # fmt: skip
    before, after = read_weights(first), read_weights(again)
    assert set(before) == set(after)
    assert all(torch.allclose(before[name], after[name], atol=1e-7) for name in before)
    save_file(renamed | read_weights(first), tmp_path / "both.safetensors")
    with pytest.raises(UserError, match=r"both\.safetensors") as error:
        train_toy(
            toy, images, tmp_path / "x", network_train_unet_only=True, network_weights=tmp_path / "both.safetensors"
        )
    assert error.value.code == "adapter-layer-twice"


@pytest.mark.full
def test_one_encoder_trains_and_the_other_is_cached(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    options = {"text_encoder_lr": ["1e-3", "0"], "max_train_steps": 3}
    live = train_toy(toy, images, tmp_path / "live", **options)
    cached = train_toy(toy, images, tmp_path / "cached", cache_text_encoder_outputs=True, **options)
    assert toy_runs.equal_tensors(read_weights(live), read_weights(cached))
    assert {name.split("_text_model")[0] for name in read_weights(live) if name.startswith("lora_te")} == {"lora_te1"}


@pytest.mark.parametrize(
    ("given", "launched", "expected", "lines"),
    [
        (["1e-3", "1e-4"], True, (1e-3, 1e-3), 1),  # networks.lora of sd-scripts reads the first alone
        (["1e-3", "1e-4"], False, (1e-3, 1e-4), 0),
        (["1e-3", "1e-3"], True, (1e-3, 1e-3), 0),
        (["1e-3"], True, (1e-3, 1e-3), 0),
        (["1e-3", "0"], True, (1e-3, 1e-3), 1),
    ],
)
def test_two_learning_rates_of_text_encoders_under_a_launcher(
    toy: Mapping[str, Path], images: Path, tmp_path: Path, given, launched, expected, lines
) -> None:
    argv = make_arguments(toy, images, tmp_path, text_encoder_lr=given)
    config = load_config(argv, defaults={"family": "sdxl", "method": "adapter"} if launched else {})
    plan = make_run_plan(config, processes=1)
    found = {part.part: part.learning_rate for part in plan.parts}
    assert (found["clip_l"], found["clip_g"]) == expected
    assert len([note for note in plan.notes if "--text_encoder_lr" in note]) == lines


@pytest.mark.full
def test_two_processes_leave_unreached_layers_as_one_does(
    toy: Mapping[str, Path], images: Path, tmp_path: Path
) -> None:
    """Weight decay would move the down matrices of layers that never get a gradient."""
    options = {"max_train_steps": 3, "optimizer_args": ["weight_decay=0.5", "eps=0.01"]}
    alone = train_toy(toy, images, tmp_path / "alone", train_batch_size=2, **options)
    script = Path(__file__).parents[2] / "launchers" / "sdxl_train_network.py"
    command = make_arguments(toy, images, tmp_path / "both", train_batch_size=1, **options)
    run_ranks(script, *command)
    ours, theirs = read_weights(tmp_path / "both"), read_weights(alone)
    unreached = [name for name in theirs if name.startswith(LAST_OF_CLIP_L)]
    assert unreached
    assert all(torch.equal(ours[name], theirs[name]) for name in unreached)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)
