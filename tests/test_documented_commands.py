"""Command lines of sd-scripts' guide for FLUX.1 and Chroma: options as they are written there, sizes of toys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from families.toys import ToyShelf
from sfumato.compat.launch import main
from toy_runs import make_images, read_metrics

pytestmark = pytest.mark.full

DATASETS = """\
[general]
flip_aug = true
color_aug = false
keep_tokens_separator = "|||"
shuffle_caption = false
caption_tag_dropout_rate = 0
caption_extension = ".txt"

[[datasets]]
batch_size = 2
enable_bucket = true
min_bucket_reso = 32
resolution = [64, 64]

  [[datasets.subsets]]
  image_dir = "{images}"
  num_repeats = 1

[[datasets]]
batch_size = 2
enable_bucket = true
min_bucket_reso = 32
resolution = [96, 96]

  [[datasets.subsets]]
  image_dir = "{images}"
  num_repeats = 1
"""
PROMPTS = """\
# the first image
a (tabby:1.2) cat, on a wooden table, looking at the camera --n [blurred], dark --w 64 --h 96 --d 1 --l 4 --g {g} --s 3

# the second
a red cup of coffee --n a dog --w 96 --h 64 --d 2 --s 2
"""
FLUX = """
--clip_l {clip_l} --t5xxl {t5xxl} --ae {ae} --save_model_as safetensors --sdpa --persistent_data_loader_workers
--max_data_loader_n_workers 2 --seed 42 --gradient_checkpointing --mixed_precision bf16 --save_precision bf16
--network_module networks.lora_flux --network_dim 4 --learning_rate 1e-4 --cache_latents_to_disk
--max_train_epochs 2 --save_every_n_epochs 1 --output_name flux-lora-name
--timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw --guidance_scale 1.0
--loss_type l2
"""
CACHED = "--network_train_unet_only --cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk"
ADAFACTOR = """
--optimizer_type adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False
--lr_scheduler constant_with_warmup --max_grad_norm 0.0
"""
CHROMA = """
--model_type chroma --t5xxl {t5xxl} --ae {ae} --apply_t5_attn_mask --save_model_as safetensors --sdpa --seed 42
--gradient_checkpointing --mixed_precision bf16 --save_precision bf16 --network_module networks.lora_flux
--network_dim 4 --learning_rate 1e-4 --cache_latents_to_disk --max_train_epochs 2 --save_every_n_epochs 1
--output_name flux-lora-name --timestep_sampling sigmoid --model_prediction_type raw --guidance_scale 0.0
"""
LAYERS = "img_attn_dim=4 img_mlp_dim=8 txt_attn_dim=2 txt_mlp_dim=2"
MODULATION = "img_mod_dim=2 txt_mod_dim=2 single_dim=2 single_mod_dim=2 in_dims=[4,2,2,2,4] verbose=True"
COMMANDS = {
    "denoiser alone": ("flux", FLUX + CACHED + ADAFACTOR),
    "with CLIP-L, T5 cached": ("flux", FLUX + "--cache_text_encoder_outputs --text_encoder_lr 1e-5"),
    "with CLIP-L and T5": ("flux", FLUX + "--network_args train_t5xxl=True --text_encoder_lr 1e-5 5e-6"),
    "CLIP-L alone": ("flux", FLUX + "--network_train_text_encoder_only --cache_text_encoder_outputs"),
    "CLIP-L and T5": ("flux", FLUX + "--network_train_text_encoder_only --network_args train_t5xxl=True"),
    "with the mask": ("flux", FLUX + CACHED + " --apply_t5_attn_mask"),
    "ranks by layer": ("flux", FLUX + CACHED + f" --network_args {LAYERS} {MODULATION}"),
    "some blocks": ("flux", FLUX + CACHED + " --network_args train_blocks=single split_qkv=True"),
    "numbered blocks": (
        "flux",
        FLUX + CACHED + " --network_args train_double_block_indices=0 train_single_block_indices=none",
    ),
    "chroma": ("chroma", CHROMA + CACHED),
    "chroma, ranks by layer": ("chroma", CHROMA + CACHED + f" --network_args {LAYERS} single_dim=3 split_qkv=True"),
    "chroma with T5": ("chroma", CHROMA + "--network_args train_t5xxl=True"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_the_guide(name: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    family, line = COMMANDS[name]
    paths = toy_shelf.paths(family)
    images = make_images(tmp_path / "images", 3) / "2_cat"
    datasets, prompts, output = tmp_path / "dataset.toml", tmp_path / "prompts.txt", tmp_path / "out"
    datasets.write_text(DATASETS.format(images=images))
    prompts.write_text(PROMPTS.format(g=3.5 if family == "flux" else 0))
    words = line.format(**{option: path for option, path in paths.items() if option in ("clip_l", "t5xxl", "ae")})
    places: dict[str, Any] = {
        "pretrained_model_name_or_path": paths["pretrained_model_name_or_path"], "dataset_config": datasets,
        "output_dir": output, "sample_prompts": prompts, "sample_every_n_epochs": 1, "cache_dir": tmp_path / "cache",
    }  # fmt: skip
    words += "".join(f" --{option} {value}" for option, value in places.items())
    assert main(["flux_train_network", *words.split()]) == 0

    saved = sorted(path.name for path in output.glob("*.safetensors"))
    assert saved == ["flux-lora-name-000001.safetensors", "flux-lora-name.safetensors"]
    file = load_file(output / saved[1])
    assert {tensor.dtype for tensor in file.values()} == {torch.bfloat16}
    assert any(tensor.any() for key, tensor in file.items() if key.endswith("lora_up.weight"))
    with safe_open(output / saved[1], "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_module"] == "networks.lora_flux"
    assert metadata["modelspec.architecture"] == ("flux-1-dev/lora" if family == "flux" else "chroma/lora")
    assert (
        len(read_metrics(output, "flux-lora-name")) == int(metadata["ss_steps"]) == int(metadata["ss_max_train_steps"])
    )
    check_samples(output / "sample", guidance=3.5 if family == "flux" else None)


def check_samples(folder: Path, *, guidance: float | None) -> None:
    """Two prompts an epoch; the second has no --l, so that its negative prompt has no say."""
    made = sorted(folder.glob("*.png"))
    assert len(made) == 4
    first, second = (Image.open(path) for path in made[:2])
    assert (first.size, second.size) == ((64, 96), (96, 64))
    assert read_recipe(first) == {"scale": 4.0, "guidance": guidance, "steps": 3, "seed": 1}
    assert read_recipe(second) == {"scale": 1.0, "guidance": guidance, "steps": 2, "seed": 2}


def read_recipe(image: Image.Image) -> dict[str, Any]:
    return {name: json.loads(image.info[name]) for name in ("scale", "guidance", "steps", "seed")}


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        (CHROMA.replace("--apply_t5_attn_mask", "") + CACHED, "chroma-attention-mask-missing", "--apply_t5_attn_mask"),
        (
            CHROMA.replace("--guidance_scale 0.0", "--guidance_scale 3.5") + CACHED,
            "chroma-guidance-scale",
            "--guidance_scale 0",
        ),
        (CHROMA + CACHED + " --network_args img_mod_dim=4", "network-arg-unknown", "'img_mod_dim'"),
        (CHROMA + CACHED + " --network_args train_t5xxl=True", "opt-in-of-frozen-part", "train_t5xxl=True"),
        (
            CHROMA + "--cache_text_encoder_outputs --network_args train_t5xxl=True",
            "text-cache-of-trained-encoders",
            "--cache_text_encoder_outputs",
        ),
    ],
)
def test_what_the_guide_says_not_to_do(
    line: str,
    code: str,
    text: str,
    toy_shelf: ToyShelf,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    codes: list[str],
) -> None:
    paths = toy_shelf.paths("chroma")
    datasets = tmp_path / "dataset.toml"
    datasets.write_text(DATASETS.format(images=make_images(tmp_path / "images", 2) / "2_cat"))
    words = line.format(t5xxl=paths["t5xxl"], ae=paths["ae"]).split()
    words += ["--pretrained_model_name_or_path", str(paths["pretrained_model_name_or_path"])]
    words += ["--dataset_config", str(datasets), "--output_dir", str(tmp_path / "out")]
    assert main(["flux_train_network", *words]) == 2
    assert codes == [code]
    assert text in capsys.readouterr().err.splitlines()[-1]
