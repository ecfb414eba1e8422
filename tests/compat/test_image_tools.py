"""sd-scripts' image scripts: command lines as guides show them, on sfumato-tiny, and the files that they write."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from PIL import Image
from safetensors.torch import save_file

from families.loading import load_model
from families.toys import ToyShelf
from sfumato.cli.generate import ALIASES, COMMAND_THEMES
from sfumato.compat.image_tools import IMAGE_TOOLS, find_image_tool
from sfumato.compat.launch import main
from sfumato.config.model import ModelOptions
from sfumato.config.option_table import make_option_table
from sfumato.config.schema import vocabulary
from sfumato.demo.base import CHECKPOINT
from test_regions import write_lora

SMALL = f"--ckpt {CHECKPOINT} --v_parameterization --zero_terminal_snr --W 64 --H 64 --steps 2"
full = pytest.mark.full


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters, a word, a ControlNet, images, masks, prompts and a module of prompts."""
    folder = tmp_path_factory.mktemp("place")
    model = load_model(ModelOptions(pretrained_model_name_or_path=str(CHECKPOINT), v_parameterization=True))
    for seed, name in enumerate(("one", "two")):
        write_lora(model, folder / f"{name}.safetensors", seed)
    width = model.parts["clip"].module.config.hidden_size
    save_file({"emb_params": torch.ones(2, width)}, folder / "zwx.safetensors")
    write_control_net(model, folder / "control")
    (folder / "start").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "start" / f"photo{i}.png")
    Image.fromarray(np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (0, 32)))).save(folder / "mask.png")
    (folder / "p.txt").write_text("a cat --n a dog --l 3\n# no\na cup, {red|blue} --d 7,8 --s 3\n")
    (folder / "prompts.py").write_text(
        "def get_prompter(args, pipe, networks):\n    return ['a cat', args.prompter_module_args]\n"
    )
    return folder


def write_control_net(model: Any, folder: Path) -> None:
    """A copy of the UNet's first half whose outputs are not zero."""
    net: Any = ControlNetModel.from_unet(model.denoiser, conditioning_embedding_out_channels=(16, 32, 96))
    generator = torch.Generator().manual_seed(1)
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * 0.02
    net.save_pretrained(folder)


def run(name: str, words: str, place: Path, out: Path, monkeypatch: pytest.MonkeyPatch, typed: str = "") -> list[Path]:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    argv = [word.format(place=place) if "{place}" in word else word for word in re.findall(r'"[^"]*"|\S+', words)]
    assert main([name, *(word.strip('"') for word in argv)]) == 0
    return sorted(out.iterdir())


LINES = {  # a guide's command line -> the names of the files, of which # stands for digits
    "one prompt": ('--prompt "a cat --n a dog" --seed 3', ["im_#_000_3.png"]),
    "a file": ("--from_file {place}/p.txt --seed 3", ["im_#_000_3.png", "im_#_001_7.png", "im_#_002_8.png"]),
    "a module": (
        "--from_module {place}/prompts.py --prompter_module_args dog --seed 3", ["im_#_000_3.png", "im_#_001_4.png"],
    ),
    "several images": (
        '--prompt "a cat" --images_per_prompt 3 --batch_size 2 --seed 1', [f"im_#_00{i}_{i + 1}.png" for i in range(3)],
    ),
    "several rounds": (
        '--prompt "a cat" --n_iter 2 --iter_same_seed --images_per_prompt 2 --seed 1',
        ["im_#_000_1.png", "im_#_001_1.png", "im_#_002_2.png", "im_#_003_2.png"],
    ),
    "shuffled": ("--from_file {place}/p.txt --shuffle_prompts --seed 1", ["im_#_00#_#.png"] * 3),
    "numbered": ('--prompt "a cat" --images_per_prompt 2 --sequential_file_name', ["im_000001.png", "im_000002.png"]),
    "a name": ('--prompt "a cat --f mine" --images_per_prompt 2', ["mine.png", "mine_1.png"]),
    "a WebP file": ('--prompt "a cat --f mine.webp"', ["mine.webp"]),
    "hires fix": (
        '--prompt "a cat" --highres_fix_scale 0.5 --highres_fix_steps 2 --strength 0.6 --seed 2 --highres_fix_save_1st',
        ["im_#_0000_2.png", "im_#_1000_2.png"],
    ),
    "from images": (
        '--prompt "a cat" --image_path {place}/start --strength 0.7 --images_per_prompt 2 --use_original_file_name',
        ["photo0.png", "photo1.png"],
    ),
    "with a mask": (
        '--prompt "a cat" --image_path {place}/start/photo0.png --mask_path {place}/mask.png --seed 4',
        ["im_#_000_4.png"],
    ),
    "an adapter": (
        '--prompt "a cat" --network_module networks.lora --network_weights {place}/one.safetensors --seed 1',
        ["im_#_000_1.png"],
    ),
    "a new word": (
        '--prompt "a zwx on a red background" --textual_inversion_embeddings {place}/zwx.safetensors --seed 1',
        ["im_#_000_1.png"],
    ),
    "a ControlNet": (
        ('--prompt "a cat" --control_net_models {place}/control --guide_image_path {place}/start/photo1.png '
        "--control_net_preps canny_63_191 --control_net_weights 0.7 --control_net_ratios 0.8 --seed 1"),
        ["im_#_000_1.png"],
    ),
    "typed": ("--interactive", ["im_#_000_3.png", "im_#_001_4.png"]),
    "two adapters": (
        ('--prompt "a cat --am 0.5,1" --network_module networks.lora networks.lora --network_weights '
        "{place}/one.safetensors {place}/two.safetensors --network_mul 0.8 0.3 --seed 1"), ["im_#_000_1.png"],
    ),
    "merged adapters": (
        ('--prompt "a cat" --network_weights {place}/one.safetensors {place}/two.safetensors '
        "--network_mul 0.8 0.3 --network_merge --seed 1"), ["im_#_000_1.png"],
    ),
    "one of two merged": (
        ('--prompt "a cat" --network_weights {place}/one.safetensors {place}/two.safetensors '
        "--network_merge_n_models 1 --network_pre_calc --seed 1"), ["im_#_000_1.png"],
    ),
    "Deep Shrink": ('--prompt "a cat" --ds_depth_1 1 --ds_timesteps_1 500 --seed 1', ["im_#_000_1.png"]),
    "Gradual Latent": (
        '--prompt "a cat" --sampler euler_a --gradual_latent_timesteps 900 --seed 1', ["im_#_000_1.png"],
    ),
    "every combination": ('--prompt "{e$$a|the} {e$$cat|dog}" --seed 5', [f"im_#_00{i}_5.png" for i in range(4)]),
    "half precision": (
        '--prompt "a (cat:1.3)" --bf16 --sdpa --max_embeddings_multiples 3 --seed 1', ["im_#_000_1.png"],
    ),
}  # fmt: skip
FAST = ("a file", "hires fix", "from images", "two adapters")


@pytest.mark.parametrize("kind", [name if name in FAST else pytest.param(name, marks=full) for name in LINES])
def test_gen_img(kind: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, names = LINES[kind]
    out = tmp_path / "out"
    found = run("gen_img", f"{SMALL} {words} --outdir {out}", place, out, monkeypatch, "a cat --d 3\n\na dog --d 4\n")
    assert len(found) == len(names)
    for path, name in zip(found, names, strict=True):
        assert re.fullmatch(re.escape(name).replace(r"\#", r"\d+"), path.name), path.name
        with Image.open(path) as image:
            assert image.size == ((32, 32) if name.startswith("im_#_0000") else (64, 64))
            assert np.asarray(image).std() > 5, "it shows nothing"


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@full
def test_merged_adapters_make_the_same_image(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As attached ones, up to rounding, with their multipliers beside them or in the prompt; not as none."""
    start = f"{SMALL} --seed 1 --network_weights {{place}}/one.safetensors {{place}}/two.safetensors"
    kinds = {
        "attached": '--prompt "a cat" --network_mul 0.5 1.5',
        "merged": '--prompt "a cat" --network_mul 0.5 1.5 --network_merge',
        "prompted": '--prompt "a cat --am 0.5,1.5" --network_mul 0 0',
        "none": '--prompt "a cat --am 0"',
        "merged-prompted": '--prompt "a cat --am 0.1,2" --network_mul 0.5 1.5 --network_merge',
    }
    images: dict[str, np.ndarray] = {}
    for name, words in kinds.items():
        out = tmp_path / name
        images[name] = read_pixels(run("gen_img", f"{start} {words} --outdir {out}", place, out, monkeypatch)[0])
    assert "--am has no effect, 2 are merged with theirs" in capsys.readouterr().err
    for name in ("merged", "prompted", "merged-prompted"):
        assert np.abs(images[name] - images["attached"]).max() <= 1, name
    assert (images["none"] != images["attached"]).any()


@full
def test_prompts_that_are_typed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong with one is reported, a word, a file or what the model cannot do, and the next one is read."""
    wrong = ("a --ss none", "a --img gone.png", "a --glr 0.5 --d 5")
    typed = "\n".join((wrong[0], "a cat --d 3", "", *wrong[1:], "a dog --d 4"))
    words = f"{SMALL} --interactive --outdir {tmp_path}"
    assert [path.name[-6:] for path in run("gen_img", words, place, tmp_path, monkeypatch, typed)] == [
        "_3.png",
        "_4.png",
    ]
    said = capsys.readouterr().err
    assert all(word in said for word in ("unknown sampler 'none'", "gone.png", "needs the sampler euler_a")), said


@pytest.mark.fast_for("flux")
@pytest.mark.parametrize(
    ("name", "family", "words", "typed", "size"),
    [
        (
            "flux_minimal_inference", "flux", "--width 64 --height 96 --steps 2 --seed 1 --dtype fp32 --offload", "",
            (64, 96),
        ),
        (
            "flux_minimal_inference", "flux", "--interactive --dtype fp32",
            "a --w 64 --h 64 --s 2 --d 1\nb --d 2\n\nc\n", (64, 64),
        ),
        ("sd3_minimal_inference", "sd3", '--prompt "a cat" --width 64 --height 64 --steps 2 --bf16', "", (64, 64)),
        ("sdxl_minimal_inference", "sdxl", "--interactive --W 64 --H 64 --steps 2", "a cat\na dog\n\n1\n\n", (64, 64)),
        (
            "lumina_minimal_inference", "lumina",
            "--image_width 64 --image_height 64 --steps 2 --seed 1 --dtype fp32 --guidance_scale 3", "", (64, 64),
        ),
    ],
)  # fmt: skip
def test_minimal_inference(
    name: str, family: str, words: str, typed: str, size: tuple[int, int], toy_shelf: ToyShelf, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = toy_shelf.options(family).model_dump(exclude_defaults=True)
    renamed = {value: key for key, value in IMAGE_TOOLS[name].aliases.items()}
    toy = " ".join(f"--{renamed.get(key, key)} {value}" for key, value in options.items() if key != "model_type")
    toy = toy.replace(" True", "")
    found = run(name, f"{toy} {words} --output_dir {tmp_path}", tmp_path, tmp_path, monkeypatch, typed)
    assert len(found) == max(1, typed.count(" --d "))
    for path in found:
        with Image.open(path) as image:
            assert image.size == size


THEIR_OPTIONS = json.loads((Path(__file__).parents[1] / "goldens" / "image_script_options.json").read_text())


@pytest.mark.parametrize("script", THEIR_OPTIONS)
def test_every_option_of_the_scripts_is_known(script: str) -> None:
    """It is one of ours, another name of one, or refused with a reason."""
    tool = find_image_tool(script)
    assert tool is not None
    table = make_option_table({theme.__name__: theme for theme in (tool.options, *tool.refused, *COMMAND_THEMES)})
    known = {*table.options, *vocabulary(), *ALIASES, *tool.aliases}
    assert not set(THEIR_OPTIONS[script]) - known
    assert {name for theme in tool.refused for name in theme.model_fields} == set(tool.absent)
    assert not set(tool.absent) & set(THEIR_OPTIONS["gen_img"]), "sd-scripts' current script has them"


def test_other_names() -> None:
    assert find_image_tool("gen_img_diffusers.py") is IMAGE_TOOLS["gen_img"]
    assert find_image_tool("train_network") is None


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--prompt a --fp16 --bf16", "gen-img-two-precisions"),
        ("--prompt a --clip_guidance_scale 1", "option-of-another-script"),
        ("--use_original_file_name --prompt a", "original-name-without-image"),
        ("--image_path . --prompt a", "start-folder-empty"),
        ("--prompt a --interactive", "prompt-given-twice"),
        ("--from_module m.py", "prompt-module-without-function"),
        ("--image_path plain.png", "image-without-prompt"),
    ],
)
def test_mistakes(words: str, code: str, codes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text("")
    if "plain" in words:
        Image.new("RGB", (64, 64)).save("plain.png")
    assert main(["gen_img", "--ckpt", "owner/model", *words.split()]) == 2
    assert code in codes


def test_a_wrong_multiplier(codes: list[str]) -> None:
    assert main(["flux_minimal_inference", "--ckpt_path", "owner/model", "--lora_weights", "a.safetensors;x"]) == 2
    assert codes == ["lora-weights-multiplier"]
