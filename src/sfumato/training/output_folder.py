"""The output folder of a run: its name is locked there, leftovers go, and what the run reads is written down."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sfumato.common.files import remove_leftovers
from sfumato.common.run_lock import RunLock
from sfumato.config.run_record import write_run_record
from sfumato.data.find.index import get_default_cache_dir
from sfumato.errors import UserError
from sfumato.formats.state import remove_useless_copies
from sfumato.parallel.base import ParallelStrategy
from sfumato.plan import RunPlan
from sfumato.track.image_list import find_image_list, write_image_list
from sfumato.track.report_curves import METRICS_SUFFIX

log = logging.getLogger(__name__)


def lock_output(plan: RunPlan, parallel: ParallelStrategy) -> AbstractContextManager[Any]:
    """The name of the run in its output folder belongs to the process that writes there."""
    return RunLock(plan.output_dir, plan.saves.name) if parallel.is_main else nullcontext()


def prepare_output_folder(plan: RunPlan, *, resumed: bool) -> None:
    """Remove what a killed run has left half-written; warn once where a new run replaces an earlier one.

    The options are remembered for `sfumato compare`.
    """
    folder, name = plan.output_dir, plan.saves.name
    for place in (folder, folder / "sample"):
        remove_leftovers(place, re.escape(name) + "[-._].*")
    remove_useless_copies(folder, name)
    output = folder / (name + plan.method.file_suffixes(plan.blueprint)[0])
    if not resumed and output.exists():
        log.warning("%s is of an earlier run: this one replaces the files of that name in --output_dir", output.name)
    try:
        write_run_record(plan.config, get_default_cache_dir())
    except OSError as error:
        log.info("the options are not remembered for `sfumato compare`: %s", error)


def record_images(plan: RunPlan, *, continued: bool) -> Sequence[int]:
    """Write down which images the run trains on; gives their numbers in this list by their positions in the plan."""
    metrics = plan.output_dir / f"{plan.saves.name}{METRICS_SUFFIX}"
    continued = continued and metrics.is_file()  # else no line has numbers yet
    try:
        return write_image_list(find_image_list(plan.output_dir, plan.saves.name), plan.data, continued=continued)
    except (OSError, UserError) as error:
        log.info("the images are not recorded for the list of their losses: %s", error)
        return ()
