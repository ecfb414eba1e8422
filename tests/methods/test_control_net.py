"""ControlNet training: against diffusers' classes and pipelines, generated with, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from families.toys import ToyShelf
from methods.control_training import OPTIONS, ControlShelf, Trained, load_with, predict
from sfumato.cli.generate import main as generate_command
from sfumato.config import ModelOptions
from sfumato.config.prompts import Prompt
from sfumato.demo.base import CHECKPOINT
from sfumato.errors import SeveralErrors, UserError
from sfumato.families.control_net import CONTROL_NET
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.sample import generate
from sfumato.sampling.request import make_request
from sfumato.sampling.schedulers import make_scheduler
from toy_runs import equal_tensors, make_images, read_metrics, read_weights, train_toy

fast_for_one = pytest.mark.fast_for("sdxl")
families = pytest.mark.parametrize("family", ["sdxl", "sd"])


@pytest.mark.full
@fast_for_one
@families
def test_a_new_one_is_diffusers_copy_and_changes_nothing(family: str, toy_shelf: ToyShelf) -> None:
    from diffusers import ControlNetModel

    model = load_with(toy_shelf.options(family), None)
    theirs: Any = ControlNetModel.from_unet(model.denoiser)
    ours, drawn = model.parts[CONTROL_NET].module.state_dict(), 0
    for name, tensor in theirs.state_dict().items():
        if "cond_embedding.conv_in" in name or "cond_embedding.blocks" in name:
            drawn += 1
            if tensor.numel() > 400:
                assert ours[name].std() == pytest.approx(float(tensor.std()), rel=0.1)
                assert ours[name].abs().max() == pytest.approx(float(tensor.abs().max()), rel=0.1)
        else:
            assert torch.equal(ours[name], tensor), name
    assert drawn == 14
    assert set(ours) == set(theirs.state_dict())
    again, other = load_with(toy_shelf.options(family), None), load_with(toy_shelf.options(family), None, seed=8)
    assert equal_tensors(ours, again.parts[CONTROL_NET].module.state_dict())
    assert not equal_tensors(ours, other.parts[CONTROL_NET].module.state_dict())
    assert torch.equal(predict(model, torch.full((1, 3, 64, 64), 0.3)), predict(model, None))


@pytest.mark.full
def test_one_halves_as_often_as_the_autoencoder(tmp_path: Path) -> None:
    """That of sfumato-tiny halves twice; a ControlNet that halves three times is refused, with and without its
    configuration.
    """
    from diffusers import ControlNetModel

    options = ModelOptions(pretrained_model_name_or_path=str(CHECKPOINT))
    model = load_with(options, None)
    shapes = {name: tensor.shape for name, tensor in model.parts[CONTROL_NET].module.state_dict().items()}
    theirs: Any = ControlNetModel.from_unet(model.denoiser, conditioning_embedding_out_channels=(16, 32, 96))
    assert {name: tensor.shape for name, tensor in theirs.state_dict().items()} == shapes
    theirs.save_pretrained(tmp_path / "own")
    for given in (tmp_path / "own", tmp_path / "own" / "diffusion_pytorch_model.safetensors"):
        found = load_with(options, given).parts[CONTROL_NET].module.state_dict()
        assert equal_tensors(found, theirs.state_dict())
    theirs = ControlNetModel.from_unet(model.denoiser)
    theirs.save_pretrained(tmp_path / "other")
    for given in (tmp_path / "other", tmp_path / "other" / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(UserError, match="8 times smaller") as error:
            load_with(options, given)
        assert error.value.code == "control-net-halvings"


@pytest.mark.full
@families
def test_the_loss_falls_and_hangs_on_the_control_image(
    family: str, control_shelf: ControlShelf, tmp_path: Path
) -> None:
    """At one timestep, so that the losses of steps compare."""
    trained = control_shelf.get(family)
    options = {"min_timestep": 400, "max_timestep": 401, "learning_rate": "3e-3", "max_train_steps": 16}
    output = trained.train(tmp_path / "long", **options)
    losses = [row["loss/current"] for row in read_metrics(output)]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    other = trained.train(tmp_path / "other", conditioning_data_dir=trained.images)
    assert not equal_tensors(read_weights(other), read_weights(trained.output))


def read_pipeline_image(trained: Trained, folder: Path, control_net: Any, request: Any) -> Tensor:
    """(3, H, W) in [-1, 1], by diffusers' pipeline."""
    import diffusers

    library: Any = diffusers
    kind = "StableDiffusionXL" if trained.family == "sdxl" else "StableDiffusion"
    more = {} if trained.family == "sdxl" else {"safety_checker": None}
    pipe = getattr(library, f"{kind}ControlNetPipeline").from_pretrained(folder, controlnet=control_net, **more)
    model = load_with(trained.options, None)
    pipe.scheduler = make_scheduler(request.sampler, model.objective)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, model.latents.channels, 8, 8, generator=torch.Generator().manual_seed(request.seed))
    image = Image.open(trained.control_image).convert("RGB")
    found = pipe(
        prompt=request.prompt, negative_prompt=request.negative_prompt, image=image, height=64, width=64,
        num_inference_steps=request.steps, guidance_scale=request.scale, latents=x, output_type="pt",
    ).images  # fmt: skip
    return found[0] * 2 - 1


@pytest.mark.full
@families
def test_diffusers_makes_the_same_image(
    family: str, toy_shelf: ToyShelf, control_shelf: ControlShelf, tmp_path: Path
) -> None:
    """From the file and from the folder, and as a preview is made."""
    from diffusers import ControlNetModel

    trained = control_shelf.get(family)
    folder = toy_shelf.paths(family, "diffusers")["pretrained_model_name_or_path"]
    (tmp_path / "config").mkdir()
    config = {"_class_name": "ControlNetModel", **read_config(trained.file)}
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    control_net = ControlNetModel.from_single_file(str(trained.file), config=str(tmp_path / "config"))
    model = load_with(trained.options, trained.file)
    prompt = Prompt(
        prompt="a cat", negative_prompt="a red dog", width=64, height=64, sample_steps=2, scale=2.0,
        controlnet_image=str(trained.control_image),
    )  # fmt: skip
    request = make_request(prompt, model, sampler="ddim", seed=3)
    ours = generate(model, InferenceAdapters(model, []), request)
    theirs = read_pipeline_image(trained, folder, control_net, request)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    plain = generate(load_with(trained.options, None), InferenceAdapters(model, []), request)
    assert (ours - plain).abs().max() > 1e-4
    saved = trained.train(tmp_path / "folder", save_model_as="diffusers") / "lora"
    again: Any = ControlNetModel.from_pretrained(saved)
    assert equal_tensors(again.state_dict(), control_net.state_dict())
    assert dict(again.config).items() >= {name: again.config[name] for name in config}.items()


def read_config(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["sfumato.config"])[CONTROL_NET]


def test_metadata(control_shelf: ControlShelf) -> None:
    with safe_open(control_shelf.get("sdxl").file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/control-net"
    assert metadata["ss_control_net_lr"] == "0.001"


@pytest.mark.full
@families
def test_original_names_are_read(family: str, control_shelf: ControlShelf, tmp_path: Path) -> None:
    """With the prefix of a whole file and without; diffusers' converter reads the same of them."""
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    from sfumato.families._unet_control_net import UNET_CONTROL_NET

    trained = control_shelf.get(family)
    model = load_with(trained.options, trained.file)
    ours = model.parts[CONTROL_NET].module.state_dict()
    layout, _ = UNET_CONTROL_NET.list_layouts(model.parts["denoiser"].network.config)
    original = layout.key_map.to_original(ours)
    theirs = convert_controlnet_checkpoint(dict(original), {"layers_per_block": 1})
    assert {name for name in ours if name not in theirs} == {name for name in ours if name.startswith("add_embedding.")}
    assert equal_tensors(theirs, {name: ours[name] for name in theirs})  # theirs does not know the sizes' layers
    for prefix in ("control_model.", ""):
        path = tmp_path / f"{prefix}original.safetensors"
        save_file({prefix + name: tensor.contiguous() for name, tensor in original.items()}, path)
        assert equal_tensors(load_with(trained.options, path).parts[CONTROL_NET].module.state_dict(), ours)


@pytest.mark.parametrize("family", ["sdxl", *(pytest.param(name, marks=pytest.mark.full) for name in ("flux", "sd3"))])
def test_generate_makes_the_preview_again(family: str, control_shelf: ControlShelf, tmp_path: Path) -> None:
    trained = control_shelf.get(family)
    (preview,) = (trained.output / "sample").glob("*.png")
    given = trained.options.model_dump(exclude_defaults=True)
    line = [word for name, value in given.items() if not isinstance(value, tuple) for word in (f"--{name}", str(value))]
    line += ["--prompt", "a cat", "--W", "64", "--H", "64", "--steps", "2", "--seed", "1", "--outdir", str(tmp_path)]
    line += ["--controlnet_model_name_or_path", str(trained.file)]
    assert generate_command([*line, "--control_net_image", str(trained.control_image)]) == 0
    (made,) = tmp_path.glob("*.png")
    assert Image.open(made).tobytes() == Image.open(preview).tobytes()
    command = Image.open(preview).info["command"]
    assert "--control_net_image 0.png" in command
    assert "--controlnet_model_name_or_path lora.safetensors" in command
    made.unlink()
    assert generate_command(line) == 0
    (plain,) = tmp_path.glob("*.png")
    assert Image.open(plain).tobytes() != Image.open(preview).tobytes()
    with pytest.raises(UserError) as raised:
        generate_command([*line, "--control_net_image", str(tmp_path / "absent.png")])
    assert raised.value.code == "prompt-image-unreadable"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("no folder", "control-images-missing"),
        ("one missing", "conditioning-image-missing"),
        ("other family", "control-net-unsupported"),
        ("other model", "control-net-model-mismatch"),
        ("no control net", "control-net-model-mismatch"),
        ("other class", "control-net-kind-mismatch"),
        ("adapter options", "adapter-options-in-full-training"),
        ("no learning rate", "learning-rates-all-zero"),
    ],
)
def test_faults(change: str, code: str, toy_shelf: ToyShelf, control_shelf: ControlShelf, tmp_path: Path) -> None:
    trained = control_shelf.get("sdxl")
    options: dict[str, Any] = {"conditioning_data_dir": trained.controls, **OPTIONS}
    toy = trained.toy
    if change == "no folder":
        options["conditioning_data_dir"] = None
    elif change == "one missing":
        controls = make_images(tmp_path / "controls", 4)
        (controls / "2_cat" / "1.png").unlink()
        options["conditioning_data_dir"] = controls
    elif change == "other family":
        toy = toy_shelf.paths("lumina")
    elif change == "other model":
        toy = toy_shelf.paths("sd")
        options["controlnet_model_name_or_path"] = trained.file
    elif change == "no control net":
        options["controlnet_model_name_or_path"] = trained.toy["pretrained_model_name_or_path"]
    elif change == "other class":
        folder = tmp_path / "union"
        folder.mkdir()
        (folder / "config.json").write_text('{"_class_name": "ControlNetUnionModel"}')
        (folder / "diffusion_pytorch_model.safetensors").write_bytes(trained.file.read_bytes())
        options["controlnet_model_name_or_path"] = folder
    elif change == "adapter options":
        options["network_dim"] = 4
    else:
        options["learning_rate"] = 0
    with pytest.raises(UserError) as raised:
        train_toy(toy, trained.images, tmp_path / "out", **options)
    errors = raised.value.errors if isinstance(raised.value, SeveralErrors) else [raised.value]
    assert code in [error.code for error in errors]
    assert not (tmp_path / "out").exists()
