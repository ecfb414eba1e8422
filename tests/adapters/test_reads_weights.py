"""Which kinds say that their change depends on the weights: those whose change does."""

from __future__ import annotations

import torch
from torch import nn

from adapters.groups import draw, make_group
from sfumato.adapters.base import AdapterRequest
from sfumato.adapters.kinds import list_kinds


def test_the_kinds_whose_change_depends_on_the_weights_say_so() -> None:
    for name, kind in list_kinds().items():
        if not kind.spellings:  # its files are read as another kind
            continue
        if kind.is_wrapper:
            assert kind.reads_weights, name
            continue
        changes: list[torch.Tensor] = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            layer = nn.LayerNorm(8) if kind.of_norms else nn.Conv2d(8, 8, 3) if kind.replaces else nn.Linear(8, 8)
            group = make_group(nn.Sequential(layer))
            request = AdapterRequest(
                rank=4, alpha=2.0, options=kind.options_class(), generator=torch.Generator().manual_seed(0)
            )
            adapter = kind.create(group, request).eval()
            torch.manual_seed(0)
            draw(adapter, 0.1)
            changes.append(adapter.delta(0).detach())
        differs = bool((changes[0] - changes[1]).abs().max() > 1e-4)
        assert differs == kind.reads_weights, name
