"""ControlNet-LLLite: against its structure written out, generated with, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

from families.loading import load_model, read_model
from families.toys import ToyShelf
from methods.control_training import ControlShelf, Trained
from methods.lllite_written_out import VersionOne
from sfumato.adapters.lllite import LLLite
from sfumato.cli.generate import main as generate_command
from sfumato.config import ModelOptions
from sfumato.data.batch import CONTROL, Extras, ImageInput
from sfumato.errors import SeveralErrors, UserError
from sfumato.families._unet_control_net import list_unet_layers
from sfumato.families.published import write_published
from sfumato.methods.inference_adapters import InferenceAdapters
from toy_runs import read_metrics, read_weights

OPTIONS = {"method": "lllite", "network_dim": 8, "cond_emb_dim": 4, "learning_rate": "1e-2"}


@pytest.fixture(scope="module")
def trained(control_shelf: ControlShelf, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Four steps and a preview."""
    found = control_shelf.get("sdxl")
    output = tmp_path_factory.mktemp("lllite")
    prompts = output / "prompts.txt"
    prompts.write_text(f"a cat --w 64 --h 64 --s 2 --d 1 --cn {found.control_image}\n")
    more = {"sample_prompts": prompts, "sample_every_n_steps": 4}
    found.train(output, **OPTIONS, **more)
    return Trained(found.family, found.toy, found.options, found.images, found.controls, output)


@pytest.mark.full
def test_inputs_of_layers_change_as_written_out(trained: Trained) -> None:
    model = load_model(trained.options)
    adapters = InferenceAdapters(model, [], lllite=[trained.file])
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    adapters.set_batch(model, Extras(images={CONTROL: ImageInput(pixels=image)}))
    (attached,) = adapters.controlled
    assert isinstance(attached, LLLite)
    written, seen = VersionOne(read_weights(trained.output)), 0
    for module in attached.iterate():
        layer: Any = model.denoiser.get_submodule(module.layer.path)
        side = module.layer.token_side
        x = torch.randn(2, -(-64 // side) * -(-96 // side), module.layer.inputs)
        if 96 % side == 0:
            change = written.change(module.layer.name, x, image)
            torch.testing.assert_close(layer(x), F.linear(x + change, layer.weight, layer.bias), rtol=0, atol=1e-5)
            assert change.abs().max() > 1e-6
            seen += 1
        else:
            assert layer(x).shape == (2, x.shape[1], layer.weight.shape[0])
    assert seen
    adapters.set_batch(model, Extras())
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_what_the_file_says(trained: Trained) -> None:
    with safe_open(trained.file, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/control-net-lllite"
    assert (metadata["ss_network_dim"], metadata["ss_cond_emb_dim"]) == ("8", "4")


@pytest.mark.full
def test_the_loss_falls(trained: Trained, tmp_path: Path) -> None:
    options = {**OPTIONS, "min_timestep": 400, "max_timestep": 401, "max_train_steps": 24}
    losses = [row["loss/current"] for row in read_metrics(trained.train(tmp_path, **options))]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


def test_generate_makes_the_preview_again(trained: Trained, tmp_path: Path) -> None:
    (preview,) = (trained.output / "sample").glob("*.png")
    given = trained.options.model_dump(exclude_defaults=True)
    line = [word for name, value in given.items() if not isinstance(value, tuple) for word in (f"--{name}", str(value))]
    line += ["--prompt", "a cat", "--W", "64", "--H", "64", "--steps", "2", "--seed", "1", "--outdir", str(tmp_path)]
    line += ["--control_net_lllite_models", str(trained.file)]
    assert generate_command([*line, "--control_net_image", str(trained.control_image)]) == 0
    (made,) = tmp_path.glob("*.png")
    assert Image.open(made).tobytes() == Image.open(preview).tobytes()
    assert "--control_net_lllite_models lora.safetensors" in Image.open(preview).info["command"]
    made.unlink()
    assert generate_command(line) == 0
    (plain,) = tmp_path.glob("*.png")
    assert Image.open(plain).tobytes() != Image.open(preview).tobytes()


@pytest.mark.full
def test_the_layers_of_the_published_model(tmp_path: Path) -> None:
    """sd-scripts makes 136 modules for it."""
    folder = write_published("sdxl", tmp_path / "sdxl")
    blueprint = read_model(ModelOptions(pretrained_model_name_or_path=str(folder)))
    every = list_unet_layers(blueprint)
    layers = {name: layer for name, layer in every.items() if layer.in_version_1}
    assert len(layers) == 136
    sides = {
        "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": 16,
        "lllite_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_q": 32,
        "lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_v": 32,
    }
    assert {name: layers[name].token_side for name in sides} == sides


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("version 1", "lllite-version-unsupported"),
        ("other model", "lllite-layers-unknown"),
        ("no lllite", "lllite-layers-unknown"),
        ("adapter options", "adapter-options-in-full-training"),
    ],
)
def test_faults(change: str, code: str, trained: Trained, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    options: dict[str, Any] = {**OPTIONS}
    toy = trained.toy
    if change == "version 1":
        toy = toy_shelf.paths("lumina")
        options["lllite_version"] = 1
    elif change == "other model":
        toy = toy_shelf.paths("sd")
        options["network_weights"] = trained.file
    elif change == "no lllite":
        options["network_weights"] = trained.toy["pretrained_model_name_or_path"]
    else:
        options["network_module"] = "networks.lora"
    other = Trained(trained.family, toy, trained.options, trained.images, trained.controls, tmp_path)
    with pytest.raises(UserError) as raised:
        other.train(tmp_path / "out", **options)
    errors = raised.value.errors if isinstance(raised.value, SeveralErrors) else [raised.value]
    assert code in [error.code for error in errors]
