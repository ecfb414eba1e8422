"""`sfumato dataset cache`: fill the caches of latents and text features without training."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import nn

from sfumato.config import Config
from sfumato.data.find.discover import find_data
from sfumato.data.plans import DataPlan
from sfumato.errors import Problems
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.detection import describe_model, read_size_steps, with_base_resolution
from sfumato.families.part import Builder, Network
from sfumato.families.source import on_meta
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.tools.ignored_options import describe_ignored_options
from sfumato.track.console import configure_logging
from sfumato.training.caching import Caches, fill_caches
from sfumato.training.plan_report import dataset_lines
from sfumato.training.setup_run import start_processes

log = logging.getLogger(__name__)
# The options that caching uses: all of these groups, and single ones of others.
CACHING_THEMES = ("run", "model", "dataset", "buckets", "captions", "images", "cache", "loader", "log")
CACHING_OPTIONS = ("mixed_precision",)


def fill_dataset_caches(config: Config, *, machine: tuple[int, int] = (0, 1)) -> Caches:
    """Encode what is missing in the caches of the model and the datasets of the options, over all processes.

    machine: index and number of the machines; each encodes its part and waits for no other.
    """
    processes = start_processes(config.processes.ddp_timeout)
    assert processes.device is not None
    configure_logging(config.log, main_process=processes.is_main_process)
    problems = Problems()
    family, blueprint = None, None
    with problems.catch():
        family, blueprint = describe_model(config)
    config = with_base_resolution(config, blueprint) if blueprint else config
    steps, number = read_size_steps(family), processes.num_processes
    data = find_data(config, bucket_step=steps.bucket, size_step=steps.single, processes=number, problems=problems)
    problems.raise_all()
    assert family is not None
    assert blueprint is not None
    log_plan(config, data)
    networks = set(family.text_parts) if config.cache.cache_text_encoder_outputs else set()
    if config.cache.cache_latents:
        networks.add("vae")
    model = load_frozen_model(family, select_networks(blueprint, networks), config, processes.device)
    return fill_caches(config, data, model, processes, machine=machine)


def log_plan(config: Config, data: DataPlan) -> None:
    """The datasets, the notes about them, and the options that caching ignores."""
    ignored = describe_ignored_options(config, themes=CACHING_THEMES, options=CACHING_OPTIONS, purpose="caching")
    notes = (f"note: {note}" for note in (*config.notes, *data.notes))
    for line in (*dataset_lines(config, data), *notes, *ignored):
        log.info("%s", line)


def load_frozen_model(family: type[Family], blueprint: Blueprint, config: Config, device: torch.device) -> Family:
    """The model in the dtype of --mixed_precision, without gradients."""
    model = family.load(blueprint, config.model, dtype=MIXED_PRECISION[config.memory.mixed_precision], device=device)
    model.freeze()
    return model


def select_networks(blueprint: Blueprint, names: set[str]) -> Blueprint:
    """The blueprint of a model of which only the VAE and the networks named get their weights."""
    networks: dict[str, Network] = {}
    for name, network in blueprint.networks.items():
        if name in names or name == "vae":
            networks[name] = network
        else:
            networks[name] = WeightlessNetwork(spec=network.spec, config=network.config, weights=network.weights)
    return replace(blueprint, networks=networks)


class WeightlessNetwork(Network):
    """A network that is built without storage, since nothing runs it."""

    def load(self, build: Builder, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return on_meta(lambda: build(self.config))
