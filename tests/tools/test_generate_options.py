"""Every option of `sfumato generate` and of gen_img changes an image or a file; one without a case fails here."""

from __future__ import annotations

import ast
import io
import re
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from families.toys import ToyShelf
from sfumato.cli.generate import COMMAND_THEMES
from sfumato.compat.image_tools import IMAGE_TOOLS
from sfumato.compat.launch import main as run_script
from sfumato.config.model import ModelOptions
from sfumato.config.schema import vocabulary
from sfumato.demo.base import CHECKPOINT
from sfumato.families.base import Family
from sfumato.tools.generate_setup import GenerateRequest, load_requested_model
from sfumato.training.image_metadata import OTHER_OPTIONS, TRAINING_OPTIONS, model_options

START = "--W 64 --H 64 --steps 2 --seed 5 --scale 3 --prompt"
CAT = f"{START} 'a cat'"
IMAGE = f"{CAT} --image_path start.png"
SHRINK = f"{CAT} --ds_depth_1 1 --ds_timesteps_1 0"
SHRINK_2 = f"{CAT} --steps 4 --ds_depth_1 1 --ds_timesteps_1 900 --ds_depth_2 2 --ds_timesteps_2 100"
LARGE = "--W 128 --H 128 --steps 6 --seed 5 --scale 3 --prompt 'a cat' --sampler euler_a"
GROWING = f"{LARGE} --gradual_latent_timesteps 1000 --gradual_latent_every_n_steps 1"
SHARP = f"{GROWING} --gradual_latent_unsharp_params 3,0.5,0.5"
HIGHRES = "--W 128 --H 128 --steps 4 --seed 5 --scale 3 --prompt 'a cat' --highres_fix_scale 0.5 --highres_fix_steps 2"
LORA = f"{CAT} --network_weights lora.safetensors"
TWO = f"{START} 'a cat AND a dog' --mask_path parts.png"

SIZES = (
    "original_width", "original_height", "original_width_negative", "original_height_negative", "crop_top", "crop_left",
)  # fmt: skip

# option -> what the image is made with, and with what it is another one; {} is the option's name. "sdxl " before it:
# with that model.
PIXELS = {
    "prompt": (CAT, "{} 'a dog'"), "plain_prompt": (f"{START} 'a (cat) --s 1'", "{}"),
    "negative_prompt": (CAT, "{} 'a dog'"), "network_weights": (CAT, "{} lora.safetensors"),
    "network_mul": (LORA, "{} 0.5"), "W": (CAT, "{} 128"), "H": (CAT, "{} 128"), "steps": (CAT, "{} 3"),
    "scale": (CAT, "{} 5"), "negative_scale": (f"{CAT} --negative_prompt 'a dog'", "{} 0.5"),
    "cfg_trunc_ratio": (CAT, "{} 0.3"), "renorm_cfg": (CAT, "{} 0.5"),
    "prompt_2": ("sdxl " + CAT, "{} 'a dog'"), "clip_prompt": ("sdxl " + CAT, "{} 'a dog'"),
    "vae_tile_size": ("--W 256 --H 64 --steps 1 --seed 5 --prompt 'a cat'", "{} 64"),
    "image_path": (CAT, "{} start.png"), "mask_path": (IMAGE, "{} mask.png"),
    "strength": (f"{IMAGE} --steps 5", "{} 0.4"),
    "network_regional_mask_max_color_codes": (TWO, "{} 2"), "highres_fix_scale": (HIGHRES, "{} 0.75"),
    "highres_fix_steps": (HIGHRES, "{} 4"),
    "highres_fix_strength": (f"{HIGHRES} --highres_fix_steps 5 --image_path start.png", "{} 0.3"),
    "highres_fix_latents_upscaling": (HIGHRES, "{}"),
    **dict.fromkeys(SIZES, ("sdxl " + CAT, "{} 512")),
    "ds_depth_1": (f"{CAT} --ds_timesteps_1 0 --ds_depth_1 0", "{} 1"), "ds_timesteps_1": (SHRINK, "{} 900"),
    "ds_depth_2": (SHRINK_2, "{} 3"), "ds_timesteps_2": (SHRINK_2, "{} 850"), "ds_ratio": (SHRINK, "{} 0.75"),
    "gradual_latent_timesteps": (f"{LARGE} --gradual_latent_timesteps 1000", "{} 500"),
    "gradual_latent_ratio": (GROWING, "{} 0.75"), "gradual_latent_ratio_step": (GROWING, "{} 0.25"),
    "gradual_latent_every_n_steps": (GROWING, "{} 3"), "gradual_latent_s_noise": (GROWING, "{} 0.9"),
    "gradual_latent_unsharp_params": (GROWING, "{} 3,0.5,0.5"),
    "noise_offset": (CAT, "{} 0.1"), "pyramid_noise_discount": (CAT, "{} 0.7"), "noise_offset_prob": (CAT, "{} 1"),
    "pyramid_noise_prob": (CAT, "{} 1"), "noise_offset_range": (f"{CAT} --noise_offset_prob 1", "{} 0.3 0.4"),
    "pyramid_noise_discount_range": (f"{CAT} --pyramid_noise_prob 1", "{} 0.2 0.3"),
    "force_scheduler_zero_steps_offset": (f"{CAT} --no_zero_terminal_snr", "{}"),
    "textual_inversion_embeddings": (CAT, "{} cat.safetensors"),
    "seed": (CAT, "{} 6"), "sample_sampler": (CAT, "{} euler"), "clip_skip": (CAT, "{} 2"),
    "prompt_weighting": (f"{START} 'a (cat:1.5)'", "--no_{}"),
    "emb_normalize_mode": (f"{START} 'a (cat:1.5)'", "{} none"), "mixed_precision": (CAT, "{} bf16"),
    "bf16": (CAT, "{}"), "fp16": (CAT, "{}"), "max_embeddings_multiples": (f"{START} '{'a cat, ' * 40}'", "{} 3"),
    "v_parameterization": (CAT, "--no_{}"), "zero_terminal_snr": (CAT, "--no_{}"), "vae": (CAT, "{} vae.safetensors"),
    "base_weights": (CAT, "{} lora.safetensors"),
    "base_weights_multiplier": (f"{CAT} --base_weights lora.safetensors", "{} 0.5"),
    "max_token_length": (f"{START} '{'a cat, ' * 40}'", "{} 225"),
    **dict.fromkeys(("fp8_base", "fp8_base_unet", "int8_base", "nf4_base"), (CAT, "{}")),
    "fp8_scaled": (f"{CAT} --fp8_base", "{}"), "rotate_inputs": (f"{CAT} --int8_base", "{}"),
    "sdxl": ("--steps 1 --seed 5 --prompt 'a cat' --W 64", "{}"), "vae_slices": (
        "--W 256 --H 64 --steps 1 --seed 5 --prompt 'a cat'", "{} 4"),
}  # fmt: skip
# option -> words, and a pattern of the names of all files that they write, those of the images' seeds in its place.
FILES = {
    "n_iter": (f"{CAT} --n_iter 2", r"im_\d+_000_5.png im_\d+_001_6.png"),
    "images_per_prompt": (f"{CAT} --images_per_prompt 2", r"im_\d+_000_5.png im_\d+_001_6.png"),
    "iter_same_seed": (f"{CAT} --n_iter 2 --iter_same_seed", r"im_\d+_000_5.png im_\d+_001_6.png"),
    "shuffle_prompts": (
        f"{START.removesuffix('--prompt')} --from_file lines.txt --shuffle_prompts --seed 7",
        r"im_\d+_000_3.png im_\d+_001_1.png im_\d+_002_2.png",
    ),
    "sequential_file_name": (f"{CAT} --sequential_file_name", "im_000001.png"),
    "use_original_file_name": (f"{IMAGE} --use_original_file_name", "start.png"),
    "from_module": (f"{START.removesuffix('--prompt')} --from_module m.py", r"im_\d+_000_7.png"),
    "prompter_module_args": (
        f"{START.removesuffix('--prompt')} --from_module m.py --prompter_module_args 9", r"im_\d+_000_9.png"
    ),
    "interactive": (f"{START.removesuffix('--prompt')} --interactive", r"im_\d+_000_3.png im_\d+_001_4.png"),
    "highres_fix_save_1st": (f"{HIGHRES} --highres_fix_save_1st", r"im_\d+_0000_5.png im_\d+_1000_5.png"),
    "grid": (f"{CAT} --grid", r"grid_\d+.png im_\d+_000_5.png"),
    "xy": (f'{CAT} --xy "steps=1"', r"im_\d+_000_5.png xy_\d+.png"),
    "outdir": (CAT, r"im_\d+_000_5.png"),  # every case here gives it
    "progress_file": (f"{CAT} --progress_file out/sketch.png", r"im_\d+_000_5.png sketch.png"),
}  # fmt: skip
ELSEWHERE = {  # option -> the test that shows what it does
    "guidance": "test_sample.py::test_defaults_are_the_fields",
    "flow_shift": "tools/test_generate.py::test_the_command_in_a_preview_makes_it_again",
    "reference_image": "families/test_flux_kontext.py::test_generate_makes_the_preview_again",
    "float32_parts": "tools/test_generate.py::test_a_fully_trained_model",
    "network_merge": "compat/test_image_tools.py::test_merged_adapters_make_the_same_image",
    "network_merge_n_models": "compat/test_image_tools.py::test_gen_img",
    "network_pre_calc": "tools/test_generate_options.py::test_calculated_weights_make_the_same_image",
    "network_show_meta": "tools/test_generate_options.py::test_the_metadata_is_shown",
    "vae_batch_size": "tools/test_image_sheets.py::test_images_are_decoded_in_batches",
    "control_net_models": "test_control_images.py::test_several_of_stable_diffusion",
    "control_net_lllite_models": "test_control_images.py::test_two_of_lllite",
    "control_net_image": "test_control_images.py::test_several_of_stable_diffusion",
    "control_net_multipliers": "test_control_images.py::test_each_setting_changes_the_image",
    "control_net_ratios": "test_control_images.py::test_each_setting_changes_the_image",
    "control_net_starts": "test_control_images.py::test_each_setting_changes_the_image",
    **dict.fromkeys(("clip_vision_strength", "clip_vision_model"), "test_start_images.py::test_the_vector_of_an_image"),
    "control_net_preps": "test_control_images.py::test_edges_of_the_control_image",
    **dict.fromkeys(
        ("highres_fix_upscaler", "highres_fix_upscaler_args"),
        "tools/test_upscale_latents.py::test_the_hires_fix_of_gen_img_goes_through_the_network",
    ),
    "highres_fix_disable_control_net": "test_control_images.py::test_the_hires_fix_without_control",
    "pretrained_model_name_or_path": "tools/test_image_sheets.py::test_a_plot_of_checkpoints",
    "controlnet_model_name_or_path": "methods/test_control_net.py::test_generate_makes_the_preview_again",
    "tokenizer": "tools/test_generate.py::test_a_fully_trained_model",
    "sample_prompts": "tools/test_generate.py::test_several_prompts_of_a_file",
    "sample_batch_size": "test_sample.py::test_a_batch_gives_the_same_images_as_single_requests",
    "no_half_vae": "test_half_vae.py::test_an_image_is_decoded_in_float32_where_half_overflows",
    "v2": "families/test_sd2.py::test_v2_is_checked",
    **dict.fromkeys(
        ("model_type", "clip_l", "clip_g", "t5xxl", "gemma2", "ae", "lora_weights", "merge_lora_weights", "output_dir",
         "width", "height", "image_width", "image_height", "dtype"),
        "compat/test_image_tools.py::test_minimal_inference",
    ),
    **dict.fromkeys(
        ("image", "mask", "guidance_scale"),
        "compat/test_image_script_options.py::test_painting_within_a_mask",
    ),
    **dict.fromkeys(
        ("t5xxl_max_token_length", "apply_t5_attn_mask", "apply_lg_attn_mask"),
        "families/test_sd3.py::test_lengths_and_masks_name_the_cache_entries",
    ),
    **dict.fromkeys(("t5xxl_dtype", "t5xxl_device"), "families/test_sd3.py::test_precision_and_device_of_t5"),
    "gemma2_max_token_length": "families/test_lumina.py::test_the_longest_caption",
    **dict.fromkeys(
        ("system_prompt", "add_system_prompt_to_negative_prompt"),
        "compat/test_image_script_options.py::test_a_system_prompt_before_negative_prompts",
    ),
    **dict.fromkeys(
        ("enable_scaled_pos_embed", "resolution"), "families/test_sd3_training.py::test_tables_are_chosen_by_area"
    ),
    "discrete_flow_shift": "families/test_lumina_sampling.py::test_the_time_grid_of_previews",
    **dict.fromkeys(
        ("fp8_compute", "int8_compute"), "training/test_low_precision.py::test_products_in_8_bits_train_alike"
    ),
}  # fmt: skip
OF_PREVIEWS = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")  # when they are made


def test_every_option_has_a_case() -> None:
    """Of the command, of the vocabulary that images depend on, and of all scripts, but those that are said to have no
    effect."""
    scripts = [tool.options for tool in IMAGE_TOOLS.values()]
    every = {name for theme in (*COMMAND_THEMES, *scripts) for name in theme.model_fields}
    of_images = [name for name, option in vocabulary().items() if option.theme in ("model", "samples")]
    every |= {*of_images, *OTHER_OPTIONS, "seed", "resolution", "vae_batch_size"} - {*TRAINING_OPTIONS, *OF_PREVIEWS}
    every -= {name for name, option in vocabulary().items() if option.facts.no_effect}
    cases = {*PIXELS, *FILES, *ELSEWHERE}
    assert every - cases == {name for tool in IMAGE_TOOLS.values() for name in tool.no_effect}
    assert cases - every == set()
    root = Path(__file__).parents[1]
    for option, place in ELSEWHERE.items():
        file, _, name = place.partition("::")
        tree = ast.parse((root / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (option, place)


@cache
def write_folder(folder: Path) -> None:
    """Images, masks, an adapter, a word and prompts for the cases."""
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "start.png")
    Image.fromarray(np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (0, 32)))).save(folder / "mask.png")
    parts = np.zeros((64, 64, 3), np.uint8)
    parts[:, :32], parts[:, 32:] = (255, 255, 0), (255, 0, 0)
    Image.fromarray(parts).save(folder / "parts.png")
    (folder / "lines.txt").write_text("a cat --d 1\na dog --d 2\na cup --d 3\n")
    (folder / "m.py").write_text(
        "def get_prompter(args, pipe, networks):\n    return [f'a cat --d {args.prompter_module_args or 7}']\n"
    )
    state = {name: tensor for name, tensor in load_file(CHECKPOINT).items() if name.startswith("first_stage_model.")}
    last = "first_stage_model.decoder.conv_out.weight"
    with safe_open(CHECKPOINT, "pt") as file:
        save_file({**state, last: state[last] * 0.9}, folder / "vae.safetensors", file.metadata())
    save_file(
        {"emb_params": torch.randn(1, 128, generator=torch.Generator().manual_seed(1))}, folder / "cat.safetensors"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from families.loading import load_model
    from test_regions import write_lora

    place = tmp_path_factory.mktemp("cases")
    write_folder(place)
    model = load_model(ModelOptions(pretrained_model_name_or_path=str(CHECKPOINT)))
    write_lora(model, place / "lora.safetensors", 3)
    return place


def make(words: str, shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch, typed: str = "") -> list[Path]:
    """The files that gen_img writes into the folder `out`, with sfumato-tiny, or where words say so a toy of SDXL."""
    model = CHECKPOINT if not words.startswith("sdxl ") else shelf.paths("sdxl")["pretrained_model_name_or_path"]
    out = Path("out")
    for path in out.glob("*") if out.is_dir() else ():
        path.unlink()
    out.mkdir(exist_ok=True)
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    line = ["gen_img", "--ckpt", str(model), *shlex.split(words.removeprefix("sdxl ")), "--outdir", "out"]
    assert run_script(line) == 0
    return sorted(out.iterdir())


MODELS: dict[str, Family] = {}


def load_once(request: GenerateRequest) -> Family:
    """The model of an earlier case with the same options, unless something is attached to it."""
    if request.networks or request.embeddings:
        return load_requested_model(request)
    values = repr((model_options(request.config), request.config.memory))
    if values not in MODELS:
        MODELS[values] = load_requested_model(request)
    MODELS[values].vae_tile_size = request.vae_tile_size
    return MODELS[values]


BASES: dict[str, bytes] = {}  # words -> pixels


def read_pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


@pytest.mark.full
@pytest.mark.parametrize("option", PIXELS)
def test_an_option_changes_the_image(
    option: str, folder: Path, toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sfumato.tools.generate.load_requested_model", load_once)
    base, words = PIXELS[option]
    if base not in BASES:
        BASES[base] = read_pixels(make(base, toy_shelf, monkeypatch)[-1])
    given = words.replace("--no_{}", f"--no_{option}").replace("{}", f"--{option}")
    without = re.sub(rf"--{option} ('[^']*'|\S+)", "", base)  # the option itself is given once
    changed = make(f"{without} {given}", toy_shelf, monkeypatch)[-1]
    assert read_pixels(changed) != BASES[base]


@pytest.mark.full
@pytest.mark.parametrize("option", FILES)
def test_an_option_changes_the_files(
    option: str, folder: Path, toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sfumato.tools.generate.load_requested_model", load_once)
    words, pattern = FILES[option]
    names = " ".join(path.name for path in make(words, toy_shelf, monkeypatch, "a cat --d 3\n\na dog --d 4\n"))
    assert re.fullmatch(pattern, names), names


@pytest.mark.full
def test_calculated_weights_make_the_same_image(
    folder: Path, toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As adapters beside the weights, up to rounding; at strength 0 exactly as none, also after another strength."""
    monkeypatch.chdir(folder)
    (folder / "muls.txt").write_text("a cat --d 5 --am 0.5\na cat --d 5 --am 0\na cat --d 5 --am 0.5\n")
    start = f"{START.removesuffix('--prompt')} --from_file muls.txt --network_weights lora.safetensors"

    def run(words: str) -> list[np.ndarray]:
        paths = make(words, toy_shelf, monkeypatch)
        return [np.frombuffer(read_pixels(path), np.uint8).astype(int) for path in paths]

    beside, inside = run(start), run(f"{start} --network_pre_calc --batch_size 3")
    for ours, theirs in zip(inside, beside, strict=True):
        assert np.abs(ours - theirs).max() <= 1
    (plain,) = run(CAT)
    assert (inside[1] == plain).all()
    assert (inside[0] != plain).any()
    assert (inside[0] == inside[2]).all()


@pytest.mark.full
def test_the_metadata_is_shown(
    folder: Path, toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    from safetensors.torch import load_file

    save_file(load_file(folder / "lora.safetensors"), folder / "named.safetensors", {"ss_comment": "of the sea"})
    make(f"{CAT} --network_weights named.safetensors --network_show_meta", toy_shelf, monkeypatch)
    assert "of the sea" in capsys.readouterr().err
