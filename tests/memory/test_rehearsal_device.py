"""The rehearsal device has a GPU's rules: tensors in the wrong place are errors, and waits are noted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sfumato.memory.rehearsal.backend as backend
from rehearsing import make_three_layers, needs_rehearsal, rehearsal
from sfumato.errors import UserError
from sfumato.memory.rehearsal.device import UnknownValueError, rehearsal_device
from sfumato.memory.transfer import Transfer
from sfumato.quantization.scaled_blocks import ScaledBlocks
from sfumato.quantization.weight import quantize

__all__ = ["rehearsal"]
TWO_DEVICES = "rehearsal:0 and cpu|cpu and rehearsal:0"


@needs_rehearsal
class TestDevice:
    def test_a_tensor_in_the_wrong_place_is_an_error(self, rehearsal):
        network = make_three_layers().to(rehearsal.device)
        with pytest.raises(RuntimeError, match=TWO_DEVICES):
            network(torch.zeros(2, 10))
        network[1].cpu()
        with pytest.raises(RuntimeError, match=TWO_DEVICES):
            network(torch.zeros(2, 10, device=rehearsal.device))

    def test_tensors_on_the_cpu_are_real(self, rehearsal):
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(4, generator=generator)
        assert noise.tolist() == torch.randn(4, generator=torch.Generator().manual_seed(3)).tolist()
        x = torch.ones(4, device=rehearsal.device) * torch.tensor(2.0)  # a number goes anywhere, as on a GPU
        assert (x.device.type, x.cpu().tolist()) == ("rehearsal", [0, 0, 0, 0])

    def test_weights_on_the_cpu_may_be_more_than_the_machine_has(self, rehearsal):
        """4 TB, of which a copy in one piece and one in fewer bits are made, and a part comes onto the device."""
        with rehearsal.without_values():
            weight = torch.empty(2**20, 2**20)
        (pinned,) = Transfer(rehearsal.device).pin_together([weight])
        small = quantize(weight[:1024, :1024], ScaledBlocks(dtype=torch.int8, block=128))
        assert (pinned.device.type, small.device.type) == ("cpu", "cpu")
        pinned[0].add_(pinned[1])
        assert pinned[0].to(rehearsal.device).untyped_storage().nbytes() == 4 * 2**20
        assert rehearsal.memory.peak == 4 * 2**20
        assert pinned[0, :2].numpy().tolist() == [0, 0]
        assert torch.full((2,), 3.0).tolist() == [3, 3]

    @pytest.mark.parametrize(
        ("wait", "what"),
        [
            (lambda x: x.sum().item(), "reads a value of a float32 tensor"),
            (lambda x: bool((x > 0).all()), "reads a value of a bool tensor"),
            (lambda x: int(x.argmax()), "reads a value of a int64 tensor"),
            (lambda x: x[:1].tolist(), "reads a value of a float32 tensor"),
            (lambda x: torch.equal(x, x), "reads a value of a float32 tensor"),
            (lambda x: x.cpu(), "copies from the device and waits for it"),
            (lambda x: torch.zeros(4).copy_(x), "copies from the device and waits for it"),
            (lambda x: torch.zeros(4).to(x.device), "copies to the device and waits for it"),
            (lambda x: torch.tensor([1, 2], device=x.device), "copies to the device and waits for it"),
            (lambda x: x.copy_(torch.zeros(4)), "copies to the device and waits for it"),
            (lambda x: x[torch.tensor([0, 1])], "copies an index to the device and waits for it"),
        ],
    )
    def test_waits_are_noted_with_their_place(self, rehearsal, wait, what):
        wait(torch.zeros(4, device=rehearsal.device))
        (noted,) = rehearsal.take_waits()
        assert noted.reason == what
        assert noted.place.startswith("test_rehearsal_device.py:")
        assert rehearsal.take_waits() == []

    def test_what_does_not_wait_is_not_noted(self, rehearsal):
        x = torch.zeros(4).pin_memory().to(rehearsal.device, non_blocking=True)
        x.copy_(torch.zeros(4), non_blocking=True)
        torch.full((3,), 2.0, device=x.device).masked_fill(torch.arange(3, device=x.device) > 1, 0)
        x.to("cpu", non_blocking=True)
        assert rehearsal.take_waits() == []

    @pytest.mark.parametrize("op", [torch.nonzero, torch.unique, lambda x: x[x > 0], lambda x: x.repeat_interleave(x)])
    def test_a_size_that_depends_on_values_is_an_error(self, rehearsal, op):
        with pytest.raises(UnknownValueError, match=r"^test_rehearsal_device\.py:\d+: .* waits for the device"):
            op(torch.zeros(4, device=rehearsal.device, dtype=torch.int64))

    def test_threads_that_start_meanwhile_are_rehearsed(self, rehearsal):
        x = torch.ones(4, device=rehearsal.device)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: (x * 2).cpu().tolist()).result() == [0, 0, 0, 0]
        assert [wait.reason for wait in rehearsal.take_waits()] == ["copies from the device and waits for it"]

    def test_random_numbers_of_the_device(self, rehearsal):
        generator = torch.Generator(rehearsal.device).manual_seed(1)
        assert isinstance(generator, torch.Generator)
        drawn = torch.randint(0, 5, (3,), device=rehearsal.device, generator=generator)
        assert (drawn.device.type, drawn.shape) == ("rehearsal", (3,))

    @pytest.mark.parametrize("options", [{"fused": True}, {"fused": False}])
    def test_a_scaled_step_is_taken(self, rehearsal, options):
        network = make_three_layers().to(rehearsal.device)
        optimizer, scaler = torch.optim.AdamW(network.parameters(), **options), torch.amp.GradScaler("rehearsal")
        rehearsal.take_waits()
        scaler.scale(network(torch.zeros(1, 10, device=rehearsal.device)).sum()).backward()
        scaler.unscale_(optimizer)
        optimizer.step()
        scaler.update()
        assert not rehearsal.take_waits()
        assert rehearsal.memory.sum_storages(x for state in optimizer.state.values() for x in state.values()) >= 8040

    def test_everything_is_undone(self):
        def list_patched() -> tuple[object, ...]:
            of_tensors = (torch.Tensor.pin_memory, torch.Tensor.record_stream)
            return torch.tensor, torch.Generator, *of_tensors, torch.clear_autocast_cache, Thread.run

        before = list_patched()
        with rehearsal_device():
            assert torch.tensor is not before[0]
        assert list_patched() == before
        ones = torch.ones(1, 1, 2, 4)
        assert torch.equal(F.scaled_dot_product_attention(ones, ones, ones), ones)
        with rehearsal_device() as again, torch.autocast("rehearsal", torch.bfloat16):
            assert make_three_layers().to(again.device)(torch.zeros(1, 10, device=again.device)).dtype == torch.bfloat16


@needs_rehearsal
class TestAttention:
    def make_queries(self, device: torch.device) -> list[torch.Tensor]:
        return [torch.zeros(2, 4, 1024, 64, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]

    @pytest.mark.parametrize("checkpointed", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    def test_scores_are_not_there(self, rehearsal, checkpointed, masked):
        """One output and float32 log-sums forward, three gradients backward; the scores would take 16 MiB."""
        inputs = self.make_queries(rehearsal.device)
        mask = torch.zeros(2, 1, 1, 1024, device=rehearsal.device, dtype=torch.bool) if masked else None
        one, log_sums = 2 * 4 * 1024 * 64 * 2, 2 * 4 * 1024 * 4
        number_mask = 2 * 1024 * 2 if masked else 0
        rehearsal.memory.reset_peak()
        before = rehearsal.memory.allocated

        def attend(*tensors: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(*tensors, attn_mask=mask)

        out = checkpoint(attend, *inputs, use_reentrant=False) if checkpointed else attend(*inputs)
        assert out.shape == (2, 4, 1024, 64)
        kept = 0 if checkpointed else log_sums + number_mask
        assert rehearsal.memory.allocated - before == one + kept
        out.backward(torch.zeros_like(out))
        recomputed = one if checkpointed else 0
        assert rehearsal.memory.peak - before == 2 * one + recomputed + log_sums + number_mask + 3 * one
        assert [x.grad is not None and x.grad.shape == x.shape for x in inputs] == [True] * 3

    def test_dtypes_that_a_kernel_refuses(self, rehearsal):
        query, key, value = self.make_queries(rehearsal.device)
        with pytest.raises(RuntimeError, match="differ"):
            F.scaled_dot_product_attention(query, key.float(), value)
        with pytest.raises(RuntimeError, match="mask"):
            F.scaled_dot_product_attention(query, key, value, attn_mask=torch.zeros(1024, 1024, device=query.device))


def test_an_older_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.6.1+cu124")
    assert not backend.is_supported()
    with pytest.raises(UserError) as raised:
        backend.register_backend()
    assert raised.value.code == "rehearsal-torch-too-old"


def test_another_vendors_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "npu")
    with pytest.raises(UserError) as raised:
        backend.register_backend()
    assert raised.value.code == "rehearsal-device-taken"


@needs_rehearsal
def test_a_dropout_inside_a_checkpoint(rehearsal):
    """The random state of the device is asked for and given back."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to(rehearsal.device)
    x = torch.zeros(2, 4, device=rehearsal.device, requires_grad=True)
    checkpoint(network, x, use_reentrant=False).sum().backward()
    assert x.grad is not None
