"""What a report says besides its curves: a small description that is kept as JSON beside the journal file."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato import __version__
from sfumato.common import files
from sfumato.config import Config
from sfumato.data.plans import DataPlan, DatasetPlan
from sfumato.errors import UserError
from sfumato.formats.metadata import without_paths

ENDING = ".report.json"
MOST_WARNINGS = 100
EMPTY: Mapping[str, Any] = {
    "name": "", "model": "", "checkpoint": "", "method": "", "trains": [], "total": 0, "steps_per_epoch": 1,
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
    trains: Sequence[tuple[str, int, int, float]],
    total: int,
    device: str,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Everything that is known before the first step. options: the public ones; trains: part, layers, parameters, rate.

    Absolute paths are cut down to names.
    """
    import torch

    return {
        **EMPTY,
        "name": config.save.output_name,
        "model": model,
        "checkpoint": without_paths(checkpoint),
        "method": method(config),
        "trains": [list(row) for row in trains],
        "total": total,
        "steps_per_epoch": data.steps_per_epoch(config.loop.gradient_accumulation_steps),
        "seed": config.loop.seed,
        "device": device,
        "clip": config.optim.max_grad_norm,
        "options": [[name, value, without_paths(config.source(name))] for name, value in options.items()],
        "data": [of_dataset(dataset) for dataset in data.datasets],
        "notes": [without_paths(note) for note in (*config.notes, *data.notes, *notes)],
        "versions": {"sfumato": __version__, "torch": str(torch.__version__), "Python": platform.python_version()},
    }


def method(config: Config) -> str:
    if config.run.method != "adapter":
        return config.run.method
    return f"adapter, {config.network.network_module or 'networks.lora'}"


def of_dataset(dataset: DatasetPlan) -> dict[str, Any]:
    width, height = dataset.settings.resolution
    return {
        "resolution": f"{width}×{height}",
        "batch_size": dataset.settings.batch_size,
        "subsets": [
            {
                "folder": subset.settings.place.name,
                "images": len(subset.items),
                "repeats": subset.settings.num_repeats,
                "samples": subset.samples,
                "is_reg": subset.settings.is_reg,
            }
            for subset in dataset.subsets
        ],
        "buckets": [[*size, count] for size, count in dataset.buckets.items()],
    }


def read_description(path: Path) -> dict[str, Any]:
    """A description as it was written. UserError where it is none of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(name), type(EMPTY[name])) for name in KINDS):
        raise UserError(f"{path} does not describe a run")
    return {**EMPTY, **found}


KINDS = ("name", "total", "options", "data", "sessions", "warnings")


def write_description(path: Path, description: Mapping[str, Any]) -> None:
    files.write_text(path, json.dumps(description, ensure_ascii=False, indent=1))


class Remembered(logging.Handler):
    """Keeps the warnings that were shown, each text once, without paths."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: dict[str, int] = {}
        self.first: dict[str, int] = {}
        self.step = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = without_paths(record.getMessage())
        if text in self.counts or len(self.counts) < MOST_WARNINGS:
            self.counts[text] = self.counts.get(text, 0) + 1
            self.first.setdefault(text, self.step)

    def told(self) -> Iterator[dict[str, Any]]:
        for text, count in self.counts.items():
            yield {"step": self.first[text], "text": text, "times": count}


def remember_warnings() -> Remembered:
    """From now on; the next set-up of the messages, or `forget`, ends it."""
    handler = Remembered()
    logging.getLogger("sfumato").addHandler(handler)
    return handler


def forget(handler: Remembered) -> None:
    logging.getLogger("sfumato").removeHandler(handler)
