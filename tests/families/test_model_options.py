"""Options that hold only for some models, and what a checkpoint declares: in the plan and in the loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from families.toys import ToyShelf
from sfumato.compat.scripts import find_script
from sfumato.config import Config, load_config
from sfumato.config.schema import vocabulary
from sfumato.errors import SeveralErrors, UserError
from sfumato.plan import RunPlan, make_run_plan
from sfumato.train import train
from toy_runs import make_arguments, make_images, read_metrics, read_weights

Toy = Mapping[str, Path]
SCRIPTS = {
    "flux": "flux_train_network",
    "chroma": "flux_train_network",
    "sd3": "sd3_train_network",
    "lumina": "lumina_train_network",
    "sd": "train_network",
    "sdxl": "sdxl_train_network",
}
FLOW = ("flux", "chroma", "sd3", "lumina")
IGNORED = {
    "min_snr_gamma": 5.0,
    "noise_offset": 0.05,
    "noise_offset_random_strength": True,
    "adaptive_noise_scale": 0.01,
    "multires_noise_iterations": 6,
    "multires_noise_discount": 0.4,
}
PERTURBED = {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 3)


def read_options(toy: Toy, images: Path, folder: Path, script: str = "", **options: Any) -> Config:
    """The config of a launcher, or without one of `sfumato train`."""
    presets = find_script(script).presets if script else {}
    presets |= {"model_type": "chroma"} if "chroma" in str(toy["pretrained_model_name_or_path"]) else {}
    return load_config(make_arguments(toy, images, folder, **options), defaults=presets)


def plan(toy: Toy, images: Path, folder: Path, script: str = "", **options: Any) -> RunPlan:
    return make_run_plan(read_options(toy, images, folder, script, **options), processes=1)


def count_notes(found: RunPlan, name: str, words: str) -> int:
    return sum(f"--{name}" in note and words in note for note in found.notes)


@pytest.mark.parametrize("family", FLOW)
def test_a_launcher_ignores_what_its_script_ignores(
    family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    toy, options = toy_shelf.paths(family), IGNORED | PERTURBED
    launched = plan(toy, images, tmp_path, SCRIPTS[family], **options)
    ours = plan(toy, images, tmp_path, **options)
    perturbs = family in ("flux", "chroma")  # whose scripts read --ip_noise_gamma
    for name, value in options.items():
        applied = perturbs and name in PERTURBED
        assert launched.config.value(name) == (value if applied else vocabulary()[name].default), name
        assert count_notes(launched, name, "no effect") == (not applied), name
        assert ours.config.value(name) == value
        assert count_notes(ours, name, "applied") == (not applied), name


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_where_the_scripts_read_them_nothing_is_said(
    family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    options = IGNORED | PERTURBED
    found = plan(toy_shelf.paths(family), images, tmp_path, SCRIPTS[family], **options)
    for name, value in options.items():
        assert found.config.value(name) == value
        assert not count_notes(found, name, "")


@pytest.mark.parametrize("script", ["", "flux_train_network"])
def test_formulas_that_no_flow_has(script: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """They are out of the formulas whoever starts the run, as the plan says."""
    options: dict[str, Any] = {"debiased_estimation_loss": True, "v_pred_like_loss": 0.5}
    options["scale_v_pred_loss_like_noise_pred"] = True
    found = plan(toy_shelf.paths("flux"), images, tmp_path, script, **options)
    for name in options:
        assert found.config.value(name) == vocabulary()[name].default
        assert count_notes(found, name, "no effect") == 1


def test_strict_makes_an_ignored_option_an_error(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    toy = toy_shelf.paths("flux")
    with pytest.raises(UserError) as error:
        plan(toy, images, tmp_path, "flux_train_network", min_snr_gamma=7.0, strict=True)
    assert error.value.code == "checkpoint-note-strict"
    assert plan(toy, images, tmp_path, min_snr_gamma=7.0, strict=True).config.loss.min_snr_gamma == 7


@pytest.mark.parametrize("family", ["flux", "chroma", "lumina"])
def test_a_range_of_timesteps_holds_and_is_said(family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    found = plan(toy_shelf.paths(family), images, tmp_path, SCRIPTS[family], min_timestep=100, max_timestep=900)
    assert (found.config.noise.min_timestep, found.config.noise.max_timestep) == (100, 900)
    assert count_notes(found, "min_timestep", "applied") == count_notes(found, "max_timestep", "applied") == 1


@pytest.mark.parametrize(
    ("family", "prediction", "applied"),
    [
        ("flux", "raw", False),
        ("flux", "additive", False),
        ("flux", "sigma_scaled", True),
        ("flux", None, True),
        ("lumina", None, False),  # raw
        ("lumina", "sigma_scaled", True),
        ("sd3", None, True),
    ],
)
def test_a_weighting_that_a_script_reads_for_some_predictions(
    family: str, prediction: str | None, applied: bool, toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    options = {"weighting_scheme": "cosmap", "model_prediction_type": prediction}
    found = plan(toy_shelf.paths(family), images, tmp_path, SCRIPTS[family], **options)
    assert found.config.noise.weighting_scheme == ("cosmap" if applied else "uniform")
    assert count_notes(found, "weighting_scheme", "no effect") == (not applied)


@pytest.mark.full
@pytest.mark.parametrize("family", FLOW)
def test_the_loss_with_and_without_ignored_options(
    family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    """Gamma and offset: through the launcher the same loss and weights bit for bit, otherwise another loss."""
    toy = toy_shelf.paths(family)
    common = {"max_train_steps": 2, "network_train_unet_only": True}
    given = {"min_snr_gamma": 7.0, "noise_offset": 0.05}
    runs = {
        "launched": (SCRIPTS[family], given),
        "plain": (SCRIPTS[family], {}),
        "ours": ("", given),
        "ours_plain": ("", {}),
    }
    for name, (script, options) in runs.items():
        train(read_options(toy, images, tmp_path / name, script, **common, **options))
    losses = {name: [row.get("loss/current") for row in read_metrics(tmp_path / name)] for name in runs}
    assert losses["launched"] == losses["plain"]
    assert all(a != b for a, b in zip(losses["ours"], losses["ours_plain"], strict=True))
    first, second = read_weights(tmp_path / "launched"), read_weights(tmp_path / "plain")
    assert all(first[name].equal(second[name]) for name in first)


NOTHING = {"noise_offset": 0, "ip_noise_gamma": 0, "multires_noise_iterations": 0, "adaptive_noise_scale": 0}


@pytest.mark.parametrize("script", ["", "flux_train_network"])
def test_numbers_that_ask_for_nothing(script: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """The fields of a form at rest: no note, also with --strict."""
    options = {**NOTHING, "min_timestep": 0, "max_timestep": 1000, "clip_skip": 1, "strict": True}
    found = plan(toy_shelf.paths("flux"), images, tmp_path, script, **options)
    assert not [note for note in found.notes for name in options if f"--{name}" in note]


def declare(toy: Toy, folder: Path, metadata: dict[str, str]) -> Toy:
    """The toy with further metadata; its own names its tokenizer."""
    path, source = folder / "declared.safetensors", toy["pretrained_model_name_or_path"]
    with safe_open(source, "pt") as file:
        save_file(load_file(source), path, {**(file.metadata() or {}), **metadata})
    for name in ("tokenizer", "tokenizer_2"):
        if name in toy and not (folder / name).exists():
            shutil.copytree(toy[name], folder / name)
    return {**toy, "pretrained_model_name_or_path": path}


def test_what_a_checkpoint_declares_is_in_the_config(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    metadata = {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}
    toy = declare(toy_shelf.paths("sdxl"), tmp_path, metadata)
    found = plan(toy, images, tmp_path, strict=True, scale_v_pred_loss_like_noise_pred=True)
    assert found.config.model.v_parameterization
    assert found.config.noise.zero_terminal_snr
    assert sum("declares" in note for note in found.notes) == 2
    other = plan(toy, images, tmp_path, no_v_parameterization=True, no_zero_terminal_snr=True)
    assert not other.config.model.v_parameterization
    assert not other.config.noise.zero_terminal_snr
    assert sum("declares" in note for note in other.notes) == 2


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"v_pred_like_loss": 0.5}, "noise-loss-weight-for-v-prediction"),
        ({"sample_sampler": "k_lms"}, "sampler-cannot-start-from-noise"),
        (
            {"scale_v_pred_loss_like_noise_pred": True, "no_v_parameterization": True, "no_zero_terminal_snr": True},
            "v-loss-weight-for-noise-prediction",
        ),
    ],
)
def test_options_against_what_the_model_predicts(
    options: dict[str, Any], code: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    metadata = {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}
    toy = declare(toy_shelf.paths("sd"), tmp_path, metadata)
    with pytest.raises(UserError) as error:
        plan(toy, images, tmp_path, **options)
    assert error.value.code == code


@pytest.mark.parametrize(
    ("metadata", "size"),
    [
        ({"modelspec.resolution": "64x128"}, (64, 128)),
        ({"ss_resolution": "(128, 128)"}, (128, 128)),
        ({"modelspec.resolution": "128"}, (128, 128)),
        ({"modelspec.resolution": "64x64", "ss_resolution": "(128, 128)"}, (64, 64)),
    ],
)
def test_a_declared_resolution_is_used_where_none_is_given(
    metadata: dict[str, str], size: tuple[int, int], toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    toy = declare(toy_shelf.paths("sd"), tmp_path, metadata)
    found = plan(toy, images, tmp_path, resolution=None)
    assert found.config.buckets.resolution == size
    assert sum("which is used" in note for note in found.notes) == 1
    other = plan(toy, images, tmp_path, resolution=96, strict=True)
    assert other.config.buckets.resolution == (96, 96)
    assert sum("no dataset has it" in note for note in other.notes) == 1
    same = plan(toy, images, tmp_path, resolution=f"{size[0]},{size[1]}")
    assert not [note for note in same.notes if "declares" in note]


@pytest.mark.parametrize("metadata", [{}, {"modelspec.resolution": "large"}, {"ss_resolution": "None"}])
def test_no_resolution_at_all(metadata: dict[str, str], toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    with pytest.raises((UserError, SeveralErrors)) as error:
        plan(declare(toy_shelf.paths("sd"), tmp_path, metadata), images, tmp_path, resolution=None)
    assert error.value.code == "dataset-resolution-missing"


def test_the_resolution_of_a_folder(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """The size of the latents that its network was made for, in pixels."""
    folder = tmp_path / "model"
    shutil.copytree(toy_shelf.paths("sd", "diffusers")["pretrained_model_name_or_path"], folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 16}))
    found = plan({"pretrained_model_name_or_path": folder}, images, tmp_path, resolution=None)
    width, height = found.config.buckets.resolution or (0, 0)
    assert width == height == 16 * found.blueprint.latents.downscale
