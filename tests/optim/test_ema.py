"""EMA: against diffusers, against closed forms, and beside training, which it must not change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from families.toys import ToyShelf
from sfumato.config import EmaOptions, load_config
from sfumato.errors import UserError
from sfumato.formats.checkpoint_writer import write_safetensors
from sfumato.formats.hashes import calculate_adapter_hashes
from sfumato.formats.state import load_state
from sfumato.optim.ema import Ema, EmaSet, ExponentialProfile, PowerProfile, gamma_from_sigma_rel
from sfumato.tools.ema import reconstruct_ema, solve_coefficients
from toy_runs import build_toy_run, equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy


def walk(steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The weights after each step of some training."""
    return list(torch.randn(steps, 7, generator=torch.Generator().manual_seed(1)).cumsum(0).to(dtype))


def averaged(profile: Any, path: list[Tensor], on_cpu: bool = False) -> Tensor:
    parameter = nn.Parameter(torch.full((7,), 100.0, dtype=path[0].dtype))  # before training
    average = Ema(profile, [parameter], on_cpu=on_cpu)
    for step in path:
        parameter.data.copy_(step)
        average.update()
    return average.weights[0]


@pytest.mark.full  # what it imports takes long
@pytest.mark.parametrize("decay", [0.999, 0.5])
def test_the_exponential_ema_is_that_of_diffusers(decay: float) -> None:
    from diffusers.training_utils import EMAModel

    path, parameter = walk(30), nn.Parameter(torch.full((7,), 100.0))
    theirs = EMAModel([parameter], decay=decay)
    for step in path:
        parameter.data.copy_(step)
        theirs.step([parameter])
    torch.testing.assert_close(averaged(ExponentialProfile(decay), path), theirs.shadow_params[0])


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_the_power_ema_has_the_power_profile(sigma_rel: float, steps: int) -> None:
    """beta telescopes: step s of t counts as the integral of the profile over it."""
    path, gamma = walk(steps, torch.float64), gamma_from_sigma_rel(sigma_rel)
    ends = (np.arange(steps + 1) / steps) ** (gamma + 1)
    expected = sum(float(share) * weights for share, weights in zip(np.diff(ends), path, strict=True))
    torch.testing.assert_close(averaged(PowerProfile(sigma_rel), path), expected, rtol=1e-12, atol=1e-12)


@given(st.floats(0.001, 0.28))
def test_gamma_gives_the_width(sigma_rel: float) -> None:
    """The relative deviation of the density (gamma + 1) s^gamma on 0..1, whose moments are known."""
    gamma = gamma_from_sigma_rel(sigma_rel)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert gamma > 0
    assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_bfloat16_is_averaged_in_float32(on_cpu: bool) -> None:
    path = walk(20, torch.bfloat16)
    result = averaged(ExponentialProfile(0.9), path, on_cpu)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, averaged(ExponentialProfile(0.9), [weights.float() for weights in path]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_apply_swaps_the_weights_and_restores_them(dtype: torch.dtype, fails: bool) -> None:
    parameters = [nn.Parameter(weights.clone()) for weights in walk(3, dtype)]
    average = Ema(ExponentialProfile(0.9), parameters)
    average.update()
    for parameter in parameters:
        parameter.data.mul_(1.5)
    average.update()
    before, average_before = [p.detach().clone() for p in parameters], [w.clone() for w in average.weights]
    try:
        with average.apply():
            assert all(torch.equal(p, w.to(dtype)) for p, w in zip(parameters, average_before, strict=True))
            if fails:
                raise OSError
    except OSError:
        pass
    assert all(torch.equal(*pair) for pair in zip(before, parameters, strict=True))
    assert all(torch.equal(*pair) for pair in zip(average_before, average.weights, strict=True))


def test_the_options_choose_the_averages() -> None:
    options = EmaOptions(ema_decay=0.99, ema_sigma_rel=(0.1, 0.05))
    averages = EmaSet(options, [])
    assert averages.suffixes == ["-ema", "-ema0.1", "-ema0.05"]
    assert [average.facts() for average in averages] == [
        {"decay": 0.99, "steps": 0}, {"sigma_rel": 0.1, "steps": 0}, {"sigma_rel": 0.05, "steps": 0},
    ]  # fmt: skip


# ---------------------------------------------------------------- any width afterwards


def density(gamma: float, steps: float, at: np.ndarray) -> np.ndarray:
    return np.where(at <= steps, (gamma + 1) * at**gamma / steps ** (gamma + 1), 0.0)


def test_a_saved_average_is_found_again() -> None:
    steps, gammas = [100, 100, 200, 200, 300, 300], [gamma_from_sigma_rel(0.05), gamma_from_sigma_rel(0.1)] * 3
    shares, error = solve_coefficients(steps, gammas, 300, gamma_from_sigma_rel(0.1))
    np.testing.assert_allclose(shares, [0, 0, 0, 0, 0, 1], atol=1e-9)
    assert error < 1e-6


@pytest.mark.parametrize("wanted", [0.07, 0.15, 0.2])
def test_the_fit_is_the_least_squares_of_numeric_integration(wanted: float) -> None:
    """The shares that a general solver finds for the profiles on a fine grid, with their sum held at 1 by weight."""
    steps = [each for each in range(50, 401, 50) for _ in (0, 1)]
    gammas = [gamma_from_sigma_rel(0.05), gamma_from_sigma_rel(0.1)] * 8
    shares, error = solve_coefficients(steps, gammas, 400, gamma_from_sigma_rel(wanted))
    grid = (np.arange(400_000) + 0.5) / 1000
    columns = np.stack([density(g, t, grid) for t, g in zip(steps, gammas, strict=True)], axis=1)
    target = density(gamma_from_sigma_rel(wanted), 400, grid)
    held = np.full((1, len(steps)), 1e4)
    theirs = np.linalg.lstsq(np.vstack([columns, held]), np.append(target, 1e4), rcond=None)[0]
    assert shares.sum() == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(columns @ shares, columns @ theirs, atol=2e-3 * target.max())
    left = np.linalg.norm(columns @ shares - target) / np.linalg.norm(target)
    assert error == pytest.approx(left, abs=1e-4)
    assert left < 0.1


@pytest.mark.parametrize("wanted", [0.07, 0.15])
def test_the_sum_of_saved_averages_is_nearly_the_tracked_one(wanted: float) -> None:
    path = walk(400, torch.float64)
    ends = [each for each in range(25, 401, 25) for _ in (0, 1)]
    widths = [0.05, 0.1] * 16
    saved = [averaged(PowerProfile(width), path[:end]) for end, width in zip(ends, widths, strict=True)]
    shares, _ = solve_coefficients(
        ends, [gamma_from_sigma_rel(width) for width in widths], 400, gamma_from_sigma_rel(wanted)
    )
    made = sum(float(share) * average for share, average in zip(shares, saved, strict=True))
    tracked = averaged(PowerProfile(wanted), path)
    far = (averaged(PowerProfile(0.1), path) - tracked).norm()
    assert (made - tracked).norm() < 0.03 * far


# ---------------------------------------------------------------- beside training


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


FULL = {"method": "full", "network_dim": None, "learning_rate": "1e-4"}
LORA = {"network_train_unet_only": True}
EMA = {"ema_decay": 0.9, "ema_sigma_rel": [0.05, 0.1]}
SUFFIXES = ("-ema", "-ema0.05", "-ema0.1")


@pytest.mark.full
@pytest.mark.parametrize("method", [LORA, FULL])
def test_training_is_unchanged_and_resume_is_exact(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, method: dict
) -> None:
    """Also with samples made with the EMA."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n")
    toy, options = toy_shelf.paths("sd"), {"max_train_steps": 4, **method}
    plain = train_toy(toy, images, tmp_path / "plain", **options)
    previews = {"sample_prompts": prompts, "sample_every_n_steps": 1, "evaluate_with_ema": True}
    both = train_toy(
        toy, images, tmp_path / "both", **options, **EMA, **previews, save_every_n_steps=2, save_state=True
    )
    assert equal_tensors(read_weights(plain), read_weights(both))
    assert read_metrics(plain) == read_metrics(both)
    again = train_toy(
        toy, images, tmp_path / "again", **options, **EMA, ema_on_cpu=True, resume=both / "lora-step00000002-state"
    )
    for suffix in SUFFIXES:
        assert equal_tensors(read_weights(both, f"lora{suffix}"), read_weights(again, f"lora{suffix}"))
        assert not equal_tensors(read_weights(both, f"lora{suffix}"), read_weights(both, f"lora-step00000002{suffix}"))


def test_the_file_holds_the_average_of_the_saved_weights(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """The weights of every step are saved, and the file has their average and says which one it is."""
    options = {"save_every_n_steps": 1, "max_train_steps": 3, "no_metadata": True, **LORA, **EMA}
    out = train_toy(toy_shelf.paths("sd"), images, tmp_path, **options)
    path = [read_weights(out, name) for name in ("lora-step00000001", "lora-step00000002", "lora")]
    shares = {"-ema": ({"decay": 0.9}, [2 / 11 * 0.25, 9 / 11 * 0.25, 0.75])}  # (1 + n) / (10 + n): 2/11, then 3/12
    for width in (0.05, 0.1):
        profile = np.diff((np.arange(4) / 3) ** (gamma_from_sigma_rel(width) + 1))
        shares[f"-ema{width:g}"] = ({"sigma_rel": width}, list(profile))
    for suffix, (facts, each) in shares.items():
        for name, tensor in read_weights(out, f"lora{suffix}").items():
            expected = sum(share * step[name] for share, step in zip(each, path, strict=True))
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)
        with safe_open(out / f"lora{suffix}.safetensors", "pt") as file:
            assert json.loads(file.metadata()["sfumato.ema"]) == {**facts, "steps": 3, "of": "lora"}
    with safe_open(out / "lora.safetensors", "pt") as file:
        assert "sfumato.ema" not in file.metadata()


@pytest.mark.full
def test_older_averages_are_removed_with_older_saves(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    options = {"max_train_steps": 4, "save_every_n_steps": 1, "save_last_n_steps": 1, **LORA}
    out = train_toy(toy_shelf.paths("sd"), images, tmp_path, **options, ema_sigma_rel=[0.1])
    left = sorted(path.name for path in out.glob("*.safetensors"))
    names = ("lora", "lora-step00000002", "lora-step00000003")
    assert left == sorted(f"{name}{suffix}.safetensors" for name in names for suffix in ("", "-ema0.1"))


@pytest.mark.full
def test_an_average_may_start_later(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --resume from a state without it: it starts at the resumed weights."""
    toy = toy_shelf.paths("sd")
    train_toy(toy, images, tmp_path, save_state=True, max_train_steps=2, **LORA)
    resumed = build_toy_run(toy, images, tmp_path, resume=tmp_path, ema_decay=0.5, **LORA)
    assert "the saved state has no ema" in capsys.readouterr().err
    (average,) = resumed.ema
    assert all(torch.equal(*pair) for pair in zip(average.weights, resumed.parameters, strict=True))
    state, _ = load_state(tmp_path / "lora-state")
    assert state["ema"] == {}


@pytest.mark.full
def test_previews_show_the_average(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While samples are made the weights are those of the file that is saved after the same step."""
    from sfumato.training import previews

    seen: list[dict[str, Tensor]] = []
    make = previews.generate_batch

    def watched(model: Any, method: Any, *rest: Any) -> list[Tensor]:
        seen.append({name: tensor.clone() for name, tensor in method.engine.export_tensors().items()})
        return make(model, method, *rest)

    monkeypatch.setattr(previews, "generate_batch", watched)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n")
    options = {"sample_prompts": prompts, "sample_every_n_steps": 2, "evaluate_with_ema": True, "max_train_steps": 2}
    out = train_toy(toy_shelf.paths("sd"), images, tmp_path, ema_sigma_rel=[0.1], **options, **LORA)
    assert equal_tensors(seen[-1], read_weights(out, "lora-ema0.1"))


@pytest.mark.full
def test_validation_measures_the_average(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """The validation loss is that of the EMA's file before another training; --save_best saves the EMA."""
    toy, held = toy_shelf.paths("sd"), {"validation_split": 0.4, "validation_seed": 3, **LORA}
    options = {"ema_sigma_rel": [0.1], "evaluate_with_ema": True, "save_best": True, "learning_rate": "1e-2", **held}
    out = train_toy(toy, images, tmp_path / "out", **options, max_train_steps=3, console_log_file=tmp_path / "log.txt")
    result = {row["step"]: row["loss/validation/step_average"] for row in validated(out)}
    file = out / "lora-ema0.1.safetensors"
    again = train_toy(toy, images, tmp_path / "again", **held, network_weights=file, max_train_steps=1)
    first = validated(again)[0]
    assert (first["step"], first["loss/validation/step_average"]) == (0, pytest.approx(result[3], rel=1e-6))
    assert result[3] != result[0]
    best = out / "lora-best.safetensors"
    with safe_open(best, "pt") as saved:
        assert json.loads(saved.metadata()["sfumato.ema"])["sigma_rel"] == 0.1
    steps = min((each for each in result if each), key=lambda step: result[step])
    assert steps == 3
    assert equal_tensors(read_weights(out, "lora-best"), read_weights(out, "lora-ema0.1"))


def validated(output: Path) -> list[dict[str, float]]:
    return [row for row in read_metrics(output) if "loss/validation/step_average" in row]


# ---------------------------------------------------------------- sfumato ema


def saved_run(folder: Path, path: list[Tensor], every: int, name: str = "lora") -> None:
    for end in range(every, len(path) + 1, every):
        for width in (0.05, 0.1):
            up = averaged(PowerProfile(width), path[:end])
            tensors = {"a.lora_up.weight": up.float(), "a.alpha": torch.tensor(2.0), "count": torch.tensor([3])}
            metadata = {"sfumato.ema": json.dumps({"sigma_rel": width, "steps": end, "of": name})}
            metadata |= {"ss_steps": str(end), "sshs_model_hash": "", "sshs_legacy_hash": ""}
            write_safetensors(folder / f"{name}-{end:03d}-ema{width:g}.safetensors", tensors, metadata)


def test_another_width_from_files(tmp_path: Path) -> None:
    path = walk(400, torch.float64)
    saved_run(tmp_path, path, 25)
    write_safetensors(tmp_path / "lora.safetensors", {"x": torch.ones(1)}, {})  # of no average
    summary = reconstruct_ema([tmp_path], 0.15, output=None)
    assert "lora-ema0.15.safetensors: 32 files, step 400" in summary
    result = read_weights(tmp_path, "lora-ema0.15")
    tracked, near = averaged(PowerProfile(0.15), path), averaged(PowerProfile(0.1), path)
    assert (result["a.lora_up.weight"] - tracked).norm() < 0.03 * (near - tracked).norm()
    assert (result["a.alpha"], result["count"]) == (2, 3)
    with safe_open(tmp_path / "lora-ema0.15.safetensors", "pt") as file:
        metadata = file.metadata()
    assert "sfumato.ema" not in metadata  # it is no power average to the last digit
    assert metadata["ss_steps"] == "400"
    assert metadata["sshs_model_hash"] == calculate_adapter_hashes(result, metadata)[0]
    assert reconstruct_ema([tmp_path], 0.2, output=tmp_path / "x.safetensors").startswith(
        str(tmp_path / "x.safetensors")
    )


def code_of(*arguments: Any, **options: Any) -> str:
    """The code with which reconstructing an EMA is refused."""
    with pytest.raises(UserError) as error:
        reconstruct_ema(*arguments, 0.15, **options)
    return error.value.code


def test_files_without_an_average_are_refused(tmp_path: Path) -> None:
    assert code_of([tmp_path], output=None) == "power-ema-missing"
    saved_run(tmp_path, walk(4), 2)
    saved_run(tmp_path, walk(4), 2, name="other")
    assert code_of([tmp_path], output=None) == "ema-run-ambiguous"
    existing = tmp_path / "lora-002-ema0.1.safetensors"
    assert code_of([tmp_path], name="lora", output=existing) == "ema-output-is-input"
    write_safetensors(tmp_path / "lora.safetensors", {"x": torch.ones(1)}, {})
    assert code_of([tmp_path / "lora.safetensors"], output=None) == "file-without-power-ema"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sfumato.cli.main import main

    saved_run(tmp_path, walk(40), 10)
    assert main(["ema", str(tmp_path), "--sigma_rel", "0.12"]) == 0
    assert "lora-ema0.12.safetensors: 8 files, step 40" in capsys.readouterr().out
    assert main(["ema", str(tmp_path), "--sigma_rel", "0.5"]) == 2
    assert "--sigma_rel: '0.5'" in capsys.readouterr().err


def test_widths_on_the_command_line(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    words = make_arguments(toy_shelf.paths("sd"), images, tmp_path, ema_sigma_rel=[0.05, 0.1])
    assert load_config(words).ema.ema_sigma_rel == (0.05, 0.1)
    for wrong in ([0.1, 0.1], [0.3]):
        with pytest.raises(UserError, match="--ema_sigma_rel"):
            load_config(make_arguments(toy_shelf.paths("sd"), images, tmp_path, ema_sigma_rel=wrong))
