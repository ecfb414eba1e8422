"""`sfumato train --dry_run`: one real step, preview and save on the largest batch, and the memory of each.

On a GPU the step is taken twice, and the second one is measured: from then on the optimizer's state is there, as in
every further step. A CPU has nothing to measure a peak with; there the run itself is tried, and its times are shown.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sfumato.config import Config
from sfumato.config.environment import read_launch
from sfumato.errors import UserError
from sfumato.parallel.start import choose_device
from sfumato.plan import RunPlan
from sfumato.tools.device_meter import DeviceMeter, report_exhaustion
from sfumato.tools.layer_errors import LayerError, describe_layer_errors, measure_layer_errors
from sfumato.tools.plan import show_plan
from sfumato.tools.rehearsal_data import keep_largest_batches
from sfumato.tools.rehearsal_run import make_staged_run
from sfumato.tools.rehearsal_stages import GB, STEP, Stage, StageRecorder
from sfumato.tools.rehearsal_step import check_step, take_step
from sfumato.tools.rehearse import cache_in_memory, evaluate, write_output
from sfumato.tools.rehearse_apart import rehearse_apart
from sfumato.track.guard import Guard

FIRST_STEP = "first step"


def show_dry_run(config: Config) -> None:
    """Print the plan, and for each stage what was predicted and measured. Raises UserError where a stage fails."""
    if (processes := read_launch().processes) > 1:
        raise UserError(
            f"--dry_run is for one process, and {processes} were launched; each of a run needs the same",
            code="dry-run-launched",
            fix="run it without a launcher",
        )
    config = config.with_values({"resume": None})
    plan = show_plan(config)
    predicted: list[Stage] = []
    with Guard().survive("rehearsing this run", then=""):
        predicted = rehearse_apart(config)
    meter = DeviceMeter(choose_device())
    stages, errors = take_dry_run(plan, meter)
    print("\n".join(format_dry_run(stages, predicted, meter)))
    for line in describe_layer_errors(errors):
        print(line)


def take_dry_run(plan: RunPlan, meter: DeviceMeter) -> tuple[list[Stage], list[LayerError]]:
    """The stages of a run of one step; what it writes lies in a temporary folder where the run's output would.

    Where weights are in fewer bits, another step follows in which each layer is compared, and which is not measured.
    """
    with (
        tempfile.TemporaryDirectory(prefix=".sfumato-", dir=find_existing(plan.output_dir)) as folder,
        StageRecorder(meter).watch_loading() as recorder,
        report_exhaustion(recorder),
    ):
        plan = replace(
            plan,
            config=cache_in_memory(plan.config, cache_dir=Path(folder)),
            data=keep_largest_batches(plan.data, accumulation=plan.config.loop.gradient_accumulation_steps),
        )
        run = make_staged_run(plan, recorder)
        index = 0
        for index, name in enumerate((FIRST_STEP, STEP) if meter.measures_memory else (STEP,)):
            take_step(run, index, recorder.stage(name))
            check_step(run)
        evaluate(run, recorder)
        write_output(run, recorder, Path(folder))
        return recorder.stages, measure_layer_errors(run, index + 1)


def find_existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def format_dry_run(stages: Sequence[Stage], predicted: Sequence[Stage], meter: DeviceMeter) -> Iterator[str]:
    """A table: stage, seconds, predicted and measured peak; a stage that was not rehearsed has no prediction."""
    peaks = {stage.name: stage.peak for stage in predicted}
    width = max(len(stage.name) for stage in stages)
    yield f"{'stage':{width}}  seconds  rehearsed GB  measured GB"
    for stage in stages:
        rehearsed = f"{peaks[stage.name] / GB:.2f}" if stage.name in peaks else "-"
        measured = f"{stage.peak / GB:.2f}" if meter.measures_memory else "-"
        yield f"{stage.name:{width}}  {stage.seconds:7.1f}  {rehearsed:>12}  {measured:>11}"
    if all(stage.name != "preview" for stage in stages):
        yield "no preview was made, since the run has no --sample_prompts"
    if not meter.measures_memory:
        yield "nothing measures the peak of memory on the CPU; what was rehearsed is for a GPU"
    yield "every stage works, and nothing is left of them"
