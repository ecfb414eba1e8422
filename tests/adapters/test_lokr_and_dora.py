"""Every kind that LyCORIS has, against its stored values; LoKr and DoRA otherwise, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, nn

from adapters.groups import complete, draw, make_group
from adapters.lycoris_cases import CASES, LycorisCase, fill_tensors, make_input, make_layer, run_lycoris
from sfumato.adapters.base import ADAPTERS, AdapterEngine, AdapterRequest, Dropout, merge_adapter
from sfumato.adapters.dora import DoRA
from sfumato.adapters.kinds import choose_kinds, create_adapter, list_kinds, restore_adapter
from sfumato.adapters.lokr import LoKr, LokrOptions
from sfumato.adapters.lora import LoRA
from sfumato.common.names import LYCORIS_ALGOS
from sfumato.errors import InternalError
from sfumato.formats.adapter_kind import find_kinds
from sfumato.formats.groups import LayerGroup
from sfumato.formats.keymap import KeyMap, KeyRule
from sfumato.formats.peft_config import PeftConfig

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "lycoris.json").read_text(encoding="utf-8"))
WORDS = {"weight_decompose": "dora_wd", "wd_on_out": "wd_on_output"}  # of LyCORIS' classes -> of its arguments
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
def test_a_file_of_lycoris_gives_what_lycoris_gives(case: LycorisCase) -> None:
    stored, layer = GOLDENS[case.name], make_layer(case)
    kinds, tensors = complete(fill_tensors(stored["shapes"], stored["alpha"]))
    adapter, x = restore_adapter(kinds, make_group(nn.Sequential(layer)), tensors), make_input(case)
    expected = torch.tensor(stored["output"])
    with torch.no_grad():
        output = layer(x)
        torch.testing.assert_close(adapter.add_to(output, x, 0, 1.0).flatten()[:60], expected, rtol=1e-6, atol=2e-6)
        merge_adapter(adapter)
        torch.testing.assert_close(layer(x).flatten()[:60], expected, rtol=1e-6, atol=2e-6)


@each_case
def test_two_on_a_layer_change_it_by_the_sum(case: LycorisCase) -> None:
    """Each changes what the layer alone gives: the second does so as the first."""
    stored, layer = GOLDENS[case.name], make_layer(case)
    kinds, tensors = complete(fill_tensors(stored["shapes"], stored["alpha"]))
    group, x = make_group(nn.Sequential(layer)), make_input(case)
    with torch.no_grad():
        plain = layer(x).flatten()[:60]
        for _ in range(2):
            AdapterEngine().attach([group], lambda group: restore_adapter(kinds, group, tensors))
        expected = 2 * torch.tensor(stored["output"]) - plain
        torch.testing.assert_close(layer(x).flatten()[:60], expected, rtol=2e-6, atol=4e-6)


@each_case
def test_a_new_adapter_has_lycoris_tensors_and_changes_nothing(case: LycorisCase) -> None:
    stored, group = GOLDENS[case.name], make_group(nn.Sequential(make_layer(case)))
    words = {WORDS.get(name, name): value for name, value in case.options.items()}
    options = {}
    for name, kind in list_kinds().items():
        known = kind.options_class.model_fields
        options[name] = kind.options_class(**{word: value for word, value in words.items() if word in known})
    name = LYCORIS_ALGOS.get(case.algo, "lora")  # norm layers have their own beside any kind
    kinds = choose_kinds(name, options, group)
    generator = Generator().manual_seed(0)
    request = AdapterRequest(rank=case.rank, alpha=1.5, options=options[name], generator=generator)
    adapter = create_adapter(kinds, group, request, options)
    tensors = adapter.export_tensors()
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if name != "alpha"}
    assert shapes == stored["shapes"]
    assert (float(tensors["alpha"]) if "alpha" in tensors else None) == pytest.approx(stored["alpha"])
    assert adapter.delta(0).abs().max() < 1e-6
    draw(adapter)
    kinds, saved = complete({name: tensor.detach() for name, tensor in adapter.export_tensors().items()})
    again = restore_adapter(kinds, group, saved)
    assert torch.equal(again.delta(0), adapter.delta(0))


@each_case
def test_the_stored_values_are_those_of_lycoris(case: LycorisCase) -> None:
    pytest.importorskip("lycoris")
    found = run_lycoris(case)
    assert {name: found[name] for name in ("shapes", "alpha")} == {
        n: GOLDENS[case.name][n] for n in ("shapes", "alpha")
    }
    torch.testing.assert_close(torch.tensor(found["output"]), torch.tensor(GOLDENS[case.name]["output"]))


# ---------------------------------------------------------------- PEFT


@pytest.mark.parametrize("rank", [2, 100])
@pytest.mark.parametrize(
    "options", [{}, {"decompose_both": True}, {"use_effective_conv2d": True}, {"decompose_factor": 4}]
)
def test_lokr_equals_peft(rank: int, options: dict[str, Any]) -> None:
    """Its scale is alpha / r of the configuration, for two whole matrices, too."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 8), nn.Conv2d(8, 12, 3, padding=1)).double()
    theirs = nn.Sequential(nn.Linear(12, 8), nn.Conv2d(8, 12, 3, padding=1)).double()
    theirs.load_state_dict(plain.state_dict())
    wrapped = peft.get_peft_model(theirs, peft.LoKrConfig(r=rank, alpha=3, target_modules=["0", "1"], **options))
    for name, parameter in wrapped.named_parameters():
        if "lokr" in name:
            nn.init.normal_(parameter, std=0.3)
    state = peft.get_peft_model_state_dict(wrapped)
    config = PeftConfig(path=Path("file"), alpha=3.0, rank=float(rank))
    for i, x in enumerate((torch.randn(4, 12, dtype=torch.float64), torch.randn(2, 8, 5, 5, dtype=torch.float64))):
        start = f"base_model.model.{i}."
        tensors = {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}
        kinds, found = complete(tensors, config)
        group = make_group(nn.ModuleList([plain[i]]))
        adapter = restore_adapter(kinds, group, found).double()
        ours = adapter.add_to(plain[i](x), x, 0, 1.0)
        torch.testing.assert_close(ours, wrapped.base_model.model[i](x), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- closed forms


def make_lokr(group: LayerGroup, rank: int = 2, **options: Any) -> LoKr:
    request = AdapterRequest(rank=rank, alpha=1.5, options=LokrOptions(**options), generator=Generator())
    adapter = LoKr.create(group, request).double()
    draw(adapter)
    return adapter


@pytest.mark.parametrize("rows", [[4, 4, 4], [5, 3, 10], [6]])
@pytest.mark.parametrize("options", [{}, {"factor": 3}, {"full_matrix": True}, {"unbalanced_factorization": True}])
def test_a_fused_group_is_one_product(rows: list[int], options: dict[str, Any]) -> None:
    """Each layer computes the rows that are its own, also where they begin inside a block of w1's rows."""
    torch.manual_seed(0)
    module = nn.ModuleDict({f"l{i}": nn.Linear(6, count) for i, count in enumerate(rows)}).double()
    group = make_group(module, KeyMap([KeyRule("fused", tuple(module))]))
    adapter = make_lokr(group, **options)
    first, second = adapter.build_first(), adapter.build_second()
    whole = adapter.scale * torch.kron(first, second)
    x, start = torch.randn(2, 5, 6, dtype=torch.float64), 0
    for i, count in enumerate(rows):
        own = whole[start : start + count]
        torch.testing.assert_close(adapter.delta(i), own, rtol=0, atol=1e-12)
        torch.testing.assert_close(adapter(x, i), x @ own.t(), rtol=0, atol=1e-12)
        start += count


def test_the_norm_limit_of_lokr() -> None:
    torch.manual_seed(0)
    adapter = make_lokr(make_group(nn.Sequential(nn.Linear(12, 8)).double()))
    norm, larger = adapter.limit_norm(0.5)
    assert bool(larger)
    torch.testing.assert_close(adapter.delta(0).norm(), norm)
    torch.testing.assert_close(norm, torch.tensor(0.5, dtype=torch.float64))


def test_dropout_of_lokr_drops_rows_or_all() -> None:
    torch.manual_seed(0)
    adapter = make_lokr(make_group(nn.Sequential(nn.Linear(12, 40)).double()))
    x = torch.randn(7, 12, dtype=torch.float64)
    whole = adapter(x, 0)
    adapter.set_dropout(Dropout(rank=0.5))
    dropped = adapter(x, 0)
    rows = (dropped != 0).any(0)
    assert 5 < rows.sum() < 35
    assert torch.equal(dropped[:, rows], whole[:, rows])
    adapter.set_dropout(Dropout(module=0.5))
    assert {bool(adapter(x, 0).any()) for _ in range(20)} == {True, False}
    adapter.eval()
    assert torch.equal(adapter(x, 0), whole)


@pytest.mark.parametrize("on_output", [True, False])
@pytest.mark.parametrize("conv", [False, True])
def test_dora_is_its_equation(on_output: bool, conv: bool) -> None:
    """Values and gradients, of a fused group whose columns are those of all its layers."""
    torch.manual_seed(0)
    kinds = (
        [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)] if conv else [nn.Linear(3, 4), nn.Linear(3, 2)]
    )
    module = nn.ModuleDict({"a": kinds[0], "b": kinds[1]})
    group = make_group(module, KeyMap([KeyRule("fused", ("a", "b"))]))
    adapter = DoRA(LoRA(group, rank=2, alpha=1.0), on_output=on_output)
    draw(adapter)
    stacked = torch.cat([layer.weight for layer in group.layers]).detach()
    changed = stacked + torch.cat([adapter.inner.delta(i) for i in range(2)])
    dims = tuple(range(1, changed.ndim)) if on_output else (0, *range(2, changed.ndim))
    expected = adapter.dora_scale * changed / changed.square().sum(dim=dims, keepdim=True).sqrt() - stacked
    found = torch.cat([adapter.delta(i) for i in range(2)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    x = torch.randn(2, 3, 5, 5) if conv else torch.randn(2, 7, 3)
    engine = AdapterEngine()
    plain = [layer(x).detach() for layer in group.layers]
    engine.attach([group], lambda _: adapter)
    outputs = [layer(x) for layer in group.layers]
    weights = expected.split([4, 2])
    operate = [torch.nn.functional.conv2d(x, w, padding=1) if conv else x @ w.t() for w in weights]
    for output, before, change in zip(outputs, plain, operate, strict=True):
        torch.testing.assert_close(output, before + change, rtol=1e-5, atol=2e-5)
    parameters = list(adapter.parameters())
    ours = torch.autograd.grad(sum(output.square().sum() for output in outputs), parameters)
    theirs = torch.autograd.grad(
        sum((before + change).square().sum() for before, change in zip(plain, operate, strict=True)), parameters
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)


def test_dora_has_no_norm_limit() -> None:
    adapter = DoRA(LoRA(make_group(nn.Sequential(nn.Linear(3, 2))), rank=1, alpha=1.0))
    with pytest.raises(InternalError, match="DoRA"):
        adapter.limit_norm(1.0)
    assert not adapter.has_norm_limit


def test_no_kind_has_the_tensors_of_another() -> None:
    kinds = [kind for kind in list_kinds().values() if kind.spellings]
    ends = [(end, kind) for kind in kinds for end in kind.spellings]
    shared = {end for end, kind in ends if any(end == other and kind is not its for other, its in ends)}
    assert shared == {"oft_blocks", "rescale"}
    for shape in ((2, 3, 3), (2, 2, 3, 3)):
        assert len(find_kinds({"oft_blocks": torch.zeros(shape)}, kinds)) == 1
    assert {*ADAPTERS.names} >= {"lora", "split_lora", "lokr", "dora"}
