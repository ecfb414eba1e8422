"""What PEFT and diffusers store beside an adapter: alpha, whose place in other files is a tensor of each layer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.common.json_toml import decode_json
from sfumato.common.text_files import read_text_file
from sfumato.errors import UserError

DIFFUSERS_KEY = "lora_adapter_metadata"  # diffusers' place for the same: JSON in the file's metadata
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")  # which also change the model that the adapter belongs to
MAX_PATTERNS = 10_000
MAX_ALPHA = 1e30


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The scale of the adapter of one network."""

    path: Path  # for messages
    alpha: float | None = None  # None: the rank
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)  # end of a layer's name -> its alpha
    rank: float | None = None
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False  # alpha / sqrt(rank) instead of alpha / rank
    is_exact_rotation: bool = False  # of rotations: Cayley's transform itself instead of a series

    def find_alpha(self, layer: str, rank: int) -> float:
        """The alpha with which alpha / rank is the scale of this layer (peft.tuners.lora.layer, `update_layer`)."""
        alpha = _find_value(self.alpha_pattern, layer, self.alpha)
        alpha = float(rank) if alpha is None else alpha
        return alpha * math.sqrt(rank) if self.rank_stabilized else alpha

    def find_rank(self, layer: str) -> float | None:
        """The rank of this layer, for tensors whose shapes do not say it; None where nothing does."""
        return _find_value(self.rank_pattern, layer, self.rank)


def _find_value(patterns: Mapping[str, float], layer: str, default: float | None) -> float | None:
    return next((value for pattern, value in patterns.items() if _matches_layer(pattern, layer)), default)


def _matches_layer(pattern: str, layer: str) -> bool:
    """Whether a pattern names the layer, by all of its name or the end of it; PEFT writes no other patterns."""
    pattern = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return layer == pattern or layer.endswith(f".{pattern}")


def read_peft_config(path: Path) -> PeftConfig:
    """An adapter_config.json. Raises UserError for one that is no such file and for what is not the same without it."""
    try:
        content = decode_json(read_text_file(path))
    except ValueError:
        raise UserError(
            f"{path} is no JSON file", code="peft-config-damaged", fix="save or download it again"
        ) from None
    return _make_config(path, content)


def read_diffusers_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """Name of a network in the file, e.g. "transformer" -> the scale of its adapter; empty where nothing says it."""
    if DIFFUSERS_KEY not in metadata:
        return {}
    try:
        content = decode_json(metadata[DIFFUSERS_KEY])
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: its metadata {DIFFUSERS_KEY} is damaged, so that the adapter's alpha is not known",
            code="adapter-metadata-damaged",
            fix="save or download the file again",
        )
    networks: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in content.items():
        network, _, name = str(key).partition(".")
        networks[network][name] = value
    return {network: _make_config(path, values) for network, values in networks.items()}


def _make_config(path: Path, content: Any) -> PeftConfig:
    values: Mapping[str, Any] = content if isinstance(content, dict) else {}
    alpha = values.get("lora_alpha", values.get("alpha"))
    alphas, ranks = values.get("alpha_pattern") or {}, values.get("rank_pattern") or {}
    numbers = [number for number in (alpha, values.get("r")) if number is not None]
    for patterns in (alphas, ranks):
        numbers += list(patterns.values()) if isinstance(patterns, dict) else [None]
    if (
        not isinstance(content, dict)
        or not all(_is_number(number) for number in numbers)
        or len(numbers) > MAX_PATTERNS
    ):
        raise UserError(
            f"{path}: the adapter's alpha or rank is not a number there",
            code="peft-alpha-invalid",
            fix="save or download it again",
        )
    changing = str(values.get("init_lora_weights", "")).lower()
    if changing.startswith(BASE_CHANGING_INITS):
        raise UserError(
            f"{path}: init_lora_weights is {changing!r}, for which PEFT has changed the model's own weights; on the "
            "unchanged model the adapter would be wrong",
            code="peft-init-changes-model",
            fix="save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain adapter of it",
        )
    return PeftConfig(
        path=path,
        alpha=None if alpha is None else float(alpha),
        alpha_pattern={str(name): float(value) for name, value in alphas.items()},
        rank=None if values.get("r") is None else float(values["r"]),
        rank_pattern={str(name): float(value) for name, value in ranks.items()},
        rank_stabilized=bool(values.get("use_rslora", False)),
        is_exact_rotation=values.get("use_cayley_neumann") is False,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_ALPHA
