"""What single options of sd-scripts' image scripts mean, against closed forms and `sfumato generate`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from families.loading import load_model
from families.toys import ToyShelf
from sfumato.cli.main import main as run_command
from sfumato.compat.image_tool_options import GenImgOptions, take_vae
from sfumato.compat.image_tools import IMAGE_TOOLS
from sfumato.compat.launch import main
from sfumato.config.command import read_command
from sfumato.families._clip import scale_tokens
from sfumato.families.encoding import encode_captions

FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_modes_of_weighted_words() -> None:
    """The mean of all values, none, and the mean of absolute values is what it was."""
    hidden = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1
    weights = torch.tensor([1.0, 1.5, 0.5, 1.0, 2.0], dtype=torch.float64)
    none, absolute = scale_tokens(hidden, weights, "none"), scale_tokens(hidden, weights, "abs")
    assert torch.equal(none, hidden * weights[:, None])
    torch.testing.assert_close(absolute.abs().mean(), hidden.abs().mean())
    torch.testing.assert_close(absolute / absolute[0, 0], none / none[0, 0])
    kept = scale_tokens(hidden, weights)
    torch.testing.assert_close(kept[1] - hidden.mean(), 1.5 * (hidden[1] - hidden.mean()))


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_the_mode_is_that_of_the_model(family: str, toy_shelf: ToyShelf) -> None:
    """In the encoders' features, and in what names them in the cache."""
    texts, prints = [], []
    for mode in ("original", "none", "abs"):
        model = load_model(toy_shelf.options(family, emb_normalize_mode=mode))
        part = model.text_parts[0]
        (features,) = encode_captions(model, part, ["a (cat:1.5)"], weighted=True)
        (plain,) = encode_captions(model, part, ["a cat"], weighted=True)
        texts.append(features["hidden"])
        prints.append((model.text_fingerprint(part), plain["hidden"]))
    assert not torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[1], texts[2])
    assert len({text for text, _ in prints}) == 3
    assert all(torch.equal(plain, prints[0][1]) for _, plain in prints)


@pytest.mark.full
def test_a_system_prompt_before_negative_prompts(toy_shelf: ToyShelf) -> None:
    options: dict[str, Any] = {"system_prompt": "You draw."}
    with_it = load_model(toy_shelf.options("lumina", **options, add_system_prompt_to_negative_prompt=True))
    without = load_model(toy_shelf.options("lumina", **options))
    part = with_it.text_parts[0]
    (own,) = encode_captions(with_it, part, ["a cat"], negative=True)
    (positive,) = encode_captions(without, part, ["a cat"])
    (negative,) = encode_captions(without, part, ["a cat"], negative=True)
    assert torch.equal(own["hidden"], positive["hidden"])
    assert own["hidden"].shape != negative["hidden"].shape or not torch.equal(own["hidden"], negative["hidden"])


def test_schnell_takes_few_steps(toy_shelf: ToyShelf) -> None:
    """Its own default, whatever the script's is for dev."""
    schnell = load_model(toy_shelf.options("flux", variant="schnell"))
    assert (schnell.sampling.steps, schnell.sampling.is_distilled) == (4, True)
    assert type(schnell).sampling.steps == 20


@pytest.mark.full
@pytest.mark.parametrize(("variant", "steps"), [("schnell", 4), ("", 50)])
def test_default_steps_of_the_script(variant: str, steps: int, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    options = toy_shelf.options("flux", variant=variant).model_dump(exclude_defaults=True)
    names = {value: key for key, value in IMAGE_TOOLS["flux_minimal_inference"].aliases.items()}
    line = [word for name, value in options.items() for word in (f"--{names.get(name, name)}", str(value))]
    line = [word for word in line if word != "True"]
    more = ["--width", "64", "--height", "64", "--dtype", "fp32", "--seed", "1", "--output_dir", str(tmp_path)]
    assert main(["flux_minimal_inference", *line, *more]) == 0
    (made,) = tmp_path.iterdir()
    assert Image.open(made).info["steps"] == str(steps)


def test_how_the_autoencoder_saves_memory() -> None:
    """A batch size below 1 is a share of --batch_size; slices are tiles of that part of the longer side."""

    def take(*words: str) -> tuple[Any, Any]:
        line = read_command(list(words), GenImgOptions, aliases={"batch_size": "sample_batch_size"})
        own = take_vae(line.options(GenImgOptions), line, 512)
        return line.values.get("vae_batch_size"), own.get("vae_tile_size")

    assert take("--batch_size", "4", "--vae_batch_size", "0.5") == (2, None)
    assert take("--vae_batch_size", "3") == (3, None)
    assert take("--batch_size", "2", "--vae_batch_size", "0.1") == (1, None)
    assert take("--vae_slices", "4") == (None, 128)
    assert take("--vae_slices", "1") == (None, None)


@pytest.mark.full
def test_painting_within_a_mask(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """The same image as `sfumato generate` makes with the same image, mask and settings."""
    source = toy_shelf.paths("sd")["pretrained_model_name_or_path"]
    shutil.copytree(source.parent, tmp_path / "model")
    weight = torch.randn(load_file(source)[FIRST_LAYER].shape[0], 9, 3, 3, generator=torch.Generator().manual_seed(0))
    model = tmp_path / "model" / "inpainting.safetensors"
    save_file({**load_file(source), FIRST_LAYER: weight / 9}, model)
    draw = np.random.default_rng(0)
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(image)
    Image.fromarray(np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (0, 32)))).save(mask)
    size = ["--steps", "3", "--seed", "1", "--prompt", "a cat"]
    line = ["--ckpt_path", str(model), "--image", str(image), "--mask", str(mask), "--width", "64", "--height", "64"]
    out = ["--output_dir", str(tmp_path / "one")]
    assert main(["inpainting_minimal_inference", *line, *size, *out]) == 0
    line = ["--ckpt", str(model), "--image_path", str(image), "--mask_path", str(mask), "--W", "64", "--H", "64"]
    more = ["--scale", "7.5", "--outdir", str(tmp_path / "two")]
    assert run_command(["generate", *line, *size, *more]) == 0
    (first,), (second,) = ((tmp_path / name).iterdir() for name in ("one", "two"))
    assert (read(first) == read(second)).all()
    assert main(["inpainting_minimal_inference", "--ckpt_path", str(model)]) == 2
