"""--frozen_lora: an adapter file that takes part without being trained, its strength and when it does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import PlainSerializer, PlainValidator

from sfumato.config.base import Metavar
from sfumato.config.values import parse_path, to_tuple

FrozenUse = Literal["train", "sample", "both"]


@dataclass(frozen=True, kw_only=True)
class FrozenAdapter:
    """One file. use: in training and validation, in previews, or in both."""

    path: Path
    strength: float = 1.0
    use: FrozenUse = "both"

    def __str__(self) -> str:
        return f"{self.path}:{self.strength:g}:{self.use}"

    def is_used(self, *, sampling: bool) -> bool:
        return self.strength != 0 and self.use in ("both", "sample" if sampling else "train")


def parse_frozen_adapters(value: Any) -> tuple[FrozenAdapter, ...]:
    return tuple(parse_frozen_adapter(item) for item in to_tuple(value))


def parse_frozen_adapter(value: Any) -> FrozenAdapter:
    r"""PATH, PATH:0.8 or PATH:0.8:train; read from the end, so that C:\style.safetensors is a path."""
    if isinstance(value, FrozenAdapter):
        return value
    if not isinstance(value, str | Path):
        raise ValueError("is not a text; write PATH, PATH:0.8 or PATH:0.8:train")
    path, strength, use = str(value), 1.0, "both"
    rest, colon, last = path.rpartition(":")
    if colon and last in get_args(FrozenUse):
        path, use = rest, last
        rest, colon, last = path.rpartition(":")
    if colon and (number := parse_strength(last)) is not None:
        path, strength = rest, number
    return FrozenAdapter(path=Path(parse_path(path)), strength=strength, use=use)  # pyright: ignore[reportArgumentType]


def parse_strength(text: str) -> float | None:
    """The finite number that a text is, else None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


FrozenAdapterList = Annotated[
    tuple[FrozenAdapter, ...],
    PlainValidator(parse_frozen_adapters),
    PlainSerializer(lambda found: [str(each) for each in found]),
    Metavar("PATH[:STRENGTH[:train|sample|both]] ..."),
]
