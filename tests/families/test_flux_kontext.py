"""FLUX.1 Kontext: against diffusers' pipeline, without a reference, detected, trained, resumed, generated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from denoising import run_denoising
from families.loading import load_model, read_model
from families.toys import ToyShelf
from sfumato.cli.main import main as run_command
from sfumato.config import ModelOptions
from sfumato.config.prompts import Prompt
from sfumato.data.batch import Extras, ImageInput, Sizes
from sfumato.errors import SeveralErrors, UserError
from sfumato.families._flux_parts import pack, unpack
from sfumato.families.base import Family
from sfumato.families.flux_kontext import PREFERRED_SIZES
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.sample import encode_prompts, encode_request_images
from sfumato.sampling.request import make_request
from toy_runs import equal_tensors, make_images, read_metrics, read_weights, train_toy

EDIT = {"model_type": "flux_kontext", "network_module": "networks.lora_flux", "cache_latents": True} | {
    "timestep_sampling": "flux_shift", "model_prediction_type": "raw", "guidance_scale": 1.0,
    "cache_text_encoder_outputs": True, "network_train_unet_only": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(toy_shelf: ToyShelf) -> Path:
    return toy_shelf.paths("flux_kontext", "diffusers")["pretrained_model_name_or_path"]


@pytest.fixture(scope="module")
def model(folder: Path) -> Family:
    return load_model(ModelOptions(pretrained_model_name_or_path=str(folder)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images and their references, which have other colors."""
    root = tmp_path_factory.mktemp("edits")
    images = make_images(root / "images", 4)
    references = make_images(root / "references", 4)
    for file in (references / "2_cat").glob("*.png"):
        image = Image.open(file)
        image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(file)
    return images, references


def predict(model: Family, x: Tensor, reference: ImageInput | None) -> Tensor:
    sizes = Sizes.from_size(len(x), 64, 64)
    text = encode_prompts(model, ["a cat", "a red dog on a table"][: len(x)], sizes, 2.5)
    with torch.no_grad():
        return model.predict(x, torch.full((len(x),), 500.0), text, {"reference_1": reference} if reference else {})


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_denoising_equals_the_diffusers_pipeline(model: Family, folder: Path) -> None:
    """The reference has another shape than the image; the steps follow the image's own tokens."""
    from diffusers import FluxKontextPipeline

    request = make_request(
        Prompt(prompt="a cat", width=64, height=96, sample_steps=4, guidance_scale=2.5), model, sampler="ddim", seed=3
    )
    x, reference = draw(1, 1, 16, 12, 8), draw(2, 1, 16, 8, 10)
    text = encode_prompts(model, [request.prompt], Sizes.from_size(1, 96, 64), request.guidance)
    extras = Extras(images={"reference_1": ImageInput(latents=reference)})
    ours = run_denoising(model, x, text, steps=4, extras=extras)
    pipe = FluxKontextPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        image=reference, prompt_embeds=text["encoder_hidden_states"], pooled_prompt_embeds=text["pooled_projections"],
        guidance_scale=2.5, height=96, width=64, max_area=96 * 64, num_inference_steps=4, latents=pack(x),
        output_type="latent", max_sequence_length=512,
    ).images  # fmt: skip
    torch.testing.assert_close(ours, unpack(theirs, x.shape), rtol=0, atol=1e-5)
    plain = run_denoising(model, x, text, steps=4)
    assert (ours - plain).abs().max() > 1e-3


def test_a_reference_is_encoded_as_the_pipeline_does(model: Family, folder: Path, tmp_path: Path) -> None:
    from diffusers import FluxKontextPipeline
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    assert list(PREFERRED_SIZES) == PREFERRED_KONTEXT_RESOLUTIONS
    Image.effect_noise((100, 60), 50).convert("RGB").save(tmp_path / "image.png")
    prompt = Prompt(prompt="a cat", width=64, height=64, reference_image=str(tmp_path / "image.png"))
    request = make_request(prompt, model, sampler="ddim", seed=3)
    found = encode_request_images(model, request, 2)["reference_1"].latents
    assert found is not None
    assert found.shape == (2, 16, 6, 10)  # of 1328x800, at a sixteenth: 83x50 -> 80x48
    pipe: Any = FluxKontextPipeline.from_pretrained(folder)
    image = pipe.image_processor.resize(Image.open(tmp_path / "image.png"), 48, 80)
    with torch.no_grad():
        theirs = pipe._encode_vae_image(pipe.image_processor.preprocess(image), torch.Generator())
    torch.testing.assert_close(found[:1], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(1000, 1000), (3000, 1000), (600, 900)])
def test_the_preferred_size_of_the_nearest_shape(model: Family, size: tuple[int, int]) -> None:
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    _, *theirs = min((abs(size[0] / size[1] - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    assert model.choose_reference_size(size, (1024, 1024)) == tuple(theirs)
    assert model.choose_reference_size(size, (2048, 1024)) == tuple(theirs)


@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_without_a_reference_is_as_without_its_tokens(folder: Path, masked: bool) -> None:
    model = load_model(ModelOptions(pretrained_model_name_or_path=str(folder), apply_t5_attn_mask=masked))
    x, latents = draw(3, 2, 16, 8, 8), draw(4, 2, 16, 8, 12)
    mixed = predict(model, x, ImageInput(latents=latents, present=torch.tensor([True, False])))
    with_it, without = predict(model, x, ImageInput(latents=latents)), predict(model, x, None)
    torch.testing.assert_close(mixed, torch.stack([with_it[0], without[1]]), rtol=0, atol=1e-5)
    assert (with_it - without).abs().amax((1, 2, 3)).min() > 1e-3


def test_what_says_that_a_model_is_kontext(toy_shelf: ToyShelf, folder: Path) -> None:
    """A folder does; a file has the keys of FLUX.1 dev, so an option has to, unless its metadata does."""
    assert read_model(ModelOptions(pretrained_model_name_or_path=str(folder))).title == "FLUX.1 Kontext"
    file = toy_shelf.options("flux_kontext")
    assert read_model(file).title == "FLUX.1 dev"
    assert read_model(file, family="flux_kontext").title == "FLUX.1 Kontext"
    with pytest.raises(UserError) as raised:
        read_model(ModelOptions(pretrained_model_name_or_path=str(folder)), family="flux")
    assert (raised.value.code, raised.value.fix) == ("model-family-mismatch", "--model_type flux_kontext")


def edit_options(data: tuple[Path, Path], **more: Any) -> Mapping[str, Any]:
    return {**EDIT, "reference_data_dirs": [data[1]], "max_train_steps": 4, **more}


@pytest.fixture(scope="module")
def trained(toy_shelf: ToyShelf, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps and a preview."""
    output = tmp_path_factory.mktemp("trained")
    prompts = output / "prompts.txt"
    prompts.write_text(f"a cat --w 64 --h 64 --s 2 --d 1 --ref {data[1] / '2_cat' / '0.png'}\n")
    return train_toy(
        toy_shelf.paths("flux_kontext"), data[0], output,
        **edit_options(data, sample_prompts=prompts, sample_every_n_steps=4),
    )  # fmt: skip


@pytest.mark.full
def test_the_reference_is_learned_from(toy_shelf: ToyShelf, data: tuple[Path, Path], trained: Path, tmp_path: Path):
    """Cached or not, the numbers are the same; with other references, or none, they are not."""
    toy, rows = toy_shelf.paths("flux_kontext"), read_metrics(trained)
    live = train_toy(toy, data[0], tmp_path / "live", **edit_options(data, cache_latents=False))
    losses = {name: [row["loss/current"] for row in read_metrics(place) if "loss/current" in row]
              for name, place in {"cached": trained, "live": live}.items()}  # fmt: skip
    assert losses["cached"] == pytest.approx(losses["live"], rel=1e-5)
    same = train_toy(toy, data[0], tmp_path / "same", **edit_options((data[0], data[0])))
    dropped = train_toy(toy, data[0], tmp_path / "none", **edit_options(data, reference_dropout_rate=1.0))
    for other in (same, dropped):
        assert read_metrics(other)[0]["loss/current"] != rows[0]["loss/current"]
    plain = train_toy(toy, data[0], tmp_path / "plain", **edit_options(data, reference_data_dirs=None))
    assert equal_tensors(read_weights(dropped), read_weights(plain))


def test_what_the_file_says(trained: Path) -> None:
    with safe_open(trained / "lora.safetensors", "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "flux-1-kontext-dev/lora"


def test_diffusers_reads_the_trained_file(folder: Path, trained: Path, tmp_path: Path) -> None:
    """Exported, since diffusers splits fused layers at the widths of the published model alone."""
    from diffusers import FluxKontextPipeline

    model = load_model(ModelOptions(pretrained_model_name_or_path=str(folder)))
    x, reference = draw(1, 1, 16, 8, 8), draw(2, 1, 16, 8, 8)
    text = encode_prompts(model, ["a cat"], Sizes.from_size(1, 64, 64), 2.5)
    pipe: Any = FluxKontextPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    exported = tmp_path / "exported.safetensors"
    assert run_command(["lora", "convert", str(trained / "lora.safetensors"), str(exported), "--to", "diffusers"]) == 0
    pipe.load_lora_weights(tmp_path, weight_name=exported.name)
    theirs = pipe(
        image=reference, prompt_embeds=text["encoder_hidden_states"], pooled_prompt_embeds=text["pooled_projections"],
        guidance_scale=2.5, height=64, width=64, max_area=64 * 64, num_inference_steps=4, latents=pack(x),
        output_type="latent", max_sequence_length=512,
    ).images  # fmt: skip
    extras = Extras(images={"reference_1": ImageInput(latents=reference)})

    def sample(strength: float) -> Tensor:
        method = InferenceAdapters(model, [(trained / "lora.safetensors", strength)])
        return run_denoising(model, x, text, method=method, steps=4, extras=extras)

    without = sample(0.0)
    ours = sample(1.0)
    torch.testing.assert_close(ours, unpack(theirs, x.shape), rtol=0, atol=1e-5)
    assert (ours - without).abs().max() > 1e-4


@pytest.mark.full
def test_generate_makes_the_preview_again(
    toy_shelf: ToyShelf, data: tuple[Path, Path], trained: Path, tmp_path: Path
) -> None:
    from sfumato.cli.generate import main

    (preview,) = (trained / "sample").glob("*.png")
    toy = toy_shelf.options("flux_kontext").model_dump(exclude_defaults=True)
    model = [word for name, value in toy.items() for word in (f"--{name}", str(value))]
    line = [*model, "--prompt", "a cat", "--W", "64", "--H", "64", "--steps", "2", "--seed", "1", "--network_weights"]
    line += [str(trained / "lora.safetensors"), "--outdir", str(tmp_path)]
    reference = ["--reference_image", str(data[1] / "2_cat" / "0.png")]
    assert main([*line, *reference]) == 0
    (made,) = tmp_path.glob("*.png")
    assert Image.open(made).tobytes() == Image.open(preview).tobytes()
    assert "--reference_image 0.png" in Image.open(preview).info["command"]
    made.unlink()
    assert main(line) == 0
    (plain,) = tmp_path.glob("*.png")
    assert Image.open(plain).tobytes() != Image.open(preview).tobytes()
    with pytest.raises(UserError) as raised:
        main([*line, "--reference_image", str(tmp_path / "absent.png")])
    assert raised.value.code == "prompt-image-unreadable"


@pytest.mark.full
def test_whole_models_learn_and_say_what_they_are(toy_shelf: ToyShelf, data: tuple[Path, Path], tmp_path: Path) -> None:
    options = edit_options(
        data, method="full", network_module=None, network_dim=None, network_train_unet_only=None,
        learning_rate="3e-3", max_train_steps=30,
    )  # fmt: skip
    output = train_toy(toy_shelf.paths("flux_kontext"), data[0], tmp_path, **options)
    losses = [row["loss/current"] for row in read_metrics(output) if "loss/current" in row]
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
    toy = toy_shelf.options("flux_kontext").model_copy(
        update={"pretrained_model_name_or_path": str(output / "lora.safetensors"), "model_type": None}
    )
    assert read_model(toy).title == "FLUX.1 Kontext"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("missing", "conditioning-image-missing"),
        ("extra", "conditioning-image-unmatched"),
        ("damaged", "image-header-damaged"),
        ("no folder", "path-missing"),
        ("other family", "reference-images-unused"),
    ],
)
def test_faults_of_references(toy_shelf: ToyShelf, tmp_path: Path, change: str, code: str) -> None:
    images, references = make_images(tmp_path / "images", 2), make_images(tmp_path / "references", 2) / "2_cat"
    options = edit_options((images, references))
    if change == "missing":
        (references / "1.png").unlink()
    elif change == "extra":
        (references / "7.png").write_bytes((references / "0.png").read_bytes())
    elif change == "damaged":
        (references / "1.png").write_bytes(b"no image")
    elif change == "no folder":
        options = {**options, "reference_data_dirs": [tmp_path / "absent"]}
    else:
        options = {**options, "model_type": "flux"}
    with pytest.raises(UserError) as raised:
        train_toy(toy_shelf.paths("flux_kontext"), images, tmp_path / "out", **options)
    codes = [
        error.code for error in (raised.value.errors if isinstance(raised.value, SeveralErrors) else [raised.value])
    ]
    assert code in codes
    assert not (tmp_path / "out").exists()
