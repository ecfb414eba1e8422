"""Tables that are tensors: made once, but anew while torch traces a graph, whose tensors are not to be kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ParamSpec

from torch import Tensor
from torch._guards import detect_fake_mode

Arguments = ParamSpec("Arguments")


def cached_tensor(make: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """Like functools.cache, for a function that makes a tensor."""
    keep = cache(make)

    def get(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        return make(*args, **kwargs) if detect_fake_mode() is not None else keep(*args, **kwargs)  # pyright: ignore

    return get
