"""Kernels of attention: the same numbers with each that this machine has, and with packages that stand-ins play."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from families.toys import ToyShelf
from sfumato.config.memory import MemoryOptions
from sfumato.errors import UserError
from sfumato.memory import attention
from sfumato.memory.attention import choose_attention, compute_with, find_attention_obstacle, load_xformers
from toy_runs import make_images, read_metrics, train_toy

FAMILIES = ("sd", "sdxl", "sd3", "flux", "chroma", "lumina")
MASKED = ("chroma", "lumina")


def attend_by_definition(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """softmax(q k' scale + bias) v, with (B, L, H, D) as the packages have it."""
    scores = torch.einsum("blhd,bshd->bhls", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.softmax(scores if bias is None else scores + bias, -1)
    return torch.einsum("bhls,bshd->blhd", weights, value)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins of the packages; gives the calls. Their signatures are those of the packages' documentation."""
    calls: list[str] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: Any = None) -> Tensor:
        calls.append("flash")
        return attend_by_definition(q, k, v, None, softmax_scale)

    def flash_attn_3_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: Any = None) -> tuple[Tensor, Tensor]:
        calls.append("flash_3")
        return attend_by_definition(q, k, v, None, softmax_scale), q

    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None
    ) -> Tensor:
        calls.append("xformers")
        if attn_bias is not None:
            assert attn_bias.dtype == query.dtype
            assert attn_bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
            assert attn_bias.stride(-1) == 1
            assert not any(stride % 8 for stride in attn_bias.stride()[:-1])
        return attend_by_definition(query, key, value, attn_bias, scale)

    for name, contents in {
        "flash_attn": {"flash_attn_func": flash_attn_func},
        "flash_attn_interface": {"flash_attn_func": flash_attn_3_func},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
    }.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(attention, "find_attention_obstacle", lambda *_, **__: ("", ""))
    return calls


@pytest.mark.parametrize("name", ["math", "cudnn", "flash", "flash_3", "xformers"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_output_and_gradients_are_torchs(name: str, scale: float | None, packages: list[str]) -> None:
    inputs = [torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for length in (5, 7, 7)]

    def attend() -> list[Tensor]:
        output = torch.nn.functional.scaled_dot_product_attention(*inputs, scale=scale)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]

    expected = attend()
    found = compute_with(name, attend)()
    assert packages == ([name] if name in attention.PACKAGES else [])
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kind", ["bool", "numbers"])
def test_masks_for_xformers(kind: str, packages: list[str]) -> None:
    query, key, value = (torch.randn(2, 3, 7, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    mask = mask[:, None, None]
    if kind == "numbers":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    heads_last = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    torch.testing.assert_close(
        load_xformers(sys.modules["xformers.ops"])(*heads_last, mask, None).transpose(1, 2), expected
    )
    assert packages == ["xformers"]


def test_a_kernel_that_cannot_be_had_is_refused_or_for_older_switches_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def obstacle(masked: bool = False, **options: Any) -> str:
        memory = MemoryOptions(**options)
        return find_attention_obstacle(memory.wanted_attention, memory, masked=masked)[0]

    monkeypatch.setattr(attention, "is_installed", lambda module: module != "xformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "not installed" in obstacle(attention="xformers")
    assert "half precision" in obstacle(attention="flash")
    assert "mask" in obstacle(attention="flash_3", mixed_precision="bf16", masked=True)
    assert not obstacle(use_flash_attn=True, mixed_precision="bf16")
    assert choose_attention(MemoryOptions(use_flash_attn=True, mixed_precision="bf16"), masked=False) == "flash"
    assert choose_attention(MemoryOptions(xformers=True), masked=False) == "sdpa"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU" in obstacle(use_flash_attn=True, mixed_precision="bf16")
    assert "GPU" in obstacle(attention="cudnn")
    assert not obstacle(attention="math")


@pytest.mark.full
def test_the_plan_says_so(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    images, toy = make_images(tmp_path / "images", 1), toy_shelf.paths("sd")
    with pytest.raises(UserError, match="xformers is not installed") as refused:
        train_toy(toy, images, tmp_path / "out", attention="xformers")
    assert refused.value.code == "attention-unusable"


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_the_same_with_each(
    family: str, toy_shelf: ToyShelf, packages: list[str], tmp_path: Path
) -> None:
    """With recomputation, in which the same kernel has to run; flash attention where there are no masks."""
    images, toy = make_images(tmp_path / "images", 1), toy_shelf.paths(family)
    options: dict[str, Any] = {"network_train_unet_only": True, "max_train_steps": 2, "learning_rate": "1e-2"}
    options |= {"gradient_checkpointing": True}
    plain = read_metrics(train_toy(toy, images, tmp_path / "plain", **options))
    for name in ("xformers",) if family in MASKED else ("flash", *(["math"] if family == "sd" else [])):
        packages.clear()
        found = read_metrics(train_toy(toy, images, tmp_path / name, **options, attention=name))
        assert set(packages) == ({name} if name != "math" else set())
        for mine, other in zip(found, plain, strict=True):
            assert mine["loss/current"] == pytest.approx(other["loss/current"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", ["math", "xformers"])
def test_a_compiled_block_is_one_graph_with_the_kernel_inside(
    name: str, packages: list[str], graphs: list[int]
) -> None:
    query = torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True)

    def forward(query: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query * 2, query, query)

    compiled = torch.compile(compute_with(name, forward), backend="count", fullgraph=True)
    found = torch.autograd.grad(compiled(query).square().sum(), query)
    expected = torch.autograd.grad(forward(query).square().sum(), query)
    torch.testing.assert_close(found, expected)
    assert len(graphs) == 1
    assert packages == (["xformers"] if name == "xformers" else [])
