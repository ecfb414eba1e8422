"""ControlNets of flow models: against diffusers' classes and pipelines, trained, in others' layouts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from families.toys import ToyShelf
from methods.control_training import ControlShelf, Trained, load_with, predict
from sfumato.config import load_config
from sfumato.config.prompts import Prompt
from sfumato.data.batch import CONTROL
from sfumato.errors import SeveralErrors, UserError
from sfumato.families._flux_control_net import FLUX_CONTROL_NET
from sfumato.families._flux_parts import pack
from sfumato.families.base import Family
from sfumato.families.control_net import CONTROL_NET
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.sample import generate
from sfumato.sampling.request import ImageRequest, make_request
from sfumato.tools.dataset_cache import fill_dataset_caches
from toy_runs import build_toy_run, equal_tensors, make_arguments, read_metrics, read_weights

families = pytest.mark.parametrize("family", ["flux", "sd3"])


def library() -> Any:
    import diffusers

    return diffusers


@pytest.mark.full
@families
def test_a_new_one_is_diffusers_copy_and_changes_nothing(family: str, toy_shelf: ToyShelf) -> None:
    model = load_with(toy_shelf.options(family), None)
    part = model.parts[CONTROL_NET]
    config: Any = part.network.config
    ours = part.module.state_dict()
    if family == "flux":
        kind, more = library().FluxControlNetModel, {"num_single_layers": 0}
        more |= {name: config[name] for name in ("attention_head_dim", "num_attention_heads")}
    else:
        kind, more = library().SD3ControlNetModel, {"num_extra_conditioning_channels": 0}
    theirs = kind.from_transformer(model.denoiser, num_layers=config["num_layers"], **more).state_dict()
    copied = [name for name in theirs if name in ours and not name.startswith("controlnet_x_embedder.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in copied)
    assert {name for name in theirs if name not in ours} == set()
    further = {name.partition(".")[0] for name in ours if name not in theirs}
    assert further == ({"input_hint_block"} if family == "flux" else set())
    assert torch.equal(predict(model, torch.full((1, 3, 64, 64), 0.3)), predict(model, None))


@pytest.mark.full
@families
def test_training(family: str, control_shelf: ControlShelf, tmp_path: Path) -> None:
    """The loss falls, at about one timestep; caches change no number."""
    trained = control_shelf.get(family)
    options = {"weighting_scheme": "logit_normal", "timestep_sampling": None, "logit_mean": 0, "logit_std": 0.001}
    options |= {"learning_rate": "3e-3", "max_train_steps": 16}
    losses = [row["loss/current"] for row in read_metrics(trained.train(tmp_path / "long", **options))]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    live = trained.train(tmp_path / "live", cache_latents=False)
    found = [
        [row["loss/current"] for row in read_metrics(place) if "loss/current" in row]
        for place in (live, trained.output)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    other = trained.train(tmp_path / "other", conditioning_data_dir=trained.images)
    assert not equal_tensors(read_weights(other), read_weights(trained.output))


@pytest.mark.full
def test_the_cache_is_filled_beforehand(control_shelf: ControlShelf, tmp_path: Path) -> None:
    """`sfumato dataset cache` with the options of the training leaves it nothing to encode, control images included."""
    trained = control_shelf.get("sd3")
    own = {"conditioning_data_dir": trained.controls, "method": "control_net", "network_dim": None}
    own |= {"cache_dir": tmp_path / "cache", "cache_latents": True, "cache_latents_to_disk": True, "seed": None}
    config = load_config(make_arguments(trained.toy, trained.images, tmp_path / "out", **own))
    counts = [fill_dataset_caches(config).counts for _ in range(2)]
    assert [each["reference images"].created for each in counts] == [4, 0]
    run = build_toy_run(trained.toy, trained.images, tmp_path / "out", **own)
    assert run.model.takes_control_latents
    assert not run.model.parts["vae"].is_loaded
    (batch,) = next(run.loader.steps()).batches
    assert batch.extras.images[CONTROL].latents is not None


def take_mean(vae: Any) -> None:
    """Pipelines draw the control image's latents from the posterior; ours are its mean."""
    encode = vae.encode

    def encode_mean(pixels: Tensor) -> Any:
        mean = encode(pixels).latent_dist.mode()
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator=None: mean))

    vae.encode = encode_mean


def run_flux(trained: Trained, folder: Path, model: Family, control_net: Any, request: ImageRequest) -> Tensor:
    pipe = library().FluxControlNetPipeline.from_pretrained(folder, controlnet=control_net)
    take_mean(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    pooled, hidden = (model.encode_text(part, [request.prompt])[0] for part in ("clip_l", "t5"))
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(request.seed))
    return pipe(
        prompt_embeds=hidden["hidden"][None], pooled_prompt_embeds=pooled["pooled"][None], height=64, width=64,
        guidance_scale=request.guidance, num_inference_steps=request.steps, latents=pack(x), output_type="pt",
        control_image=Image.open(trained.control_image).convert("RGB"), max_sequence_length=512,
    ).images  # fmt: skip


def run_sd3(trained: Trained, folder: Path, model: Family, control_net: Any, request: ImageRequest) -> Tensor:
    pipe = library().StableDiffusion3ControlNetPipeline.from_pretrained(folder, controlnet=control_net)
    take_mean(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(request.seed))
    return pipe(
        prompt=request.prompt, negative_prompt=request.negative_prompt, height=64, width=64,
        guidance_scale=request.scale, num_inference_steps=request.steps, latents=x, output_type="pt",
        control_image=Image.open(trained.control_image).convert("RGB"),
    ).images  # fmt: skip


RUN = {"flux": run_flux, "sd3": run_sd3}
CLASSES = {"flux": "FluxControlNetModel", "sd3": "SD3ControlNetModel"}


def compare_with_pipeline(trained: Trained, folder: Path, given: Path) -> Tensor:
    """Our image equals the pipeline's; returns it. given: the ControlNet as a folder of diffusers."""
    control_net = getattr(library(), CLASSES[trained.family]).from_pretrained(given)
    model = load_with(trained.options, given)
    scale = 1.0 if trained.family == "flux" else 4.0
    prompt = Prompt(
        prompt="a cat", negative_prompt="a red dog", width=64, height=64, sample_steps=3, scale=scale,
        controlnet_image=str(trained.control_image),
    )  # fmt: skip
    request = make_request(prompt, model, sampler="ddim", seed=3)
    ours = generate(model, InferenceAdapters(model, []), request)
    theirs = RUN[trained.family](trained, folder, model, control_net, request)
    torch.testing.assert_close(ours, theirs[0] * 2 - 1, rtol=0, atol=1e-5)
    return ours


@pytest.mark.full
@families
def test_diffusers_makes_the_same_image(
    family: str, toy_shelf: ToyShelf, control_shelf: ControlShelf, tmp_path: Path
) -> None:
    trained = control_shelf.get(family)
    folder = toy_shelf.paths(family, "diffusers")["pretrained_model_name_or_path"]
    saved = trained.train(tmp_path / "folder", save_model_as="diffusers") / "lora"
    ours = compare_with_pipeline(trained, folder, saved)
    alone = load_with(trained.options, trained.file)
    assert equal_tensors(
        alone.parts[CONTROL_NET].module.state_dict(),
        load_with(trained.options, saved).parts[CONTROL_NET].module.state_dict(),
    )
    request = make_request(Prompt(prompt="a cat", width=64, height=64, sample_steps=3), alone, sampler="ddim", seed=3)
    assert (ours - generate(alone, InferenceAdapters(alone, []), request)).abs().max() > 1e-4


@pytest.mark.full
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_other_published_structures(
    family: str, toy_shelf: ToyShelf, control_shelf: ControlShelf, tmp_path: Path
) -> None:
    """InstantX': FLUX.1's reads latents and has blocks of one stream; that of SD3 reads no pooled text."""
    trained = control_shelf.get(family)
    folder = toy_shelf.paths(family, "diffusers")["pretrained_model_name_or_path"]
    config = dict(load_with(trained.options, None).parts[CONTROL_NET].network.config)
    if family == "flux":
        config |= {"conditioning_embedding_channels": None, "patch_size": 1, "num_single_layers": 2}
    else:
        config |= {"force_zeros_for_pooled_projection": True}
    torch.manual_seed(1)
    control_net = getattr(library(), CLASSES[family])(**config)
    for parameter in control_net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    control_net.save_pretrained(tmp_path / "published")
    compare_with_pipeline(trained, folder, tmp_path / "published")


@pytest.mark.full
def test_xlabs_names_are_read(control_shelf: ControlShelf, tmp_path: Path) -> None:
    """As sd-scripts writes them, too, without a configuration."""
    trained = control_shelf.get("flux")
    model = load_with(trained.options, trained.file)
    ours = model.parts[CONTROL_NET].module.state_dict()
    (layout,) = FLUX_CONTROL_NET.list_layouts({})
    original = layout.key_map.to_original(ours)
    assert {"pos_embed_input.weight", "input_hint_block.14.weight", "double_blocks.1.img_attn.qkv.weight"} < set(
        original
    )
    save_file({name: tensor.contiguous() for name, tensor in original.items()}, tmp_path / "xlabs.safetensors")
    again = load_with(trained.options, tmp_path / "xlabs.safetensors").parts[CONTROL_NET]
    assert equal_tensors(again.module.state_dict(), ours)


@pytest.mark.parametrize(
    ("family", "options", "code"),
    [
        ("chroma", {}, "control-net-unsupported"),
        ("flux", {"apply_t5_attn_mask": True}, "control-net-option-conflict"),
        ("flux", {"model_type": "flux_kontext"}, "control-net-unsupported"),
    ],
)
def test_faults(
    family: str, options: dict[str, Any], code: str, control_shelf: ControlShelf, toy_shelf: ToyShelf, tmp_path: Path
) -> None:
    trained = control_shelf.get("sdxl")  # for its images
    other = Trained(family, toy_shelf.paths(family), trained.options, trained.images, trained.controls, tmp_path)
    with pytest.raises(UserError) as raised:
        other.train(tmp_path / "out", **options)
    errors = raised.value.errors if isinstance(raised.value, SeveralErrors) else [raised.value]
    assert code in [error.code for error in errors]
