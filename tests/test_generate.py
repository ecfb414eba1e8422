"""`sfumato generate`: the command inside a preview makes the very same picture; what it is asked is checked."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.config import load_config
from sfumato.config.prompts import Prompt
from sfumato.families.base import Sampling
from sfumato.sample import Picture
from sfumato.training.image_metadata import command
from training import pictures, run

USUAL = Sampling(width=64, height=64, steps=2, scale=3.0, guidance=None, size_multiple=8)
PICTURE = Picture(
    prompt="a cat", negative_prompt="", width=64, height=64, seed=5, steps=2, scale=3.0, guidance=None, sampler="ddim"
)


def text_of(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)  # pyright: ignore[reportAttributeAccessIssue]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def relative(toy: Mapping[str, Path]) -> dict[str, Path]:
    """The toy's files as seen from the current folder."""
    return {name: Path(os.path.relpath(path)) for name, path in toy.items()}


def made_again(preview: Path) -> dict[str, str]:
    """Run the command in a preview; the picture is the same. The text in both."""
    text = text_of(preview)
    program, *argv = shlex.split(text["command"])
    assert program == "sfumato"
    before = set(Path("outputs").glob("*.png"))
    assert main(argv) == 0
    (made,) = set(Path("outputs").glob("*.png")) - before
    assert np.abs(pixels(preview) - pixels(made)).max() == 0, text["command"]
    assert text_of(made)["command"] == text["command"]
    return text


LINES = """a cat --w 64 --h 64 --s 2 --d 5 --n a "dog" --l 3
it's a (red:1.3) cup, 50% $HOME --w 64 --h 128 --s 3 --fs 1.5
"""


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd", {"sample_sampler": "euler_a"}),
        pytest.param("sd", {"mixed_precision": "bf16", "clip_skip": 2}, marks=pytest.mark.slow),
        ("flux", {}),
        pytest.param("sdxl", {"network_train_unet_only": True}, marks=pytest.mark.slow),
        pytest.param("chroma", {"mixed_precision": "bf16", "network_train_unet_only": True}, marks=pytest.mark.slow),
        pytest.param("sd3", {"network_train_unet_only": True}, marks=pytest.mark.slow),
        pytest.param("lumina", {"mixed_precision": "fp16", "discrete_flow_shift": 2.0}, marks=pytest.mark.slow),
    ],
)
def test_the_command_in_a_preview_makes_it_again(
    family: str, options: dict[str, Any], toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the saves of every moment: before training, in the middle, at the end."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(LINES)
    given = {"sample_prompts": "prompts.txt", "sample_every_n_steps": 1, "sample_at_first": True}
    given |= {"save_every_n_steps": 1, "max_train_steps": 2, "learning_rate": "1e-1", **options}
    output = run(relative(toy_shelf.paths(family)), pictures(Path("images")), Path("out"), **given)
    previews = sorted((output / "sample").iterdir())
    found = [made_again(path) for path in previews]
    assert [text["step"] for text in found] == ["0", "0", "1", "1", "2", "2"]
    assert [text["epoch"] for text in found] == ["0", "0", "1", "1", "1", "1"]
    trained = ["", "out/lora-step00000001.safetensors", "out/lora.safetensors"]
    assert [text.get("trained", "") for text in found] == [name for name in trained for _ in range(2)]
    assert {text["model"] for text in found} == {toy_shelf.paths(family)["pretrained_model_name_or_path"].name}
    assert (pixels(previews[0]) != pixels(previews[4])).any(), "training changed nothing"


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_of_a_whole_model(precision: str, toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(LINES)
    given = {"method": "full", "sample_prompts": "prompts.txt", "sample_every_n_steps": 2, "network_dim": None}
    given |= {"max_train_steps": 2, "train_text_encoder": True, "mixed_precision": precision, "learning_rate": "1e-2"}
    toy = relative(toy_shelf.paths("sd"))
    given["tokenizer"] = [path for name, path in toy.items() if name.startswith("tokenizer")]
    output = run(toy, pictures(Path("images")), Path("out"), **given)
    for path in sorted((output / "sample").iterdir()):
        text = made_again(path)
        assert "--pretrained_model_name_or_path out/lora.safetensors" in text["command"]
        assert ("--float32_parts clip denoiser" in text["command"]) == (precision == "bf16")


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"ema_sigma_rel": [0.1], "evaluate_with_ema": True}, "out/lora-ema0.1.safetensors"),
        pytest.param(
            {"full_bf16": True, "mixed_precision": "bf16"}, "out/lora.safetensors", marks=pytest.mark.slow
        ),
        pytest.param(
            {"full_bf16": True, "mixed_precision": "bf16", "method": "full", "network_dim": None, "ema_decay": 0.9,
             "evaluate_with_ema": True, "learning_rate": "1e-3"},
            "out/lora-ema.safetensors", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_of_an_average_and_of_weights_in_bfloat16(
    options: dict[str, Any], trained: str, toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(LINES)
    given = {"sample_prompts": "prompts.txt", "sample_every_n_steps": 2, "max_train_steps": 4, "learning_rate": "1e-1"}
    toy = relative(toy_shelf.paths("sd"))
    given["tokenizer"] = [path for name, path in toy.items() if name.startswith("tokenizer")]
    given |= {"save_every_n_steps": 2, **options}
    output = run(toy, pictures(Path("images")), Path("out"), **given)
    assert [made_again(path)["trained"] for path in sorted((output / "sample").iterdir())][2:] == [trained] * 2


@pytest.mark.slow
def test_adapters_on_top_of_merged_ones(toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged files are in the command; strengths count, a file at 0 is as good as none, two of one are its double."""
    monkeypatch.chdir(tmp_path)
    toy, images = relative(toy_shelf.paths("sd")), pictures(Path("images"))
    Path("prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 5\n")
    strong = {"learning_rate": "1e-1", "max_train_steps": 2}
    base = run(toy, images, Path("base"), **strong) / "lora.safetensors"
    given = {"base_weights": [base], "base_weights_multiplier": [0.5], "sample_every_n_steps": 2}
    output = run(toy, images, Path("out"), sample_prompts="prompts.txt", **strong, **given)
    (preview,) = (output / "sample").iterdir()
    argv = shlex.split(made_again(preview)["command"])[1:]
    assert "--base_weights base/lora.safetensors --base_weights_multiplier 0.5" in " ".join(argv)

    def picture(folder: str, *more: str, plain: bool = False) -> np.ndarray:
        keep = argv if not plain else [w for w in argv if w not in ("--network_weights", "out/lora.safetensors")]
        assert main([*keep, "--outdir", folder, *more]) == 0
        (made,) = Path(folder).iterdir()
        return pixels(made)

    lora = "out/lora.safetensors"
    none = picture("none", plain=True)
    assert (picture("zero", "--network_mul", "0") == none).all()
    double = picture("double", "--network_mul=2")
    assert (double != none).any()
    twice = picture("twice", "--network_weights", lora, lora)
    assert np.abs(double - twice).max() <= 1


def test_several_prompts_of_a_file(toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options beside the file count where a prompt is silent; pictures without a seed count on from --seed."""
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat --s 3\n# no\na dog --d 9 --w 128 --l 1\na cup --n a cat\n")
    model = str(toy_shelf.paths("sd")["pretrained_model_name_or_path"])
    argv = f"--ckpt {shlex.quote(model)} --from_file p.txt --seed 5 --W 64 --H 64 --steps 2 --scale 2.5 --sampler euler"
    assert main(["generate", *shlex.split(argv), "--negative_prompt", "a dog", "--outdir", "o"]) == 0
    found = [text_of(path) for path in sorted(Path("o").iterdir())]
    names = [path.name.split("_")[2:] for path in sorted(Path("o").iterdir())]
    assert names == [["000", "5.png"], ["001", "9.png"], ["002", "7.png"]]
    rows = [tuple(text[name] for name in ("prompt", "steps", "seed", "width", "scale", "sampler")) for text in found]
    assert rows == [
        ("a cat", "3", "5", "64", "2.5", "euler"),
        ("a dog", "2", "9", "128", "1.0", "euler"),
        ("a cup", "2", "7", "64", "2.5", "euler"),
    ]
    assert [text["negative_prompt"] for text in found] == ["a dog", "a dog", "a cat"]
    assert str(tmp_path) not in repr(found)
    assert "--pretrained_model_name_or_path toy_sd.safetensors" in found[0]["command"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a cat", "--prompt 'a cat' "),
        ("a cat --w 512", "--prompt 'a cat --w 512' --plain_prompt "),
        (" two\nlines ", "--prompt ' two\nlines ' --plain_prompt "),
        ("--a 'cat'", """'--prompt=--a '"'"'cat'"'"'' """),
        ("/home/me/cat.png", "--prompt /home/me/cat.png "),
        ("", "--prompt '' "),
    ],
)
def test_a_prompt_survives_the_shell(prompt: str, words: str) -> None:
    config = load_config([], without=("model", "data", "output"))
    line = command(config, Picture(**{**vars(PICTURE), "prompt": prompt}), USUAL, {})
    assert line == f"sfumato generate {words}--W 64 --H 64 --seed 5 --steps 2 --scale 3.0"
    from sfumato.cli.generate import asked_prompts, own_words

    found, rest = own_words(shlex.split(line)[2:])
    expected = Prompt(prompt=prompt, width=64, height=64, sample_steps=2, scale=3.0)
    assert asked_prompts(found, config) == [expected]
    assert rest == ["--seed", "5"]


def test_only_relative_paths_are_told(tmp_path: Path) -> None:
    vae, base = tmp_path / "vae.safetensors", tmp_path / "base.safetensors"
    for path in (vae, base):
        path.write_bytes(b"")
    words = f"--pretrained_model_name_or_path owner/model --vae {vae} --base_weights {base} --no_prompt_weighting"
    secret = "hf_abcdefgh"
    config = load_config(
        [*words.split(), "--huggingface_token", secret, "--training_comment", "x"], without=("data", "output")
    )
    line = command(
        config, Picture(**{**vars(PICTURE), "prompt": secret}), USUAL, {"network_weights": "out/a.safetensors"}
    )
    assert line.startswith(
        "sfumato generate --pretrained_model_name_or_path owner/model --vae vae.safetensors "
        "--base_weights base.safetensors --no_prompt_weighting --network_weights out/a.safetensors --prompt '(secret)'"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "there is nothing to draw"),
        ("--prompt a --from_file p.txt", "--prompt and --from_file both say what to draw"),
        ("--plain_prompt --from_file p.txt", "--plain_prompt is about --prompt"),
        ("--prompt", "--prompt needs a value — write --prompt TEXT"),
        ("--prompt a --W 6.4", "--W: '6.4' is not a whole number"),
        ("--prompt a --H 0", "--H: 0 is below 1"),
        ("--prompt a --scale x", "--scale: 'x' is not a number"),
        ("--prompt a --flow_shift 0", "--flow_shift 0 is not above 0"),
        ("--prompt a --plain_prompt=1", "--plain_prompt is a switch and takes no value"),
        ("--prompt a --network_weights no.safetensors", "no.safetensors does not exist"),
        ("--prompt a --network_mul 1 2", "--network_mul has 2 values for 0 files"),
        ("--prompt a --stepss 3", "--stepss is not an option"),
        ("--promt a", "--promt is not an option — did you mean --prompt?"),
        ("--prompt a --steps 1001", "--steps: 1001 is above 1000"),
        ("--prompt a b", "unexpected 'b'"),
    ],
)
def test_mistakes_are_told(
    words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\n")
    assert main(["generate", "--ckpt", "owner/model", *words.split()]) == 2
    assert told in capsys.readouterr().err


def test_help_names_every_word(capsys: pytest.CaptureFixture[str]) -> None:
    from sfumato.cli.generate import ALSO, WORDS
    from sfumato.config.schema import vocabulary

    assert main(["generate", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{name} " in printed for name in (*WORDS, *ALSO))
    assert set(ALSO) <= set(vocabulary())


def test_a_part_that_is_not_there(toy_shelf: ToyShelf, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = str(toy_shelf.paths("sd")["pretrained_model_name_or_path"])
    argv = ["generate", "--ckpt", model, "--prompt", "a", "--float32_parts", "t5", "--outdir", str(tmp_path / "o")]
    assert main(argv) == 2
    assert "this model has no part t5" in capsys.readouterr().err
