"""Blocks that are compiled and recomputed give what they give without, and equal ones share a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sfumato.adapters.base import AdapterEngine
from sfumato.adapters.lora import LoRA
from sfumato.config.memory import MemoryOptions
from sfumato.errors import UserError
from sfumato.formats.groups import find_layers, group_layers
from sfumato.formats.keymap import make_identity_map
from sfumato.memory.blocks import check_compiler, wrap_blocks

BLOCKS = ("blocks.{n}",)


class Block(nn.Module):
    """An attention-like block with keyword arguments and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.a(x)) * scale
        return x + self.b(hidden), hidden


class Net(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x, scale=x.new_ones(()) / 2)
        return self.last(x)


def adapted(count: int) -> tuple[Net, AdapterEngine]:
    """A frozen network of this many blocks, each of whose layers has an adapter that matters."""
    torch.manual_seed(0)
    net = Net(count).requires_grad_(False)
    layers = ("blocks.{n}.a", "blocks.{n}.b")
    groups = group_layers(
        find_layers(net), layers, part="denoiser", prefix="lora_unet", adapter_map=make_identity_map()
    )
    engine = AdapterEngine()
    engine.attach(groups, lambda group: LoRA(group, rank=2, alpha=1.0))
    for i, parameter in enumerate(engine.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    return net, engine


def losses_and_gradients(net: Net, engine: AdapterEngine) -> list[Tensor]:
    """For two numbers of rows, of which the first comes again, and a strength for each row."""
    found: list[Tensor] = []
    for rows, strength in ((3, 1.0), (5, 1.0), (3, 1.0), (3, torch.tensor([1.0, 0.5, 0.0]))):
        engine.multiplier = strength
        engine.zero_grad()
        loss = net(torch.arange(rows * 8.0).reshape(rows, 8) / 20).square().sum()
        loss.backward()
        gradients = [parameter.grad for parameter in engine.parameters()]
        found += [loss.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]
    return found


@pytest.mark.full
@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["", "count"])
def test_numbers_are_those_of_the_plain_network(checkpointing: bool, backend: str) -> None:
    expected = losses_and_gradients(*adapted(3))
    net, engine = adapted(3)
    memory = MemoryOptions(
        gradient_checkpointing=checkpointing, compile=backend != "", compile_backend=backend or "inductor"
    )
    wrapped = wrap_blocks(net, BLOCKS, memory)
    found = losses_and_gradients(net, engine)
    assert len(found) == len(expected) == 4 * 13
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert len(engine.report()) == 0
    assert len(wrapped.blocks) == (3 if checkpointing or backend else 0)
    wrapped.remove()
    assert all("forward" not in vars(block) for block in net.blocks)
    assert not checkpointing or count_saved(net) > count_saved(wrapped_net(net, memory))


def wrapped_net(net: Net, memory: MemoryOptions) -> Net:
    wrap_blocks(net, BLOCKS, memory)
    return net


def count_saved(net: Net) -> int:
    """Elements that autograd keeps for backward."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(torch.ones(3, 8, requires_grad=True))
    return total


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_blocks_share_their_graphs(checkpointing: bool, graphs: list[int]) -> None:
    """However many there are, adapters included; none is left uncompiled."""
    counts: list[int] = []
    for blocks in (2, 6):
        torch._dynamo.reset()
        graphs.clear()
        net, engine = adapted(blocks)
        wrap_blocks(
            net, BLOCKS, MemoryOptions(gradient_checkpointing=checkpointing, compile=True, compile_backend="count")
        )
        losses_and_gradients(net, engine)
        counts.append(len(graphs))
    assert counts[0] == counts[1]
    assert counts[0] <= 8


@pytest.mark.usefixtures("graphs")
def test_the_limit_grows_with_the_network_and_an_option_sets_it() -> None:
    """torch's own limit of 8 graphs is for one function with a few sizes, not for a class with a dozen shapes."""
    limits = torch._dynamo.config
    wrap_blocks(Net(40), BLOCKS, MemoryOptions(compile=True))
    assert (limits.recompile_limit, limits.accumulated_recompile_limit) == (320, 320)
    wrap_blocks(Net(1), BLOCKS, MemoryOptions(compile=True))  # another network of the same run
    assert limits.recompile_limit == 320
    wrap_blocks(Net(40), BLOCKS, MemoryOptions(compile=True, compile_cache_size_limit=3))
    assert limits.recompile_limit == 3


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiler(MemoryOptions(compile_backend="nvprims_nvfuser"))  # nothing is compiled
    with pytest.raises(UserError) as error:
        check_compiler(MemoryOptions(compile=True, compile_backend="nvprims_nvfuser"))
    assert error.value.code == "compile-backend-unknown"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError) as error:
        check_compiler(MemoryOptions(compile=True))
    assert error.value.code == "compile-without-compiler"
    check_compiler(MemoryOptions(compile=True, compile_backend="aot_eager"))
