"""Full training as a user runs it, at toy size: what trains, with which learning rates, and exact resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from families.toys import ToyShelf
from methods.full_training import (
    CONSTANT_TENSORS,
    TEXT,
    UNET,
    WITHOUT_GRADIENT,
    Toy,
    before,
    changed,
    full,
    make_command,
)
from sfumato.config import load_config
from sfumato.errors import UserError
from sfumato.formats.state import load_state
from sfumato.plan import make_run_plan
from toy_runs import equal_tensors, make_arguments, read_metrics, read_weights, train_toy
from warm_python import run_ranks


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_the_denoiser_learns_and_nothing_else(
    toy: Toy, family: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every one of its tensors, in the file's own layout, as the plan said; all others keep their bytes."""
    config = load_config(make_command(toy, images, tmp_path / "out", max_train_steps=2))
    plan = make_run_plan(config, processes=1)
    (part,) = plan.method.plan(plan.blueprint)
    full(toy, images, tmp_path / "out", max_train_steps=2)
    old, new = before(toy), read_weights(tmp_path / "out")
    has_prefix = any(name.startswith(UNET) for name in old)
    constant = CONSTANT_TENSORS.get(family, ())
    assert changed(old, new) == {n for n in old if (n.startswith(UNET) or not has_prefix) and not n.endswith(constant)}
    assert all(tensor.dtype == old[name].dtype and tensor.isfinite().all() for name, tensor in new.items())
    assert part.parameters == sum(new[name].numel() for name in changed(old, new))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_text_encoders_train_on_request(toy: Toy, family: str, images: Path, tmp_path: Path) -> None:
    old = before(toy)
    new = read_weights(full(toy, images, tmp_path, train_text_encoder=True, max_train_steps=2))
    moved = changed(old, new)
    text = {name for name in old if name.startswith(TEXT[family])}
    assert moved >= {name for name in old if name.startswith(UNET)}
    assert moved <= text | {name for name in old if name.startswith(UNET)}
    reached = {name for name in text if not any(part in name for part in WITHOUT_GRADIENT[family])}
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
def test_a_learning_rate_of_0_freezes_a_part(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, options: dict, moved: set[str]
) -> None:
    toy = toy_shelf.paths("sdxl")
    old = before(toy)
    new = read_weights(
        full(toy, images, tmp_path, train_text_encoder=True, max_train_steps=1, save_state=True, **options)
    )
    prefixes = {"denoiser": UNET, "clip_l": TEXT["sdxl"][0], "clip_g": TEXT["sdxl"][1]}
    found = changed(old, new)
    assert {part for part, prefix in prefixes.items() if any(name.startswith(prefix) for name in found)} == moved
    assert found == {name for name in found if name.startswith(tuple(prefixes[part] for part in moved))}
    state, _ = load_state(tmp_path / "lora-state")
    assert {name.partition(".")[0] for name in state["weights"]} == moved


def test_each_part_has_its_own_learning_rate(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    rates = {"learning_rate": "1e-5", "learning_rate_te1": "2e-6", "learning_rate_te2": "3e-6"}
    output = full(toy_shelf.paths("sdxl"), images, tmp_path, train_text_encoder=True, max_train_steps=1, **rates)
    (row,) = read_metrics(output)
    assert {name: rate for name, rate in row.items() if name.startswith("lr/")} == {
        "lr/denoiser": 1e-5, "lr/clip_l": 2e-6, "lr/clip_g": 3e-6,
    }  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        {"train_text_encoder": True, "lr_scheduler": "cosine"},
        {"gradient_accumulation_steps": 3, "train_batch_size": 2},
    ],
)
def test_resume_is_exact(sd: Toy, images: Path, tmp_path: Path, options: dict) -> None:
    """12 steps = 4, resume, 5, resume, 3, bit for bit."""
    straight = full(sd, images, tmp_path / "straight", max_train_steps=12, **options)
    parts = tmp_path / "parts"
    common = {"max_train_steps": 12, "save_state": True, **options}
    full(sd, images, parts, **common, save_every_n_steps=4)
    forget(parts, keep="lora-step00000004")
    full(sd, images, parts, **common, save_every_n_steps=9, resume=parts / "lora-step00000004-state")
    forget(parts, keep="lora-step00000009")
    full(sd, images, parts, **common, resume=parts)
    assert equal_tensors(read_weights(straight), read_weights(parts))
    assert read_metrics(straight) == read_metrics(parts)


def forget(output: Path, keep: str) -> None:
    """Remove what a run that was killed after this save would not have written."""
    for path in output.iterdir():
        if path.is_dir() and not path.name.startswith(keep):
            shutil.rmtree(path)
        elif path.suffix == ".safetensors" and not path.name.startswith(keep):
            path.unlink()


@pytest.mark.fast_for("[sd]", "[lumina")
def test_gradient_checkpointing_changes_nothing(toy: Toy, images: Path, tmp_path: Path) -> None:
    plain = full(toy, images, tmp_path / "plain", max_train_steps=2)
    less = full(toy, images, tmp_path / "less", max_train_steps=2, gradient_checkpointing=True)
    assert equal_tensors(read_weights(plain), read_weights(less))


def test_weights_stay_float32_under_mixed_precision(sd: Toy, images: Path, tmp_path: Path) -> None:
    """Steps far below what bfloat16 can hold still count; the frozen encoder keeps its bytes, loaded in half or not."""
    old = before(sd)
    new = read_weights(full(sd, images, tmp_path, mixed_precision="bf16", learning_rate="1e-7", max_train_steps=2))
    alone = "middle_block.1.transformer_blocks.0.attn1.to_"  # at the toy's middle one token attends to itself alone
    large = {name for name in old if name.startswith(UNET) and name.endswith("weight") and alone not in name}
    assert changed(old, new) >= large
    assert all((new[name] - old[name]).abs().max() < 1e-6 for name in old)
    assert all(new[name].dtype == old[name].dtype for name in old)


@pytest.mark.parametrize(
    ("options", "code", "detail"),
    [
        ({"learning_rate": 0}, "learning-rates-all-zero", ""),
        (
            {"train_text_encoder": True, "learning_rate_te2": "1e-5"},
            "numbered-text-encoder-missing",
            "learning_rate_te2",
        ),
        ({"train_text_encoder": True, "cache_text_encoder_outputs": True}, "text-cache-of-trained-encoders", ""),
        ({"block_lr": "1e-5,0"}, "block-lr-wrong-length", "2 values, this model needs 25"),
    ],
)
def test_options_that_do_not_match(
    sd: Toy, images: Path, tmp_path: Path, options: dict, code: str, detail: str
) -> None:
    with pytest.raises(UserError) as error:
        full(sd, images, tmp_path, **options)
    assert error.value.code == code
    assert detail in str(error.value)


def test_block_learning_rates_need_numbered_blocks(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        full(toy_shelf.paths("flux"), images, tmp_path, block_lr="1e-5,0")
    assert error.value.code == "block-lr-without-blocks"


@pytest.mark.full
def test_samples_do_not_disturb(sd: Toy, images: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2\n")
    plain = full(sd, images, tmp_path / "plain", train_text_encoder=True)
    options = {"sample_prompts": prompts, "sample_every_n_steps": 2, "sample_at_first": True}
    sampled = full(sd, images, tmp_path / "sampled", train_text_encoder=True, **options)
    assert equal_tensors(read_weights(plain), read_weights(sampled))
    assert len(list((sampled / "sample").iterdir())) == 3


def test_blocks_have_learning_rates_of_their_own(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """23 of them: embeddings, input 0 to 8, middle 0 to 2, output 0 to 8, the end."""
    toy = toy_shelf.paths("sdxl")
    blocks = ["time_embed|label_emb", *(f"input_blocks.{i}" for i in range(9))]
    blocks += [*(f"middle_block.{i}" for i in range(3)), *(f"output_blocks.{i}" for i in range(9)), "out"]
    rates = [1e-5 * (i % 3) for i in range(23)]
    output = full(toy, images, tmp_path, block_lr=",".join(map(str, rates)), max_train_steps=1)
    moved = {name.removeprefix(UNET) for name in changed(before(toy), read_weights(output))}
    names = {name.removeprefix(UNET) for name in before(toy) if name.startswith(UNET)}
    for block, rate in zip(blocks, rates, strict=True):
        prefixes = tuple(f"{prefix}." for prefix in block.split("|"))
        inside = {name for name in names if name.startswith(prefixes)}
        assert inside <= moved if rate else not inside & moved, block
    (row,) = read_metrics(output)
    logged = {int(name[-2:]): rate for name, rate in row.items() if name.startswith("lr/denoiser.block")}
    assert logged == {i: rate for i, rate in enumerate(rates) if rate and i in logged}
    assert len(logged) > 8


@pytest.mark.full
def test_text_encoders_stop_at_a_step(sd: Toy, images: Path, tmp_path: Path) -> None:
    """From there on their weights stay the same, in a resumed run, too."""
    options = {"train_text_encoder": True, "stop_text_encoder_training": 3, "save_every_n_steps": 1}
    output = full(sd, images, tmp_path / "a", max_train_steps=6, save_state=True, **options)
    saves = [read_weights(output, f"lora-step{step:08d}") for step in (2, 3, 4, 5)]
    text = [{name: save[name] for name in save if name.startswith(TEXT["sd"])} for save in saves]
    unet = [{name: save[name] for name in save if name.startswith(UNET)} for save in saves]
    assert not equal_tensors(text[0], text[1])
    assert equal_tensors(text[1], text[2])
    assert equal_tensors(text[1], text[3])
    assert not equal_tensors(unet[1], unet[2])
    for step in (2, 4):
        resume = output / f"lora-step{step:08d}-state"
        again = full(sd, images, tmp_path / str(step), max_train_steps=6, resume=resume, **options)
        assert equal_tensors(read_weights(output), read_weights(again))


@pytest.mark.full
def test_two_processes_train_what_one_does(sd: Toy, images: Path, tmp_path: Path) -> None:
    """The same global batch, in several messages; the optimizer's steps are in proportion to gradients."""
    options = {"max_train_steps": 2, "optimizer_type": "SGDNesterov", "method": "full", "network_dim": None}
    options |= {"train_text_encoder": True, "learning_rate": "1e-2"}
    options |= {"min_timestep": 400}  # of almost clean images a toy's gradients hold four digits in float32
    alone = train_toy(sd, images, tmp_path / "alone", train_batch_size=2, **options)
    command = make_arguments(sd, images, tmp_path / "both", train_batch_size=1, **options)
    small = "import sys, sfumato.train as train; train.MESSAGE = 50_000; from sfumato.cli.main import entry; entry()"
    script = tmp_path / "small.py"
    script.write_text(small)
    run_ranks(script, "train", *command)
    ours, theirs = read_weights(tmp_path / "both"), read_weights(alone)
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-6)
    assert max(float((ours[name] - old).abs().max()) for name, old in before(sd).items()) > 1e-4
    pairs = zip(read_metrics(alone), read_metrics(tmp_path / "both"), strict=True)
    assert all(abs(one["loss/current"] - two["loss/current"]) < 1e-4 for one, two in pairs)


@pytest.mark.full
def test_three_text_encoders_have_their_own_learning_rates(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """T5 trains where that is asked for; the last blocks of the transformer may stay as they are."""
    given = {"train_text_encoder": True, "max_train_steps": 1, "num_last_block_to_freeze": 1}
    given |= {"learning_rate_te1": "1e-5", "learning_rate_te2": "2e-5", "learning_rate_te3": "3e-5"}
    toy = toy_shelf.paths("sd3")
    output = full(toy, images, tmp_path, train_t5xxl=True, **given)
    (row,) = read_metrics(output)
    assert {name: rate for name, rate in row.items() if name.startswith("lr/")} == {
        "lr/denoiser": 1e-4, "lr/clip_l": 1e-5, "lr/clip_g": 2e-5, "lr/t5": 3e-5,
    }  # fmt: skip
    moved = changed(before(toy), read_weights(output))
    blocks = {name.split(".")[3] for name in before(toy) if ".joint_blocks." in name}
    last = f"model.diffusion_model.joint_blocks.{len(blocks) - 1}."
    assert not [name for name in moved if name.startswith(last)]
    assert {f"text_encoders.{name}." for name in ("clip_l", "clip_g", "t5xxl")} == {
        ".".join(name.split(".")[:2]) + "." for name in moved if name.startswith("text_encoders.")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "count", "code"), [("sd3", 99, "last-blocks-too-many"), ("sd", 1, "last-blocks-not-in-a-row")]
)
def test_last_blocks_that_are_not_there(
    family: str, count: int, code: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    argv = make_command(toy_shelf.paths(family), images, tmp_path, num_last_block_to_freeze=count)
    with pytest.raises(UserError) as error:
        make_run_plan(load_config(argv), processes=1)
    assert error.value.code == code
