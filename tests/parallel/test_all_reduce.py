"""Sums over processes, and what is checked before the first of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.pairs import Adder, run_both, run_strategies
from sfumato.parallel import gradient_sum
from sfumato.parallel.all_reduce import AllReduce
from sfumato.parallel.base import ProcessFailed
from sfumato.parallel.gradient_sum import Facts, sum_gradients
from sfumato.parallel.single import Single

CPU = torch.device("cpu")


def make_parameters(rank: int) -> list[nn.Parameter]:
    """Five, with gradients as two processes may have them: of both, of one alone, of none."""
    generator = torch.Generator().manual_seed(rank)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2), (7,), (1,))]
    for parameter in [*parameters[:2], *(parameters[2:4] if rank else ())]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


@pytest.mark.parametrize("bucket", [4, 12, 1 << 26])
def test_gradients_and_loss_are_summed_however_they_are_packed(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_sum, "BUCKET_SIZE", bucket)
    adder = Adder()

    def act(rank: int) -> tuple[list[Tensor | None], Tensor, list[float]]:
        parameters, loss = make_parameters(rank), torch.tensor(rank + 0.25)
        facts = sum_gradients(parameters, loss, Facts(stop=bool(rank)), adder)
        return [p.grad for p in parameters], loss, facts.tolist()

    first, second = run_both(act)
    own = [[p.grad for p in make_parameters(rank)] for rank in range(2)]
    for gradients, loss, facts in (first, second):
        assert loss == 1.5
        assert facts == [1.0, 0.0]
        assert gradients[4] is None
        for got, *each in zip(gradients[:4], own[0][:4], own[1][:4], strict=True):
            zero = torch.zeros_like(got)
            assert torch.equal(got, sum((grad for grad in each if grad is not None), zero))


def test_facts_tell_of_a_stop_and_of_a_failure() -> None:
    def learn(strategy: AllReduce) -> list[Any]:
        found: list[Any] = [strategy.must_stop]
        for facts in (torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])):
            strategy.read_facts(facts)
            found.append(strategy.must_stop)
        with pytest.raises(ProcessFailed):
            strategy.read_facts(torch.tensor([0.0, 1.0]))
        return found

    assert run_strategies(learn) == [[False, False, True]] * 2


def test_a_meeting_shares_the_wish_to_stop() -> None:
    def meet(strategy: AllReduce) -> tuple[list[Any], bool, bool]:
        if strategy.rank:
            strategy.request_stop()
        return strategy.exchange(strategy.rank), strategy.must_stop, strategy.stop_requested

    assert run_strategies(meet) == [([0, 1], True, False), ([0, 1], True, True)]


def test_one_works_and_all_know_what_came_of_it() -> None:
    done: list[int] = []

    def work(strategy: AllReduce) -> list[str]:
        return strategy.run_on_main(lambda: done.append(strategy.rank) or ["no room"])

    assert run_strategies(work) == [["no room"], ["no room"]]
    assert done == [0]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_shares_are_everything_once(count: int) -> None:
    shares = run_strategies(lambda strategy: strategy.share(range(count)))
    assert sorted([*shares[0], *shares[1]]) == list(range(count))
    assert Single(CPU).share(range(count)) == range(count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_weights_that_differ_in_a_bit_are_refused(dtype: torch.dtype) -> None:
    def prepare(strategy: AllReduce, changed: bool) -> None:
        module = nn.Module()
        weight = torch.arange(12).reshape(3, 4).to(dtype)
        if changed and strategy.rank:
            weight.view(torch.uint8)[0, 0] ^= 1
        module.register_buffer("weight", weight.T)
        strategy.prepare("denoiser", module)

    assert run_strategies(lambda strategy: prepare(strategy, changed=False)) == [None, None]
    found = run_strategies(lambda strategy: prepare(strategy, changed=True))
    assert [error.code for error in found] == ["process-weights-differ"] * 2


def test_other_devices_may_compute_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """E.g. adapters that a decomposition on the GPU begins with."""
    monkeypatch.setattr("sfumato.parallel.all_reduce.name_device", lambda device: device)

    def prepare(strategy: AllReduce) -> None:
        strategy.device = ["A", "B"][strategy.rank]  # type: ignore[assignment]
        module = nn.Linear(1, 1)
        nn.init.constant_(module.weight, strategy.rank)
        strategy.prepare("denoiser", module)

    assert run_strategies(prepare) == [None, None]


def test_an_error_on_the_way_out_is_known_to_the_others() -> None:
    def leave(strategy: AllReduce) -> Any:
        with strategy:
            if strategy.rank:
                raise ValueError("broken")
            return strategy.exchange()

    waiting, failing = run_strategies(leave)
    assert isinstance(waiting, ProcessFailed)
    assert isinstance(failing, ValueError)
