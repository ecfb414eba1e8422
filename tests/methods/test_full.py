"""Full training as a user runs it, at toy size: what learns, what is saved, and exact resume."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from families.toys import ToyShelf
from sfumato.config import ModelOptions, NoiseOptions, load_config
from sfumato.errors import UserError
from sfumato.families.base import find_family
from sfumato.families.source import open_source
from sfumato.formats.state import load_state
from sfumato.methods.full import FullMethod
from sfumato.plan import look, with_seed
from training import REPORT, arguments, losses, pictures, run, same, weights

Toy = Mapping[str, Path]
TABLES = {"sd3": ("pos_embed",)}  # of the denoiser, computed and never trained
UNET, AVERAGE = "model.diffusion_model.", "model_ema."
TEXT = {"sd": ("cond_stage_model.",), "sdxl": ("conditioner.embedders.0.", "conditioner.embedders.1.")}
STILL = {  # tensors of text encoders that no gradient reaches: tables, and what lies behind the layer that is read
    "sd": ("position_ids",),
    "sdxl": ("position_ids", "logit_scale", "embedders.0.transformer.text_model.encoder.layers.1.", "final_layer_norm"),
}


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture(params=["sd", "sdxl", "flux", "chroma"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def toy(family: str, toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths(family)


@pytest.fixture
def sd(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("sd")


def words(toy: Toy, images: Path, output: Path, **options: Any) -> list[str]:
    """A command line of full training."""
    return arguments(toy, images, output, **{"method": "full", "network_dim": None, **options})


def full(toy: Toy, images: Path, output: Path, **options: Any) -> Path:
    return run(toy, images, output, **{"method": "full", "network_dim": None, "learning_rate": "1e-4", **options})


def before(toy: Toy) -> dict[str, torch.Tensor]:
    """The checkpoint that training starts from, without the average of its weights."""
    found = load_file(toy["pretrained_model_name_or_path"])
    return {name: tensor for name, tensor in found.items() if not name.startswith(AVERAGE)}


def changed(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> set[str]:
    assert set(first) == set(second)
    return {name for name in first if not torch.equal(first[name], second[name])}


def loaded(path: Path, toy: Toy) -> dict[str, dict[str, torch.Tensor]]:
    """Every network's weights, under our names."""
    words = tuple(str(folder) for name, folder in toy.items() if name.startswith("tokenizer"))
    others = {name: str(file) for name, file in toy.items() if name in ("clip_l", "t5xxl", "ae")}
    options = ModelOptions(pretrained_model_name_or_path=str(path), tokenizer=words, **others)
    source = open_source(options)
    family = find_family(None, source)
    blueprint = family.read(source, options, NoiseOptions())
    model = family.load(blueprint, options, dtype=torch.float32, device=torch.device("cpu"))
    modules = {"vae": model.vae, **{name: part.module for name, part in model.parts.items()}}
    return {name: dict(module.state_dict()) for name, module in modules.items()}


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "chroma", "sd3", "lumina"])
def test_the_denoiser_learns_and_nothing_else(
    toy: Toy, family: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every one of its tensors, in the file's own layout, as the plan said; all others keep their bytes."""
    outlook = look(with_seed(load_config(words(toy, images, tmp_path / "out", max_train_steps=2))), processes=1)
    (planned,) = outlook.method.plan(outlook.blueprint)
    full(toy, images, tmp_path / "out", max_train_steps=2)
    old, new = before(toy), weights(tmp_path / "out")
    whole = any(name.startswith(UNET) for name in old)
    still = TABLES.get(family, ())
    assert changed(old, new) == {n for n in old if (n.startswith(UNET) or not whole) and not n.endswith(still)}
    assert all(tensor.dtype == old[name].dtype and tensor.isfinite().all() for name, tensor in new.items())
    assert planned.parameters == sum(new[name].numel() for name in changed(old, new))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_text_encoders_learn_where_asked(toy: Toy, family: str, images: Path, tmp_path: Path) -> None:
    old = before(toy)
    new = weights(full(toy, images, tmp_path, train_text_encoder=True, max_train_steps=2))
    moved = changed(old, new)
    text = {name for name in old if name.startswith(TEXT[family])}
    assert moved >= {name for name in old if name.startswith(UNET)}
    assert moved <= text | {name for name in old if name.startswith(UNET)}
    reached = {name for name in text if not any(part in name for part in STILL[family])}
    assert moved & text == reached


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({"learning_rate_te": 0}, {"denoiser"}),
        ({"learning_rate": 0, "learning_rate_te": "1e-4"}, {"clip_l", "clip_g"}),
        ({"unet_lr": 0, "learning_rate_te1": 0}, {"clip_g"}),
        ({"learning_rate_te2": 0, "learning_rate_te": "1e-5"}, {"denoiser", "clip_l"}),
    ],
)
def test_a_rate_of_0_leaves_a_part_as_it_is(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, options: dict, moved: set[str]
) -> None:
    toy = toy_shelf.paths("sdxl")
    old = before(toy)
    new = weights(full(toy, images, tmp_path, train_text_encoder=True, max_train_steps=1, save_state=True, **options))
    prefixes = {"denoiser": UNET, "clip_l": TEXT["sdxl"][0], "clip_g": TEXT["sdxl"][1]}
    found = changed(old, new)
    assert {part for part, prefix in prefixes.items() if any(name.startswith(prefix) for name in found)} == moved
    assert found == {name for name in found if name.startswith(tuple(prefixes[part] for part in moved))}
    state, _ = load_state(tmp_path / "lora-state")
    assert {name.partition(".")[0] for name in state["weights"]} == moved


def test_each_part_has_its_own_rate(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    rates = {"learning_rate": "1e-5", "learning_rate_te1": "2e-6", "learning_rate_te2": "3e-6"}
    output = full(toy_shelf.paths("sdxl"), images, tmp_path, train_text_encoder=True, max_train_steps=1, **rates)
    (row,) = losses(output)
    assert {name: rate for name, rate in row.items() if name.startswith("lr/")} == {
        "lr/denoiser": 1e-5, "lr/clip_l": 2e-6, "lr/clip_g": 3e-6,
    }  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"train_text_encoder": True, "lr_scheduler": "cosine"},
        pytest.param({"gradient_accumulation_steps": 3, "train_batch_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_resume_is_exact(sd: Toy, images: Path, tmp_path: Path, options: dict) -> None:
    """20 steps = 7, resume, 6, resume, 7, bit for bit."""
    straight = full(sd, images, tmp_path / "straight", max_train_steps=20, **options)
    parts = tmp_path / "parts"
    common = {"max_train_steps": 20, "save_state": True, **options}
    full(sd, images, parts, **common, save_every_n_steps=7)
    forget(parts, keep="lora-step00000007")
    full(sd, images, parts, **common, save_every_n_steps=13, resume=parts / "lora-step00000007-state")
    forget(parts, keep="lora-step00000013")
    full(sd, images, parts, **common, resume=parts)
    assert same(weights(straight), weights(parts))
    assert losses(straight) == losses(parts)


def forget(output: Path, keep: str) -> None:
    """What a run leaves that was killed after this save."""
    for path in output.iterdir():
        if path.is_dir() and not path.name.startswith(keep):
            shutil.rmtree(path)
        elif path.suffix == ".safetensors" and not path.name.startswith(keep):
            path.unlink()


def test_gradient_checkpointing_changes_nothing(toy: Toy, images: Path, tmp_path: Path) -> None:
    plain = full(toy, images, tmp_path / "plain", max_train_steps=2)
    less = full(toy, images, tmp_path / "less", max_train_steps=2, gradient_checkpointing=True)
    assert same(weights(plain), weights(less))


def test_weights_stay_whole_under_mixed_precision(sd: Toy, images: Path, tmp_path: Path) -> None:
    """Steps far below what bfloat16 can hold still count; the frozen encoder keeps its bytes, loaded in half or not."""
    old = before(sd)
    new = weights(full(sd, images, tmp_path, mixed_precision="bf16", learning_rate="1e-7", max_train_steps=2))
    alone = "middle_block.1.transformer_blocks.0.attn1.to_"  # at the toy's middle one token attends to itself alone
    large = {name for name in old if name.startswith(UNET) and name.endswith("weight") and alone not in name}
    assert changed(old, new) >= large
    assert all((new[name] - old[name]).abs().max() < 1e-6 for name in old)
    assert all(new[name].dtype == old[name].dtype for name in old)


def test_saved_in_half(sd: Toy, images: Path, tmp_path: Path) -> None:
    old = before(sd)
    new = weights(full(sd, images, tmp_path, save_precision="fp16", learning_rate="1e-12", max_train_steps=1))
    assert all(torch.equal(new[name], old[name].half()) for name in old if old[name].is_floating_point())
    assert all(torch.equal(new[name], old[name]) for name in old if not old[name].is_floating_point())


def test_the_file_says_what_it_is(toy: Toy, family: str, images: Path, tmp_path: Path) -> None:
    output = full(toy, images, tmp_path, max_train_steps=1, metadata_author="me")
    with safe_open(output / "lora.safetensors", "pt") as file:
        found = file.metadata()
    named = {
        "sd": "stable-diffusion-v1",
        "sdxl": "stable-diffusion-xl-v1-base",
        "flux": "flux-1-dev",
        "chroma": "chroma",
    }
    assert found["modelspec.architecture"] == named[family]
    assert (found["modelspec.author"], found["ss_steps"]) == ("me", "1")
    assert not any(name.startswith(("ss_network", "sshs_")) for name in found)
    assert not any(str(place) in text for text in found.values() for place in (tmp_path, images))
    with safe_open(toy["pretrained_model_name_or_path"], "pt") as file:
        before = file.metadata() or {}
    assert all(found[name] == before[name] for name in before)


def test_text_encoders_in_files_of_their_own_are_refused(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="clip_l of this model lies in a file of its own"):
        full(toy_shelf.paths("flux"), images, tmp_path, train_text_encoder=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0}, "every learning rate is 0"),
        ({"train_text_encoder": True, "learning_rate_te2": "1e-5"}, "--learning_rate_te2: this model has only one"),
        ({"train_text_encoder": True, "cache_text_encoder_outputs": True}, "nothing to keep"),
        ({"block_lr": "1e-5,0"}, "--block_lr has 2 values, this model needs 25"),
    ],
)
def test_what_cannot_be(sd: Toy, images: Path, tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        full(sd, images, tmp_path, **options)


def test_the_model_that_training_starts_from_is_never_overwritten(sd: Toy, images: Path, tmp_path: Path) -> None:
    copy = tmp_path / "lora-step00000002.safetensors"
    shutil.copy(sd["pretrained_model_name_or_path"], copy)
    content = copy.read_bytes()
    with pytest.raises(UserError, match="would take the place of lora-step00000002"):
        full({**sd, "pretrained_model_name_or_path": copy}, images, tmp_path)
    assert copy.read_bytes() == content


def test_previews_do_not_disturb(sd: Toy, images: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2\n")
    plain = full(sd, images, tmp_path / "plain", train_text_encoder=True)
    options = {"sample_prompts": prompts, "sample_every_n_steps": 2, "sample_at_first": True}
    shown = full(sd, images, tmp_path / "shown", train_text_encoder=True, **options)
    assert same(weights(plain), weights(shown))
    assert len(list((shown / "sample").iterdir())) == 3


@pytest.mark.parametrize("family", ["sd", "sdxl"])  # diffusers' converter for the third knows one width alone
def test_diffusers_reads_the_file_as_we_do(
    toy: Toy, family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    """Its own conversion of single files gives the weights that ours gives, all of them moved."""
    import diffusers

    library: Any = diffusers
    config = toy_shelf.paths(family, "diffusers")["pretrained_model_name_or_path"] / "unet"
    output = full(toy, images, tmp_path, max_train_steps=1)
    theirs = library.UNet2DConditionModel.from_single_file(str(output / "lora.safetensors"), config=str(config))
    start = library.UNet2DConditionModel.from_pretrained(config).state_dict()
    ours = loaded(output / "lora.safetensors", toy)["denoiser"]
    assert same(ours, theirs.state_dict())
    assert changed(start, ours) == set(start)


# ---------------------------------------------------------------- folders of diffusers'


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_both_formats_hold_the_same_model(
    toy_shelf: ToyShelf, family: str, layout: Any, images: Path, tmp_path: Path
) -> None:
    """diffusers reads the folder, and its modules have the weights that the single file has."""
    from diffusers import DiffusionPipeline

    toy = toy_shelf.paths(family, layout)
    options = {"train_text_encoder": True, "max_train_steps": 1}
    one = full(toy, images, tmp_path / "one", save_model_as="safetensors", **options)
    two = full(toy, images, tmp_path / "two", save_model_as="diffusers", **options)
    assert losses(one) == losses(two)
    pipe: Any = DiffusionPipeline.from_pretrained(two / "lora")
    assert type(pipe).__name__ == {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[family]
    single = loaded(one / "lora.safetensors", toy)
    folder = loaded(two / "lora", toy)
    theirs = {"denoiser": pipe.unet, "vae": pipe.vae, "clip": pipe.text_encoder, "clip_l": pipe.text_encoder}
    theirs["clip_g"] = pipe.components.get("text_encoder_2")
    for name, state in single.items():
        assert same(state, folder[name])
        others = {key.removeprefix("text_model."): weight for key, weight in theirs[name].state_dict().items()}
        assert same({key.removeprefix("text_model."): weight for key, weight in state.items()}, others)


def test_a_folder_keeps_what_did_not_train(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """Bytes of weights, tokenizers, configurations; a save is a folder where the model came from one."""
    toy = toy_shelf.paths("sd", "diffusers")
    source = toy["pretrained_model_name_or_path"]
    output = full(toy, images, tmp_path, max_train_steps=2, save_every_n_steps=1)
    assert (output / "lora-step00000001" / "model_index.json").is_file()
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(output / "lora") for path in (output / "lora").rglob("*") if path.is_file())
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    assert not same(load_file(source / weights), load_file(output / "lora" / weights))
    for path in set(files) - {weights}:
        first, second = (source / path).read_bytes(), (output / "lora" / path).read_bytes()
        assert (
            path.suffix == ".json"
            or first == second
            or same(load_file(source / path), load_file(output / "lora" / path))
        )
    with safe_open(output / "lora" / weights, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-v1"


def test_a_folder_of_something_else_is_never_replaced(sd: Toy, images: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds something else"):
        full(sd, images, tmp_path, save_model_as="diffusers")
    assert (tmp_path / "lora" / "letter.txt").read_text() == "dear"


def test_models_that_are_one_file_are_refused_a_folder(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="saved as one file"):
        full(toy_shelf.paths("flux"), images, tmp_path, save_model_as="diffusers")


@pytest.mark.slow
def test_only_the_last_saves_stay(sd: Toy, images: Path, tmp_path: Path) -> None:
    options = {"save_every_n_steps": 1, "save_last_n_steps": 1, "save_model_as": "diffusers", "max_train_steps": 5}
    full(sd, images, tmp_path, **options)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["lora", "lora-step00000003", "lora-step00000004", *REPORT, "lora.run.jsonl"]


# ---------------------------------------------------------------- blocks, stopping, losing the source


def test_blocks_have_rates_of_their_own(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """23 of them: embeddings, input 0 to 8, middle 0 to 2, output 0 to 8, the end."""
    toy = toy_shelf.paths("sdxl")
    places = ["time_embed|label_emb", *(f"input_blocks.{i}" for i in range(9))]
    places += [*(f"middle_block.{i}" for i in range(3)), *(f"output_blocks.{i}" for i in range(9)), "out"]
    rates = [1e-5 * (i % 3) for i in range(23)]
    output = full(toy, images, tmp_path, block_lr=",".join(map(str, rates)), max_train_steps=1)
    moved = {name.removeprefix(UNET) for name in changed(before(toy), weights(output))}
    for place, rate in zip(places, rates, strict=True):
        inside = {name for name in before(toy) if name.startswith(UNET)}
        inside = {name.removeprefix(UNET) for name in inside}
        inside = {name for name in inside if name.startswith(tuple(f"{each}." for each in place.split("|")))}
        assert inside <= moved if rate else not inside & moved, place
    (row,) = losses(output)
    shown = {int(name[-2:]): rate for name, rate in row.items() if name.startswith("lr/denoiser.block")}
    assert shown == {i: rate for i, rate in enumerate(rates) if rate and i in shown}
    assert len(shown) > 8


@pytest.mark.slow
def test_text_encoders_stop_at_a_step(sd: Toy, images: Path, tmp_path: Path) -> None:
    """As if they had never trained from there on; a resumed run knows it."""
    options = {"train_text_encoder": True, "stop_text_encoder_training": 3, "save_every_n_steps": 1}
    output = full(sd, images, tmp_path / "a", max_train_steps=6, save_state=True, **options)
    saves = [weights(output, f"lora-step{step:08d}") for step in (2, 3, 4, 5)]
    text = [{name: save[name] for name in save if name.startswith(TEXT["sd"])} for save in saves]
    unet = [{name: save[name] for name in save if name.startswith(UNET)} for save in saves]
    assert not same(text[0], text[1])
    assert same(text[1], text[2])
    assert same(text[1], text[3])
    assert not same(unet[1], unet[2])
    for step in (2, 4):
        resume = output / f"lora-step{step:08d}-state"
        again = full(sd, images, tmp_path / str(step), max_train_steps=6, resume=resume, **options)
        assert same(weights(output), weights(again))


@pytest.mark.parametrize(("family", "save_model_as"), [("sd", "safetensors"), ("sdxl", "diffusers")])
def test_a_lost_source_does_not_cost_the_run(
    toy: Toy, family: str, save_model_as: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint goes while training runs; what is saved is whole."""
    copy = tmp_path / "copy.safetensors"
    shutil.copy(toy["pretrained_model_name_or_path"], copy)
    words = [str(folder) for name, folder in toy.items() if name.startswith("tokenizer")]
    options = {"max_train_steps": 1, "save_model_as": save_model_as, "tokenizer": words}
    safe = full({"pretrained_model_name_or_path": copy}, images, tmp_path / "safe", **options)
    step = FullMethod.before_step

    def lose(method: FullMethod, number: int) -> None:
        copy.unlink()
        step(method, number)

    monkeypatch.setattr(FullMethod, "before_step", lose)
    lost = full({"pretrained_model_name_or_path": copy}, images, tmp_path / "lost", **options)
    name = "lora" if save_model_as == "diffusers" else "lora.safetensors"
    first, second = loaded(safe / name, toy), loaded(lost / name, toy)
    assert first.keys() == second.keys()
    assert all(same(first[network], second[network]) for network in first)


def test_a_disk_without_room_is_told_before_the_first_step(
    sd: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of the toy's size for each save that stays, and three times what trains for each state."""
    size = sum(tensor.nbytes for tensor in before(sd).values())
    unet = sum(tensor.nbytes for name, tensor in before(sd).items() if name.startswith(UNET))
    needed = 5 * size + 2 * 3 * unet  # all of 1 to 4 and the last one; a state stays for a step, the newest beside it
    options = {"max_train_steps": 5, "save_every_n_steps": 1, "save_state": True, "save_last_n_steps_state": 1}

    def free(count: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=count))

    free(needed - 1000)
    with pytest.raises(UserError, match=r"5 saves of .* will take"):
        full(sd, images, tmp_path, **options)
    free(2 * needed)
    full(sd, images, tmp_path, **options)


@pytest.mark.slow
def test_two_processes_train_what_one_does(sd: Toy, images: Path, tmp_path: Path) -> None:
    """The same global batch, in several messages; the optimizer's steps are in proportion to gradients."""
    options = {"max_train_steps": 2, "optimizer_type": "SGDNesterov", "method": "full", "network_dim": None}
    options |= {"train_text_encoder": True, "learning_rate": "1e-2"}
    options |= {"min_timestep": 400}  # of almost clean images a toy's gradients hold four digits in float32
    alone = run(sd, images, tmp_path / "alone", train_batch_size=2, **options)
    command = arguments(sd, images, tmp_path / "both", train_batch_size=1, **options)
    small = "import sys, sfumato.train as train; train.MESSAGE = 50_000; from sfumato.cli.main import entry; entry()"
    script = tmp_path / "small.py"
    script.write_text(small)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
    subprocess.run([*launcher, str(script), "train", *command], check=True, timeout=300)
    ours, theirs = weights(tmp_path / "both"), weights(alone)
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-6)
    assert max(float((ours[name] - old).abs().max()) for name, old in before(sd).items()) > 1e-4
    pairs = zip(losses(alone), losses(tmp_path / "both"), strict=True)
    assert all(abs(one["loss/current"] - two["loss/current"]) < 1e-4 for one, two in pairs)
