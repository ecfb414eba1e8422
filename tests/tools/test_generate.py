"""`sfumato generate`: the command inside a preview makes the same image; wrong options are refused."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from families.toys import ToyShelf
from sfumato.cli.generate import ALIASES, COMMAND_THEMES, HIGHLIGHTS
from sfumato.cli.generate_job import make_prompts, plan_series
from sfumato.cli.generate_options import GenerateOptions, list_defaults
from sfumato.cli.main import main
from sfumato.config import load_config
from sfumato.config.command import read_command
from sfumato.config.prompts import Prompt
from sfumato.families.blueprint import Sampling
from sfumato.sampling.request import ImageRequest
from sfumato.training.image_metadata import generate_command
from toy_runs import make_images, train_toy

DEFAULTS = Sampling(width=64, height=64, steps=2, scale=3.0, guidance=None, size_multiple=8)
REQUEST = ImageRequest(
    prompt="a cat", negative_prompt="", width=64, height=64, seed=5, steps=2, scale=3.0, guidance=None, sampler="ddim"
)


def read_text(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)  # pyright: ignore[reportAttributeAccessIssue]


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def make_relative(toy: Mapping[str, Path]) -> dict[str, Path]:
    """The toy's files as seen from the current folder."""
    return {name: Path(os.path.relpath(path)) for name, path in toy.items()}


def repeat_preview(preview: Path) -> dict[str, str]:
    """Run the command in a preview, which makes the same image; gives the text of both."""
    text = read_text(preview)
    program, *argv = shlex.split(text["command"])
    assert program == "sfumato"
    before = set(Path("outputs").glob("*.png"))
    assert main(argv) == 0
    (made,) = set(Path("outputs").glob("*.png")) - before
    assert np.abs(read_pixels(preview) - read_pixels(made)).max() == 0, text["command"]
    assert read_text(made)["command"] == text["command"]
    return text


LINES = """a cat --w 64 --h 64 --s 2 --d 5 --n a "dog" --l 3
it's a (red:1.3) cup, 50% $HOME --w 64 --h 128 --s 3 --fs 1.5 --img start.png --mk mask.png --t 0.7
"""


def write_prompts() -> None:
    """The lines, and beside them the files that they name."""
    Path("prompts.txt").write_text(LINES)
    pixels = np.random.default_rng(0).integers(0, 256, (128, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("start.png")
    Image.fromarray(np.pad(np.full((128, 32), 255, np.uint8), ((0, 0), (0, 32)))).save("mask.png")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("sd", {"sample_sampler": "euler_a"}, marks=pytest.mark.full),
        pytest.param("sd", {"mixed_precision": "bf16", "clip_skip": 2}, marks=pytest.mark.full),
        ("flux", {}),
        pytest.param("sdxl", {"network_train_unet_only": True}, marks=pytest.mark.full),
        pytest.param("chroma", {"mixed_precision": "bf16", "network_train_unet_only": True}, marks=pytest.mark.full),
        pytest.param("sd3", {"network_train_unet_only": True}, marks=pytest.mark.full),
        pytest.param("lumina", {"mixed_precision": "fp16", "discrete_flow_shift": 2.0}, marks=pytest.mark.full),
    ],
)
def test_the_command_in_a_preview_makes_it_again(
    family: str, options: dict[str, Any], toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the saves of every moment: before training, in the middle, at the end; from noise and within a mask."""
    monkeypatch.chdir(tmp_path)
    write_prompts()
    given = {"sample_prompts": "prompts.txt", "sample_every_n_steps": 1, "sample_at_first": True}
    given |= {"save_every_n_steps": 1, "max_train_steps": 2, "learning_rate": "1e-1", **options}
    output = train_toy(make_relative(toy_shelf.paths(family)), make_images(Path("images")), Path("out"), **given)
    previews = sorted((output / "sample").iterdir())
    texts = [repeat_preview(path) for path in previews]
    assert [text["step"] for text in texts] == ["0", "0", "1", "1", "2", "2"]
    assert [text["epoch"] for text in texts] == ["0", "0", "1", "1", "1", "1"]
    step_1, last = "out/lora-step00000001.safetensors", "out/lora.safetensors"
    assert [text.get("trained", "") for text in texts] == ["", "", step_1, step_1, last, last]
    assert {text["model"] for text in texts} == {toy_shelf.paths(family)["pretrained_model_name_or_path"].name}
    assert (read_pixels(previews[0]) != read_pixels(previews[4])).any(), "training changed nothing"


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.full)])
def test_a_fully_trained_model(
    precision: str, toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts()
    given = {"method": "full", "sample_prompts": "prompts.txt", "sample_every_n_steps": 2, "network_dim": None}
    given |= {"max_train_steps": 2, "train_text_encoder": True, "mixed_precision": precision, "learning_rate": "1e-2"}
    toy = make_relative(toy_shelf.paths("sd"))
    given["tokenizer"] = [path for name, path in toy.items() if name.startswith("tokenizer")]
    output = train_toy(toy, make_images(Path("images")), Path("out"), **given)
    for path in sorted((output / "sample").iterdir()):
        text = repeat_preview(path)
        assert "--pretrained_model_name_or_path out/lora.safetensors" in text["command"]
        assert ("--float32_parts clip denoiser" in text["command"]) == (precision == "bf16")


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"ema_sigma_rel": [0.1], "evaluate_with_ema": True}, "out/lora-ema0.1.safetensors"),
        pytest.param(
            {"full_bf16": True, "mixed_precision": "bf16"}, "out/lora.safetensors", marks=pytest.mark.full
        ),
        pytest.param(
            {"full_bf16": True, "mixed_precision": "bf16", "method": "full", "network_dim": None, "ema_decay": 0.9,
             "evaluate_with_ema": True, "learning_rate": "1e-3"},
            "out/lora-ema.safetensors", marks=pytest.mark.full,
        ),
    ],
)  # fmt: skip
@pytest.mark.full
def test_ema_and_weights_in_bfloat16(
    options: dict[str, Any], trained: str, toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts()
    given = {"sample_prompts": "prompts.txt", "sample_every_n_steps": 2, "max_train_steps": 4, "learning_rate": "1e-1"}
    toy = make_relative(toy_shelf.paths("sd"))
    given["tokenizer"] = [path for name, path in toy.items() if name.startswith("tokenizer")]
    given |= {"save_every_n_steps": 2, **options}
    output = train_toy(toy, make_images(Path("images")), Path("out"), **given)
    assert [repeat_preview(path)["trained"] for path in sorted((output / "sample").iterdir())][2:] == [trained] * 2


@pytest.mark.full
def test_adapters_on_top_of_merged_ones(toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged files are in the command; strengths count, a file at 0 is as good as none, two of one are its double."""
    monkeypatch.chdir(tmp_path)
    toy, images = make_relative(toy_shelf.paths("sd")), make_images(Path("images"))
    Path("prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 5\n")
    strong = {"learning_rate": "1e-1", "max_train_steps": 2}
    base = train_toy(toy, images, Path("base"), **strong) / "lora.safetensors"
    given = {"base_weights": [base], "base_weights_multiplier": [0.5], "sample_every_n_steps": 2}
    output = train_toy(toy, images, Path("out"), sample_prompts="prompts.txt", **strong, **given)
    (preview,) = (output / "sample").iterdir()
    argv = shlex.split(repeat_preview(preview)["command"])[1:]
    assert "--base_weights base/lora.safetensors --base_weights_multiplier 0.5" in " ".join(argv)

    def generate(folder: str, *more: str, plain: bool = False) -> np.ndarray:
        keep = argv if not plain else [w for w in argv if w not in ("--network_weights", "out/lora.safetensors")]
        assert main([*keep, "--outdir", folder, *more]) == 0
        (made,) = Path(folder).iterdir()
        return read_pixels(made)

    lora = "out/lora.safetensors"
    none = generate("none", plain=True)
    assert (generate("zero", "--network_mul", "0") == none).all()
    double = generate("double", "--network_mul=2")
    assert (double != none).any()
    twice = generate("twice", "--network_weights", lora, lora)
    assert np.abs(double - twice).max() <= 1


def test_several_prompts_of_a_file(toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options beside the file apply where a prompt gives none; without a seed it is --seed plus the index."""
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat --s 3\n# no\na dog --d 9 --w 128 --l 1\na cup --n a cat\n")
    model = str(toy_shelf.paths("sd")["pretrained_model_name_or_path"])
    argv = f"--ckpt {shlex.quote(model)} --from_file p.txt --seed 5 --W 64 --H 64 --steps 2 --scale 2.5 --sampler euler"
    assert main(["generate", *shlex.split(argv), "--negative_prompt", "a dog", "--outdir", "o"]) == 0
    texts = [read_text(path) for path in sorted(Path("o").iterdir())]
    names = [path.name.split("_")[2:] for path in sorted(Path("o").iterdir())]
    assert names == [["000", "5.png"], ["001", "9.png"], ["002", "7.png"]]
    read_row = itemgetter("prompt", "steps", "seed", "width", "scale", "sampler")
    rows = [read_row(text) for text in texts]
    assert rows == [
        ("a cat", "3", "5", "64", "2.5", "euler"),
        ("a dog", "2", "9", "128", "1.0", "euler"),
        ("a cup", "2", "7", "64", "2.5", "euler"),
    ]
    assert [text["negative_prompt"] for text in texts] == ["a dog", "a dog", "a cat"]
    assert str(tmp_path) not in repr(texts)
    assert "--pretrained_model_name_or_path toy_sd.safetensors" in texts[0]["command"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a cat", "--prompt 'a cat' "),
        ("a {cat|dog}", "--prompt 'a {cat|dog}' --plain_prompt "),
        ("a cat --w 512", "--prompt 'a cat --w 512' --plain_prompt "),
        (" two\nlines ", "--prompt ' two\nlines ' --plain_prompt "),
        ("--a 'cat'", """'--prompt=--a '"'"'cat'"'"'' """),
        ("/home/me/cat.png", "--prompt /home/me/cat.png "),
        ("", "--prompt '' "),
    ],
)
def test_a_prompt_survives_the_shell(prompt: str, words: str) -> None:
    config = load_config([], skip_rules=("model-missing", "data-missing", "output-missing"))
    line = generate_command(config, replace(REQUEST, prompt=prompt), DEFAULTS, {})
    assert line == f"sfumato generate {words}--W 64 --H 64 --seed 5 --steps 2 --scale 3.0"
    read = read_command(shlex.split(line)[2:], *COMMAND_THEMES, aliases=ALIASES)
    options = read.options(GenerateOptions)
    (found,) = make_prompts(options, config, plan_series(read, config))
    expected = Prompt(prompt=prompt, width=64, height=64, sample_steps=2, scale=3.0)
    assert found.apply_defaults(list_defaults(options)) == expected
    assert read.values == {"seed": 5}


def test_absolute_paths_are_shortened(tmp_path: Path) -> None:
    vae, base = tmp_path / "vae.safetensors", tmp_path / "base.safetensors"
    for path in (vae, base):
        path.write_bytes(b"")
    words = f"--pretrained_model_name_or_path owner/model --vae {vae} --base_weights {base} --no_prompt_weighting"
    secret = "hf_abcdefgh"
    config = load_config(
        [*words.split(), "--huggingface_token", secret, "--training_comment", "x"],
        skip_rules=("data-missing", "output-missing"),
    )
    line = generate_command(config, replace(REQUEST, prompt=secret), DEFAULTS, {"network_weights": "out/a.safetensors"})
    assert line.startswith(
        "sfumato generate --pretrained_model_name_or_path owner/model --vae vae.safetensors "
        "--base_weights base.safetensors --no_prompt_weighting --network_weights out/a.safetensors --prompt '(secret)'"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "there is no prompt"),
        ("--prompt a --from_file p.txt", "--prompt and --from_file both give prompts"),
        ("--plain_prompt --from_file p.txt", "--plain_prompt is about --prompt"),
        ("--prompt", "--prompt needs a value — write --prompt TEXT"),
        ("--prompt a --W 6.4", "--W: '6.4' is not a whole number"),
        ("--prompt a --H 0", "--H: '0' is below 1"),
        ("--prompt a --scale x", "--scale: 'x' is not a number"),
        ("--prompt a --flow_shift 0", "--flow_shift: '0' must be above 0"),
        ("--prompt a --plain_prompt=1", "--plain_prompt is a switch and takes no value"),
        ("--prompt a --network_weights no.safetensors", "no.safetensors does not exist"),
        ("--prompt a --network_mul 1 2", "--network_mul has 2 values for 0 files"),
        ("--prompt a --stepss 3", "--stepss is not an option"),
        ("--promt a", "--promt is not an option — did you mean --prompt?"),
        ("--prompt a --steps 1001", "--steps: '1001' is above 1000"),
        ("--prompt a b", "unexpected 'b'"),
    ],
)
def test_mistakes_are_reported(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\n")
    assert main(["generate", "--ckpt", "owner/model", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    printed = {word.rstrip(",") for word in capsys.readouterr().out.split()}
    assert {f"--{name}" for theme in COMMAND_THEMES for name in (*theme.model_fields, *HIGHLIGHTS)} <= printed


def test_an_unknown_part(toy_shelf: ToyShelf, codes: list[str], tmp_path: Path) -> None:
    model = str(toy_shelf.paths("sd")["pretrained_model_name_or_path"])
    argv = ["generate", "--ckpt", model, "--prompt", "a", "--float32_parts", "t5", "--outdir", str(tmp_path / "o")]
    assert main(argv) == 2
    assert codes == ["float32-part-unknown"]
