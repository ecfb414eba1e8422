"""`sfumato plan --fit`: the fastest set of memory measures with which a run fits a card, and why each is in it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from sfumato.common import files
from sfumato.common.text import plural
from sfumato.config import Config
from sfumato.config.write import write_options
from sfumato.errors import UserError
from sfumato.memory.measures import Values
from sfumato.memory.rehearsal.backend import register_backend
from sfumato.plan import RunPlan
from sfumato.tools.fit_search import Levels, find_fastest
from sfumato.tools.fit_trials import Choice, TrialSeries, list_choices
from sfumato.tools.published_run import drop_stand_ins
from sfumato.tools.rehearsal_stages import GB, describe_stages
from sfumato.tools.rehearse import ALLOWANCE

LONGEST_SEARCH = 150  # seconds, after which no reason is worth another rehearsal


def show_fit(plan: RunPlan, config: Config, *, memory: int, apply: Path | None, path: Path | None) -> None:
    """Print the trials and what they found. config: as the user gave it, of which `plan` is.

    memory: of the card, bytes. apply: a configuration file to write, which does not exist. path: of a JSON file.
    Raises UserError where nothing fits.
    """
    started = time.monotonic()
    series = make_series(plan, config, memory - ALLOWANCE)
    found = find_levels(series)
    print("\n".join(describe_found(series, found, deadline=started + LONGEST_SEARCH)))
    print(f"found in {time.monotonic() - started:.0f} s with {plural(len(series.trials), 'trial')}")
    values = series.list_values(found)
    if apply is not None:
        write_options(drop_stand_ins(config.with_values(values)), apply, option="--apply")
        print(f"options written to {apply}; train with: sfumato train --config_file {apply}")
    if path is not None:
        trial = series.run(found)
        assert trial is not None
        content = {"options": values, "stages": describe_stages(trial.stages)}
        files.write_text(path, json.dumps(content, indent=2) + "\n")


def make_series(plan: RunPlan, config: Config, available: int) -> TrialSeries:
    """The trials to come; prints what cannot be tried. Raises UserError where nothing can be rehearsed."""
    register_backend()
    print(
        f"{(available + ALLOWANCE) / GB:.2f} GB on the card, of which {ALLOWANCE / GB:.2f} GB are set aside for CUDA "
        "itself, workspaces and fragmentation, which no rehearsal sees"
    )
    choices: list[Choice] = []
    for choice in list_choices(plan, config):
        if isinstance(choice, Choice):
            choices.append(choice)
        else:
            print(f"  {choice}")
    return TrialSeries(config=config, available=available, choices=choices)


def find_levels(series: TrialSeries) -> Levels:
    """The configuration as it is, if that fits, else the fastest set; raises UserError where there is none."""
    nothing = (0,) * len(series.choices)
    if series.try_levels(nothing):
        return nothing
    highest = [len(choice.levels) for choice in series.choices]
    times = [choice.measure.time for choice in series.choices]
    found = find_fastest(highest, times, series.try_levels)
    if found is None:
        raise make_nothing_fits_error(series)
    return found


def make_nothing_fits_error(series: TrialSeries) -> UserError:
    """Which set misses by least, by how much, and where: by rehearsals alone, since a bound says too little."""
    exact = {levels: trial for levels, trial in series.trials.items() if trial is not None and not trial.is_bound}
    highest = tuple(len(choice.levels) for choice in series.choices)
    if highest not in exact and series.trials[highest] is not None:
        exact[highest] = series.rehearse(highest)
    if not exact:
        nothing = (0,) * len(series.choices)
        exact[nothing] = series.rehearse(nothing)
    levels = min(exact, key=lambda levels: exact[levels].peak)
    trial = exact[levels]
    return UserError(
        f"nothing fits: the least, {series.name_levels(levels)}, needs {trial}, "
        f"{(trial.peak - series.available) / GB:.2f} GB too much",
        code="nothing-fits-card",
        fix="a lower --resolution, --network_dim or --max_bucket_reso, a smaller model, or a larger card",
    )


def describe_found(series: TrialSeries, found: Levels, *, deadline: float) -> Iterator[str]:
    """The set, its peak, and of each measure what the peak is without it."""
    trial = series.run(found)
    assert trial is not None
    reasons = list(list_reasons(series, found, deadline))
    yield f"fits: {series.name_levels(found)}, {trial}; {(series.available - trial.peak) / GB:.2f} GB remain"
    yield from reasons


def list_reasons(series: TrialSeries, found: Levels, deadline: float) -> Iterator[str]:
    """A line for each measure that is taken."""
    for number, (choice, level) in enumerate(zip(series.choices, found, strict=True)):
        if level:
            without = (*found[:number], level - 1, *found[number + 1 :])
            options = " ".join(spell_options(choice.levels[level - 1]))
            yield f"  {options}: {describe_without(series, without, deadline)}; costs: {choice.measure.cost}"


def describe_without(series: TrialSeries, levels: Levels, deadline: float) -> str:
    """The peak of the set with one measure at its next lower level; rehearsed only where nothing tried decides it."""
    known = series.find_higher(levels)
    if levels not in series.trials and known is not None and known.peak > series.available:
        return f"otherwise at least {known.peak / GB:.2f} GB ({known.stage}), more than the card"
    if levels not in series.trials and time.monotonic() > deadline:
        return "otherwise not tried"
    trial = series.run(levels)
    if trial is None:
        return "otherwise refused"
    return f"otherwise {trial}, {'more than' if trial.peak > series.available else 'within'} the card"


def spell_options(values: Values) -> Iterator[str]:
    """As on a command line."""
    for name, value in values.items():
        if value is None:
            yield f"without --{name}"
        else:
            yield f"--{name}" if value is True else f"--{name} {value}"
