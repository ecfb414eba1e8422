"""The examples of an adapter and of a loss outside of the package: they train, and files of them are read."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from families.toys import ToyShelf
from others.models import compute_output, compute_with_file, load_toy
from sfumato.adapters import register_adapters
from sfumato.adapters.base import ADAPTERS
from sfumato.common import extensions
from sfumato.common.extensions import ADAPTERS_GROUP, LOSSES_GROUP, find_registered
from sfumato.config import LossOptions, load_config
from sfumato.config.write import format_toml
from sfumato.diffusion.losses import LOSSES, make_loss
from sfumato.errors import UserError
from toy_runs import build_toy_run, equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy

EXAMPLES = Path(__file__).parents[1] / "examples" / "extend"
PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The examples can be imported, and afterwards nothing of them is left."""
    register_adapters()
    monkeypatch.syspath_prepend(EXAMPLES)
    for registry in (ADAPTERS, LOSSES):
        monkeypatch.setattr(registry, "_things", dict(registry._things))
        monkeypatch.setattr(registry, "_names", list(registry._names))
    yield
    for name in ("vector_adapter", "charbonnier_loss"):
        sys.modules.pop(name, None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", 2)


def test_both_examples_train(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    toy, common = toy_shelf.paths("flux"), {"max_train_steps": 2, "learning_rate": "1e-2"}
    options = {"network_module": "vector_adapter", "network_args": ["vector_start=0.5"]}
    output = train_toy(toy, images, tmp_path / "a", **common, **options, loss_type="charbonnier_loss")
    plain = train_toy(toy, images, tmp_path / "b", **common, **options)
    assert read_metrics(output)[0]["loss/current"] != read_metrics(plain)[0]["loss/current"]
    suffixes = {key.rpartition(".")[2] for key in read_weights(output)}
    assert suffixes == {"vector_row", "vector_column", "alpha"}
    model = load_toy(toy_shelf, "flux")
    before = compute_output(model)
    assert (compute_with_file(model, output / "lora.safetensors") - before).abs().max() > 1e-4
    build_toy_run(toy, images, tmp_path / "c", network_weights=output / "lora.safetensors", **common, **options)


def test_the_example_loss_is_its_formula() -> None:
    estimate, target = torch.randn(3, 4), torch.randn(3, 4)
    found = make_loss(LossOptions(loss_type="charbonnier_loss"))(estimate, target, None)  # pyright: ignore
    torch.testing.assert_close(found, torch.hypot(estimate - target, torch.tensor(1e-3)))


def test_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is enough, and typing errors are still found."""
    points = {
        ADAPTERS_GROUP: [EntryPoint("vector", "vector_adapter", ADAPTERS_GROUP)],
        LOSSES_GROUP: [EntryPoint("charbonnier", "charbonnier_loss", LOSSES_GROUP)],
    }
    monkeypatch.setattr(extensions, "entry_points", lambda group: points[group])
    extensions.load_entry_points.cache_clear()
    assert find_registered(ADAPTERS, "vector", group=ADAPTERS_GROUP, option="--network_module") == "vector"
    assert LossOptions(loss_type="charbonnier").loss_type == "charbonnier"
    assert callable(make_loss(LossOptions(loss_type="charbonnier")))
    extensions.load_entry_points.cache_clear()


@pytest.mark.parametrize(("content", "code"), [
    ("def create_network(*args, **options): ...", "network-module-of-kohya"),
    ("", "extension-without-thing"),
    ("import a_module_that_is_missing", "extension-not-importable"),
])  # fmt: skip
def test_modules_without_a_kind(
    content: str, code: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"my_module_{code.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        build_toy_run(toy_shelf.paths("sd"), images, tmp_path / "out", network_module=name)
    assert error.value.code == code
    assert code != "network-module-of-kohya" or "docs/extending.md" in error.value.fix


def test_a_name_that_nothing_has(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    for options in ({"network_module": "network.lora"}, {"loss_type": "hubber"}):
        with pytest.raises(UserError, match=r"networks\.lora|huber"):
            load_config(make_arguments(toy_shelf.paths("sd"), images, tmp_path, **options))


@pytest.mark.full
def test_the_program_of_the_page_trains(
    toy_shelf: ToyShelf,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """docs/extending.md, run as it stands: it saves what a command line does, and a fault is printed with its code."""
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    config = load_config(make_arguments(toy_shelf.paths("sd"), images, tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(format_toml(config), encoding="utf-8")
    found: dict[str, object] = {}
    exec(program, found)
    assert found["saved"] == tmp_path / "out" / "lora.safetensors"
    command = train_toy(toy_shelf.paths("sd"), images, tmp_path / "command", max_train_steps=2)
    assert equal_tensors(read_weights(tmp_path / "out"), read_weights(command))
    exec(program.replace('"2"', '"two"'), found)
    assert found["saved"] is None
    assert "--max_train_steps" in capsys.readouterr().out
