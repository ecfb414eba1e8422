"""Tables that are tensors: made once, but anew while torch traces a graph, whose tensors are not to be kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ParamSpec

from torch import Tensor
from torch._guards import detect_fake_mode

Call = ParamSpec("Call")


def cached_tensor(make: Callable[Call, Tensor]) -> Callable[Call, Tensor]:
    """Like functools.cache, for a function that makes a tensor."""
    keep = cache(make)

    def get(*args: Call.args, **kwargs: Call.kwargs) -> Tensor:
        return make(*args, **kwargs) if detect_fake_mode() is not None else keep(*args, **kwargs)  # pyright: ignore

    return get
