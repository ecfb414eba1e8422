"""`sfumato dataset cache`: fill the caches of latents and text features without training."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import nn

from sfumato.config import Config
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.part import Builder, Network
from sfumato.families.source import on_meta
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.tools.cache_plan import cache_plan_lines, make_cache_plan
from sfumato.track.console import configure_logging
from sfumato.training.caching import Caches, fill_caches
from sfumato.training.setup_run import start_processes

log = logging.getLogger(__name__)


def fill_dataset_caches(config: Config, *, machine: tuple[int, int] = (0, 1)) -> Caches:
    """Encode what is missing in the caches of the model and the datasets of the options, over all processes.

    machine: index and number of the machines; each encodes its part and waits for no other.
    """
    processes = start_processes(config.processes.ddp_timeout)
    assert processes.device is not None
    configure_logging(config.log, main_process=processes.is_main_process)
    plan = make_cache_plan(config, processes=processes.num_processes)
    for line in cache_plan_lines(plan):
        log.info("%s", line)
    config, family = plan.config, plan.family
    networks = set(family.text_parts) if config.cache.cache_text_encoder_outputs else set()
    if config.cache.cache_latents:
        networks.add("vae")
    model = load_frozen_model(family, select_networks(plan.blueprint, networks), config, processes.device)
    return fill_caches(config, plan.data, model, processes, machine=machine)


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
