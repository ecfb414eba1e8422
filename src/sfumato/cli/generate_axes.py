"""--xy: the values of one or two options, and what each combination of them makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.cli.generate_options import NO_PROMPT_FIELDS, PROMPT_FIELDS, PROMPT_THEMES, SeriesOptions
from sfumato.common.registry import did_you_mean
from sfumato.config.command import NO_TRIALS, CommandLine, read_command
from sfumato.config.prompts import Prompt
from sfumato.config.schema import vocabulary
from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.cli.generate_job import GenerateJob
    from sfumato.tools.generate_setup import GenerateRequest

AXIS_NAMES = {  # further names of options, beside those of the command
    "lora_mul": "network_mul", "ckpt": "pretrained_model_name_or_path", "sampler": "sample_sampler",
    "cfg": "scale", "width": "W", "height": "H",
}  # fmt: skip
OF_PROMPTS = {"seed": "seed", "sample_sampler": "sample_sampler", "network_mul": "network_mul", "prompt": "prompt"}
MANY, OTHER_SEPARATOR = ",", "|"  # between values; the second where values have commas
MAX_AXES = 2


@dataclass(frozen=True, kw_only=True)
class ValueAxis:
    """An option and its values."""

    name: str
    texts: Sequence[str]
    values: Sequence[Any]  # the same in their type
    field: str | None  # of prompts; None: the model depends on it

    @property
    def labels(self) -> list[str]:
        """Of files the names alone."""
        return [f"{self.name} {Path(text).name if is_path(text) else text}" for text in self.texts]


@dataclass(frozen=True, kw_only=True)
class PlotModel:
    """One model of a plot, and the prompts of the combinations that it makes."""

    request: GenerateRequest
    cells: Mapping[tuple[int, int], Sequence[Prompt]]  # place on the axes -> a prompt per image


def is_path(text: str) -> bool:
    """Whether a value is that of a file or folder."""
    return "/" in text or Path(text).exists()


def read_axes(texts: Sequence[str]) -> list[ValueAxis]:
    """Of "steps=10,20"; UserError for an option that is not known, or a value that it does not take."""
    if len(texts) > MAX_AXES:
        raise UserError(f"--xy takes one option or two, not {len(texts)}", code="xy-too-many", fix="remove some")
    return [_read_axis(text) for text in texts]


def _read_axis(text: str) -> ValueAxis:
    name, equals, values = text.partition("=")
    name = name.strip().removeprefix("--")
    option = AXIS_NAMES.get(name, name)
    fields = [each for theme in PROMPT_THEMES for each in theme.model_fields]
    excluded = {*SeriesOptions.model_fields, "outdir", "prompt"}
    known = {*fields, *vocabulary(), *AXIS_NAMES} - excluded | {"prompt"}
    if not equals or option not in known:
        hint = did_you_mean(name, known) if equals else 'write it like "steps=10,20"'
        raise UserError(f"--xy {text!r} names no option with values", code="xy-axis-invalid", fix=hint)
    separator = OTHER_SEPARATOR if OTHER_SEPARATOR in values else MANY
    parts = [part.strip() for part in values.split(separator) if part.strip()]
    if not parts:
        raise UserError(f"--xy {text!r} has no values", code="xy-axis-empty", fix=f'"{name}=..." with some')
    of_prompts = option in fields and option not in NO_PROMPT_FIELDS
    field = OF_PROMPTS.get(option, PROMPT_FIELDS.get(option, option) if of_prompts else None)
    typed = [read_option(option, part)[1] for part in parts]
    return ValueAxis(name=name, texts=parts, values=typed, field=field)


def read_option(name: str, text: str) -> tuple[CommandLine, Any]:
    """An option as on a command line, and its value."""
    line = read_command([f"--{name}={text}"], *PROMPT_THEMES, absent=NO_TRIALS)
    line.raise_faults()
    return line, (line.own if name in line.own else line.values)[name]


def change_option(line: CommandLine, name: str, text: str) -> CommandLine:
    """The command line with another value of an option."""
    changed, _ = read_option(name, text)
    source = replace(
        line.source,
        values={**line.source.values, **changed.source.values},
        places={**line.source.places, **changed.source.places},
        notes=list(line.source.notes),
    )
    own = {**line.own, name: changed.own[name]} if name in changed.own else line.own
    return replace(line, source=source, own=own, values={**line.values, **changed.values})


def list_plot_models(
    line: CommandLine, axes: Sequence[ValueAxis], prepare: Callable[[CommandLine], GenerateJob]
) -> Iterator[PlotModel]:
    """One after the other, each model with all of its cells; the images of all cells have the same seeds."""
    across, down = axes[0], axes[1] if len(axes) > 1 else None
    places = list(product(range(len(across.texts)), range(len(down.texts) if down else 1)))
    by_model: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for place in places:
        chosen = [axis.texts[number] for axis, number in zip(axes, place, strict=False) if axis.field is None]
        by_model.setdefault(tuple(chosen), []).append(place)
    seed: int | None = None
    for chosen, cells in by_model.items():
        changed = line
        for axis, text in zip((axis for axis in axes if axis.field is None), chosen, strict=True):
            changed = change_option(changed, AXIS_NAMES.get(axis.name, axis.name), text)
        job = prepare(changed)
        if seed is None:
            seed = job.series.first_seed
        elif job.series.first_seed != seed:  # without --seed every job draws its own
            job = prepare(change_option(changed, "seed", str(seed)))
        yield PlotModel(
            request=job.request,
            cells={place: [change_prompt(prompt, axes, place) for prompt in job.first] for place in cells},
        )


def change_prompt(prompt: Prompt, axes: Sequence[ValueAxis], place: tuple[int, int]) -> Prompt:
    """The prompt with the values at a place."""
    values = {
        axis.field: axis.values[number] for axis, number in zip(axes, place, strict=False) if axis.field is not None
    }
    return replace(prompt, **values)
