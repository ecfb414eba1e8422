"""Toy checkpoints: what is in their files, who can load them, and the command that is printed for them."""

from __future__ import annotations

import hashlib
import inspect
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file

from families.loading import load_family
from families.toys import ToyShelf
from sfumato.cli.toy import main
from sfumato.config import NoiseOptions
from sfumato.data.batch import Sizes
from sfumato.demo.toy import TOYS, list_toy_families, register_toys, write_toy
from sfumato.errors import UserError
from sfumato.families import register_families
from sfumato.families.base import Family, find_family
from sfumato.families.encoding import encode_with_grad
from sfumato.families.source import open_source
from warm_python import run_script

register_toys()
register_families()
VARIANTS: list[tuple[str, str]] = []
for toy_family in list_toy_families():
    VARIANTS += [(toy_family, toy_variant) for toy_variant in TOYS.get(toy_family).variants]


def load(options: Any, name: str | None = None) -> Family:
    source = open_source(options)
    family = find_family(name, source)
    blueprint = family.read(source, options, NoiseOptions())
    return load_family(family, blueprint, options)


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_both_layouts_are_detected_and_hold_the_same_weights(toy_shelf: ToyShelf, family: str, variant: str) -> None:
    original = toy_shelf.options(family, "original", variant)
    first = load(original, original.model_type)  # a single file cannot say that it is Kontext
    second = load(toy_shelf.options(family, "diffusers", variant))
    assert first.name == second.name == family
    assert set(first.parts) == set(second.parts)
    modules = [(first.parts[name].module, second.parts[name].module) for name in first.parts]
    for ours, theirs in [*modules, (first.vae, second.vae)]:
        expected = theirs.state_dict()
        assert set(ours.state_dict()) == set(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("family", list_toy_families())
@torch.no_grad()
def test_nothing_vanishes_or_explodes(toy_shelf: ToyShelf, family: str) -> None:
    """Activations keep their size through every network, so that a fault anywhere shows at the end."""
    model = load(toy_shelf.options(family))
    noise = torch.Generator().manual_seed(0)
    shape = (2, model.latents.channels, 8, 8)
    latents = model.encode_image(torch.rand(2, 3, 64, 64, generator=noise) * 2 - 1, torch.zeros(shape))
    image = model.decode(torch.randn(shape, generator=noise))
    features = {
        part: encode_with_grad(model, part, ["a photo of a cat", "a wide picture"]) for part in model.text_parts
    }
    conditioning = model.condition(features, Sizes.from_size(2, 64, 64), None)
    prediction = model.predict(torch.randn(shape, generator=noise), torch.tensor([100.0, 900.0]), conditioning)
    for tensor in (latents, image, prediction):
        assert torch.isfinite(tensor).all()
        assert 0.05 < tensor.std() < 3


@pytest.mark.parametrize("family", list_toy_families())
def test_bytes_are_a_function_of_the_seed_and_no_generator_is_touched(tmp_path: Path, family: str) -> None:
    before = torch.get_rng_state()
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        write_toy(family, tmp_path / name, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    first, second, other = (hashes(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    weights = [name for name in first if name.endswith(".safetensors")]
    assert weights
    assert all(first[name] != other[name] for name in weights)


@pytest.mark.parametrize("family", list_toy_families())
def test_diffusers_makes_an_image_from_the_folder(toy_shelf: ToyShelf, family: str) -> None:
    folder = toy_shelf.paths(family, "diffusers")["pretrained_model_name_or_path"]
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64}
    if "max_area" in inspect.signature(pipeline.__call__).parameters:
        size["max_area"] = 64 * 64  # what Kontext's pipeline scales every size to
    image = pipeline(prompt="a photo of a cat", num_inference_steps=2, output_type="np", **size).images[0]
    assert image.shape == (64, 64, 3)
    assert 0.1 < image.std() < 0.5


def test_diffusers_reads_the_single_file_as_an_original_checkpoint(toy_shelf: ToyShelf) -> None:
    file = load_file(toy_shelf.paths("sd")["pretrained_model_name_or_path"])
    folder = toy_shelf.paths("sd", "diffusers")["pretrained_model_name_or_path"]
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    networks = (
        (pipeline.unet, single_file_utils.convert_ldm_unet_checkpoint),
        (pipeline.vae, single_file_utils.convert_ldm_vae_checkpoint),
    )
    for network, convert in networks:
        expected, found = network.state_dict(), convert(dict(file), dict(network.config))
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_single_file_holds_the_usual_leftovers(toy_shelf: ToyShelf) -> None:
    with safe_open(toy_shelf.paths("sd")["pretrained_model_name_or_path"], "pt") as file:
        ids = file.get_tensor("cond_stage_model.transformer.text_model.embeddings.position_ids")
        betas = file.get_tensor("betas")
        assert ids.dtype == torch.int64
        assert ids.tolist() == [list(range(77))]
        expected = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        torch.testing.assert_close(betas.double(), expected, rtol=2e-4, atol=0)
        assert {"alphas_cumprod", "posterior_mean_coef2", "model_ema.decay"} <= set(file.keys())


def test_text_encoder_files_have_the_names_in_use(toy_shelf: ToyShelf) -> None:
    paths = toy_shelf.paths("flux")
    clip, t5, ae, dit = (
        set(load_file(paths[name])) for name in ("clip_l", "t5xxl", "ae", "pretrained_model_name_or_path")
    )
    assert all(name.startswith("text_model.") for name in clip)
    assert "shared.weight" in t5
    assert "encoder.embed_tokens.weight" not in t5
    assert {"encoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight"} <= ae
    assert not any("quant_conv" in name for name in ae)
    assert {"guidance_in.in_layer.weight", "single_blocks.1.linear1.weight"} <= dit
    schnell = load_file(toy_shelf.paths("flux", variant="schnell")["pretrained_model_name_or_path"])
    assert not any(name.startswith("guidance_in") for name in schnell)


def test_unknown_families_and_variants_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'fluxx'.*'flux'"):
        write_toy("fluxx", tmp_path)
    with pytest.raises(UserError, match=r"'schnel'.*'schnell'") as error:
        write_toy("flux", tmp_path, variant="schnel")
    assert error.value.code == "toy-variant-unknown"
    assert not list(tmp_path.iterdir())


def test_the_last_line_names_every_component(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "it's a toy"
    assert main(["flux", str(folder)]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))
    for name in ("pretrained_model_name_or_path", "clip_l", "t5xxl", "ae"):
        assert Path(options[name]).is_absolute()
        assert Path(options[name]).is_file()
    assert Path(options["train_data_dir"]).is_dir()
    assert options["max_train_steps"] == "10"


@pytest.mark.full
@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_the_printed_command_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, variant: str
) -> None:
    folder = tmp_path / "it's a toy"
    assert main([family, str(folder), "--variant", variant]) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    if (family, variant) == VARIANTS[0]:
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        python, script, *words = shlex.split(command)
        codes, output = run_script(Path(script), words, folder=tmp_path)
        assert (python, codes) == (sys.executable, [0]), output
    assert [path.name for path in (folder / "output").glob("*.safetensors")] == ["last.safetensors"]
