"""A compiler that only counts: it runs what torch has traced as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

_SIZES: list[int] = []


def _count_graph(graph: Any, inputs: Any) -> Callable[..., Any]:
    _SIZES.append(len(graph.graph.nodes))
    return graph.forward


@pytest.fixture
def graphs() -> Iterator[list[int]]:
    """Of each graph that the backend "count" compiles, the number of its nodes; nothing compiled stays behind."""
    limits = torch._dynamo.config
    torch._dynamo.reset()
    if "count" not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(_count_graph, name="count")
    _SIZES.clear()
    with limits.patch(
        recompile_limit=limits.recompile_limit, accumulated_recompile_limit=limits.accumulated_recompile_limit
    ):
        yield _SIZES
    torch._dynamo.reset()
