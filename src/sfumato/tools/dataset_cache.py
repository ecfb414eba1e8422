"""`sfumato dataset cache`: fill the caches of latents and text features without training."""

from __future__ import annotations

import logging

from sfumato.config import Config
from sfumato.data.caches import Caches
from sfumato.memory.low_precision import choose_formats
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.parallel.start import start_parallel
from sfumato.tools.cache_plan import cache_plan_lines, make_cache_plan
from sfumato.track.console import configure_logging
from sfumato.training.caching import fill_caches
from sfumato.training.preview_prompts import make_preview_prompts

log = logging.getLogger(__name__)


def fill_dataset_caches(config: Config, *, machine: tuple[int, int] = (0, 1)) -> Caches:
    """Encode what is missing in the caches of the model and the datasets of the options, over all processes.

    machine: index and number of the machines; each encodes its part and waits for no other.
    """
    with start_parallel(config.processes.model_copy(update={"fsdp": False, "deepspeed": False})) as parallel:
        configure_logging(config.log, main_process=parallel.is_main)
        plan = make_cache_plan(config, processes=parallel.processes)
        for line in cache_plan_lines(plan):
            log.info("%s", line)
        config = plan.config
        dtype = MIXED_PRECISION[config.memory.mixed_precision]
        model = plan.family(plan.blueprint, config.model, dtype=dtype, device=parallel.device)
        choose_formats(model, config.memory)
        prompts = make_preview_prompts(config, model)
        return fill_caches(config, plan.data, model, parallel, prompts=prompts, machine=machine)
