"""--full_fp16: rounding and the loss scale against closed forms and float32, and every method that trains with it."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from families.toys import ToyShelf
from sfumato.optim.half_scaler import HalfGradScaler, make_scaler
from sfumato.optim.half_stepper import HalfStepper, stochastic_round
from toy_runs import equal_tensors, make_images, read_metrics, read_weights, train_toy


@given(st.floats(min_value=-70000.0, max_value=70000.0, width=32), st.integers(0, 3))
def test_float16_is_rounded_to_a_neighbor(value: float, seed: int) -> None:
    """Also below 6e-5, where the distances of neighbors are constant."""
    wide = torch.tensor([value, value * 1e-6, value * 1e-9])
    found = stochastic_round(wide, torch.Generator().manual_seed(seed), torch.float16)
    nearest = wide.to(torch.float16)
    for one, near, exact in zip(found, nearest, wide, strict=True):
        if near.isfinite() and one.isfinite():
            step = (torch.nextafter(near.abs(), torch.tensor(torch.inf, dtype=torch.float16)) - near.abs()).float()
            assert abs(float(one) - float(exact)) <= float(step)


def test_float16_is_right_on_average() -> None:
    """1 + 1/4096 is a quarter of the way to the next number, 2e-8 a third of the smallest."""
    for value, low, high in ((1 + 2**-12, 1.0, 1 + 2**-10), (2e-8, 0.0, 2**-24), (-3e-6, None, None)):
        wide = torch.full((40000,), value)
        found = stochastic_round(wide, torch.Generator().manual_seed(1), torch.float16)
        if low is not None:
            assert set(found.float().tolist()) == {low, high}
        step = 2**-10 if value > 1 else 2**-24
        assert float(found.double().mean()) == pytest.approx(value, abs=4 * step / 40000**0.5)
    exact = torch.tensor([0.0, 1.0, -0.5, 65504.0, 2**-24, torch.inf])
    assert torch.equal(stochastic_round(exact, torch.Generator(), torch.float16).float(), exact)


def test_scaled_gradients_step_as_in_float32() -> None:
    """Gradients of 1e-8, which float16 cannot hold: the step is that of float32 with the same gradients."""
    weight, gradient = torch.linspace(-1, 1, 64).half().float(), torch.linspace(-1, 1, 64) * 1e-8
    half = nn.Parameter(weight.half())
    optimizer = torch.optim.AdamW([half], lr=0.5, eps=1e-12)
    scaler = make_scaler(torch.device("cpu"), mixed=True, full=True)
    assert isinstance(scaler, HalfGradScaler)
    loss = scaler.scale((half.float() * gradient).sum())
    loss.backward()
    assert half.grad is not None
    scale = float(scaler.read_scale())
    scaler.unscale_(optimizer)
    torch.testing.assert_close(half.grad.float(), gradient * scale, rtol=1e-3, atol=1e-7)
    HalfStepper(optimizer, seed=1, stochastic=False, scaler=scaler).step(0)
    plain = nn.Parameter(weight.clone())
    plain.grad = gradient
    torch.optim.AdamW([plain], lr=0.5, eps=1e-12).step()
    torch.testing.assert_close(half.detach().float(), plain.detach(), rtol=1e-3, atol=1e-3)
    scaler.update()
    assert float(scaler.read_scale()) == scale
    half.grad = torch.full_like(half, torch.inf)
    scaler.unscale_(optimizer)
    scaler.update()
    assert float(scaler.read_scale()) == scale / 2


FULL_FP16: dict[str, dict[str, object]] = {
    "adapter": {},
    "full": {"method": "full", "network_dim": None},
    "textual_inversion": {"method": "textual_inversion", "network_dim": None, "token_string": "zwx",
                          "use_object_template": True, "learning_rate": "1e-2"},
    "control_net": {"method": "control_net", "network_dim": None},
    "lllite": {"method": "lllite", "network_dim": 4, "learning_rate": "1e-2"},
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("method", FULL_FP16)
def test_every_method_trains_in_float16_and_resumes_exactly(method: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """The weights are float16 in the file, follow float32's closely, and learn."""
    images, options = make_images(tmp_path / "images", 3), dict(FULL_FP16[method])
    if method in ("control_net", "lllite"):
        options["conditioning_data_dir"] = images
    common = {"mixed_precision": "fp16", "max_train_steps": 4, "learning_rate": "1e-3", "save_state": True, **options}
    toy = toy_shelf.paths("sdxl")
    half = train_toy(toy, images, tmp_path / "half", full_fp16=True, save_every_n_steps=2, **common)
    resumed = train_toy(
        toy, images, tmp_path / "resumed", full_fp16=True, resume=half / "lora-step00000002-state", **common
    )
    weights = read_weights(half)
    assert equal_tensors(weights, read_weights(resumed))
    wide = read_weights(train_toy(toy, images, tmp_path / "wide", **common))
    trained = [name for name, tensor in weights.items() if tensor.dtype == torch.float16]
    assert trained
    assert method == "full" or all(name.endswith(".alpha") for name in weights.keys() - trained)
    losses = [[row["loss/current"] for row in read_metrics(each)] for each in (half, tmp_path / "wide")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    learning_rate = float(str(common["learning_rate"]))
    distances = [float((weights[name].float() - wide[name].float()).abs().mean()) for name in trained]
    # AdamW's first steps are as long as the learning rate whatever the gradient: where that is 0, their sign is chance
    assert statistics.median(distances) < learning_rate
