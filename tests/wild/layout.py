"""A home folder as the guides of front ends show it: models, images, captions, masks, prompts; all of it toy-sized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from families.toys import ToyShelf
from toy_runs import train_toy

MODELS = (  # family, layout, variant of the toy; its main file; what other files and folders are called
    ("sd", "original", "", "sd-models/model.safetensors", {}),
    ("sd", "diffusers", "", "sd-models/stable-diffusion-v1-5", {}),
    ("sd", "original", "2-v", "sd2-models/v2-1_768-ema-pruned.safetensors", {}),
    ("sd", "original", "2", "sd2-base/512-base-ema.safetensors", {}),
    ("sdxl", "original", "", "sdxl-models/sd_xl_base_1.0.safetensors", {}),
    ("sd3", "original", "", "sd3-models/sd3_medium_incl_clips_t5xxlfp16.safetensors", {}),
    (
        "flux",
        "original",
        "",
        "models/unet/flux1-dev.sft",
        {"clip_l": "../clip/clip_l.safetensors", "t5xxl": "../clip/t5xxl_fp16.safetensors", "ae": "../vae/ae.sft"},
    ),
    ("chroma", "original", "", "chroma/chroma-unlocked.safetensors", {"t5xxl": "t5xxl_fp16.safetensors"}),
    ("lumina", "original", "", "lumina/lumina-image-2.safetensors", {"gemma2": "gemma-2-2b.safetensors"}),
)
CAPTION = "1robot, solo, grey background, standing, number {}"


def make_home(shelf: ToyShelf, home: Path) -> Path:
    """Everything that the configurations name; {home} stands for it in them."""
    for family, layout, variant, name, others in MODELS:
        place_toy(shelf.paths(family, layout, variant), home / name, others)  # type: ignore[arg-type]
    sd = home / "sd-models" / "model.safetensors"
    torch.save({"state_dict": load_file(sd)}, sd.with_suffix(".ckpt"))
    base = home / "sd2-base" / "512-base-ema.safetensors"
    torch.save({"state_dict": load_file(base)}, base.with_suffix(".ckpt"))
    save_encoders(home / "sd3-models" / "sd3_medium_incl_clips_t5xxlfp16.safetensors")
    save_vae(sd, home / "vae" / "vae-ft-mse-840000-ema-pruned.safetensors")
    save_vae(home / "sdxl-models" / "sd_xl_base_1.0.safetensors", home / "sdxl-models" / "sdxl_vae.safetensors")
    make_data(home)
    make_trained(shelf.paths("sd"), home)
    return home


def place_toy(toy: Mapping[str, Path], target: Path, others: Mapping[str, str]) -> None:
    """Copy a toy; its tokenizers stay beside the model."""
    for option, source in toy.items():
        path = target if option == "pretrained_model_name_or_path" else target.parent / others.get(option, source.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, path, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, path)


def save_vae(checkpoint: Path, path: Path) -> None:
    """The autoencoder of a checkpoint as a file of its own, without a prefix."""
    prefix = "first_stage_model."
    tensors = {name.removeprefix(prefix): t for name, t in load_file(checkpoint).items() if name.startswith(prefix)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def save_encoders(checkpoint: Path) -> None:
    """The text encoders of Stable Diffusion 3 as files of their own, and the checkpoint without them."""
    prefix, tensors = "text_encoders.", load_file(checkpoint)
    for name in ("clip_l", "clip_g", "t5xxl"):
        start = f"{prefix}{name}.transformer."
        own = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
        save_file(own, checkpoint.with_name(f"{name}.safetensors"))
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
    save_file(rest, checkpoint.with_name("sd3_medium.safetensors"))


def make_data(home: Path) -> None:
    """Folders with repeats in their names, a flat one, regularization images, masks, cutouts, metadata, prompts."""
    for folder in ("train/img/10_sks robot", "train/img/2_statue", "datasets/robot", "Loras/robot/dataset"):
        make_images(home / folder, captions=True)
    make_images(home / "train/reg/1_robot")
    make_images(home / "inversion/20_robot4 toy")
    (home / "embeddings").mkdir()
    torch.save({"emb_params": torch.zeros(2, 64)}, home / "embeddings" / "robot4.pt")
    make_images(home / "datasets/masks", mode="L")
    make_images(home / "datasets/controls")
    make_images(home / "paired/4_robot", captions=True)
    write(
        home / "control_prompt.txt",
        f"a robot --w 64 --h 64 --d 1 --s 2 --cn {(home / 'datasets/controls/0.png').as_posix()}\n",
    )
    make_images(home / "datasets/cutouts", captions=True, mode="RGBA")
    entries = {
        path.stem: {"caption": "a robot", "tags": "1robot, solo"} for path in (home / "datasets/robot").glob("*.png")
    }
    write(home / "meta" / "meta_cap.json", json.dumps(entries))
    write(home / "prompt.txt", "a robot --n lowres, blurry --w 64 --h 64 --d 1 --l 7 --s 2\n")
    write(home / "empty_prompt.txt", "")
    write(home / "leco.toml", '[[prompts]]\ntarget = "robot"\naction = "erase"\nresolution = 64\n')
    write(
        home / "dataset.toml",
        fill((Path(__file__).parent / "sd_scripts" / "masked_loss.dataset.toml").read_text(), home),
    )


def make_images(folder: Path, *, captions: bool = False, mode: str = "RGB") -> None:
    """Four noise images of two shapes."""
    folder.mkdir(parents=True)
    for number in range(4):
        rng = np.random.default_rng(number)
        height, width = (96, 64) if number % 2 else (64, 64)
        pixels = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
        Image.fromarray(pixels.squeeze()).save(folder / f"{number}.png")
        if captions:
            write(folder / f"{number}.txt", CAPTION.format(number))


def make_trained(toy: Mapping[str, Path], home: Path) -> None:
    """A LoRA of rank 2, and the state of the run that trained it."""
    train_toy(toy, home / "train" / "img", home / "trained", max_train_steps=1, save_state=True)
    (home / "lora").mkdir()
    shutil.copyfile(home / "trained" / "lora.safetensors", home / "lora" / "robot-000001.safetensors")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def fill(text: str, home: Path, dataset: Path | None = None) -> str:
    """A configuration with the places that it names."""
    return text.replace("{home}", home.as_posix()).replace("{dataset}", dataset.as_posix() if dataset else "")
