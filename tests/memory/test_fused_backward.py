"""Steps within backward are those after it, but for clipping, which looks at each gradient alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint
from transformers.optimization import Adafactor

from sfumato.memory.fused_backward import FusedBackward, divide
from sfumato.memory.offload import BlockOffload
from sfumato.optim.half_stepper import HalfStepper

CPU = torch.device("cpu")
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": partial(AdamW, lr=1e-2, fused=True),
    "AdamW, waiting": partial(AdamW, lr=1e-2, foreach=False),
    "SGD": partial(SGD, lr=1e-2, momentum=0.9),
    "AdaFactor": partial(Adafactor, lr=1e-2, relative_step=False, scale_parameter=False),
    "Lion": partial(Lion, lr=1e-2),
}


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(4))
    return nn.Sequential(nn.Linear(8, 8), *blocks)


def find_weight(net: nn.Module, path: str) -> nn.Parameter:
    return net.get_parameter(f"{path}.weight")


def make_optimizer(net: nn.Module, kind: str) -> Optimizer:
    """Two groups with learning rates of their own."""
    parameters = list(net.parameters())
    rows = [{"params": parameters[:5]}, {"params": parameters[5:], "lr": 3e-3}]
    return OPTIMIZERS[kind](rows)


def make_buckets(net: nn.Sequential, kind: str) -> list[Sequence[nn.Parameter]]:
    parameters = list(net.parameters())
    if kind == "blocks":
        return [list(child.parameters()) for child in net]
    return list(divide(parameters, 3)) if kind == "groups" else [[each] for each in parameters]


def iterate_losses(net: nn.Module, steps: int = 3) -> Iterator[Tensor]:
    for step in range(steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()).dtype)
        yield net(x).square().sum()


def train(net: nn.Sequential, optimizer: Optimizer, stepper: HalfStepper | None = None, max_norm: float = 0.0) -> None:
    """As torch's own loops do; each gradient is clipped by its own norm."""
    for step, loss in enumerate(iterate_losses(net)):
        optimizer.zero_grad()
        loss.backward()
        for parameter in net.parameters():
            if max_norm:
                nn.utils.clip_grad_norm_(parameter, max_norm)
        optimizer.step() if stepper is None else stepper.step(step)


def train_fused(net: nn.Sequential, fused: FusedBackward, optimizer: Optimizer) -> list[Tensor]:
    """The norms of all gradients before clipping."""
    norms: list[Tensor] = []
    for step, loss in enumerate(iterate_losses(net)):
        optimizer.zero_grad()
        fused.start(step, loss)
        loss.backward()
        norms.append(fused.finish())
    return norms


def host_blocks(net: nn.Sequential) -> BlockOffload:
    offload = BlockOffload(CPU)
    for block in list(net)[1:]:
        block.forward = partial(checkpoint, offload.wrap(block, block.forward), use_reentrant=False)
    return offload


def assert_equal(net: nn.Module, other: nn.Module) -> None:
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(mine, expected) for mine, expected in pairs)


def assert_equal_states(optimizer: Optimizer, other: Optimizer) -> None:
    mine, expected = optimizer.state_dict(), other.state_dict()
    assert mine["param_groups"] == expected["param_groups"]
    assert mine["state"].keys() == expected["state"].keys()
    for number, state in mine["state"].items():
        torch.testing.assert_close(state, expected["state"][number], rtol=0, atol=0)


@pytest.mark.parametrize("buckets", ["parameters", "blocks", "groups", "in main memory"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_and_state_are_the_same(kind: str, buckets: str) -> None:
    """Bit for bit, on the device and in main memory; what it saves is what the optimizer alone would."""
    plain, net = make_net(), make_net()
    before, offload = find_weight(plain, "1.0").clone(), host_blocks(net) if buckets == "in main memory" else None
    expected, optimizer = make_optimizer(plain, kind), make_optimizer(net, kind)
    train(plain, expected)
    made = make_buckets(net, buckets)
    train_fused(net, FusedBackward(optimizer, made, stepper=None, offload=offload, max_norm=0), optimizer)
    assert_equal(net, plain)
    assert_equal_states(optimizer, expected)
    assert not torch.equal(find_weight(plain, "1.0"), before)


@pytest.mark.parametrize("buckets", ["parameters", "blocks", "in main memory"])
def test_gradients_of_several_batches_make_one_step(buckets: str) -> None:
    """Bit for bit those of torch's own loop, with a layer that the last batch does not run."""
    plain, net = make_net(), make_net()
    offload = host_blocks(net) if buckets == "in main memory" else None
    expected, optimizer = make_optimizer(plain, "AdamW"), make_optimizer(net, "AdamW")
    fused = FusedBackward(optimizer, make_buckets(net, buckets), stepper=None, offload=offload, max_norm=0)
    for step in range(2):
        expected.zero_grad()
        optimizer.zero_grad()
        total = torch.zeros(())
        for number in range(3):
            for network in (plain, net):
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(3 * step + number))
                hidden = x if number == 2 else network[0](x)
                loss = nn.Sequential(*list(network)[1:])(hidden).square().sum() / 3
                if network is net:
                    total += loss.detach()
                    fused.start(step, total) if number == 2 else fused.accumulate()
                loss.backward()
        expected.step()
        norm = fused.finish()
        torch.testing.assert_close(norm, nn.utils.get_total_norm([each.grad for each in plain.parameters()]))  # pyright: ignore
        assert_equal(net, plain)
    assert_equal_states(optimizer, expected)


@pytest.mark.parametrize("hosted", [False, True])
def test_rounding_is_the_same(hosted: bool) -> None:
    """Of bfloat16 weights, whose noise depends on the step and the place of a parameter alone."""
    plain, net = make_net().bfloat16(), make_net().bfloat16()
    offload = host_blocks(net) if hosted else None
    expected, optimizer = make_optimizer(plain, "AdamW"), make_optimizer(net, "AdamW")
    train(plain, expected, HalfStepper(expected, seed=5, stochastic=True))
    stepper = HalfStepper(optimizer, seed=5, stochastic=True)
    buckets = make_buckets(net, "parameters")
    train_fused(net, FusedBackward(optimizer, buckets, stepper=stepper, offload=offload, max_norm=0), optimizer)
    assert_equal(net, plain)


@pytest.mark.parametrize("buckets", ["parameters", "blocks"])
def test_each_gradient_is_clipped_by_its_own_norm(buckets: str) -> None:
    plain, net = make_net(), make_net()
    expected, optimizer = make_optimizer(plain, "SGD"), make_optimizer(net, "SGD")
    train(plain, expected, max_norm=0.1)
    made = make_buckets(net, buckets)
    norms = train_fused(net, FusedBackward(optimizer, made, stepper=None, offload=None, max_norm=0.1), optimizer)
    for mine, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    net = make_net()
    next(iterate_losses(net)).backward()
    total = nn.utils.get_total_norm([each.grad for each in net.parameters() if each.grad is not None])
    torch.testing.assert_close(norms[0], total)


def test_gradients_are_gone() -> None:
    """What is left of each takes the memory of one number, and says whether it was 0."""
    net = make_net()
    optimizer = make_optimizer(net, "AdamW")
    fused = FusedBackward(optimizer, make_buckets(net, "parameters"), stepper=None, offload=None, max_norm=0)
    loss = net(torch.zeros(4, 8)).square().sum()
    fused.start(0, loss)
    loss.backward()
    fused.finish()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert all(grad is not None and grad.untyped_storage().nbytes() == 4 for grad in gradients.values())
    assert {name for name, grad in gradients.items() if grad is not None and not grad.any()} == {"0.weight"}


@pytest.mark.parametrize("kind", ["AdamW", "AdaFactor"])
def test_what_is_not_finite_stays_out(kind: str) -> None:
    """Of a gradient: its own parameter is skipped. Of the loss: all are."""
    net = make_net()
    optimizer = make_optimizer(net, kind)
    fused = FusedBackward(optimizer, make_buckets(net, "parameters"), stepper=None, offload=None, max_norm=1)
    train_fused(net, fused, optimizer)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    handle = find_weight(net, "2.0").register_hook(lambda gradient: gradient * float("nan"))
    loss = next(iterate_losses(net))
    optimizer.zero_grad()
    fused.start(3, loss)
    loss.backward()
    assert not fused.finish().isfinite()
    handle.remove()
    after = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    assert [name for name in after if torch.equal(after[name], before[name])] == ["2.0.weight"]
    loss = next(iterate_losses(net)) * float("inf")
    optimizer.zero_grad()
    fused.start(4, loss)
    loss.backward()
    fused.finish()
    assert all(torch.equal(parameter, after[name]) for name, parameter in net.named_parameters())


def test_a_backward_that_is_no_step_changes_nothing() -> None:
    """A look at the gradients of a step that went wrong."""
    net = make_net()
    optimizer = make_optimizer(net, "AdamW")
    FusedBackward(optimizer, make_buckets(net, "blocks"), stepper=None, offload=None, max_norm=0)
    next(iterate_losses(net)).backward()
    assert_equal(net, make_net())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


def test_parameters_without_gradients_do_not_hold_up_their_bucket() -> None:
    net, plain = make_net(), make_net()
    idle = nn.Parameter(torch.ones(3))
    optimizer = AdamW([*net.parameters(), idle], lr=1e-2, fused=True)
    fused = FusedBackward(optimizer, [[*net.parameters(), idle]], stepper=None, offload=None, max_norm=0)
    train_fused(net, fused, optimizer)
    train(plain, AdamW(plain.parameters(), lr=1e-2, fused=True))
    assert_equal(net, plain)
    assert torch.equal(idle, torch.ones(3))


def test_weights_that_share_a_tensor() -> None:
    """As those of a file have that is split into layers: one steps while another is still to be used by backward."""

    def make() -> tuple[nn.ModuleList, AdamW]:
        layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
        stacked = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
        for layer, rows in zip(layers, stacked.split(4), strict=True):
            layer.load_state_dict({"weight": rows}, assign=True)
        return layers, AdamW(layers.parameters(), lr=1e-2, fused=True)

    def compute(layers: nn.ModuleList) -> Tensor:
        x = torch.ones(2, 4)
        for layer in layers:
            x = torch.tanh(layer(x))
        return x.square().sum()

    (plain, expected), (net, optimizer) = make(), make()
    fused = FusedBackward(optimizer, [[each] for each in net.parameters()], stepper=None, offload=None, max_norm=0)
    for step in range(2):
        expected.zero_grad()
        compute(plain).backward()
        expected.step()
        optimizer.zero_grad()
        loss = compute(net)
        fused.start(step, loss)
        loss.backward()
        fused.finish()
    assert_equal(net, plain)


def test_a_division_is_even() -> None:
    parameters = [nn.Parameter(torch.zeros(size)) for size in (5, 1, 1, 3, 6, 2)]
    pieces = list(divide(parameters, 3))
    assert [sum(each.numel() for each in piece) for piece in pieces] == [6, 10, 2]
    assert [each for piece in pieces for each in piece] == parameters
    assert len(list(divide(parameters, 99))) == 6
