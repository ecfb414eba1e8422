"""What a run will do, before it does it: configuration, data, and what trains, from file headers alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from sfumato.common import files
from sfumato.config import Config
from sfumato.config.prompts import read_prompts
from sfumato.config.schema import vocabulary
from sfumato.config.secrets import scrubbed, secrets_of
from sfumato.data.find.discover import find_data, table
from sfumato.data.plans import DataPlan
from sfumato.data.split import validation_order
from sfumato.errors import Problems, UserError

if TYPE_CHECKING:
    from sfumato.families.base import Blueprint, Family
    from sfumato.methods.base import Method


def plan(config: Config) -> None:
    """Print everything; options and data come before torch is imported. Raises what `train` would refuse."""
    config = with_seed(config)
    show(options(config))
    problems = Problems()
    data = find_data(config, bucket_step=1, problems=problems)
    show(data_lines(config, data))
    if problems.found:
        problems.raise_all()
    outlook = look(config, processes=1)
    show(model_lines(outlook))
    draw_timesteps(config, outlook)


def with_seed(config: Config) -> Config:
    """Draw the seed where none was given, so that it is written down and a resumed run has it."""
    if config.loop.seed is not None:
        return config
    seed = random.SystemRandom().randrange(2**32)
    return config.model_copy(update={"loop": config.loop.model_copy(update={"seed": seed})})


def show(lines: Iterable[str]) -> None:
    print("\n".join(lines), flush=True)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """All that is known of a run before any weight is read."""

    family: type[Family]
    blueprint: Blueprint
    method: Method
    data: DataPlan
    total: int  # optimizer steps, counted from step 0
    notes: tuple[str, ...]  # about the checkpoint, and options that have no effect on it


def look(config: Config, *, processes: int) -> Outlook:
    """Read headers and folders; every fault of model, data, method and output folder is raised at once."""
    from sfumato.families import register_all
    from sfumato.families.base import find_family
    from sfumato.families.source import open_source
    from sfumato.methods import make_method
    from sfumato.optim.optimizers import choose
    from sfumato.optim.rates import check_schedule
    from sfumato.track.trackers import check_trackers

    register_all()
    problems = Problems()
    family, blueprint, method, notes = None, None, None, ()
    with problems.catch():
        source = open_source(config.model)
        family = find_family(config.model.model_type or config.run.family, source)
        blueprint = family.read(source, config.model, config.noise)
        method = make_method(config)
        method.plan(blueprint)
        notes = (*model_notes(config, family, blueprint), *dropout_notes(config, family, blueprint))
        for note in notes if config.log.strict else ():
            problems.add(note)
    data = find_data(config, bucket_step=family.bucket_step if family else 1, processes=processes, problems=problems)
    total = total_steps(config, data)
    with problems.catch():
        if method is not None and (data.preserves or config.loss.masked_prior_preservation_weight):
            method.without()
    with problems.catch():
        choose(config.optim)
    with problems.catch():
        if total:
            check_beginning(config, data, total)
            fresh = 0 if config.save.resume else named_step(config, data) or 0
            check_schedule(config.optim, total - fresh)
    with problems.catch():
        check_prompts(config)
    with problems.catch():
        check_trackers(config.log)
    with problems.catch():
        if config.save.output_dir is not None:
            files.check_writable(config.save.output_dir, option="--output_dir")
    with problems.catch():
        if blueprint is not None and method is not None and total and not problems.found:
            check_disk(config, data, total, method, blueprint)
    problems.raise_all()
    assert family is not None
    assert blueprint is not None
    assert method is not None
    return Outlook(family=family, blueprint=blueprint, method=method, data=data, total=total, notes=notes)


def check_disk(config: Config, data: DataPlan, total: int, method: Method, blueprint: Blueprint) -> None:
    """Everything that the run will have on the disk at once must fit there; a state counts with what it surely has."""
    from sfumato.formats.checkpoint import PRECISIONS
    from sfumato.formats.outputs import make_plan, most_kept

    save = config.save
    assert save.output_dir is not None
    epochs = -(-total // data.steps_per_epoch(config.loop.gradient_accumulation_steps))
    saves = make_plan(save, epochs)
    averages = config.ema.averages
    outputs = (1 + most_kept(saves, steps=total, epochs=epochs, state=False)) * (1 + averages)
    outputs += 2 if config.validation.save_best else 0  # the best yet stands until a better one does
    states = most_kept(saves, steps=total, epochs=epochs, state=True) if save.save_state else 0
    states += save.save_state or save.save_state_on_train_end
    one = method.output_bytes(blueprint, PRECISIONS[save.save_precision])
    moments = 2 if config.optim.optimizer == "AdamW" else 0  # other optimizers may keep less than the weights
    state = sum(row.parameters for row in method.plan(blueprint)) * 4 * (1 + moments + averages)
    what = f"{outputs} saves of {one / 1e9:.2f} GB"
    what += f" and {states} states of {state / 1e9:.2f} GB" if states else ""
    files.check_room(save.output_dir, outputs * one + states * state, mine=save.output_name, what=what)


def check_prompts(config: Config) -> None:
    """The file of prompts is read anew for every preview, where a fault is only a warning; here it is an error."""
    path = config.samples.sample_prompts
    if path is not None and not read_prompts(path):
        raise UserError(f"{path} holds no prompt")


def total_steps(config: Config, data: DataPlan) -> int:
    """Optimizer steps of the whole run; --max_train_epochs goes before --max_train_steps."""
    loop = config.loop
    if loop.max_train_epochs is None:
        return loop.max_train_steps
    return loop.max_train_epochs * data.steps_per_epoch(loop.gradient_accumulation_steps)


def named_step(config: Config, data: DataPlan) -> int | None:
    """The steps that --initial_step or --initial_epoch call done; None where neither is given."""
    loop = config.loop
    if loop.initial_step is not None or loop.initial_epoch is None:
        return loop.initial_step
    return (loop.initial_epoch - 1) * data.steps_per_epoch(loop.gradient_accumulation_steps)


def check_beginning(config: Config, data: DataPlan, total: int) -> None:
    """There must be a step left; the length of an epoch is needed to know."""
    named = named_step(config, data)
    if named is not None and named >= total:
        option = "initial_epoch" if config.loop.initial_step is None else "initial_step"
        raise UserError(
            f"--{option} {config.value(option)} begins after step {named}, and training ends after step {total}",
            fix="raise --max_train_steps or --max_train_epochs, which count from 0",
        )


def options(config: Config) -> Iterator[str]:
    """Every option that is not at its default, and where it came from."""
    secrets = secrets_of(config)
    yield "options"
    for name in config.sources:
        if config.changed(name):
            yield f"  {name:<32} {scrubbed(shown(config.value(name)), secrets):<36} {config.source(name)}"


def public_options(config: Config) -> dict[str, str]:
    """Every option that is not at its default, as text, without secrets and with names instead of paths."""
    from sfumato.formats.metadata import without_paths

    known, secrets = vocabulary(), secrets_of(config)
    return {
        name: scrubbed(without_paths(shown(config.value(name))), secrets)
        for name in known
        if config.changed(name) and not known[name].secret
    }


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(str(each) for each in value)
    if isinstance(value, dict):
        return " ".join(f"{name}={each}" for name, each in value.items())
    return str(value)


def dataset_lines(config: Config, data: DataPlan) -> Iterator[str]:
    """The dataset table: subsets, buckets, batches."""
    rows = table(data, accumulation=config.loop.gradient_accumulation_steps, held_out=validation_order(config, data))
    for group, members in groupby(rows, key=lambda row: row[0]):
        yield group
        yield from (f"  {name:<32} {value}" for _, name, value in members)


def data_lines(config: Config, data: DataPlan) -> Iterator[str]:
    """The dataset table, steps, and what was noticed on the way."""
    yield from dataset_lines(config, data)
    if data.batches_per_epoch:
        total = total_steps(config, data)
        epochs = -(-total // data.steps_per_epoch(config.loop.gradient_accumulation_steps))
        yield "run"
        named = named_step(config, data)
        since = f", those up to {named} called done" if named else ""
        yield f"  {'steps':<32} {total}, over {epochs} epochs{since}"
    yield from (f"note: {note}" for note in (*config.notes, *data.notes))


def draw_timesteps(config: Config, outlook: Outlook) -> None:
    """The picture that --plot_timesteps asks for."""
    path = config.run.plot_timesteps
    if path is None:
        return
    from sfumato.diffusion.recipe import make_recipe
    from sfumato.track.timesteps import course, timestep_plot

    blueprint, buckets = outlook.blueprint, outlook.data.buckets
    recipe = make_recipe(config.noise, config.loss, blueprint.objective, config.model.guidance_scale)
    found = course(recipe, blueprint.objective, blueprint.latents, buckets)
    width, height = next(iter(buckets))
    sizes = f"pictures of {len(buckets)} sizes" if len(buckets) > 1 else f"pictures of {width}x{height}"
    with files.atomic(path) as temporary:
        timestep_plot(found, subtitle=f"{blueprint.title}, {sizes}").save(temporary, "PNG", optimize=True)


def model_notes(config: Config, family: type[Family], blueprint: Blueprint) -> Iterator[str]:
    """What the user should know of the checkpoint, and options that other families read and this one does not."""
    from sfumato.families.base import FAMILIES

    yield from blueprint.notes
    read_by_some = frozenset[str]().union(*(FAMILIES.get(name).options for name in FAMILIES.names))
    idle = sorted(name for name in read_by_some - family.options if config.changed(name))
    yield from (f"--{name} has no effect on a model of the family {family.name}" for name in idle)


def dropout_notes(config: Config, family: type[Family], blueprint: Blueprint) -> Iterator[str]:
    """Chances to leave out a text encoder that this one checkpoint does not have."""
    for option, part in ((f"{part}_dropout_rate", part) for part in config.captions.text_dropout):
        if option in family.options and part not in blueprint.text_parts:
            yield f"--{option} has no effect: there is no text encoder {part}"


def model_lines(outlook: Outlook) -> Iterator[str]:
    """What trains, with how many parameters at which rate."""
    yield "model"
    yield f"  {'checkpoint':<32} {outlook.blueprint.source.name}, {outlook.blueprint.title}"
    yield f"  {'part':<20}{'layers':>10}{'parameters':>14}{'rate':>12}"
    for row in outlook.method.plan(outlook.blueprint):
        yield f"  {row.part:<20}{row.modules:>10,}{row.parameters:>14,}{row.learning_rate:>12.3g}"
    yield from (f"note: {note}" for note in outlook.notes)
