"""Every optimizer: its class, steps equal to its library's, exact resume, errors."""

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
from sfumato.errors import Problems, UserError
from sfumato.formats.state import load_state, save_state
from sfumato.optim.averaging import eval_weights
from sfumato.optim.check import check_optimizer
from sfumato.optim.lr_schedule import current_learning_rates
from sfumato.optim.optimizers import OPTIMIZERS, choose_optimizer, class_name, describe_optimizer, restore_optimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]
CLASSES = {  # name -> its class, from sd-scripts' documentation
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


def skip_without(name: str) -> None:
    """Skip where the package of an optimizer is not installed."""
    package = OPTIMIZERS.get(name).path if name in OPTIMIZERS else name
    if "." in package:
        pytest.importorskip(package.partition(".")[0])


def moving_options(name: str) -> dict[str, Any]:
    """Options with which this optimizer moves its weights within a few steps, at changing learning rates."""
    options: dict[str, Any] = {"optimizer_type": name, "learning_rate": 1e-2}
    if name in ADAPTIVE:
        options |= {"learning_rate": 1.0, "optimizer_args": {"d0": 1e-4}}
    if name == "RAdamScheduleFree":
        options |= {"optimizer_args": {"silent_sgd_phase": False}}  # its first steps are still otherwise
    if name not in (*FREE, "AdaFactor", "DAdaptSGD"):
        options |= {"lr_scheduler": "cosine", "lr_warmup_steps": 2}
    return options


def test_every_name_of_sd_scripts_is_known() -> None:
    assert sorted(OPTIMIZERS.names) == sorted(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("spelling", [str.lower, str.upper])
def test_names_in_any_case_find_the_class(name: str, spelling: Any) -> None:
    skip_without(name)
    kind = choose_optimizer(OptimOptions(optimizer_type=spelling(name))).optimizer_class
    assert f"{kind.__module__}.{kind.__name__}" == CLASSES[name]


@pytest.mark.parametrize("name", [*CLASSES, *OTHERS])
def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    """6 steps = 3 steps, state to disk and back, 3 steps: weights, optimizer and schedule, bit for bit."""
    skip_without(name)
    straight = Bench(**moving_options(name))
    straight.steps(range(6))
    first = Bench(**moving_options(name))
    before = first.weights()
    first.steps(range(3))
    state = {
        "weights": first.module.state_dict(),
        "optimizer": first.optimizer.state_dict(),
        "class": class_name(first.optimizer),
        "rates": first.schedule.state_dict(),
    }
    save_state(tmp_path / "state", state, {})
    second = Bench(**moving_options(name))
    loaded, _ = load_state(tmp_path / "state")
    second.module.load_state_dict(loaded["weights"])
    restore_optimizer(second.optimizer, loaded["optimizer"], loaded["class"])
    second.schedule.load_state_dict(loaded["rates"])
    second.steps(range(3, 6))
    assert all(not torch.equal(old, new) for old, new in zip(before, first.weights(), strict=True))
    assert all(not torch.equal(old, new) for old, new in zip(first.weights(), second.weights(), strict=True))
    assert all(torch.equal(one, other) for one, other in zip(straight.weights(), second.weights(), strict=True))
    assert current_learning_rates(straight.optimizer) == current_learning_rates(second.optimizer)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "SGDNesterov8bit", "PagedAdamW8bit"])
def test_eight_bits_are_eight_bits(name: str) -> None:
    """bitsandbytes quantizes the large layer's state, but not that of small tensors."""
    skip_without(name)
    bench = Bench(**moving_options(name))
    bench.steps(range(2))
    large, small = bench.module[0].weight, bench.module[2].weight
    assert bench.optimizer.state[large]["state1"].dtype == torch.uint8
    assert bench.optimizer.state[small]["state1"].dtype == torch.float32


@pytest.mark.parametrize("name", ["AdamW", "Lion", "Prodigy", "AdaFactor", "SGDNesterov", "DAdaptAdam"])
def test_steps_are_those_of_the_library(name: str) -> None:
    """Our groups, learning rates and defaults around it change nothing."""
    skip_without(name)
    options = {"optimizer_type": name, "learning_rate": 1e-2}
    arguments: dict[str, Any] = {"lr": 1e-2} if name != "AdaFactor" else {}
    arguments |= {"momentum": 0.9, "nesterov": True} if name == "SGDNesterov" else {}
    arguments |= {"fused": True} if name == "AdamW" else {}
    ours, theirs = Bench(**options), Bench(**options)
    theirs.optimizer = choose_optimizer(theirs.options).optimizer_class(theirs.module.parameters(), **arguments)
    for index in range(4):
        ours.step(index)
        generator = torch.Generator().manual_seed(100 + index)
        x = torch.randn(16, 64, generator=generator)
        theirs.optimizer.zero_grad()
        (theirs.module(x) - x[:, :3].sin()).square().mean().backward()
        theirs.optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(ours.weights(), theirs.weights(), strict=True))


def test_adamw_is_fused_by_default() -> None:
    assert Bench(optimizer_type="AdamW").optimizer.param_groups[0]["fused"] is True
    assert Bench(optimizer_args={"fused": False}).optimizer.param_groups[0]["fused"] is False


def test_old_switches() -> None:
    assert OptimOptions(use_8bit_adam=True).optimizer == "AdamW8bit"
    assert OptimOptions(use_lion_optimizer=True).optimizer == "Lion"
    assert OptimOptions().optimizer == "AdamW"


def test_each_group_has_its_learning_rate() -> None:
    bench = Bench(lrs=(1e-3, 1e-4), lr_scheduler="linear")
    bench.step(TOTAL // 2)
    assert current_learning_rates(bench.optimizer) == pytest.approx({"first": 5e-4, "second": 5e-5})


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam", "DAdaptSGD"])
def test_one_learning_rate_for_all_is_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    skip_without(name)
    bench = Bench(lrs=(1.0, 0.5), optimizer_type=name)
    assert [group["lr"] for group in bench.optimizer.param_groups] == [1.0, 1.0]
    assert name in caplog.text
    assert "1 of first" in caplog.text
    bench.steps(range(2))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_factor_of_an_optimizer_is_logged(name: str) -> None:
    skip_without(name)
    bench = Bench(**moving_options(name))
    bench.steps(range(6))
    series = current_learning_rates(bench.optimizer)
    d = bench.optimizer.param_groups[0]["d"]
    assert d >= bench.optimizer.defaults["d"]
    assert series["d*lr/second"] == d * series["second"] > 0


def test_relative_step() -> None:
    """AdaFactor's own learning rate, min(1e-2, t^-1/2), min(1e-6 t, t^-1/2) in a warmup; the given one is ignored."""
    bench = Bench(optimizer_type="AdaFactor", learning_rate=0.5)
    assert [group["lr"] for group in bench.optimizer.param_groups] == [None, None]
    assert current_learning_rates(bench.optimizer) == {"first": 0.0, "second": 0.0}
    bench.steps(range(3))
    assert current_learning_rates(bench.optimizer) == {"first": 1e-2, "second": 1e-2}
    arguments = {"warmup_init": True, "relative_step": False}
    forced = Bench(optimizer_type="adafactor", optimizer_args=arguments, total=3)
    forced.steps(range(3))
    assert current_learning_rates(forced.optimizer) == pytest.approx({"first": 3e-6, "second": 3e-6})
    expected = choose_optimizer(forced.options).optimizer_class._get_lr(
        {**forced.optimizer.param_groups[0], "scale_parameter": False}, {"step": 3}
    )
    assert expected == pytest.approx(3e-6)


def test_adafactor_with_a_learning_rate() -> None:
    arguments = {"relative_step": False, "scale_parameter": False}
    bench = Bench(optimizer_type="AdaFactor", learning_rate=1e-3, optimizer_args=arguments, lr_scheduler="linear")
    bench.step(0)
    assert current_learning_rates(bench.optimizer) == {"first": 1e-3, "second": 1e-3}


@pytest.mark.parametrize("name", FREE)
def test_eval_weights_are_the_average_and_change_no_training(name: str) -> None:
    skip_without(name)
    plain, averaged = Bench(**moving_options(name)), Bench(**moving_options(name))
    plain.steps(range(6))
    for index in range(6):
        trained = averaged.weights()
        with eval_weights(averaged.optimizer):
            average = averaged.weights()
            assert not averaged.optimizer.param_groups[0]["train_mode"]
        assert all(torch.equal(one, other) for one, other in zip(trained, averaged.weights(), strict=True))
        assert index < 2 or not all(torch.equal(one, other) for one, other in zip(trained, average, strict=True))
        averaged.step(index)
    assert all(torch.equal(one, other) for one, other in zip(plain.weights(), averaged.weights(), strict=True))
    reference = Bench(**moving_options(name))
    reference.steps(range(6))
    reference.optimizer.eval()
    with eval_weights(plain.optimizer):
        assert all(torch.equal(one, other) for one, other in zip(plain.weights(), reference.weights(), strict=True))


def test_other_optimizers_have_no_average() -> None:
    bench = Bench()
    bench.step(0)
    before = bench.weights()
    with eval_weights(bench.optimizer):
        assert all(torch.equal(one, other) for one, other in zip(before, bench.weights(), strict=True))


def test_arguments_of_this_run_count_after_resume() -> None:
    """torch's own loading would silently restore those of the saved run."""
    first = Bench(optimizer_args={"weight_decay": 0.5, "betas": (0.8, 0.9)})
    first.step(0)
    second = Bench(optimizer_args={"weight_decay": 0.25})
    restore_optimizer(second.optimizer, first.optimizer.state_dict(), class_name(first.optimizer))
    group = second.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (0.25, (0.9, 0.999))


def test_the_factor_is_restored_on_resume() -> None:
    skip_without("Prodigy")
    options = {"optimizer_type": "Prodigy", "learning_rate": 1.0}
    first = Bench(**options)
    first.steps(range(8))
    second = Bench(**options, optimizer_args={"d_coef": 2.0})
    restore_optimizer(second.optimizer, first.optimizer.state_dict(), class_name(first.optimizer))
    group = second.optimizer.param_groups[0]
    assert group["d"] == first.optimizer.param_groups[0]["d"] > 2 * group["d0"]
    assert group["d_coef"] == 2.0


def test_state_of_another_optimizer_is_refused() -> None:
    first, second = Bench(), Bench(optimizer_type="SGDNesterov")
    with pytest.raises(UserError) as error:
        restore_optimizer(second.optimizer, first.optimizer.state_dict(), class_name(first.optimizer))
    assert error.value.code == "resume-optimizer-mismatch"
    assert "torch.optim.adamw.AdamW" in error.value.what
    assert "torch.optim.sgd.SGD" in error.value.what
    saved = first.optimizer.state_dict()
    saved["param_groups"] = saved["param_groups"][:1]
    with pytest.raises(UserError) as error:
        restore_optimizer(Bench().optimizer, saved, class_name(first.optimizer))
    assert error.value.code == "resume-parameters-mismatch"


MISTAKES = [  # options, the code, values in the text
    ({"optimizer_type": "AdamX"}, "class-name-unknown", ["--optimizer_type 'AdamX'", "'Adamax'"]),
    ({"optimizer_type": "radam"}, "class-name-unknown", ["--optimizer_type 'radam'", "'RAdam'"]),
    ({"optimizer_type": "no.such.Thing"}, "class-module-missing", ["--optimizer_type no.such.Thing"]),
    ({"optimizer_type": "torch.optim.AdamV"}, "class-not-in-module", ["torch.optim", "'AdamV'", "'Adam"]),
    ({"optimizer_type": "torch.nn.Linear"}, "optimizer-not-a-class", ["torch.nn.Linear"]),
    ({"optimizer_type": "LBFGS"}, "optimizer-needs-closure", ["LBFGS"]),
    ({"optimizer_args": {"lr": 1}}, "optimizer-args-lr", ["--optimizer_args", "--learning_rate"]),
    ({"optimizer_args": {"betas": 3}}, "optimizer-arguments-refused", ["AdamW"]),
    ({"optimizer_type": "Muon"}, "optimizer-arguments-refused", ["Muon"]),
]


@pytest.mark.parametrize(("options", "code", "values"), MISTAKES)
def test_mistakes(options: dict[str, Any], code: str, values: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Bench(**options)
    assert error.value.code == code
    assert all(value in str(error.value) for value in values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*CLASSES, *OTHERS])
def test_every_optimizer_is_tried_without_a_fault(name: str) -> None:
    skip_without(name)
    problems = Problems()
    check_optimizer(OptimOptions(optimizer_type=name, learning_rate=0.0), 5, problems)
    assert not problems.found


def test_a_value_that_the_class_refuses_is_found_beforehand() -> None:
    problems = Problems()
    check_optimizer(OptimOptions(optimizer_args={"weight_decay": "abc"}), 5, problems)
    assert [error.code for error in problems.found] == ["optimizer-arguments-refused"]


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(UserError, match=r"--optimizer_args: AdamW .*'weight_deca'.*'weight_decay'"):
        Bench(optimizer_args={"weight_deca": 1})


@pytest.mark.parametrize("name", [name for name in CLASSES if "torch" not in name])
def test_a_missing_package_is_named_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = OPTIMIZERS.get(name)
    if not entry.package:
        return
    module = entry.path.partition(".")[0]
    for loaded in [each for each in sys.modules if each.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError) as error:
        choose_optimizer(OptimOptions(optimizer_type=name))
    assert error.value.code == "optimizer-package-missing"
    assert f"pip install {entry.package}" in error.value.fix


@pytest.mark.full
def test_only_the_chosen_optimizer_is_imported() -> None:
    program = """
import json, sys, torch
from sfumato.config import OptimOptions
from sfumato.optim.groups import ParameterGroup
from sfumato.optim.optimizers import make_optimizer
from sfumato.optim.lr_schedule import make_lr_schedule
options = OptimOptions()
group = ParameterGroup(name="a", parameters=[torch.nn.Parameter(torch.ones(2))], learning_rate=1e-3)
make_lr_schedule(options, make_optimizer(options, [group]), 5)
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
    assert describe_optimizer(optimizer, arguments) == "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))"
    assert describe_optimizer(optimizer, {}) == "torch.optim.adamw.AdamW"


def test_a_parameter_without_gradient_stays() -> None:
    """A layer that never ran, in the middle of a group, e.g. an unused layer of a text encoder."""
    for name in CLASSES:
        if name in OPTIMIZERS and not OPTIMIZERS.get(name).package:
            bench = Bench(**moving_options(name))
            unused = nn.Parameter(torch.ones(3, 3))
            bench.optimizer.param_groups[0]["params"].insert(1, unused)
            bench.steps(range(2))
            assert torch.equal(unused, torch.ones(3, 3))
