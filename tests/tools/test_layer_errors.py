"""What a dry run says of layers in fewer bits; and the bounds of products in 8 bits for every kind of layer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from families.toys import ToyShelf
from quantization.meant import FLOAT8, round_scaled
from sfumato.config import load_config
from sfumato.plan import make_run_plan
from sfumato.tools.device_meter import DeviceMeter
from sfumato.tools.dry_run import take_dry_run
from sfumato.tools.layer_errors import LayerError, describe_layer_errors, watch_layers
from toy_runs import SEVERAL_TOKENS, build_toy_run, make_arguments, make_images

FAMILIES = ("sd", "sdxl", "sd3", "flux", "chroma", "lumina")
BOUNDS = {"int8_compute": 0.03, "fp8_compute": 0.05}  # inputs and gradients of a model are less even than normal ones
KEY = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), 1)


@pytest.mark.full
def test_the_error_is_that_of_the_weights_meant(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """Of x W' against x W, and of g W' against g W, with W' by the formula of the format and W from the file."""
    toy = toy_shelf.paths("flux")
    run = build_toy_run(toy, images, tmp_path / "out", fp8_scaled=True, network_train_unet_only=True)
    part = run.model.parts["denoiser"]
    layer = part.module.get_submodule(KEY)
    stacked = load_file(toy["pretrained_model_name_or_path"])["double_blocks.0.img_attn.qkv.weight"].double()
    exact = stacked[: stacked.shape[0] // 3]
    meant = round_scaled(exact, 64, FLOAT8).double()
    x, g = torch.randn(7, exact.shape[1]), torch.randn(7, exact.shape[0])
    with watch_layers(part) as errors:
        layer(x.requires_grad_()).backward(g)
    found = next(error for error in errors if error.path == KEY)
    output, gradient = x.detach().double() @ exact.t() + layer.bias.double(), g.double() @ exact
    rounded = x.detach().double() @ (meant - exact).t(), g.double() @ (meant - exact)
    assert found.output == pytest.approx(float(rounded[0].norm() / output.norm()), rel=1e-3)
    assert found.gradient == pytest.approx(float(rounded[1].norm() / gradient.norm()), rel=1e-3)
    assert all(error.output is None for error in errors if error.path != KEY)


@pytest.mark.full
@pytest.mark.parametrize("option", BOUNDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_products_in_8_bits_are_within_their_bound_in_every_layer(
    family: str, option: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    """Against the file's weights, with a step's own inputs and gradients."""
    options = {option: True, "network_train_unet_only": True, "gradient_checkpointing": True, **SEVERAL_TOKENS}
    config = load_config(make_arguments(toy_shelf.paths(family), images, tmp_path / "out", **options))
    _, errors = take_dry_run(make_run_plan(config, processes=1), DeviceMeter(torch.device("cpu")))
    assert errors
    assert all(error.output is not None for error in errors)
    assert max(error.output or 0.0 for error in errors) < BOUNDS[option]
    assert max(error.gradient or 0.0 for error in errors) < BOUNDS[option]
    assert sum(error.gradient is not None for error in errors) > len(errors) / 2


def test_the_lines() -> None:
    errors = [LayerError(path=f"blocks.{n}.to_q", output=0.01 * (n + 1), gradient=0.02) for n in range(3)]
    errors += [LayerError(path="out", output=0.05), LayerError(path="unused")]
    lines = list(describe_layer_errors(errors))
    assert [re.sub(" +", " ", line).strip() for line in lines[1:]] == [
        "out: output 5.00% 5.00%",
        "blocks.N.to_q: output 2.00% 3.00%, gradient 2.00% 2.00%; worst in blocks.2.to_q",
    ]
    assert not list(describe_layer_errors([]))
