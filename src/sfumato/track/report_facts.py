"""What a report says besides its curves: a small description, stored as JSON beside the metrics file."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sfumato import __version__
from sfumato.common import files
from sfumato.common.json_toml import decode_json
from sfumato.common.names import DEFAULT_NETWORK_MODULE
from sfumato.common.text import strip_paths
from sfumato.config import Config
from sfumato.config.run import ADAPTER_METHODS
from sfumato.data.plans import DataPlan, DatasetPlan
from sfumato.errors import UserError
from sfumato.track.run_description import RunDescription

DESCRIPTION_SUFFIX = ".report.json"
MAX_WARNINGS = 100
EMPTY_DESCRIPTION: Mapping[str, Any] = {
    "name": "", "model": "", "checkpoint": "", "method": "", "trained_parts": [], "total": 0, "steps_per_epoch": 1,
    "seed": None, "device": "", "clip": 0.0, "options": [], "data": [], "notes": [], "versions": {}, "sessions": [],
    "warnings": [],
}  # fmt: skip


def describe_run(
    config: Config,
    data: DataPlan,
    *,
    options: Mapping[str, str],
    model: str,
    checkpoint: str,
    trained_parts: Sequence[tuple[str, int, int, float]],
    total: int,
    device: str,
    notes: Sequence[str],
) -> dict[str, Any]:
    """What is known before the first step.

    options: without secrets; trained_parts: part, layers, parameters, learning rate. Absolute paths are cut to names.
    """
    import torch

    return {
        **EMPTY_DESCRIPTION,
        "name": config.save.output_name,
        "model": model,
        "checkpoint": strip_paths(checkpoint),
        "method": describe_method(config),
        "trained_parts": [list(row) for row in trained_parts],
        "total": total,
        "steps_per_epoch": data.count_steps_per_epoch(config.loop.gradient_accumulation_steps),
        "seed": config.loop.seed,
        "device": device,
        "clip": config.optim.max_grad_norm,
        "options": [[name, value, strip_paths(config.source(name))] for name, value in options.items()],
        "data": [describe_dataset(dataset) for dataset in data.datasets],
        "notes": [strip_paths(note) for note in (*config.notes, *data.notes, *notes)],
        "versions": {"sfumato": __version__, "torch": str(torch.__version__), "Python": platform.python_version()},
    }


def describe_method(config: Config) -> str:
    if config.run.method not in ADAPTER_METHODS:
        return config.run.method
    return f"{config.run.method}, {config.network.network_module or DEFAULT_NETWORK_MODULE}"


def describe_dataset(dataset: DatasetPlan) -> dict[str, Any]:
    width, height = dataset.settings.resolution
    return {
        "resolution": f"{width}×{height}",
        "batch_size": dataset.settings.batch_size,
        "subsets": [
            {
                "folder": subset.settings.source.name,
                "images": len(subset.items),
                "repeats": subset.settings.num_repeats,
                "samples": subset.num_samples,
                "is_reg": subset.settings.is_reg,
            }
            for subset in dataset.subsets
        ],
        "buckets": [[*size, count] for size, count in dataset.buckets.items()],
    }


def read_description(path: Path) -> dict[str, Any]:
    """A description that `write_description` wrote; UserError where the file is none."""
    try:
        description = decode_json(files.read_file(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", code="run-description-unreadable") from error
    try:
        return RunDescription.model_validate(description).model_dump()
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors(include_url=False)[0]["loc"])
        raise UserError(
            f"{path} does not describe a run: {place or 'it'} is damaged", code="run-description-invalid"
        ) from error


def write_description(path: Path, description: Mapping[str, Any]) -> None:
    files.write_text(path, json.dumps(description, ensure_ascii=False, indent=1))


class WarningCollector(logging.Handler):
    """Collects warnings, each text once, without paths."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: dict[str, int] = {}
        self.first: dict[str, int] = {}
        self.step = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = strip_paths(record.getMessage())
        if text in self.counts or len(self.counts) < MAX_WARNINGS:
            self.counts[text] = self.counts.get(text, 0) + 1
            self.first.setdefault(text, self.step)

    def entries(self) -> Iterator[dict[str, Any]]:
        for text, count in self.counts.items():
            yield {"step": self.first[text], "text": text, "times": count}


def collect_warnings() -> WarningCollector:
    """Collect from now on, until `stop_collecting` or the next `configure_logging`."""
    handler = WarningCollector()
    logging.getLogger("sfumato").addHandler(handler)
    return handler


def stop_collecting(handler: WarningCollector) -> None:
    logging.getLogger("sfumato").removeHandler(handler)
