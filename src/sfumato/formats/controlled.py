"""A layer whose input a control image may change, by its name in files and its place in a network."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ControlledLayer:
    """A linear layer over image tokens in row-major order."""

    name: str  # in files
    path: str  # in its network
    inputs: int  # channels
    token_side: int  # pixels
