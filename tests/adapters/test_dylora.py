"""DyLoRA: in training the first ranks of a LoRA, of which the last ones train; outside of it the LoRA itself."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor, nn

from adapters.groups import draw, make_group
from sfumato.adapters.base import AdapterRequest
from sfumato.adapters.dylora import DyLoRA, DyloraOptions
from sfumato.adapters.lora import LoRA

RANK, UNIT = 6, 2


def make(conv: bool) -> tuple[DyLoRA, Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 5, 3, padding=1) if conv else nn.Linear(4, 5)
    options = DyloraOptions(unit=UNIT)
    request = AdapterRequest(rank=RANK, alpha=3.0, options=options, generator=Generator().manual_seed(1))
    adapter = DyLoRA.create(make_group(nn.Sequential(layer).double()), request).double()
    adapter.configure(options)
    draw(adapter)
    return adapter, torch.randn(2, 4, 5, 5, dtype=torch.float64) if conv else torch.randn(3, 4, dtype=torch.float64)


def cut(adapter: DyLoRA, ranks: int) -> LoRA:
    """A LoRA of the first ranks, scaled as the paper's code and sd-scripts do."""
    tensors = adapter.export_tensors()
    tensors = {
        "lora_down.weight": tensors["lora_down.weight"][:ranks], "lora_up.weight": tensors["lora_up.weight"][:, :ranks],
        "alpha": torch.tensor(3.0 * ranks / RANK * (RANK / ranks) ** 0.5, dtype=torch.float64),
    }  # fmt: skip
    return LoRA.from_tensors(adapter.group, {name: tensor.detach() for name, tensor in tensors.items()}).double()


@pytest.mark.parametrize("conv", [False, True])
def test_a_step_uses_the_first_ranks_and_trains_the_last_of_them(conv: bool) -> None:
    adapter, x = make(conv)
    seen: set[int] = set()
    for seed in range(20):
        torch.manual_seed(seed)
        found = adapter(x, 0)
        ranks = next(n for n in (2, 4, 6) if torch.allclose(found, cut(adapter, n)(x, 0), rtol=1e-6, atol=1e-6))
        down, up = torch.autograd.grad(found.square().sum(), [adapter.lora_down, adapter.lora_up])
        trained = [bool(down[i].any() and up[:, i].any()) for i in range(RANK)]
        assert trained == [ranks - UNIT <= i < ranks for i in range(RANK)]
        seen.add(ranks)
    assert seen == {2, 4, 6}


@pytest.mark.parametrize("conv", [False, True])
def test_outside_of_training_it_is_the_lora_of_its_file(conv: bool) -> None:
    adapter, x = make(conv)
    adapter.eval()
    torch.testing.assert_close(adapter(x, 0), cut(adapter, RANK)(x, 0))


def test_the_rank_is_a_multiple_of_the_unit() -> None:
    group = make_group(nn.Sequential(nn.Linear(4, 5)))
    assert [rank for rank in range(1, 9) if DyLoRA.allows_dim(group, rank, DyloraOptions(unit=4))] == [4, 8]
