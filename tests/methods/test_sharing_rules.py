"""What does not go together with weights that are shared out, and which optimizers may step pieces of a weight."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from sfumato.config import Config
from sfumato.config.process_rules import FSDP2
from sfumato.methods.sharing_rules import SHARING_RULES, Planned, list_broken_sharing_rules, steps_each_number

OPTIMIZERS = sorted(
    name
    for name, found in vars(torch.optim).items()
    if inspect.isclass(found) and issubclass(found, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")
)


def make_planned(options: Mapping[str, Any], *, processes: int = 2, **facts: Any) -> Planned:
    """facts: trains (the denoiser's own weights), reads (the adapter the weights), formats, preserves."""
    config = Config().with_values(dict(options))
    network = SimpleNamespace(weights=SimpleNamespace(has_formats=facts.get("formats", False)))
    return Planned(
        config=config,
        blueprint=cast(Any, SimpleNamespace(networks={"denoiser": network})),
        method=cast(Any, SimpleNamespace(full_precision_parts=lambda _: ["denoiser"] * facts.get("trains", False))),
        parts=[cast(Any, SimpleNamespace(reads_weights=facts.get("reads", False)))],
        data=cast(Any, SimpleNamespace(processes=processes, has_preserved_samples=facts.get("preserves", False))),
    )


BROKEN = {
    "sharing-method": ({"method": "leco"}, {}),
    "sharing-optimizer": ({"method": "full", "optimizer_type": "torch.optim.Adafactor"}, {"trains": True}),
    "sharing-block-swap": ({"blocks_to_swap": 2}, {}),
    "sharing-low-precision": ({}, {"formats": True}),
    "sharing-base-weights": ({"base_weights": (Path("a.safetensors"),)}, {}),
    "sharing-reading-adapter": ({}, {"reads": True}),
    "sharing-preservation": ({}, {"preserves": True}),
    "sharing-schedule-free": ({"optimizer_type": "AdamWScheduleFree"}, {}),
    "sharing-ema": ({"ema_decay": 0.9}, {}),
    "sharing-half-weights": ({"full_bf16": True, "mixed_precision": "bf16"}, {}),
    "sharing-uncertainty": ({"uncertainty_weighting": True}, {}),
    "sharing-norm-limit": ({"scale_weight_norms": 1.0}, {}),
    "sharing-stopped-encoder": ({"stop_text_encoder_training": 10}, {}),
    "sharing-compiled-blocks": ({"compile": True}, {}),
}
ASKING = {FSDP2: {"fsdp": True}, **{f"ZeRO {stage}": {"deepspeed": True, "zero_stage": stage} for stage in (1, 2, 3)}}


@pytest.mark.parametrize("rule", SHARING_RULES, ids=lambda rule: rule.code)
def test_each_rule_is_broken_by_its_options_alone(rule: Any) -> None:
    options, facts = BROKEN[rule.code]
    assert not list(list_broken_sharing_rules(make_planned(options, **facts)))
    for engine, asking in ASKING.items():
        shared = {**options, **asking}
        expected = [rule.code] if engine in rule.engines else []
        assert [error.code for error in list_broken_sharing_rules(make_planned(shared, **facts))] == expected
        assert not list(list_broken_sharing_rules(make_planned(shared, processes=1, **facts)))


def step_pieces(name: str, pieces: int) -> torch.Tensor:
    """A weight after three steps that its pieces take by themselves."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(4, 6, generator=generator), torch.randn(3, 4, 6, generator=generator)
    parts = [nn.Parameter(piece.clone()) for piece in start.chunk(pieces)]
    optimizer = getattr(torch.optim, name)(parts, lr=0.1)
    for gradient in gradients:
        for part, piece in zip(parts, gradient.chunk(pieces), strict=True):
            part.grad = piece.to_sparse() if name == "SparseAdam" else piece.clone()
        optimizer.step()
    return torch.cat([part.detach() for part in parts])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_torch_may_step_pieces_where_they_step_as_the_whole_does(name: str) -> None:
    config = make_planned({"optimizer_type": f"torch.optim.{name}"}).config
    if steps_each_number(config):
        assert torch.equal(step_pieces(name, 1), step_pieces(name, 2))
    elif name != "SparseAdam":  # whose gradients are of another kind than those here
        assert not torch.equal(step_pieces(name, 1), step_pieces(name, 2))
