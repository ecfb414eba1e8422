"""Several ControlNets with strengths and ranges, against diffusers' pipelines; edges, against OpenCV's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from families.loading import NoMethod
from families.toys import ToyShelf
from sfumato.config import NoiseOptions
from sfumato.config.prompts import Prompt
from sfumato.errors import UserError
from sfumato.families import register_families
from sfumato.families.base import Family, find_family
from sfumato.families.control_net import name_control_net
from sfumato.families.control_net_files import add_control_net
from sfumato.families.source import open_source
from sfumato.sample import generate
from sfumato.sampling.control_images import prepare_control_image
from sfumato.sampling.request import make_request
from sfumato.sampling.schedulers import make_scheduler

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
METHOD: Any = NoMethod()
LINE = {"prompt": "a cat", "negative_prompt": "a dog", "width": 64, "height": 64, "sample_steps": 4, "seed": 1}
SCALES, STARTS, ENDS = (0.5, 1.5), (0.0, 0.25), (0.5, 1.0)
MULTIPLE = {"control_net_multipliers": SCALES, "control_net_starts": STARTS, "control_net_ratios": ENDS}


def write_control_net(network: Any, seed: int, folder: Path) -> Any:
    """One whose outputs are not 0, in a folder."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("controlnet_") and parameter.ndim > 1:
                parameter.normal_(std=0.1, generator=generator)
    network.save_pretrained(folder)
    return network


def load_with(shelf: ToyShelf, family: str, folders: list[Path]) -> Family:
    register_families()
    options = shelf.options(family)
    source = open_source(options)
    kind = find_family(None, source)
    blueprint = kind.read(source, options, NoiseOptions())
    for number, folder in enumerate(folders):
        given = options.model_copy(update={"controlnet_model_name_or_path": str(folder)})
        blueprint = add_control_net(kind, blueprint, given, seed=0, number=number)
    model = kind(blueprint, options, dtype=torch.float32, device=torch.device("cpu"))
    model.load()
    return model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("controls")
    draw = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def pair(toy_shelf: ToyShelf, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, list[Any]]:
    """Stable Diffusion with two ControlNets, and diffusers' two."""
    from diffusers import ControlNetModel

    plain, folder = load_with(toy_shelf, "sd", []), tmp_path_factory.mktemp("nets")
    nets = [
        write_control_net(ControlNetModel.from_unet(plain.denoiser), seed, folder / str(seed))  # pyright: ignore
        for seed in range(2)
    ]
    return load_with(toy_shelf, "sd", [folder / "0", folder / "1"]), nets


def make_image(model: Family, images: list[Path], **more: Any) -> Tensor:
    files = [str(path) for path in images]
    given: dict[str, Any] = {"controlnet_image": files[0], "further_control_images": tuple(files[1:]), "scale": 3.0}
    return generate(model, METHOD, make_request(Prompt(**{**LINE, **given, **more}), model, sampler="ddim", seed=1))


@pytest.mark.full
def test_several_of_stable_diffusion(pair: tuple[Family, list[Any]], images: list[Path], toy_shelf: ToyShelf) -> None:
    """diffusers' pipeline with the same strengths and shares of the steps."""
    from diffusers import MultiControlNetModel, StableDiffusionControlNetPipeline

    model, nets = pair
    folder = toy_shelf.paths("sd", "diffusers")["pretrained_model_name_or_path"]
    pipe: Any = StableDiffusionControlNetPipeline.from_pretrained(
        folder, controlnet=MultiControlNetModel(nets), safety_checker=None
    )
    pipe.scheduler = make_scheduler("ddim", model.objective)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, model.latents.channels, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = pipe(
        prompt="a cat", negative_prompt="a dog", image=[Image.open(path).convert("RGB") for path in images],
        height=64, width=64, num_inference_steps=4, guidance_scale=3.0, latents=x, output_type="pt",
        controlnet_conditioning_scale=list(SCALES), control_guidance_start=list(STARTS),
        control_guidance_end=list(ENDS),
    ).images[0]  # fmt: skip
    ours = make_image(model, images, **MULTIPLE)
    torch.testing.assert_close(ours, theirs * 2 - 1, rtol=0, atol=1e-4)
    assert (ours - make_image(model, images)).abs().max() > 1e-3


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(MULTIPLE))
def test_each_setting_changes_the_image(name: str, pair: tuple[Family, list[Any]], images: list[Path]) -> None:
    model, _ = pair
    plain, changed = make_image(model, images), make_image(model, images, **{name: MULTIPLE[name]})
    neutral = {"control_net_multipliers": (1.0,), "control_net_starts": (0.0,), "control_net_ratios": (1.0, 1.0)}
    assert not torch.equal(plain, changed)
    assert torch.equal(plain, make_image(model, images, **{name: neutral[name]}))


@pytest.mark.full
def test_edges_of_the_control_image(pair: tuple[Family, list[Any]], images: list[Path], tmp_path: Path) -> None:
    """As if the edges had been given; only for the ControlNet that asks for it."""
    model, _ = pair
    edges = tmp_path / "edges.png"
    prepare_control_image(Image.open(images[0]), "canny_63_191").save(edges)
    prepared = make_image(model, images, control_net_preps=("canny_63_191", "none"))
    assert torch.equal(prepared, make_image(model, [edges, images[1]]))
    assert not torch.equal(prepared, make_image(model, images))
    with pytest.raises(UserError) as raised:
        make_image(model, images, control_net_preps=("depth",))
    assert raised.value.code == "control-preparation-unknown"


@pytest.mark.full
def test_the_hires_fix_without_control(pair: tuple[Family, list[Any]], images: list[Path]) -> None:
    """Only the first stage is steered: at strength 0 the second is as without."""
    model, _ = pair
    options = {"highres_fix_scale": 0.5, "highres_fix_steps": 2, "width": 128, "height": 128}
    options |= {"highres_fix_latents_upscaling": True}
    first_only = make_image(model, images, **options, highres_fix_disable_control_net=True)
    assert not torch.equal(first_only, make_image(model, images, **options))
    assert not torch.equal(first_only, make_image(model, images, **options, control_net_multipliers=(0.0, 0.0)))


def test_the_edges_are_those_of_opencv() -> None:
    """Of a picture with noise, at three pairs of limits; the golden is of OpenCV 4."""
    golden = np.load(Path(__file__).parent / "goldens" / "canny.npz")
    image = golden["image"]
    for name in (name for name in golden.files if name != "image"):
        found = np.asarray(prepare_control_image(Image.fromarray(image), f"canny_{name}"))[..., 0] > 0
        expected = np.unpackbits(golden[name], count=found.size).reshape(found.shape).astype(bool)
        assert expected.any()
        assert (found == expected).all(), name


@pytest.mark.full
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_two_of_a_transformer_add_up(family: str, images: list[Path], toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """The same one twice at strengths 0.5 and 0.75 is one at 1.25; of different depths they are both there."""
    import diffusers

    plain: Any = load_with(toy_shelf, family, [])
    name = {"flux": "FluxControlNetModel", "sd3": "SD3ControlNetModel"}[family]
    more: dict[str, Any] = {"num_layers": 2}
    config = plain.denoiser.config
    heads = {name: config[name] for name in ("num_attention_heads", "attention_head_dim")}
    more |= {"num_single_layers": 1, **heads} if family == "flux" else {"num_extra_conditioning_channels": 0}
    deep = getattr(diffusers, name).from_transformer(plain.denoiser, **more)
    write_control_net(deep, 0, tmp_path / "deep")
    small = {**more, "num_layers": 1}
    write_control_net(getattr(diffusers, name).from_transformer(plain.denoiser, **small), 1, tmp_path / "flat")
    one = load_with(toy_shelf, family, [tmp_path / "deep"])
    single = make_image(one, images[:1], control_net_multipliers=(1.25,))
    two = load_with(toy_shelf, family, [tmp_path / "deep", tmp_path / "deep"])
    assert two.control_nets == ["control_net", name_control_net(1)]
    twice = make_image(two, images[:1], control_net_multipliers=(0.5, 0.75))
    torch.testing.assert_close(single, twice, rtol=0, atol=1e-4)
    mixed = load_with(toy_shelf, family, [tmp_path / "deep", tmp_path / "flat"])
    both = make_image(mixed, images, control_net_multipliers=(1.25, 1.0))
    assert (both - single).abs().max() > 1e-4
    without = make_image(mixed, images, control_net_multipliers=(1.25, 0.0))
    torch.testing.assert_close(without, single, rtol=0, atol=1e-5)


@pytest.mark.full
def test_two_of_lllite(images: list[Path], toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Each with its image and strength; at 0 it is as if it were not there."""
    from sfumato.adapters.lllite import LLLite
    from sfumato.methods.inference_adapters import InferenceAdapters

    model = load_with(toy_shelf, "sd", [])
    layers = type(model).list_controlled_layers
    assert layers is not None
    made = LLLite(layers(model.blueprint), width=4, image_width=8)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    save_file(made.parts.state_dict(), tmp_path / "lllite.safetensors")
    request = {"controlnet_image": str(images[0]), "further_control_images": (str(images[1]),)}

    def run(count: int, **more: Any) -> Tensor:
        fresh = load_with(toy_shelf, "sd", [])
        method: Any = InferenceAdapters(fresh, [], lllite=[tmp_path / "lllite.safetensors"] * count)
        prompt = Prompt(**{**LINE, **request, **more})
        return generate(fresh, method, make_request(prompt, fresh, sampler="ddim", seed=1))

    both = run(2)
    assert not torch.equal(both, run(1))
    assert torch.equal(run(1), run(2, control_net_multipliers=(1.0, 0.0)))
    assert not torch.equal(run(2, control_net_multipliers=(0.5, 1.0)), both)
    assert not torch.equal(run(2, control_net_ratios=(0.5, 1.0)), both)
