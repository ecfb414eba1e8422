"""What a plan says, as lines: for --plan, and in the log before the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from sfumato.common.text import plural
from sfumato.config import Config
from sfumato.config.listing import public_options
from sfumato.config.process_rules import name_engine, name_engine_option
from sfumato.data.find.data_rows import make_data_rows
from sfumato.data.plans import DataPlan
from sfumato.data.split import make_validation_sampler
from sfumato.formats.save_schedule import describe_retention
from sfumato.plan import RunPlan, count_steps, draw_seed, make_run_plan, requested_first_step, with_seed
from sfumato.training.start_point import describe_end, find_start_point
from sfumato.training.timestep_report import draw_timesteps

if TYPE_CHECKING:
    from sfumato.parallel.base import ParallelStrategy

log = logging.getLogger(__name__)


def make_reported_plan(config: Config, parallel: ParallelStrategy) -> RunPlan:
    """The plan, with one seed for all processes; the same tables as --plan shows, before anything is loaded."""
    config = with_seed(config, parallel.run_on_main(draw_seed))
    plan = make_run_plan(config, processes=parallel.processes)
    for line in plan_lines(plan):
        log.info("%s", line)
    if parallel.is_main:
        draw_timesteps(plan)
    return plan


def plan_lines(plan: RunPlan) -> Iterator[str]:
    """Everything that is known before the first weight is read."""
    if plan.config.processes.ddp_timeout is not None and plan.data.processes == 1:
        yield "note: --ddp_timeout has no effect: there is one process"
    if (engine := name_engine(plan.config)) and plan.data.processes == 1:
        option = name_engine_option(engine)
        yield f"note: {option} has no effect: there is one process, which has the whole model, where {engine} shares it"
    yield from data_lines(plan.config, plan.data)
    yield from model_lines(plan)
    yield from describe_retention(plan.saves, states=plan.config.save.save_state)
    yield f"seed {plan.seed}"


def resume_lines(plan: RunPlan) -> Iterator[str]:
    """Where the run starts, if it is not at step 0, and which options differ from those of the saved run."""
    config, saved = plan.config, plan.saved
    if saved is None and config.save.resume is not None:
        yield f"note: --resume: {config.save.resume.as_posix()} is downloaded and checked when training starts"
        return
    if saved is not None:
        yield f"resuming from {saved.folder}, step {saved.tree['counters']['step']} of {plan.total_steps}"
        yield from (f"note: {line}" for line in describe_changes(saved.info["options"], config))
    start = find_start_point(config, plan.data, saved.tree["counters"] if saved else {})
    if start.step >= plan.total_steps:
        yield describe_end(start, plan.total_steps)


def describe_changes(before: Mapping[str, str], config: Config) -> Iterator[str]:
    """A line for each option that differs from the saved run's, as both were written down."""
    now = public_options(config)
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield f"--{name} was {before.get(name, 'not set')}, now it is {now.get(name, 'not set')}"


def dataset_lines(config: Config, data: DataPlan) -> Iterator[str]:
    """The dataset table: subsets, buckets, batches."""
    rows = make_data_rows(
        data, accumulation=config.loop.gradient_accumulation_steps, validation=make_validation_sampler(config, data)
    )
    for group, members in groupby(rows, key=lambda row: row[0]):
        yield group
        yield from (f"  {name:<32} {value}" for _, name, value in members)


def data_lines(config: Config, data: DataPlan) -> Iterator[str]:
    """The dataset table, steps, and what was noticed on the way."""
    yield from dataset_lines(config, data)
    if data.batches_per_epoch:
        total = count_steps(config, data)
        epochs = -(-total // data.count_steps_per_epoch(config.loop.gradient_accumulation_steps))
        yield "run"
        first = requested_first_step(config, data)
        since = f", of which {first} count as done" if first else ""
        yield f"  {'steps':<32} {total}, over {plural(epochs, 'epoch')}{since}"
    yield from (f"note: {note}" for note in (*config.notes, *data.notes))


def model_lines(plan: RunPlan) -> Iterator[str]:
    """What trains, with how many parameters at which learning rate."""
    yield "model"
    yield f"  {'checkpoint':<32} {plan.blueprint.source.name}, {plan.blueprint.title}"
    yield f"  {'part':<20}{'layers':>10}{'parameters':>14}{'learning rate':>16}"
    for part in plan.parts:
        yield f"  {part.part:<20}{part.modules:>10,}{part.parameters:>14,}{part.learning_rate:>16.3g}"
    yield from (f"note: {note}" for note in plan.notes)
