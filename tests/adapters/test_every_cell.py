"""Every kind of adapter on every family: all layers that train by default, hooked, saved and read again.

Training, resuming and merging are in test_every_kind.py. docs/adapters.md lists the kinds and families of this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator

from adapters.groups import draw
from families.toys import ToyShelf
from others.models import compute_output, compute_with_file, load_toy
from pages import page_maker
from sfumato.adapters.base import Adapter, AdapterEngine, AdapterRequest
from sfumato.adapters.kinds import choose_kinds, create_adapter, list_kinds, list_related
from sfumato.families.base import Family
from sfumato.formats.adapter_file import write_adapter_file
from sfumato.formats.groups import LayerGroup, is_pointwise

FAMILIES = ("sd", "sdxl", "sd3", "flux", "flux_kontext", "chroma", "lumina")
KINDS: dict[str, dict[str, Any]] = {  # kind -> arguments; a wrapper is around LoRA
    "lora": {}, "lora_fa": {}, "dylora": {}, "split_lora": {"split_qkv": True}, "pissa": {"pissa": True},
    "tucker_lora": {"use_tucker": True}, "norm_difference": {},
    "dora": {"dora_wd": True}, "trained_scalar": {"use_scalar": True}, "loha": {"use_tucker": True}, "lokr": {},
    "full_difference": {}, "ia3": {}, "glora": {}, "oft": {"divided": True}, "diag_oft": {"rescaled": True},
    "boft": {}, "oft_v2": {}, "boft_v2": {},
}  # fmt: skip
VARIANTS = {("norm_difference", "sd3"): "3.5-medium"}  # SD3 itself has no norm layer with a weight
DIMS = {"boft": 384}  # which all layers' rows can be divided into; else 4
IN_ITS_PLACE = ("split_lora", "tucker_lora", "pissa", "dora", "trained_scalar")  # asked for by an argument of LoRA


@pytest.fixture(scope="module")
def models() -> dict[str, Family]:
    return {}


def list_groups(model: Family, kind: type[Adapter]) -> dict[str, list[LayerGroup]]:
    """Part -> the layers with an adapter, convolutions included, or all norm layers."""
    found: dict[str, list[LayerGroup]] = {}
    for name, part in model.parts.items():
        if part.spec.targets:
            wanted = {group.name for group in part.groups()}
            every = part.groups(every=True)
            groups = [group for group in every if group.name in wanted or not is_pointwise(group.layers[0])]
            found[name] = [group for group in every if group.is_norm] if kind.of_norms else groups
    return found


def attach(kind: str, model: Family) -> AdapterEngine:
    """Adapters with drawn values on all layers."""
    name, engine = "lora" if kind in IN_ITS_PLACE else kind, AdapterEngine()
    options = {}
    for other, each in list_related(name).items():
        known = {word: value for word, value in KINDS[kind].items() if word in each.options_class.model_fields}
        options[other] = each.options_class(**known)
    for i, groups in enumerate(list_groups(model, list_kinds()[kind]).values()):
        for group in groups:
            generator = Generator().manual_seed(i)
            request = AdapterRequest(rank=DIMS.get(kind, 4), alpha=4.0, options=options[name], generator=generator)
            adapter = create_adapter(choose_kinds(name, options, group), group, request, options)
            draw(adapter, 0.03)
            adapter.eval()
            engine.attach([group], lambda _, adapter=adapter: adapter)
    return engine


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_read_it_changes_the_model_as_it_did(
    kind: str, family: str, models: dict[str, Family], toy_shelf: ToyShelf, tmp_path: Path
) -> None:
    variant = VARIANTS.get((kind, family), "")
    if family + variant not in models:
        models[family + variant] = load_toy(toy_shelf, family, variant)
    model = models[family + variant]
    plain, engine = compute_output(model), attach(kind, model)
    found = compute_output(model)
    write_adapter_file(tmp_path / "x.safetensors", engine.export_tensors(), {}, None)
    engine.detach()
    again = compute_with_file(model, tmp_path / "x.safetensors")
    assert (found - plain).abs().max() > 1e-4
    torch.testing.assert_close(again, found, rtol=0, atol=2e-5 * float(found.abs().max().clamp(min=1)))


def test_no_kind_is_left_out() -> None:
    assert {*KINDS} == {*list_kinds()}


@pytest.mark.full
def test_the_page_is_up_to_date() -> None:
    maker = page_maker("make_adapters")
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), "run `make pages`"
    assert {*maker.WHEN} == {*KINDS}
