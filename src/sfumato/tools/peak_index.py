"""Peaks that rehearsals have found, remembered beside the dataset index by all that they depend on."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch

from sfumato import __version__
from sfumato.config import Config
from sfumato.config.prompts import read_prompts
from sfumato.config.schema import vocabulary
from sfumato.data.find.index import Index, cache_folder
from sfumato.plan import RunPlan
from sfumato.tools.memory_bound import MemoryBound
from sfumato.tools.rehearsal_data import keep_largest_batches

FREE_THEMES = ("save", "metadata", "hub", "log", "loop")  # their options change nothing that a step needs, but for
ACCUMULATION = "gradient_accumulation_steps"


def find_peak_index(plan: RunPlan, config: Config) -> Index:
    """Where the peak of a run is remembered. config: as the user gave it."""
    return Index(cache_folder(config), ("rehearsed peak", compute_digest(plan, config)))


def load_peak(index: Index) -> MemoryBound | None:
    columns = index.load()
    return None if columns is None else MemoryBound(str(columns["stage"][0]), int(columns["peak"][0]))


def save_peak(index: Index, peak: MemoryBound) -> MemoryBound:
    """Remember a peak, and give it back."""
    index.save({"stage": np.array([peak.stage]), "peak": np.array([peak.size])})
    return peak


def compute_digest(plan: RunPlan, config: Config) -> str:
    """A hash of all that the peak depends on. config: as the user gave it."""
    options = {
        option.name: str(config.value(option.name))
        for option in vocabulary().values()
        if option.theme not in FREE_THEMES or option.name == ACCUMULATION
    }
    networks = {
        name: [repr(network.config), sorted(network.weights.read_shapes().items())]
        for name, network in plan.blueprint.networks.items()
    }
    data = keep_largest_batches(plan.data, accumulation=1)
    batches = [list(dataset.buckets.items()) for dataset in (*data.datasets, *data.validation)]
    prompts = config.samples.sample_prompts
    sizes = [(prompt.width, prompt.height) for prompt in read_prompts(prompts)] if prompts else []
    facts = [__version__, torch.__version__, options, networks, batches, sizes]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
