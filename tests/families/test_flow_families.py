"""What holds for FLUX.1, Chroma, Stable Diffusion 3 and Lumina alike: files, caches, which text trains, previews."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.loading import load_model
from families.toys import ToyShelf, in_pieces
from sfumato.compat.launch import main
from sfumato.config import ModelOptions
from sfumato.data.batch import Sizes
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.encoding import encode_with_grad
from sfumato.sampling.schedulers import make_scheduler
from sfumato.train import train_step
from toy_runs import build_toy_run, equal_tensors, make_images, read_metrics, read_weights, train_toy

FAMILIES = ("flux", "chroma", "sd3", "lumina")
CAPTIONS = ["a cat", "a red cup of coffee on a wooden table"]
DENOISER, TEXT = {"network_train_unet_only": True}, {"network_train_text_encoder_only": True}
T5 = {"network_args": ["train_t5xxl=True"]}
ROWS = [  # model, options -> what trains, by prefix, and the rest of the text, which may be cached (None: all trains)
    ("flux", DENOISER, {"lora_unet"}, {"clip_l", "t5"}),
    ("flux", {}, {"lora_unet", "lora_te1"}, {"t5"}),
    ("flux", T5, {"lora_unet", "lora_te1", "lora_te3"}, None),
    ("flux", TEXT, {"lora_te1"}, {"t5"}),
    ("flux", TEXT | T5, {"lora_te1", "lora_te3"}, None),
    ("chroma", {}, {"lora_unet"}, {"t5"}),
    ("chroma", T5, {"lora_unet", "lora_te3"}, None),
    ("chroma", TEXT | T5, {"lora_te3"}, None),
    ("sd3", DENOISER, {"lora_unet"}, {"clip_l", "clip_g", "t5"}),
    ("sd3", {}, {"lora_unet", "lora_te1", "lora_te2"}, {"t5"}),
    ("sd3", T5, {"lora_unet", "lora_te1", "lora_te2", "lora_te3"}, None),
    ("sd3", TEXT, {"lora_te1", "lora_te2"}, {"t5"}),
    ("sd3", TEXT | T5, {"lora_te1", "lora_te2", "lora_te3"}, None),
    ("lumina", DENOISER, {"lora_unet"}, {"gemma2"}),
    ("lumina", {}, {"lora_unet", "lora_te"}, None),
    ("lumina", TEXT, {"lora_te"}, None),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 3)


def load(family: str, model: ModelOptions) -> Family:
    return load_model(model, family=family)


@torch.no_grad()
def prediction(model: Family) -> Tensor:
    features = {part: encode_with_grad(model, part, CAPTIONS) for part in model.text_parts}
    conditioning = model.condition(features, Sizes.from_size(2, 64, 64), None)
    x = torch.randn(2, model.latents.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.predict(x, torch.tensor([300.0, 900.0]), conditioning)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_in_pieces_and_in_narrow_types(family: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """fp16, bf16 and fp8, another type in each file: the model of the rounded weights, to the bit."""
    paths = toy_shelf.paths(family)
    files = {name: path for name, path in paths.items() if not name.startswith("tokenizer")}
    tokenizers = tuple(str(path) for name, path in paths.items() if name.startswith("tokenizer"))
    options = toy_shelf.options(family).model_copy(update={"tokenizer": tokenizers})
    kinds = (torch.float8_e4m3fn, torch.bfloat16, torch.float16)
    narrow, wide = {}, {}
    for i, (name, path) in enumerate(files.items()):
        dtype = kinds[i % 3]
        low = {key: t.to(dtype) if t.is_floating_point() else t for key, t in load_file(path).items()}
        high = {key: t.float() if t.is_floating_point() else t for key, t in low.items()}
        narrow[name] = str(in_pieces(low, tmp_path / name, "model"))
        wide[name] = str(tmp_path / f"{name}.safetensors")
        save_file(high, wide[name])
    expected = prediction(load(family, options.model_copy(update=wide)))
    assert torch.equal(prediction(load(family, options.model_copy(update=narrow))), expected)
    assert not torch.equal(prediction(load(family, options)), expected)
    folders = {name: str(Path(path).parent) for name, path in narrow.items() if name in ("clip_l", "t5xxl", "gemma2")}
    assert torch.equal(prediction(load(family, options.model_copy(update=narrow | bare(folders)))), expected)


def bare(folders: Mapping[str, str]) -> dict[str, str]:
    """A folder needs a configuration, except where the weights say everything."""
    return {name: folder for name, folder in folders.items() if name == "gemma2"}


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_caches_change_nothing(family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """Latents and text: none kept, kept in memory, on disk, and found there again."""
    options = {**DENOISER, "max_train_steps": 3, "train_batch_size": 2}
    memory = {"cache_latents": True, "cache_text_encoder_outputs": True}
    disk = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "cache_dir": tmp_path / "cache"}
    ways = {"none": {}, "memory": memory, "disk": disk, "found": disk}
    toy = toy_shelf.paths(family)
    found = {name: train_toy(toy, images, tmp_path / name, **options, **way) for name, way in ways.items()}
    for name in ("memory", "disk", "found"):
        assert equal_tensors(read_weights(found[name]), read_weights(found["none"])), name
        assert read_metrics(found[name]) == read_metrics(found["none"])


@pytest.mark.parametrize(("family", "options", "trained", "cached"), ROWS)
def test_a_row_of_the_table(
    family: str, options: dict[str, Any], trained: set[str], cached: set[str] | None, toy_shelf: ToyShelf,
    images: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """Every part of the row moves in the first step and no other is there; the rest of the text is cached."""
    toy = toy_shelf.paths(family)
    if family == "lumina" and not options:  # the cache alone keeps its encoder from training
        pass
    elif cached is None:
        with pytest.raises(UserError) as error:
            build_toy_run(toy, images, tmp_path, cache_text_encoder_outputs=True, **options)
        assert error.value.code == "text-cache-of-trained-encoders"
    found = build_toy_run(toy, images, tmp_path, cache_text_encoder_outputs=cached is not None, **options)
    step = next(iter(found.loader.steps(0)))
    assert set(step.batches[0].text) == (cached or set())
    train_step(found, step)
    method: Any = found.method
    file = method.engine.export_tensors()
    assert {"_".join(name.split("_")[:2]) for name in file} == trained
    still = [name for name, tensor in file.items() if name.endswith("lora_up.weight") and not tensor.any()]
    assert still == [name for name in still if name.startswith(UNREAD.get(family, ()))], still


# Layers behind the one that is read: in the file as everywhere, but nothing teaches them.
UNREAD = {"lumina": ("lora_te_layers_2_",)}


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        (None, (1e-3, 1e-3, 1e-3)), (["2e-5"], (2e-5, 2e-5, 2e-5)), (["2e-5", "3e-6"], (2e-5, 3e-6, 3e-6)),
        (["2e-5", "3e-6", "4e-7"], (2e-5, 3e-6, 4e-7)), (["2e-5", "3e-6", "4e-7", "1"], (2e-5, 3e-6, 4e-7)),
    ],
)  # fmt: skip
def test_learning_rates_of_three_text_encoders(
    given: list[str] | None, rates: tuple[float, ...], toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    """CLIP-L's, CLIP-G's, T5's; one for all; none: --learning_rate; the second of two is T5's, too."""
    options = {"text_encoder_lr": given, "unet_lr": "4e-4", **T5}
    found = build_toy_run(toy_shelf.paths("sd3"), images, tmp_path, **options)
    assert any("--text_encoder_lr" in note for note in found.plan.notes) == (len(given or ()) in (2, 4))
    groups = {group["name"]: group["lr"] for group in found.optimizer.param_groups}
    assert groups == dict(zip(("denoiser", "clip_l", "clip_g", "t5"), (4e-4, *rates), strict=True))


PROMPTS = """\
# a comment, and an empty line

a (red:1.3) cup of [coffee] --n a dog --w 64 --h 96 --d 11 --l 3 --g {g} --s 3 --ctr 0.6 --rcfg 0.8 --fs 2.5
a cat --n a dog --w 96 --h 64 --d 12 --l 1 --s 2 --ss euler
"""


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_previews(family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """Every option of a line is in the image's recipe; cached text, whose encoders are offloaded, gives the same."""
    guidance = {"flux": 2.5}.get(family)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS.format(g=guidance or 0))
    options = {**DENOISER, "max_train_steps": 1, "sample_at_first": True, "sample_prompts": prompts}
    folders = [
        train_toy(toy_shelf.paths(family), images, tmp_path / name, **options, cache_text_encoder_outputs=cached)
        / "sample"
        for name, cached in (("live", False), ("cached", True))
    ]
    live, cached = (list(map(Image.open, sorted(folder.glob("*.png")))) for folder in folders)
    assert [image.tobytes() for image in live] == [image.tobytes() for image in cached]
    assert [image.size for image in live] == [(64, 96), (96, 64)]
    first, second = map(read_recipe, live)
    assert first == {
        "seed": 11, "steps": 3, "scale": 3.0, "guidance": guidance, "cfg_trunc_ratio": 0.6, "renorm_cfg": 0.8,
        "flow_shift": 2.5,
    }  # fmt: skip
    assert (second["seed"], second["steps"], second["scale"], second["flow_shift"]) == (12, 2, 1.0, None)
    assert live[0].info["negative_prompt"] == "a dog"


RECIPE = ("seed", "steps", "scale", "guidance", "cfg_trunc_ratio", "renorm_cfg", "flow_shift")


def read_recipe(image: Image.Image) -> dict[str, Any]:
    return {key: json.loads(image.info[key]) for key in RECIPE}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompts_own_shift(family: str, toy_shelf: ToyShelf) -> None:
    """--fs: the grid of diffusers' scheduler with this shift, whatever the family's own."""
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    model = load(family, toy_shelf.options(family))
    for shift in (1.0, 2.5):
        moved = model.objective.with_shift(shift)
        assert moved is not None
        ours, theirs = make_scheduler("ddim", moved), FlowMatchEulerDiscreteScheduler(shift=shift)
        moved.set_timesteps(ours, 7, model.latents, (1, 16, 8, 8))
        if family == "sd3":  # its pipeline leaves the grid to the scheduler
            theirs.set_timesteps(7)
        else:
            theirs.set_timesteps(sigmas=[1 - i / 7 for i in range(7)])
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-4)
        usual = make_scheduler("ddim", model.objective)
        model.objective.set_timesteps(usual, 7, model.latents, (1, 16, 8, 8))
        assert not torch.allclose(usual.timesteps, ours.timesteps)


DATASET = """\
[general]
enable_bucket = true
caption_extension = ".txt"
min_bucket_reso = 32

[[datasets]]
resolution = 64
batch_size = 2

  [[datasets.subsets]]
  image_dir = "{images}"
  num_repeats = 1
"""
COMMON = """
--dataset_config {dataset} --output_dir {output} --output_name mine --save_model_as safetensors --network_dim 4
--network_alpha 1 --learning_rate 1e-4 --optimizer_type AdamW --lr_scheduler constant --sdpa --max_train_epochs 2
--save_every_n_epochs 1 --mixed_precision bf16 --gradient_checkpointing --sample_every_n_epochs 1
--sample_prompts {prompts} --cache_dir {cache}
"""
SD3 = f"""
sd3_train_network --pretrained_model_name_or_path {{base}} --network_module networks.lora_sd3 {COMMON}
--weighting_scheme uniform
"""
LUMINA = f"""
lumina_train_network --pretrained_model_name_or_path {{base}} --gemma2 {{gemma2}} --ae {{ae}}
--network_module networks.lora_lumina {COMMON} --timestep_sampling nextdit_shift --discrete_flow_shift 6.0
--model_prediction_type raw --system_prompt Draw.
"""
COMMANDS = {
    "sd3": ("sd3", SD3 + "--cache_latents"),
    "sd3, text cached": (
        "sd3",
        SD3 + "--network_train_unet_only --cache_text_encoder_outputs_to_disk --cache_latents_to_disk "
        "--apply_lg_attn_mask --apply_t5_attn_mask --clip_l_dropout_rate 0.1 --clip_g_dropout_rate 0.1 "
        "--t5_dropout_rate 0.1 --t5xxl_max_token_length 128 --training_shift 3.0 --weighting_scheme logit_normal",
    ),
    "sd3, ranks by layer": (
        "sd3",
        SD3 + "--network_train_unet_only --network_args context_attn_dim=2 context_mlp_dim=3 context_mod_dim=0 "
        "x_attn_dim=4 x_mlp_dim=5 x_mod_dim=0 emb_dims=[2,3,2,2,2,2] train_block_indices=0-1 "
        "split_qkv=True verbose=True",
    ),
    "lumina": ("lumina", LUMINA + "--network_train_unet_only --cache_latents --cache_text_encoder_outputs"),
    "lumina with Gemma": ("lumina", LUMINA + "--text_encoder_lr 1e-5 --cache_latents_to_disk"),
    "lumina, ranks by layer": (
        "lumina",
        LUMINA + "--network_train_unet_only --network_args attn_dim=4 mlp_dim=2 mod_dim=0 refiner_dim=3 "
        "embedder_dims=[2,2,2] train_blocks=transformer split_qkv=True verbose=True",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_of_the_guides(name: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    family, line = COMMANDS[name]
    paths = toy_shelf.paths(family)
    (tmp_path / "data.toml").write_text(DATASET.format(images=make_images(tmp_path / "images", 3) / "2_cat"))
    (tmp_path / "prompts.txt").write_text("a cat --n a dog --w 64 --h 64 --d 1 --l 3 --s 2\n")
    words = line.format(
        base=paths["pretrained_model_name_or_path"], gemma2=paths.get("gemma2"), ae=paths.get("ae"),
        dataset=tmp_path / "data.toml", output=tmp_path / "out", prompts=tmp_path / "prompts.txt", cache=tmp_path / "c",
    )  # fmt: skip
    assert main(words.split()) == 0
    saved = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert saved == ["mine-000001.safetensors", "mine.safetensors"]
    file = read_weights(tmp_path / "out", "mine")
    assert any(tensor.any() for key, tensor in file.items() if key.endswith("lora_up.weight"))
    assert len(read_metrics(tmp_path / "out", "mine")) == 4
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 2
