"""What a run will do, before it does it: configuration, data, and what trains, from file headers alone."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.config import Config
from sfumato.config.output_checks import check_places, check_prompts, check_thumbnail
from sfumato.data.find.concept_data import find_run_data
from sfumato.data.plans import DataPlan
from sfumato.errors import Problems, UserError

if TYPE_CHECKING:
    from sfumato.families.base import Family
    from sfumato.families.blueprint import Blueprint
    from sfumato.formats.save_schedule import SaveSchedule as SaveSchedule
    from sfumato.formats.state import StateOutline
    from sfumato.methods.base import Method
    from sfumato.methods.base import TrainablePart as TrainablePart
    from sfumato.methods.model_plan import ModelPlan


def draw_seed() -> int:
    """For a run that was given none."""
    return random.SystemRandom().randrange(2**32)


def with_seed(config: Config, drawn: int | None = None) -> Config:
    """Where none was given, a drawn one, so that it is written down and a resumed run has it.

    drawn: by the main process for all; None to draw it here.
    """
    if config.loop.seed is not None:
        return config
    seed = draw_seed() if drawn is None else drawn
    return config.model_copy(update={"loop": config.loop.model_copy(update={"seed": seed})})


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """All that is known of a run before any weight is read, each thing resolved once."""

    config: Config
    seed: int
    output_dir: Path
    family: type[Family]
    blueprint: Blueprint
    method: Method
    parts: tuple[TrainablePart, ...]  # what trains
    data: DataPlan
    total_steps: int  # optimizer steps, counted from step 0
    steps_per_epoch: int
    epochs: int
    saves: SaveSchedule
    saved: StateOutline | None  # of --resume; None also where it is on the hub
    notes: tuple[str, ...]  # about the checkpoint, and options that have no effect on it


def make_run_plan(config: Config, *, processes: int, remember: bool = True) -> RunPlan:
    """Read headers and folders; every fault of model, data, method and output folder is raised at once.

    remember: whether the dataset index is written to the cache folder; nothing else ever is.
    """
    from sfumato.formats.save_schedule import make_save_schedule
    from sfumato.methods.model_plan import describe_data, plan_model
    from sfumato.methods.run_checks import check_run

    config = with_seed(config)
    problems = Problems()
    model = saved = None
    with problems.catch():
        model = plan_model(config, problems)
    config = model.config if model else config
    data = find_run_data(
        config,
        bucket_step=model.family.bucket_step if model else 1,
        size_step=model.family.sampling.size_multiple if model else 1,
        processes=processes,
        remember=remember,
        problems=problems,
    )
    with problems.catch():
        saved = find_saved_state(config)
    total_steps = count_steps(config, data)
    memory_notes = check_model(model, data, problems) if model else []
    learning_rates = {part.learning_rate for part in model.parts} if model else set[float]()
    option_notes = check_run_options(config, data, total_steps, learning_rates, saved, problems)
    if model is not None:
        check_run(config, data, total_steps, model, problems)
    problems.raise_all()
    assert model is not None
    assert config.loop.seed is not None
    assert config.save.output_dir is not None
    steps_per_epoch = data.count_steps_per_epoch(config.loop.gradient_accumulation_steps)
    epochs = -(-total_steps // steps_per_epoch)
    return RunPlan(
        config=config,
        seed=config.loop.seed,
        output_dir=config.save.output_dir,
        family=model.family,
        blueprint=model.blueprint,
        method=model.method,
        parts=model.parts,
        data=data,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        saves=make_save_schedule(config.save, epochs),
        saved=saved,
        notes=(*model.notes, *model.remarks, *describe_data(model, data), *memory_notes, *option_notes),
    )


def check_model(model: ModelPlan, data: DataPlan, problems: Problems) -> list[str]:
    """What the model and the method can do with the data, and in which precision; gives notes about the latter."""
    from sfumato.memory.plan_checks import describe_memory
    from sfumato.methods.model_plan import check_data

    check_data(model, data, problems)
    with problems.catch():
        if data.has_preserved_samples or model.config.loss.masked_prior_preservation_weight:
            model.method.disabled()  # raises where the model of before training is gone
    trained = model.method.full_precision_parts(model.blueprint)
    notes: list[str] = []
    with problems.catch():
        notes += describe_memory(model.config, model.family, model.blueprint, trained)
    return notes


def find_saved_state(config: Config) -> StateOutline | None:
    """The state that --resume names, without its tensors; one on the hub is downloaded by training alone."""
    from sfumato.formats.state import read_newest_outline

    if config.save.resume is None or config.hub.resume_from_huggingface:
        return None
    return read_newest_outline(config.save.resume, config.save.output_name)


def check_run_options(
    config: Config,
    data: DataPlan,
    total_steps: int,
    learning_rates: Collection[float],
    saved: StateOutline | None,
    problems: Problems,
) -> list[str]:
    """Optimizer, schedule, start, prompts, metadata, trackers and folders; gives notes about them."""
    from sfumato.memory.plan_checks import check_memory_options
    from sfumato.optim.check import check_fused_processes, check_optimizer
    from sfumato.track.trackers import check_trackers

    first = 0 if config.save.resume or not total_steps else requested_first_step(config, data) or 0
    steps = max(0, total_steps - first)
    saved_class = saved.tree["optimizer"]["class"] if saved else ""
    notes = check_optimizer(config.optim, steps, problems, learning_rates, saved_class=saved_class)
    with problems.catch():
        check_fused_processes(config.optim, data.processes)
    with problems.catch():
        if total_steps:
            check_first_step(config, data, total_steps)
    with problems.catch():
        notes += check_prompts(config)
    with problems.catch():
        check_thumbnail(config)
    check_memory_options(config, problems)
    with problems.catch():
        check_trackers(config.log)
    check_places(config, problems)
    return notes


def count_steps(config: Config, data: DataPlan) -> int:
    """Optimizer steps of the whole run; --max_train_epochs takes precedence over --max_train_steps."""
    loop = config.loop
    if loop.max_train_epochs is None:
        return loop.max_train_steps
    return loop.max_train_epochs * data.count_steps_per_epoch(loop.gradient_accumulation_steps)


def requested_first_step(config: Config, data: DataPlan) -> int | None:
    """The number of steps that --initial_step or --initial_epoch count as done; None where neither is given."""
    loop = config.loop
    if loop.initial_step is not None or loop.initial_epoch is None:
        return loop.initial_step
    return (loop.initial_epoch - 1) * data.count_steps_per_epoch(loop.gradient_accumulation_steps)


def check_first_step(config: Config, data: DataPlan, total: int) -> None:
    """There must be a step left; the length of an epoch is needed to know."""
    first = requested_first_step(config, data)
    if first is not None and first >= total:
        option = "initial_epoch" if config.loop.initial_step is None else "initial_step"
        raise UserError(
            f"--{option} {config.value(option)} starts after step {first}, but training ends after step {total}",
            code="initial-step-after-end",
            fix="raise --max_train_steps or --max_train_epochs, which count from 0",
        )
