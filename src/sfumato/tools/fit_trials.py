"""Trials of memory measures: which of them a run can take, and what a set of them needs, by bound or by rehearsal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sfumato.config import Config
from sfumato.config.rules import broken_rules
from sfumato.errors import Problems, SeveralErrors, UserError
from sfumato.memory.measures import MEASURES, MemoryMeasure, Values
from sfumato.memory.rehearsal.backend import DEVICE_TYPE
from sfumato.methods.model_plan import plan_model
from sfumato.plan import RunPlan, make_run_plan
from sfumato.tools.fit_search import Levels, is_within
from sfumato.tools.memory_bound import MemoryBound, bound_stages
from sfumato.tools.rehearsal_stages import GB, STEP, Stage
from sfumato.tools.rehearse import rehearse_plan

SAFE_SHARE = 0.9  # of activations that were rehearsed with other weights, where those in fewer bits are decoded


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A measure that this run can take."""

    name: str
    measure: MemoryMeasure
    levels: Sequence[Values]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a set of measures needs. stages: empty where a bound from file headers was enough to refuse it."""

    peak: int  # bytes
    stage: str  # where it is
    stages: Sequence[Stage] = ()

    @property
    def is_bound(self) -> bool:
        """Whether the peak is only known to be at least this much."""
        return not self.stages

    def __str__(self) -> str:
        return f"{'at least ' if self.is_bound else ''}{self.peak / GB:.2f} GB ({self.stage})"


@dataclass(kw_only=True)
class TrialSeries:
    """Trials for one configuration and one card; each set is tried once."""

    config: Config
    available: int  # bytes for what a rehearsal counts
    choices: Sequence[Choice]
    trials: dict[Levels, Trial | None] = field(default_factory=dict)  # None: what the run refuses
    activations: dict[Levels, int] = field(default_factory=dict)  # bytes of a rehearsed step beyond its bound

    def try_levels(self, levels: Levels) -> bool | None:
        """Whether the set fits; None where a run would refuse it."""
        trial = self.run(levels)
        return None if trial is None else trial.peak <= self.available

    def run(self, levels: Levels) -> Trial | None:
        """The set's peak, or a bound of it where that exceeds the card; None where a run would refuse it."""
        if levels not in self.trials:
            started = time.monotonic()
            print(f"  {self.name_levels(levels)}: ", end="", flush=True)
            self.trials[levels] = trial = self._try(levels)
            print(f"{trial or 'refused'}, {time.monotonic() - started:.0f} s", flush=True)
        return self.trials[levels]

    def rehearse(self, levels: Levels) -> Trial:
        """The peak of a set that a run does not refuse, whatever its bound."""
        plan = make_run_plan(self.config.with_values(self.list_values(levels)), processes=1, remember=False)
        stages = rehearse_plan(plan, saves=False)
        largest = max(stages, key=lambda stage: stage.peak)
        return Trial(peak=largest.peak, stage=largest.name, stages=stages)

    def find_higher(self, levels: Levels) -> Trial | None:
        """Of the sets with more measures that were tried the one that needs most: this one needs no less."""
        tried = [trial for others, trial in self.trials.items() if trial is not None and is_within(levels, others)]
        return max(tried, key=lambda trial: trial.peak, default=None)

    def _try(self, levels: Levels) -> Trial | None:
        try:
            bounds = bound_run(self.config.with_values(self.list_values(levels)))
            step = bounds[0].size + self._find_least_activations(levels)
            largest = max(*bounds, MemoryBound(STEP, step), key=lambda bound: bound.size)
            if largest.size > self.available:
                return Trial(peak=largest.size, stage=largest.stage)
            trial = self.rehearse(levels)
        except UserError:
            return None
        peak = next(stage.peak for stage in trial.stages if stage.name == STEP)
        self.activations[levels] = peak - bounds[0].size
        return trial

    def _find_least_activations(self, levels: Levels) -> int:
        """What a step needs beyond its bound: as much as any that was rehearsed with the same or stronger measures.

        Those that change weights alone may be others.
        """
        counts = [number for number, choice in enumerate(self.choices) if not choice.measure.changes_weights_alone]
        same = (size for other, size in self.activations.items() if all(levels[n] <= other[n] for n in counts))
        return int(SAFE_SHARE * max(same, default=0))

    def list_values(self, levels: Levels) -> dict[str, Any]:
        """Option -> value of all measures of a set."""
        values: dict[str, Any] = {}
        for choice, level in zip(self.choices, levels, strict=True):
            values |= choice.levels[level - 1] if level else {}
        return values

    def name_levels(self, levels: Levels) -> str:
        taken = zip(self.choices, levels, strict=True)
        names = [f"{choice.name}{describe_level(choice, level)}" for choice, level in taken if level]
        return ", ".join(names) or "as it is"


def describe_level(choice: Choice, level: int) -> str:
    """Which of several levels, by what it sets first."""
    name, value = next(iter(choice.levels[level - 1].items()))
    return f" ({name if value is True else value})" if len(choice.levels) > 1 else ""


def bound_run(config: Config) -> list[MemoryBound]:
    """Of the step, which comes first, and of caching, from file headers alone. The rehearsal device is registered."""
    problems = Problems()
    model = plan_model(config, problems)
    problems.raise_all()
    return bound_stages(model, torch.device(DEVICE_TYPE))


def list_choices(plan: RunPlan, config: Config) -> Iterator[Choice | str]:
    """The measures that have something to set; a line for each that the run does not allow. config: as given."""
    for name in MEASURES.names:
        measure = MEASURES.get(name)
        levels = measure.list_levels(config)
        if not levels:
            continue
        reason = find_obstacle(plan, config, levels[-1])
        yield f"{name}: not possible, {reason}" if reason else Choice(name=name, measure=measure, levels=levels)


def find_obstacle(plan: RunPlan, config: Config, values: Values) -> str:
    """Why a run with these values would be another one or none; empty where it trains the same."""
    changed = config.with_values(values)
    conflicts = [rule.sentence for rule in broken_rules(changed, set()) if rule.severity == "conflict"]
    if conflicts:
        return conflicts[0]
    try:
        other = make_run_plan(changed, processes=1, remember=False)
    except SeveralErrors as errors:
        return errors.errors[0].what
    except UserError as error:
        return error.what
    if [(part.part, part.parameters) for part in other.parts] != [(part.part, part.parameters) for part in plan.parts]:
        return "with it other parts would train"
    if "train_batch_size" in values and not (has_option_batches(plan) and has_option_batches(other)):
        return "the dataset file sets batch_size"
    return ""


def has_option_batches(plan: RunPlan) -> bool:
    """Whether every dataset has the batch size of --train_batch_size, and none another from the dataset file."""
    sizes = {dataset.settings.batch_size for dataset in plan.data.datasets}
    return sizes == {plan.config.value("train_batch_size")}
