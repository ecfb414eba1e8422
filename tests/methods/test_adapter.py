"""Adapter training with its options, at toy size: what trains, at which learning rate, and what stays frozen."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from families.toys import ToyShelf
from sfumato.adapters.lora import LoRA
from sfumato.config import load_config
from sfumato.errors import UserError
from sfumato.plan import RunPlan, make_run_plan
from sfumato.train import train_step
from toy_runs import (
    SEVERAL_TOKENS,
    build_toy_run,
    equal_tensors,
    make_arguments,
    make_images,
    read_metrics,
    read_weights,
    train_toy,
)

Toy = Mapping[str, Path]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def sd(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("sd")


@pytest.fixture(scope="module")
def flux(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("flux")


@pytest.fixture(scope="module")
def first(sd: Toy, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with convolutions, of rank 2 and 3."""
    output = tmp_path_factory.mktemp("first")
    train_toy(sd, images, output, network_args=["conv_dim=3", "conv_alpha=2"], max_train_steps=2)
    return output / "lora.safetensors"


def get_error(toy: Toy, images: Path, output: Path, **options: Any) -> UserError:
    with pytest.raises(UserError) as error:
        build_toy_run(toy, images, output, **options)
    return error.value


def make_plan(toy: Toy, images: Path, output: Path, **options: Any) -> RunPlan:
    return make_run_plan(load_config(make_arguments(toy, images, output, **options)), processes=1)


def prefixes(file: Mapping[str, Tensor]) -> set[str]:
    return {"_".join(name.split("_")[:2]) for name in file}


def product(file: Mapping[str, Tensor], name: str) -> Tensor:
    """alpha / rank * up @ down of one layer in a file, as a matrix over flattened kernels."""
    down, up = file[f"{name}.lora_down.weight"], file[f"{name}.lora_up.weight"]
    return file[f"{name}.alpha"] / len(down) * up.flatten(1) @ down.flatten(1)


# ---------------------------------------------------------------- which parts train


def test_an_encoder_that_trains_only_on_request(flux: Toy, images: Path, tmp_path: Path) -> None:
    default = train_toy(flux, images, tmp_path / "default", max_train_steps=2, cache_text_encoder_outputs=True)
    assert prefixes(read_weights(default)) == {"lora_unet", "lora_te1"}
    asked = train_toy(flux, images, tmp_path / "asked", max_train_steps=2, network_args=["train_t5xxl=True"])
    file = read_weights(asked)
    assert prefixes(file) == {"lora_unet", "lora_te1", "lora_te3"}
    assert any(tensor.any() for name, tensor in file.items() if "_te3_" in name and "lora_up" in name)


def test_a_learning_rate_without_effect_is_reported(flux: Toy, images: Path, tmp_path: Path) -> None:
    line = "the learning rate 2e-05 of t5 has no effect without --network_args train_t5xxl=True"
    options: dict[str, Any] = {"text_encoder_lr": ["1e-5", "2e-5"]}
    assert any(line in note for note in make_plan(flux, images, tmp_path, **options).notes)
    asked = make_plan(flux, images, tmp_path, network_args=["train_t5xxl=True"], **options)
    assert not any(line in note for note in asked.notes)


def test_an_encoder_that_trains_cannot_be_cached(flux: Toy, sd: Toy, images: Path, tmp_path: Path) -> None:
    options = {"cache_text_encoder_outputs": True}
    for error in (
        get_error(flux, images, tmp_path, network_args=["train_t5xxl=true"], **options),
        get_error(sd, images, tmp_path, **options),
    ):
        assert error.code == "text-cache-of-trained-encoders"


def test_unknown_arguments_are_errors_with_the_nearest(sd: Toy, images: Path, tmp_path: Path) -> None:
    error = get_error(sd, images, tmp_path, network_args=["convdim=4"])
    assert error.code == "network-arg-unknown"
    assert "'conv_dim'" in error.fix


# ---------------------------------------------------------------- blocks and learning rates


@pytest.mark.full
def test_a_block_at_learning_rate_0_gets_no_adapter(sd: Toy, images: Path, tmp_path: Path) -> None:
    options = {"network_args": ["up_lr_weight=zeros", "mid_lr_weight=0.5"], "network_train_unet_only": True}
    output = train_toy(sd, images, tmp_path, max_train_steps=1, **options)
    assert not any("up_blocks" in name for name in read_weights(output))
    rates = read_metrics(output)[0]
    assert (rates["lr/denoiser"], rates["lr/denoiser.block12"]) == (1e-3, 5e-4)


@pytest.mark.full
def test_a_block_at_learning_rate_0_stays_as_the_file_has_it(
    sd: Toy, images: Path, first: Path, tmp_path: Path
) -> None:
    options = {"network_weights": first, "dim_from_weights": True, "network_args": ["down_lr_weight=zeros"]}
    output = train_toy(sd, images, tmp_path, max_train_steps=2, **SEVERAL_TOKENS, **options)
    before, after = read_weights(first.parent), read_weights(output)
    assert set(before) == set(after)
    for name in (name for name in before if name.endswith("lora_up.weight")):
        assert torch.equal(before[name], after[name]) == ("down_blocks" in name), name


def test_lora_plus_in_a_run(sd: Toy, images: Path, tmp_path: Path) -> None:
    output = train_toy(sd, images, tmp_path, max_train_steps=1, network_args=["loraplus_lr_ratio=16"], unet_lr="2e-3")
    rates = {name: value for name, value in read_metrics(output)[0].items() if name.startswith("lr/")}
    assert rates == {"lr/denoiser": 2e-3, "lr/denoiser+": 32e-3, "lr/clip": 1e-3, "lr/clip+": 16e-3}


def test_verbose_logs_ranks(sd: Toy, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = {"console_log_level": "INFO", "console_log_simple": True}
    build_toy_run(sd, images, tmp_path, network_args=["conv_dim=3", "verbose=True"], **options)
    output = " ".join(capfd.readouterr().err.split())
    assert "lora_unet_down_blocks_0_resnets_0_conv1: LoRA, rank 3, alpha 1, learning rate 0.001 (denoiser)" in output


# ---------------------------------------------------------------- weights to start from


@pytest.mark.full
def test_going_on_from_a_file_with_convolutions(sd: Toy, images: Path, first: Path, tmp_path: Path) -> None:
    options = {"network_weights": first, "learning_rate": "1e-12", "max_train_steps": 1}
    by_file = train_toy(sd, images, tmp_path / "1", dim_from_weights=True, **options)
    by_options = train_toy(sd, images, tmp_path / "2", network_args=["conv_dim=3", "conv_alpha=2"], **options)
    for output in (by_file, by_options):
        before, after = read_weights(first.parent), read_weights(output)
        assert set(before) == set(after)
        assert all(torch.allclose(before[name], after[name], atol=1e-7) for name in before)


def test_a_file_that_the_options_do_not_cover(sd: Toy, images: Path, first: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"network_weights": first}
    none = get_error(sd, images, tmp_path, **options)
    assert (none.code, "rank 3" in none.what) == ("adapter-rank-mismatch", True)
    other = get_error(sd, images, tmp_path, network_args=["conv_dim=4"], **options)
    assert (other.code, "rank 3, the options ask for 4" in other.what) == ("adapter-rank-mismatch", True)
    options["dim_from_weights"] = True
    both = get_error(sd, images, tmp_path, network_args=["conv_dim=3"], **options)
    assert (both.code, "conv_dim" in both.what) == ("rank-args-with-dim-from-weights", True)


@pytest.mark.parametrize(
    ("option", "trained", "other"),
    [
        ("network_train_unet_only", "lora_unet", "clip"),
        ("network_train_text_encoder_only", "lora_te", "denoiser"),
    ],
)
def test_weights_of_parts_that_do_not_train_are_set_aside(
    option: str, trained: str, other: str, sd: Toy, images: Path, first: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {option: True, "network_weights": first, "dim_from_weights": True}
    found = make_plan(sd, images, tmp_path, **options)
    (note,) = [note for note in found.notes if "set aside" in note]
    assert str(first) in note
    assert f"adapters of {other}" in note
    run = build_toy_run(sd, images, tmp_path, **options)
    method: Any = run.method
    tensors = method.engine.export_tensors()
    assert prefixes(tensors) == {trained}
    file = {name: tensor for name, tensor in read_weights(first.parent).items() if name.startswith(trained)}
    assert set(tensors) == set(file)
    assert all(torch.allclose(tensors[name].float(), file[name].float()) for name in file)


def test_weights_of_parts_that_do_not_train_alone(sd: Toy, images: Path, first: Path, tmp_path: Path) -> None:
    text = {name: tensor for name, tensor in read_weights(first.parent).items() if name.startswith("lora_te")}
    save_file(text, tmp_path / "text.safetensors")
    options: dict[str, Any] = {"network_weights": tmp_path / "text.safetensors"}
    error = get_error(sd, images, tmp_path, network_train_unet_only=True, **options)
    assert (error.code, "'clip'" in error.what) == ("weights-of-frozen-part", True)
    whole = make_plan(sd, images, tmp_path, **options)
    (note,) = [note for note in whole.notes if "text.safetensors" in note]
    count = len({name.partition(".")[0] for name in text})
    assert f"{count} of " in note


def test_base_weights_are_merged_first(sd: Toy, images: Path, first: Path, tmp_path: Path) -> None:
    """W + (0.5 + 1) alpha / rank up down: the second file's strength is missing and so 1."""
    plain = build_toy_run(sd, images, tmp_path, network_train_unet_only=True)
    changed = build_toy_run(
        sd, images, tmp_path, network_train_unet_only=True, base_weights=[first, first], base_weights_multiplier=0.5
    )
    file = read_weights(first.parent)
    for part, prefix in (("denoiser", "lora_unet"), ("clip", "lora_te_text_model")):
        before = plain.model.parts[part].module.state_dict()
        for name, weight in changed.model.parts[part].module.state_dict().items():
            layer = f"{prefix}_{name.removesuffix('.weight').replace('.', '_')}"
            if f"{layer}.alpha" in file and name.endswith(".weight"):
                expected = before[name] + 1.5 * product(file, layer).reshape(weight.shape)
                torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)
                assert not torch.equal(weight, before[name]) or not product(file, layer).any()
            else:
                assert torch.equal(weight, before[name])


def test_base_weights_of_another_model(sd: Toy, flux: Toy, images: Path, first: Path, tmp_path: Path) -> None:
    error = get_error(flux, images, tmp_path, base_weights=first)
    assert error.code == "adapter-names-unmatched"
    assert str(first) in error.what


# ---------------------------------------------------------------- norms


def test_norms_are_limited_after_every_step(sd: Toy, images: Path, tmp_path: Path) -> None:
    limit = 0.02
    output = train_toy(sd, images, tmp_path, scale_weight_norms=limit, learning_rate="1e-2", max_train_steps=3)
    file = read_weights(output)
    norms = [float(product(file, name.removesuffix(".alpha")).norm()) for name in file if name.endswith(".alpha")]
    last = read_metrics(output)[-1]
    assert max(norms) == pytest.approx(limit, rel=1e-4)
    assert last["max_norm/max_key_norm"] == pytest.approx(max(norms), rel=1e-4)
    assert last["max_norm/avg_key_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    assert 0 < last["max_norm/keys_scaled"] <= len(norms)


def test_a_norm_limit_needs_an_adapter_that_has_one(
    sd: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoRA, "has_norm_limit", False)
    assert get_error(sd, images, tmp_path, scale_weight_norms=1).code == "norm-limit-unsupported"


# ---------------------------------------------------------------- dropout

DROPOUT = {"network_dropout": 0.3, "network_args": ["rank_dropout=0.3", "module_dropout=0.3"]}


@pytest.mark.full
def test_dropout_changes_training_and_nothing_else(sd: Toy, images: Path, tmp_path: Path) -> None:
    """Resume is exact, checkpointing replays the random numbers, samples neither drop nor disturb."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 5")
    plain = train_toy(sd, images, tmp_path / "plain")
    straight = train_toy(sd, images, tmp_path / "straight", **DROPOUT)
    assert not equal_tensors(read_weights(plain), read_weights(straight))
    options = {"gradient_checkpointing": True, "sample_prompts": prompts, "sample_every_n_steps": 2}
    less = train_toy(sd, images, tmp_path / "less", **DROPOUT, **options)
    assert equal_tensors(read_weights(straight), read_weights(less))
    parts = tmp_path / "parts"
    train_toy(sd, images, parts, **DROPOUT, max_train_steps=2, save_state=True)
    train_toy(sd, images, parts, **DROPOUT, resume=parts / "lora-state")
    assert equal_tensors(read_weights(straight), read_weights(parts))


# ---------------------------------------------------------------- multipliers of datasets

DATASETS = """
[general]
resolution = 64
caption_extension = ".txt"
[[datasets]]
batch_size = 2
network_multiplier = {first}
[[datasets.subsets]]
image_dir = "{images}"
[[datasets]]
batch_size = 2
network_multiplier = {second}
[[datasets.subsets]]
image_dir = "{other}"
"""


def test_a_dataset_at_multiplier_0_gives_no_gradient(sd: Toy, tmp_path: Path) -> None:
    images = make_images(tmp_path / "a", 3) / "2_cat"
    other = make_images(tmp_path / "b", 3) / "2_cat"
    toml = tmp_path / "datasets.toml"
    toml.write_text(DATASETS.format(first=0.0, second=0.5, images=images, other=other))
    found = build_toy_run(
        sd, images, tmp_path / "out", dataset_config=toml, train_data_dir=None, resolution=None, enable_bucket=None,
        min_bucket_reso=None, max_bucket_reso=None, caption_extension=None,
    )  # fmt: skip
    seen = set()
    for step in islice(found.loader.steps(0), 8):
        (batch,) = step.batches
        assert batch.extras.multiplier is not None
        (strength,) = set(batch.extras.multiplier.tolist())  # one dataset a batch
        train_step(found, step)
        gradients = [parameter.grad for parameter in found.parameters]
        assert any(gradient is not None and gradient.any() for gradient in gradients) == (strength != 0)
        seen.add(strength)
    assert seen == {0.0, 0.5}
