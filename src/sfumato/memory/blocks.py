"""Wraps a network's repeated blocks in one order for every family: compiled, then offloaded, then checkpointed."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sfumato.config.memory import MemoryOptions
from sfumato.errors import UserError
from sfumato.memory.offload import BlockOffload, find_blocks
from sfumato.memory.recompute import InputOffload, recompute

CPU = torch.device("cpu")
INDUCTOR = "inductor"
COMPILERS = ("c++", "g++", "clang++", "cl")
GRAPHS_PER_BLOCK = 8  # torch's own limit, for one block: its sizes of images, with and without gradients
DYNAMIC = {"true": True, "false": False, "auto": None}


@dataclass(frozen=True, kw_only=True)
class WrappedBlocks:
    """The repeated blocks of one network, whose `forward` is wrapped until `remove` is called."""

    blocks: tuple[nn.Module, ...]
    offload: BlockOffload | None = None

    def remove(self) -> None:
        for block in self.blocks:
            vars(block).pop("forward", None)  # the instance's; that of the class shows again


def wrap_blocks(
    network: nn.Module,
    patterns: Sequence[str],
    memory: MemoryOptions,
    *,
    device: torch.device = CPU,
    hosted: Collection[str] = (),
) -> WrappedBlocks:
    """Compile each block and recompute it in backward, as the options say; blocks whose path matches are wrapped.

    hosted: paths of the blocks whose weights are in main memory and visit the device: they are recomputed in any case,
    since autograd would keep views of the weights.

    Equal blocks share one compiled graph, adapters included, whose parameters are its inputs. Recomputation is
    non-reentrant, so keyword arguments, nested outputs and adapters inside the blocks all work; the global generators
    are replayed, an adapter's dropout included.
    """
    if not (memory.compile or memory.checkpoint_interval or hosted):
        return WrappedBlocks(blocks=())
    blocks = find_blocks(network, patterns)
    if memory.compile:
        limit_graphs(memory, len(blocks))
    offload = BlockOffload(device, pins=not memory.stream_blocks) if hosted else None
    inputs = InputOffload(device) if memory.cpu_offload_checkpointing else None
    for number, (path, block) in enumerate(blocks.items()):
        forward = compile_forward(block.forward, memory) if memory.compile else block.forward
        if offload is not None and path in hosted:
            forward = offload.wrap(block, forward)
        if path in hosted or (memory.checkpoint_interval and number % memory.checkpoint_interval == 0):
            forward = recompute(forward, inputs)
        block.forward = forward
    return WrappedBlocks(blocks=tuple(blocks.values()), offload=offload)


def limit_graphs(memory: MemoryOptions, blocks: int) -> None:
    """Set how many graphs torch compiles for one class of blocks, after which it runs the class uncompiled.

    A UNet's blocks of one class have a dozen shapes, each with graphs of its own: torch's limit is not for them.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = memory.compile_cache_size_limit or max(limits.recompile_limit, GRAPHS_PER_BLOCK * blocks)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, limits.recompile_limit)


def compile_forward(forward: Callable[..., Any], memory: MemoryOptions) -> Callable[..., Any]:
    return torch.compile(
        forward,
        backend=memory.compile_backend,
        mode=memory.compile_mode if memory.compile_backend == INDUCTOR else None,  # others know no modes
        dynamic=DYNAMIC[memory.compile_dynamic],
        fullgraph=memory.compile_fullgraph,
    )


def check_compiler(memory: MemoryOptions) -> None:
    """Raise UserError where blocks are to be compiled and nothing here can do it."""
    if not memory.compile:
        return
    known = torch._dynamo.list_backends(None)
    if memory.compile_backend not in known:
        raise UserError(
            f"--compile_backend {memory.compile_backend}: torch knows no such compiler",
            code="compile-backend-unknown",
            fix=f"one of {', '.join(known)}",
        )
    if memory.compile_backend != INDUCTOR:
        return
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            raise UserError(
                "--compile: torch compiles for this GPU with triton, which is not installed",
                code="compile-without-triton",
                fix="pip install triton (on Windows triton-windows), or --compile_backend aot_eager",
            )
    elif "CXX" not in os.environ and not any(map(shutil.which, COMPILERS)):
        raise UserError(
            "--compile: torch compiles for this processor with a C++ compiler, and there is none",
            code="compile-without-compiler",
            fix="install g++ or clang++, or --compile_backend aot_eager",
        )
