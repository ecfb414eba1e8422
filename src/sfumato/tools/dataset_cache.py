"""`sfumato dataset cache`: fill the caches of latents and text features without training."""

from __future__ import annotations

import logging

from sfumato.config import Config
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.tools.cache_plan import cache_plan_lines, make_cache_plan
from sfumato.track.console import configure_logging
from sfumato.training.caching import Caches, fill_caches
from sfumato.training.model_setup import make_preview_prompts
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
    config = plan.config
    dtype = MIXED_PRECISION[config.memory.mixed_precision]
    model = plan.family(plan.blueprint, config.model, dtype=dtype, device=processes.device)
    prompts = make_preview_prompts(config, model)
    return fill_caches(config, plan.data, model, processes, prompts=prompts, machine=machine)
