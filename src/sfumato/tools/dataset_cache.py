"""`sfumato dataset cache`: fill the caches of latents and text features without training."""

from __future__ import annotations

import logging

from sfumato.config import Config
from sfumato.data.find.discover import find_data
from sfumato.data.plans import DataPlan
from sfumato.errors import Problems
from sfumato.families.detection import describe_model, read_size_steps, with_base_resolution
from sfumato.tools.ignored_options import describe_ignored_options
from sfumato.track.console import configure_logging
from sfumato.training.caching import Caches, fill_caches
from sfumato.training.plan_report import dataset_lines
from sfumato.training.run import MIXED_PRECISION
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
    dtype = MIXED_PRECISION[config.memory.mixed_precision]
    model = family(blueprint, config.model, dtype=dtype, device=processes.device)
    return fill_caches(config, data, model, processes, machine=machine)


def log_plan(config: Config, data: DataPlan) -> None:
    """The datasets, the notes about them, and the options that caching ignores."""
    ignored = describe_ignored_options(config, themes=CACHING_THEMES, options=CACHING_OPTIONS, purpose="caching")
    notes = (f"note: {note}" for note in (*config.notes, *data.notes))
    for line in (*dataset_lines(config, data), *notes, *ignored):
        log.info("%s", line)
