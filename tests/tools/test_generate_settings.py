"""The command inside an image makes it again, whatever its settings; and other programs read its recipe."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from families.loading import load_model
from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.config.prompts import Prompt
from sfumato.demo.base import CHECKPOINT
from sfumato.sampling.request import ImageRequest, list_ignored, make_request
from sfumato.training.comfyui_workflow import make_workflow

START = "--W 64 --H 64 --steps 3 --seed 5 --scale 3"
LINES = {
    "from an image": "--prompt 'a cat --n a dog' --image_path start.png --mask_path mask.png --strength 0.7",
    "hires fix": "--prompt 'a cat' --highres_fix_scale 0.5 --highres_fix_steps 2 --highres_fix_latents_upscaling",
    "Deep Shrink": "--prompt 'a cat --dsd1 1 --dst1 500 --dsr 0.75' --negative_scale 0.5",
    "Gradual Latent": "--prompt 'a cat' --sampler euler_a --gradual_latent_ratio 0.75",
    "variants": "--prompt 'a {cat|dog} in \\{braces\\} --d 4' --negative_prompt 'a {red|blue} cup'",
    "not as declared": "--prompt 'a cat' --no_v_parameterization --no_zero_terminal_snr",
    "sizes": "--prompt 'a cat --p2 a dog --c a cup' --original_width 512 --crop_top 8",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("start.png")
    Image.fromarray(np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (0, 32)))).save("mask.png")
    return tmp_path


SETTINGS = {  # of a prompt without the one that it is about
    "strength": 0.5, "mask_image": "mask.png", "network_regional_mask_max_color_codes": 3, "highres_fix_steps": 3,
    "highres_fix_strength": 0.5, "highres_fix_save_1st": True, "highres_fix_latents_upscaling": True,
    "highres_fix_upscaler": "u.safetensors", "highres_fix_disable_control_net": True, "controlnet_image": "c.png",
    "control_net_multipliers": (0.5,), "reference_image": "r.png", "guidance_scale": 3.0, "flow_shift": 2.0,
    "clip_vision_strength": 0.5, "clip_vision_model": "c", "original_width": 64,
    "prompt_2": "a dog", "clip_prompt": "a dog",
}  # fmt: skip


def test_no_setting_is_ignored_in_silence(toy_shelf: ToyShelf) -> None:
    """Of a model that has no use for it, or beside none of what it is about: the request is the same, and a line says
    so."""
    model, plain = load_model(toy_shelf.options("sd")), Prompt(prompt="a cat")
    before = make_request(plain, model, sampler="ddim", seed=1)
    for name, value in SETTINGS.items():
        prompt = replace(plain, **{name: value})
        request = make_request(prompt, model, sampler="ddim", seed=1)
        assert request == before, name
        assert list(list_ignored(prompt, request, model)), name
    for sampler, count in (("ddim", 0), ("dpmsingle", 1)):
        prompt = replace(plain, force_scheduler_zero_steps_offset=True, sample_sampler=sampler)
        request = make_request(prompt, model, sampler="ddim", seed=1)
        assert len(list(list_ignored(prompt, request, model))) == count
    stages = {"highres_fix_strength": 0.5, "highres_fix_upscaler": "u", "highres_fix_disable_control_net": True}
    prompt = replace(plain, highres_fix_scale=0.5, highres_fix_latents_upscaling=True, **stages)
    assert len(list(list_ignored(prompt, make_request(prompt, model, sampler="ddim", seed=1), model))) == len(stages)


def read(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    with Image.open(path) as image:
        return np.asarray(image), dict(image.text)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "kind", [name if name == "from an image" else pytest.param(name, marks=pytest.mark.full) for name in LINES]
)
def test_the_command_makes_the_image_again(kind: str, folder: Path, toy_shelf: ToyShelf) -> None:
    family = "sdxl" if kind == "sizes" else "sd"
    toy = toy_shelf.paths(family)["pretrained_model_name_or_path"]
    model = os.path.relpath(CHECKPOINT if kind == "not as declared" else toy)
    assert main(["generate", "--ckpt", model, *shlex.split(f"{START} {LINES[kind]}"), "--outdir", "first"]) == 0
    (made,) = (folder / "first").iterdir()
    pixels, text = read(made)
    assert main([*shlex.split(text["command"])[1:], "--outdir", "second"]) == 0
    (again,) = (folder / "second").iterdir()
    found, same = read(again)
    assert (found == pixels).all(), text["command"]
    assert same == text


def test_the_recipe_for_other_programs(folder: Path, toy_shelf: ToyShelf) -> None:
    """The text of AUTOMATIC1111's web UI, and from it the prompts again where only an image is given."""
    model = str(toy_shelf.paths("sd")["pretrained_model_name_or_path"])
    line = f"{START} --prompt 'a cat' --negative_prompt 'a dog' --sampler euler_a --outdir one"
    assert main(["generate", "--ckpt", model, *shlex.split(line)]) == 0
    (made,) = (folder / "one").iterdir()
    pixels, text = read(made)
    assert text["parameters"] == (
        "a cat\nNegative prompt: a dog\nSteps: 3, Sampler: Euler a, CFG scale: 3, Seed: 5, Size: 64x64"
    )
    for number, keys in enumerate((("prompt", "negative_prompt"), ("parameters",))):
        carried = PngInfo()
        for key in keys:
            carried.add_text(key, text[key])
        source = folder / f"source{number}.png"
        Image.fromarray(pixels).save(source, pnginfo=carried)
        more = ["--image_path", str(source), "--outdir", f"out{number}"]
        assert main(["generate", "--ckpt", model, *shlex.split(START), *more]) == 0
        (found,) = (folder / f"out{number}").iterdir()
        _, read_again = read(found)
        assert (read_again["prompt"], read_again["negative_prompt"]) == ("a cat", "a dog")
        assert read_again["init_image"] == source.name


def test_the_workflow_for_comfyui() -> None:
    """Every link joins an output with an input of its type, both of which know it; the sampler has the request."""
    request = ImageRequest(
        prompt="a cat", negative_prompt="a dog", width=64, height=96, seed=5, steps=3, scale=4.0, guidance=None,
        sampler="k_euler_a",
    )  # fmt: skip
    graph = json.loads(make_workflow(request, checkpoint="m/toy.safetensors", adapters=[("a.safetensors", 0.5)]))
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(graph["links"]) == graph["last_link_id"] == 11
    for link, source, output, target, slot, kind in graph["links"]:
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][slot]["type"] == kind
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link
        assert source < target
    by_type = {node["type"]: node for node in graph["nodes"]}
    assert by_type["KSampler"]["widgets_values"] == [5, "fixed", 3, 4.0, "euler_ancestral", "normal", 1.0]
    assert by_type["LoraLoader"]["widgets_values"] == ["a.safetensors", 0.5, 0.5]
    assert by_type["EmptyLatentImage"]["widgets_values"] == [64, 96, 1]
    texts = [node["widgets_values"] for node in graph["nodes"] if node["type"] == "CLIPTextEncode"]
    assert texts == [["a cat"], ["a dog"]]
    sampled = {socket["name"]: socket["link"] for socket in by_type["KSampler"]["inputs"]}
    (positive,) = [link for link in graph["links"] if link[0] == sampled["positive"]]
    assert nodes[positive[1]]["widgets_values"] == ["a cat"]
