"""Training Stable Diffusion 3: which encoders train, dropouts, places in the table, and files for diffusers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from families.sd3_toys import CAPTIONS, checkpoint, conditioning, load, read, without
from families.toys import ToyShelf
from sfumato.adapters.base import AdapterEngine
from sfumato.adapters.kinds import read_adapter_file
from sfumato.adapters.lora import LoRA
from sfumato.config import NoiseOptions, load_config
from sfumato.errors import UserError
from sfumato.families._sd3_patches import find_nearest_side, make_scaled_table
from sfumato.families.sd3 import count_side_patches
from sfumato.plan import RunPlan, make_run_plan
from sfumato.tools.export_lora import export_lora
from toy_runs import equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy


@pytest.fixture(scope="module")
def toy(toy_shelf: ToyShelf) -> dict[str, Path]:
    return toy_shelf.paths("sd3")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 3)


def outlook(toy: Mapping[str, Path], images: Path, output: Path, **options: Any) -> RunPlan:
    """What a run would do."""
    argv = make_arguments(toy, images, output, **{"network_module": "networks.lora_sd3", **options})
    return make_run_plan(load_config(argv), processes=1)


@pytest.mark.full
def test_dropouts_are_the_samples_own(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    """Cached or live, they hit the same samples; and they change what is learned."""
    rates = {"clip_l_dropout_rate": 0.4, "clip_g_dropout_rate": 0.4, "t5_dropout_rate": 0.4}
    options = {"network_train_unet_only": True, "max_train_steps": 4}
    plain = train_toy(toy, images, tmp_path / "plain", **options)
    live = train_toy(toy, images, tmp_path / "live", **options, **rates)
    cached = train_toy(toy, images, tmp_path / "cached", **options, **rates, cache_text_encoder_outputs=True)
    assert read_metrics(live) == read_metrics(cached)
    assert equal_tensors(read_weights(live), read_weights(cached))
    assert not equal_tensors(read_weights(live), read_weights(plain))


def test_a_dropout_rate_without_its_encoder_is_noted(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    path = tmp_path / "sd3.safetensors"
    save_file(without(load_file(toy["pretrained_model_name_or_path"]), "t5"), path)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(toy[name], tmp_path / name)
    found = outlook({"pretrained_model_name_or_path": path}, images, tmp_path / "out", t5_dropout_rate=0.1)
    assert "--t5_dropout_rate has no effect: there is no text encoder t5" in found.notes


@pytest.mark.full
def test_what_trains_is_encoded_and_the_rest_is_cached(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    """Both CLIPs train without more ado, T5 when asked; cached and live give the same file."""
    rates = {"text_encoder_lr": ["1e-3", "5e-4", "0"], "max_train_steps": 2}
    live = train_toy(toy, images, tmp_path / "live", **rates)
    cached = train_toy(toy, images, tmp_path / "cached", **rates, cache_text_encoder_outputs=True)
    assert equal_tensors(read_weights(live), read_weights(cached))
    assert {name.split("_")[1] for name in read_weights(live)} == {"unet", "te1", "te2"}
    asked = {"network_args": ["train_t5xxl=True"], "text_encoder_lr": ["1e-3", "5e-4", "2e-4"], "max_train_steps": 1}
    whole = train_toy(toy, images, tmp_path / "whole", **asked)
    assert {name.split("_")[1] for name in read_weights(whole)} == {"unet", "te1", "te2", "te3"}
    planned = outlook(toy, images, tmp_path / "x", **asked)
    rows = {row.part: row.learning_rate for row in planned.method.plan(planned.blueprint)}
    assert rows == {"denoiser": 1e-3, "clip_l": 1e-3, "clip_g": 5e-4, "t5": 2e-4}
    with pytest.raises(UserError) as error:
        outlook(toy, images, tmp_path / "x", **asked, cache_text_encoder_outputs=True)
    assert error.value.code == "text-cache-of-trained-encoders"
    alone = train_toy(toy, images, tmp_path / "alone", network_train_text_encoder_only=True, max_train_steps=1)
    assert {name.split("_")[1] for name in read_weights(alone)} == {"te1", "te2"}


def test_the_position_table_does_not_train(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    """Neither planned nor trained; the rest is."""
    planned = outlook(toy, images, tmp_path, method="full", network_dim=None, network_module=None)
    (row,) = planned.method.plan(planned.blueprint)
    denoiser = load(**checkpoint(toy)).denoiser
    assert row.parameters == sum(parameter.numel() for parameter in denoiser.parameters())


def test_what_the_file_says_of_its_training(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    options = {"weighting_scheme": "logit_normal", "logit_std": 0.5, "apply_lg_attn_mask": True, "max_train_steps": 1}
    output = train_toy(
        toy, images, tmp_path, network_train_unet_only=True, network_module="networks.lora_sd3", **options
    )
    with safe_open(output / "lora.safetensors", "pt") as found:
        said = found.metadata()
    golden = json.loads((Path(__file__).parents[1] / "goldens" / "metadata_keys.json").read_text())
    assert all(name in said for name in golden["extra_keys_by_family"]["sd3"])
    assert said["ss_weighting_scheme"] == "logit_normal"
    assert (said["ss_logit_std"], said["ss_apply_lg_attn_mask"]) == ("0.5", "True")
    assert said["ss_base_model_version"] == "medium"
    assert said["modelspec.architecture"] == "stable-diffusion-3-medium/lora"
    assert "modelspec.prediction_type" not in said


@pytest.mark.parametrize(
    ("noise", "notes"),
    [
        ({}, []),
        ({"discrete_flow_shift": 3.0}, ["--discrete_flow_shift has no effect without --timestep_sampling"]),
        ({"sigmoid_scale": 2.0}, ["--sigmoid_scale has no effect without --timestep_sampling"]),
        ({"timestep_sampling": "shift", "sigmoid_scale": 2.0, "discrete_flow_shift": 3.0}, []),
        ({"timestep_sampling": "uniform", "training_shift": 3.0}, ["--training_shift has no effect"]),
    ],
)
def test_shifts_without_effect_are_noted(noise: dict[str, Any], notes: list[str], toy: Mapping[str, Path]) -> None:
    blueprint = read(NoiseOptions(**noise), **checkpoint(toy))
    assert len(blueprint.notes) == len(notes)
    assert all(note.startswith(start) for note, start in zip(blueprint.notes, notes, strict=True))


def test_random_crops_of_the_position_table_only_in_training(toy_shelf: ToyShelf) -> None:
    """Every image has its own crop, a window of the table; without gradients there are no random crops."""
    model = load(**checkpoint(toy_shelf.paths("sd3", "original", "3.5-medium")), pos_emb_random_crop_rate=0.5)
    assert model.blueprint.notes == ()
    patches = model.denoiser.pos_embed
    latent = torch.zeros(40, 16, 8, 8)
    bias = patches.proj.bias
    torch.manual_seed(0)
    places = (patches(latent) - bias).reshape(40, 4, 4, -1)
    table = patches.pos_embed.reshape(24, 24, -1)
    windows = table.unfold(0, 4, 1).unfold(1, 4, 1).permute(0, 1, 3, 4, 2)
    middle, moved = windows[10, 10], 0
    for each in places:
        distances = (windows - each).abs().amax(dim=(2, 3, 4))
        assert distances.min() < 1e-5
        moved += int((each - middle).abs().max() > 1e-5)
    assert 10 < moved < 30
    with torch.no_grad():
        assert torch.equal(patches(latent), patches(latent[:1]).expand(40, -1, -1))


def test_scaled_table() -> None:
    """Closed form: the middle spans 0 to 16, whatever the size; columns first, then rows; sines, then cosines."""
    for side in (4, 8, 9):
        table = make_scaled_table(side, 16).double()
        size = int(1.5 * side)
        assert table.shape == (size, size, 16)
        for row, column, channel in ((0, 0, 0), (1, size - 1, 1), (size - 1, 2, 3)):
            x, y = (16 * (place - (size - side) / 2) / side for place in (column, row))
            angle = 10000 ** -(channel / 4)
            expected = [math.sin(x * angle), math.cos(x * angle), math.sin(y * angle), math.cos(y * angle)]
            assert table[row, column, channel::4].tolist() == pytest.approx(expected, abs=1e-5)


def test_tables_are_chosen_by_area(toy_shelf: ToyShelf) -> None:
    assert [count_side_patches(*size) for size in ((512, 512), (1024, 1024), (832, 1216), (768, 512))] == [
        32,
        64,
        62,
        39,
    ]
    assert [find_nearest_side((32, 64), area) for area in (1, 2560, 2561, 10**6)] == [32, 32, 64, 64]
    model = load(**checkpoint(toy_shelf.paths("sd3", "original", "3.5-medium")), enable_scaled_pos_embed=True)
    patches = model.denoiser.pos_embed
    keys = set(patches.state_dict())
    model.set_resolutions([(64, 64), (128, 128)])
    assert set(patches.state_dict()) == keys
    zeros = torch.zeros(1, 16, 8, 8)
    with torch.no_grad():
        found = (patches(zeros) - patches.proj.bias)[0]
        torch.testing.assert_close(found, make_scaled_table(4, 128)[1:5, 1:5].flatten(0, 1), rtol=0, atol=1e-5)
        wide = (patches(torch.zeros(1, 16, 4, 40)) - patches.proj.bias)[0]  # 2 x 20 patches fit neither table
    table = patches.pos_embed.reshape(24, 24, -1)
    torch.testing.assert_close(wide, table[11:13, 2:22].flatten(0, 1), rtol=0, atol=1e-5)


def test_options_of_one_version_are_noted_on_another(toy: Mapping[str, Path]) -> None:
    blueprint = read(**checkpoint(toy), pos_emb_random_crop_rate=0.1, enable_scaled_pos_embed=True)
    assert len(blueprint.notes) == 2
    assert [note.split()[0] for note in blueprint.notes] == ["--pos_emb_random_crop_rate", "--enable_scaled_pos_embed"]


@pytest.mark.full
def test_training_with_scaled_tables_and_random_crops(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    toy = toy_shelf.paths("sd3", "original", "3.5-medium")
    options = {"network_train_unet_only": True, "max_train_steps": 2, "gradient_checkpointing": True}
    plain = train_toy(toy, images, tmp_path / "plain", **options)
    options |= {"pos_emb_random_crop_rate": 0.5, "enable_scaled_pos_embed": True}
    first, second = (train_toy(toy, images, tmp_path / name, **options) for name in "ab")
    assert read_metrics(first) == read_metrics(second)
    assert read_metrics(first) != read_metrics(plain)


def test_an_image_larger_than_the_position_table(toy: Mapping[str, Path]) -> None:
    model = load(**checkpoint(toy))
    with pytest.raises(UserError, match="32 x 4") as error:
        model.denoiser.pos_embed(torch.zeros(1, 16, 64, 8))
    assert error.value.code == "image-exceeds-position-table"


@pytest.mark.full
@torch.no_grad()
def test_a_trained_lora_under_diffusers_names_gives_the_same(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """diffusers reads no kohya-format SD3 files; exported, it reads every layer of them."""
    from diffusers import StableDiffusion3Pipeline

    toy = toy_shelf.paths("sd3", "original", "3.5-medium")
    options = {"network_alpha": 1, "learning_rate": "3e-2", "network_args": ["emb_dims=[2,2,2,2,2,2]"]}
    with torch.enable_grad():
        output = train_toy(toy, images, tmp_path, network_train_unet_only=True, **options)
    entries, model = read_adapter_file(output / "lora.safetensors").layers, load(**checkpoint(toy))
    groups = {group.name: group for group in model.parts["denoiser"].groups(every=True) if not group.is_norm}
    assert set(entries) == set(groups)
    export_lora(output / "lora.safetensors", tmp_path / "theirs.safetensors", program="diffusers")
    folder = toy_shelf.paths("sd3", "diffusers", "3.5-medium")["pretrained_model_name_or_path"]
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(folder)
    text, t = conditioning(model, CAPTIONS[:1]), torch.tensor([600.0])
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    before = pipe.transformer(hidden_states=x, timestep=t, **text).sample
    pipe.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    assert lora_layers(pipe) == sum(len(group.paths) for group in groups.values())
    found = pipe.transformer(hidden_states=x, timestep=t, **text).sample
    engine = AdapterEngine()
    engine.attach(list(groups.values()), lambda group: LoRA.from_tensors(group, entries[group.name]))
    assert (found - before).abs().max() > 1e-2
    torch.testing.assert_close(model.predict(x, t, text), found, rtol=0, atol=1e-5)


def lora_layers(pipe: Any) -> int:
    return sum(1 for module in pipe.transformer.modules() if isinstance(getattr(module, "lora_A", None), nn.ModuleDict))


def test_diffusers_loads_nothing_of_a_file_as_it_is(toy_shelf: ToyShelf) -> None:
    """Why the test above goes by diffusers' names; once this fails, it can load the file itself."""
    from diffusers import StableDiffusion3Pipeline

    folder = toy_shelf.paths("sd3", "diffusers")["pretrained_model_name_or_path"]
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(folder)
    name = "lora_unet_joint_blocks_0_x_block_mlp_fc1"
    down, up = torch.ones(2, 128), torch.ones(512, 2)
    pipe.load_lora_weights(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    )
    assert lora_layers(pipe) == 0
