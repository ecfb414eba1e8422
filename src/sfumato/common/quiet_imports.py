"""Libraries imported without the parts that this program does not use, and without their messages about them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BITSANDBYTES_LOGGER = "bitsandbytes.backends.cpu.ops"  # warns about a kernel of 4-bit layers


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Within, diffusers' model classes are imported as if bitsandbytes were not installed.

    They and peft would import it for quantized layers, which are not used here. Its optimizers are imported by
    optim.classes.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules["bitsandbytes"] = None  # what imports it now gets ModuleNotFoundError
    try:
        from diffusers.utils import import_utils

        import_utils._bitsandbytes_available = False  # pyright: ignore[reportPrivateUsage]
        yield
    finally:
        del modules["bitsandbytes"]


def silence_lost_stores() -> None:
    """Keep torch from printing C++ stack frames where another process of a run has ended; call before importing torch.

    The run itself says so in one line. Whoever sets the variable sees them.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def silence_bitsandbytes() -> None:
    """Drop the warning of its import about a missing kernel of 4-bit layers; call before importing it."""
    logging.getLogger(BITSANDBYTES_LOGGER).addFilter(is_not_about_kernels)


def is_not_about_kernels(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()
