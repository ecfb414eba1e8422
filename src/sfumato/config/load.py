"""From command line, configuration file and launcher to one frozen Config, with every fault told at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfumato.config.command_line import read_command_line
from sfumato.config.config_file import config_path, read_config_file
from sfumato.config.layer import Layer, check, refuse_absent
from sfumato.config.paths import check_paths, neighbour
from sfumato.config.rules import broken_rules
from sfumato.config.schema import THEMES, Config, by_theme, vocabulary
from sfumato.errors import Problems

NOTHING: Mapping[str, Any] = MappingProxyType({})
IMPLIED = {  # a switch that includes another
    "cache_latents_to_disk": "cache_latents",
    "cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs",
}
PERIODS = ("sample_every_n_steps", "sample_every_n_epochs")  # zero and below mean never


def load_config(
    argv: Sequence[str],
    *,
    defaults: Mapping[str, Any] = NOTHING,
    absent: Mapping[str, str] = NOTHING,
    without: Collection[str] = (),
) -> Config:
    """Read and check everything that a run was asked for; imports no torch and reads no model or image.

    Precedence: command line, then --config_file, then `defaults` (a launcher's), then the built-in defaults.
    absent: options that the calling script does not have, each with the reason told to the user.
    without: names of rules that do not hold for the calling command.
    Raises one UserError, or SeveralErrors for all faults together: unknown, mistyped, wrong or missing values,
    missing files, options that are not available yet, and options that contradict each other.
    """
    problems = Problems()
    assert not set(defaults) - set(vocabulary()), "a launcher's default names no option"
    launcher = Layer(source="launcher", typed=True, values=dict(defaults))
    line = read_command_line(argv, problems)
    refuse_absent(line, absent, problems)
    from_line = check(line, problems)
    file = configuration_file(from_line, problems)
    refuse_absent(file, absent, problems)
    layers = (launcher, file, line)

    values = check(launcher, problems) | check(file, problems) | from_line
    sources = {name: layer.source for layer in layers for name in layer.values if name in values}
    places = {name: layer.place(name) for layer in layers for name in layer.values}
    suspects = set().union(*(layer.suspects for layer in layers))
    notes = [note for layer in layers for note in layer.notes] + exposed(line)

    notes += switch_off(values)
    suspects |= refuse_planned(values, places, problems)
    for switch, included in IMPLIED.items():
        if values.get(switch) and not values.get(included):
            values[included], sources[included] = True, f"--{switch}"

    config = build(values, sources, notes)
    missing_yet_allowed = {"config_file"}  # told when it was read; with --output_config it must not exist
    if config.hub.resume_from_huggingface:
        missing_yet_allowed.add("resume")  # a name on the hub
    check_paths(config, suspects | missing_yet_allowed, lambda name: places.get(name, f"--{name}"), problems)
    config = check_rules(config, suspects, problems, without)
    problems.raise_all()
    return config


def configuration_file(from_line: Mapping[str, Any], problems: Problems) -> Layer:
    """The layer of --config_file; empty without one, and with --output_config, which is about to write it."""
    name: Path | None = from_line.get("config_file")
    if name is None and from_line.get("output_config"):
        problems.add("--output_config has no file to write", fix="give --config_file")
    if name is None or from_line.get("output_config"):
        return Layer(source="", typed=True)
    path = config_path(name)
    if not path.is_file():
        problems.add(f"--config_file: {path} does not exist", fix=neighbour(path))
        # What is missing may well be in that file, so nothing is called missing.
        return Layer(source=path.name, typed=True, suspects=set(vocabulary()) - set(from_line))
    return read_config_file(path, problems)


def build(values: Mapping[str, Any], sources: Mapping[str, str], notes: Sequence[str]) -> Config:
    """The config of values that were checked before."""
    known = vocabulary()
    themes: dict[str, Any] = {
        theme: THEMES[theme].model_construct(**{option.name: values[option.name] for option in options})
        for theme, options in by_theme(known[name] for name in values).items()
    }
    every_source = {name: sources.get(name, "default") for name in known}
    return Config(**themes, sources=every_source, notes=tuple(notes))


def exposed(line: Layer) -> list[str]:
    """A secret on the command line is readable by others on the machine and is logged by some trackers."""
    return [
        f"--{name} is on the command line, where others can read it; a configuration file or a login hides it"
        for name in line.values
        if vocabulary()[name].secret
    ]


def switch_off(values: dict[str, Any]) -> list[str]:
    """Turn periods of zero and below into None; gives the notes about it."""
    notes = []
    for name in PERIODS:
        period = values.get(name)
        if period is not None and period <= 0:
            values[name] = None
            notes.append(f"--{name} {period} is ignored: a period is at least 1")
    return notes


def refuse_planned(values: Mapping[str, Any], places: Mapping[str, str], problems: Problems) -> set[str]:
    """Add a problem for every value that a later room brings; gives the names of their options."""
    refused = set()
    for name, value in values.items():
        option = vocabulary()[name]
        room = option.room(value)
        if room:
            refused.add(name)
            problems.add(f"{places[name]} is not available yet (comes with {room})")
    return refused


def check_rules(config: Config, suspects: set[str], problems: Problems, without: Collection[str]) -> Config:
    """Apply the rules between options; gives the config with the notes that they add."""
    notes = list(config.notes)

    def tell(what: str, fix: str = "") -> None:
        if config.log.strict:
            problems.add(what, fix=fix)
        else:
            notes.append(f"{what} ({fix})" if fix else what)

    for option in vocabulary().values():
        if option.facts.no_effect and config.changed(option.name):
            tell(f"--{option.name} has no effect: {option.facts.no_effect}")
    for rule in broken_rules(config, suspects):
        if rule.name in without:
            continue
        if rule.kind == "no effect":
            tell(rule.what, rule.fix)
        elif rule.kind == "note":
            notes.append(f"{rule.what} ({rule.fix})")
        elif rule.kind == "conflict" or not config.run.output_config:
            problems.add(rule.what, fix=rule.fix)
    return config.model_copy(update={"notes": tuple(notes)})
