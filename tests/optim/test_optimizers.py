"""Every optimizer: found by its name, equal to its library, resumed bit for bit, refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optim.helpers import TOTAL, Bench
from sfumato.config import OptimOptions
from sfumato.errors import UserError
from sfumato.formats.state import load_state, save_state
from sfumato.optim.averaging import averaged
from sfumato.optim.optimizers import OPTIMIZERS, choose, class_name, describe, restore
from sfumato.optim.rates import shown_rates

pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]
CLASSES = {  # name -> its class, as the field's documents have it
    "AdamW": "torch.optim.adamw.AdamW",
    "AdamW8bit": "bitsandbytes.optim.adamw.AdamW8bit",
    "PagedAdamW8bit": "bitsandbytes.optim.adamw.PagedAdamW8bit",
    "PagedAdamW": "bitsandbytes.optim.adamw.PagedAdamW",
    "PagedAdamW32bit": "bitsandbytes.optim.adamw.PagedAdamW32bit",
    "Lion8bit": "bitsandbytes.optim.lion.Lion8bit",
    "PagedLion8bit": "bitsandbytes.optim.lion.PagedLion8bit",
    "SGDNesterov8bit": "bitsandbytes.optim.sgd.SGD8bit",
    "Lion": "lion_pytorch.lion_pytorch.Lion",
    "SGDNesterov": "torch.optim.sgd.SGD",
    "DAdaptation": "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint",
    "DAdaptAdamPreprint": "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint",
    "DAdaptAdaGrad": "dadaptation.dadapt_adagrad.DAdaptAdaGrad",
    "DAdaptAdam": "dadaptation.dadapt_adam.DAdaptAdam",
    "DAdaptAdan": "dadaptation.dadapt_adan.DAdaptAdan",
    "DAdaptAdanIP": "dadaptation.experimental.dadapt_adan_ip.DAdaptAdanIP",
    "DAdaptLion": "dadaptation.dadapt_lion.DAdaptLion",
    "DAdaptSGD": "dadaptation.dadapt_sgd.DAdaptSGD",
    "Prodigy": "prodigyopt.prodigy.Prodigy",
    "AdaFactor": "transformers.optimization.Adafactor",
    "RAdamScheduleFree": "schedulefree.radam_schedulefree.RAdamScheduleFree",
    "AdamWScheduleFree": "schedulefree.adamw_schedulefree.AdamWScheduleFree",
    "SGDScheduleFree": "schedulefree.sgd_schedulefree.SGDScheduleFree",
}
ADAPTIVE = [name for name in CLASSES if name.startswith(("DAdapt", "Prodigy"))]
FREE = [name for name in CLASSES if name.endswith("ScheduleFree")]
OTHERS = ("RAdam", "NAdam", "torch.optim.Adafactor", "bitsandbytes.optim.AdEMAMix8bit")


def needs(name: str) -> None:
    """Skip where the package of an optimizer is not installed."""
    package = OPTIMIZERS.get(name).path if name in OPTIMIZERS else name
    if "." in package:
        pytest.importorskip(package.partition(".")[0])


def usual(name: str) -> dict[str, Any]:
    """Options under which a run with this optimizer moves its weights within a few steps, rates changing."""
    options: dict[str, Any] = {"optimizer_type": name, "learning_rate": 1e-2}
    if name in ADAPTIVE:
        options |= {"learning_rate": 1.0, "optimizer_args": {"d0": 1e-4}}
    if name == "RAdamScheduleFree":
        options |= {"optimizer_args": {"silent_sgd_phase": False}}  # its first steps are still otherwise
    if name not in (*FREE, "AdaFactor", "DAdaptSGD"):
        options |= {"lr_scheduler": "cosine", "lr_warmup_steps": 2}
    return options


def test_every_name_of_the_field_is_known() -> None:
    assert sorted(OPTIMIZERS.names) == sorted(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("spelling", [str.lower, str.upper])
def test_names_in_any_case_give_the_class(name: str, spelling: Any) -> None:
    needs(name)
    kind = choose(OptimOptions(optimizer_type=spelling(name))).kind
    assert f"{kind.__module__}.{kind.__name__}" == CLASSES[name]


@pytest.mark.parametrize("name", [*CLASSES, *OTHERS])
def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    """6 steps = 3 steps, state to disk and back, 3 steps: weights, optimizer and schedule, bit for bit."""
    needs(name)
    straight = Bench(**usual(name))
    straight.steps(range(6))
    first = Bench(**usual(name))
    before = first.weights()
    first.steps(range(3))
    state = {
        "weights": first.module.state_dict(),
        "optimizer": first.optimizer.state_dict(),
        "class": class_name(first.optimizer),
        "rates": first.rates.state_dict(),
    }
    save_state(tmp_path / "state", state, {})
    second = Bench(**usual(name))
    loaded, _ = load_state(tmp_path / "state")
    second.module.load_state_dict(loaded["weights"])
    restore(second.optimizer, loaded["optimizer"], loaded["class"])
    second.rates.load_state_dict(loaded["rates"])
    second.steps(range(3, 6))
    assert all(not torch.equal(old, new) for old, new in zip(before, first.weights(), strict=True))
    assert all(not torch.equal(old, new) for old, new in zip(first.weights(), second.weights(), strict=True))
    assert all(torch.equal(one, other) for one, other in zip(straight.weights(), second.weights(), strict=True))
    assert shown_rates(straight.optimizer) == shown_rates(second.optimizer)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "SGDNesterov8bit", "PagedAdamW8bit"])
def test_eight_bits_are_eight_bits(name: str) -> None:
    """The large layer's state is quantised, the small tensors' state is not, as bitsandbytes has it."""
    needs(name)
    bench = Bench(**usual(name))
    bench.steps(range(2))
    large, small = bench.module[0].weight, bench.module[2].weight
    assert bench.optimizer.state[large]["state1"].dtype == torch.uint8
    assert bench.optimizer.state[small]["state1"].dtype == torch.float32


@pytest.mark.parametrize("name", ["AdamW", "Lion", "Prodigy", "AdaFactor", "SGDNesterov", "DAdaptAdam"])
def test_steps_are_those_of_the_library(name: str) -> None:
    """Our groups, rates and defaults around it change nothing."""
    needs(name)
    options = {"optimizer_type": name, "learning_rate": 1e-2}
    arguments: dict[str, Any] = {"lr": 1e-2} if name != "AdaFactor" else {}
    arguments |= {"momentum": 0.9, "nesterov": True} if name == "SGDNesterov" else {}
    arguments |= {"fused": True} if name == "AdamW" else {}
    ours, theirs = Bench(**options), Bench(**options)
    theirs.optimizer = choose(theirs.options).kind(theirs.module.parameters(), **arguments)
    for index in range(4):
        ours.step(index)
        generator = torch.Generator().manual_seed(100 + index)
        x = torch.randn(16, 64, generator=generator)
        theirs.optimizer.zero_grad()
        (theirs.module(x) - x[:, :3].sin()).square().mean().backward()
        theirs.optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(ours.weights(), theirs.weights(), strict=True))


def test_adamw_is_fused_and_a_user_may_say_otherwise() -> None:
    assert Bench(optimizer_type="AdamW").optimizer.param_groups[0]["fused"] is True
    assert Bench(optimizer_args={"fused": False}).optimizer.param_groups[0]["fused"] is False


def test_old_switches() -> None:
    assert OptimOptions(use_8bit_adam=True).optimizer == "AdamW8bit"
    assert OptimOptions(use_lion_optimizer=True).optimizer == "Lion"
    assert OptimOptions().optimizer == "AdamW"


def test_each_group_has_its_rate() -> None:
    bench = Bench(rates=(1e-3, 1e-4), lr_scheduler="linear")
    bench.step(TOTAL // 2)
    assert shown_rates(bench.optimizer) == pytest.approx({"first": 5e-4, "second": 5e-5})


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam", "DAdaptSGD"])
def test_one_rate_for_all_is_told(name: str, caplog: pytest.LogCaptureFixture) -> None:
    needs(name)
    bench = Bench(rates=(1.0, 0.5), optimizer_type=name)
    assert [group["lr"] for group in bench.optimizer.param_groups] == [1.0, 1.0]
    assert f"{name} knows one rate for all: 1 of first" in caplog.text
    bench.steps(range(2))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_what_an_optimizer_finds_is_shown(name: str) -> None:
    needs(name)
    bench = Bench(**usual(name))
    bench.steps(range(6))
    shown = shown_rates(bench.optimizer)
    d = bench.optimizer.param_groups[0]["d"]
    assert d >= bench.optimizer.defaults["d"]
    assert shown["d*lr/second"] == d * shown["second"] > 0


def test_relative_step() -> None:
    """AdaFactor's own rate, min(1e-2, t^-1/2), or min(1e-6 t, t^-1/2) while it warms up; the given one has no say."""
    bench = Bench(optimizer_type="AdaFactor", learning_rate=0.5)
    assert [group["lr"] for group in bench.optimizer.param_groups] == [None, None]
    assert shown_rates(bench.optimizer) == {"first": 0.0, "second": 0.0}
    bench.steps(range(3))
    assert shown_rates(bench.optimizer) == {"first": 1e-2, "second": 1e-2}
    arguments = {"warmup_init": True, "relative_step": False}
    forced = Bench(optimizer_type="adafactor", optimizer_args=arguments, total=3)
    forced.steps(range(3))
    assert shown_rates(forced.optimizer) == pytest.approx({"first": 3e-6, "second": 3e-6})
    expected = choose(forced.options).kind._get_lr(
        {**forced.optimizer.param_groups[0], "scale_parameter": False}, {"step": 3}
    )
    assert expected == pytest.approx(3e-6)


def test_adafactor_with_a_rate() -> None:
    arguments = {"relative_step": False, "scale_parameter": False}
    bench = Bench(optimizer_type="AdaFactor", learning_rate=1e-3, optimizer_args=arguments, lr_scheduler="linear")
    bench.step(0)
    assert shown_rates(bench.optimizer) == {"first": 1e-3, "second": 1e-3}


@pytest.mark.parametrize("name", FREE)
def test_the_average_is_put_in_place_and_training_does_not_notice(name: str) -> None:
    needs(name)
    plain, shown = Bench(**usual(name)), Bench(**usual(name))
    plain.steps(range(6))
    for index in range(6):
        trained = shown.weights()
        with averaged(shown.optimizer):
            average = shown.weights()
            assert not shown.optimizer.param_groups[0]["train_mode"]
        assert all(torch.equal(one, other) for one, other in zip(trained, shown.weights(), strict=True))
        assert index < 2 or not all(torch.equal(one, other) for one, other in zip(trained, average, strict=True))
        shown.step(index)
    assert all(torch.equal(one, other) for one, other in zip(plain.weights(), shown.weights(), strict=True))
    reference = Bench(**usual(name))
    reference.steps(range(6))
    reference.optimizer.eval()
    with averaged(plain.optimizer):
        assert all(torch.equal(one, other) for one, other in zip(plain.weights(), reference.weights(), strict=True))


def test_other_optimizers_have_no_average() -> None:
    bench = Bench()
    bench.step(0)
    before = bench.weights()
    with averaged(bench.optimizer):
        assert all(torch.equal(one, other) for one, other in zip(before, bench.weights(), strict=True))


def test_arguments_of_this_run_count_after_resume() -> None:
    """torch's own loading would bring back those of the saved run without a word; what the optimizer found stays."""
    first = Bench(optimizer_args={"weight_decay": 0.5, "betas": (0.8, 0.9)})
    first.step(0)
    second = Bench(optimizer_args={"weight_decay": 0.25})
    restore(second.optimizer, first.optimizer.state_dict(), class_name(first.optimizer))
    group = second.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (0.25, (0.9, 0.999))


def test_found_factor_stays_after_resume() -> None:
    needs("Prodigy")
    options = {"optimizer_type": "Prodigy", "learning_rate": 1.0}
    first = Bench(**options)
    first.steps(range(8))
    second = Bench(**options, optimizer_args={"d_coef": 2.0})
    restore(second.optimizer, first.optimizer.state_dict(), class_name(first.optimizer))
    group = second.optimizer.param_groups[0]
    assert group["d"] == first.optimizer.param_groups[0]["d"] > 2 * group["d0"]
    assert group["d_coef"] == 2.0


def test_state_of_another_optimizer_is_refused() -> None:
    first, second = Bench(), Bench(optimizer_type="SGDNesterov")
    with pytest.raises(UserError, match=r"saved with torch.optim.adamw.AdamW, this run has torch.optim.sgd.SGD"):
        restore(second.optimizer, first.optimizer.state_dict(), class_name(first.optimizer))
    saved = first.optimizer.state_dict()
    saved["param_groups"] = saved["param_groups"][:1]
    with pytest.raises(UserError, match="other parts or layers"):
        restore(Bench().optimizer, saved, class_name(first.optimizer))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"optimizer_type": "AdamX"}, "unknown --optimizer_type 'AdamX' — did you mean 'Adamax'? Classes of"),
        ({"optimizer_type": "radam"}, "unknown --optimizer_type 'radam' — did you mean 'RAdam'?"),
        ({"optimizer_type": "no.such.Thing"}, "--optimizer_type no.such.Thing needs the module no, which is not there"),
        ({"optimizer_type": "torch.optim.AdamV"}, "torch.optim has no 'AdamV' — did you mean 'Adam"),
        ({"optimizer_type": "torch.nn.Linear"}, "--optimizer_type torch.nn.Linear is not an optimizer"),
        ({"optimizer_type": "LBFGS"}, "--optimizer_type LBFGS computes the loss several times a step"),
        ({"optimizer_args": {"weight_deca": 1}}, "--optimizer_args: AdamW does not take 'weight_deca' — did you mean"),
        ({"optimizer_args": {"lr": 1}}, "--optimizer_args: lr is given by --learning_rate"),
        ({"optimizer_args": {"betas": 3}}, "AdamW cannot be made of these arguments: "),
        ({"optimizer_type": "Muon"}, "Muon cannot be made of these arguments: "),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as raised:
        Bench(**options)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [name for name, row in zip(CLASSES, CLASSES, strict=True) if "torch" not in row])
def test_a_missing_package_is_named_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = OPTIMIZERS.get(name)
    if not row.package:
        return
    module = row.path.partition(".")[0]
    for loaded in [each for each in sys.modules if each.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError) as raised:
        choose(OptimOptions(optimizer_type=name))
    assert f"needs {row.package}, which is not installed" in str(raised.value)
    assert f'pip install "sfumato[optimizers]", or pip install {row.package}' in str(raised.value)


def test_nothing_is_imported_that_is_not_asked_for() -> None:
    program = """
import json, sys, torch
from sfumato.config import OptimOptions
from sfumato.optim.groups import ParameterGroup
from sfumato.optim.optimizers import make_optimizer
from sfumato.optim.rates import make_rates
options = OptimOptions()
group = ParameterGroup(name="a", parameters=[torch.nn.Parameter(torch.ones(2))], learning_rate=1e-3)
make_rates(options, make_optimizer(options, [group]), 5)
print(json.dumps([name for name in sys.modules if "." not in name]))
"""
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": source}, capture_output=True, text=True, check=True
    )
    extras = {"bitsandbytes", "lion_pytorch", "dadaptation", "prodigyopt", "schedulefree", "transformers", "diffusers"}
    assert not extras & set(json.loads(done.stdout))


def test_ss_optimizer() -> None:
    arguments = {"weight_decay": 0.1, "betas": (0.9, 0.99)}
    optimizer = Bench(optimizer_args=arguments).optimizer
    assert describe(optimizer, arguments) == "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))"
    assert describe(optimizer, {}) == "torch.optim.adamw.AdamW"


def test_a_parameter_without_gradient_is_left_alone() -> None:
    """A layer that never ran, in the middle of a group: common, since some text layers are not used."""
    for name in CLASSES:
        if name in OPTIMIZERS and not OPTIMIZERS.get(name).package:
            bench = Bench(**usual(name))
            idle = nn.Parameter(torch.ones(3, 3))
            bench.optimizer.param_groups[0]["params"].insert(1, idle)
            bench.steps(range(2))
            assert torch.equal(idle, torch.ones(3, 3))
