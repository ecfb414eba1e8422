"""What a run will do, before it does it: configuration, data, and what trains, from file headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sfumato.config import Config
from sfumato.data.summary import DataPlan, find_data, table
from sfumato.errors import Problems, UserError


def plan(config: Config) -> None:
    """Print everything; the first part comes before torch is imported, within a second."""
    problems = Problems()
    for line in configuration(config):
        print(line)
    data: DataPlan | None = None
    with problems.catch():
        data = find_data(config, bucket_step=1, problems=problems)
    if data is not None:
        print("\n".join(table(data)))
        print("\n".join(length(config, data)), flush=True)
    with problems.catch():
        print("\n".join(trainable(config)))
    problems.raise_all()


def configuration(config: Config) -> Iterator[str]:
    """Every option that is not at its default, with where it came from."""
    yield "Options"
    for name in sorted(config.sources):
        if config.changed(name):
            yield f"  {name:<32} {config.value(name)!s:<40} {config.source(name)}"
    yield from (f"  note: {note}" for note in config.notes)
    yield ""


def length(config: Config, data: DataPlan) -> Iterator[str]:
    """Steps and epochs."""
    accumulation = config.loop.gradient_accumulation_steps
    total = total_steps(config, data)
    per_epoch = data.steps_per_epoch(accumulation)
    yield f"{total} steps, {-(-total // per_epoch)} epochs of {per_epoch} steps"
    yield ""


def total_steps(config: Config, data: DataPlan) -> int:
    """Optimizer steps of the whole run, counted from step 0; --max_train_epochs goes before --max_train_steps."""
    loop = config.loop
    if loop.max_train_epochs is None:
        return loop.max_train_steps
    return loop.max_train_epochs * data.steps_per_epoch(loop.gradient_accumulation_steps)


def trainable(config: Config) -> Iterator[str]:
    """What trains, with how many parameters at which rate."""
    from sfumato.families import register_all
    from sfumato.families._source import open_source
    from sfumato.families.base import find_family
    from sfumato.methods import make_method

    register_all()
    source = open_source(config.model)
    family = find_family(config.run.family, source)
    blueprint = family.read(source, config.model, config.noise)
    yield f"Model: {blueprint.title} ({source.path.name})"
    yield from planned_table(make_method(config.run.method, config).plan(blueprint))


def planned_table(rows: Sequence) -> Iterator[str]:
    yield f"  {'part':<12}{'modules':>9}{'parameters':>14}{'rate':>12}"
    for row in rows:
        yield f"  {row.part:<12}{row.modules:>9,}{row.parameters:>14,}{row.learning_rate:>12.3g}"
