"""From command line, configuration file and launcher to one frozen Config, with all faults reported together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.common.text import EMPTY, join_parts
from sfumato.config.command import CommandLine, read_command
from sfumato.config.config_file import read_config_file, resolve_config_path
from sfumato.config.environment import describe_environment
from sfumato.config.file_values import PERIODS
from sfumato.config.launcher_options import check_contradictions, read_launcher_options
from sfumato.config.loose_keys import describe_loose_keys, refuse_loose_keys
from sfumato.config.option_source import OptionSource, check_values, refuse_absent
from sfumato.config.option_table import group_options
from sfumato.config.paths import check_paths, suggest_path
from sfumato.config.presets import read_preset_options
from sfumato.config.rules import broken_rules
from sfumato.config.schema import THEMES, Config, vocabulary
from sfumato.config.values import get_last_part
from sfumato.errors import Problems

IMPLIED = {  # a switch that includes another
    "cache_latents_to_disk": "cache_latents",
    "cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs",
}


def load_config(
    argv: Sequence[str],
    *,
    defaults: Mapping[str, Any] = EMPTY,
    absent: Mapping[str, str] = EMPTY,
    skip_rules: Collection[str] = (),
    check_files: bool = True,
) -> Config:
    """Read and check the options of a run; imports no torch and reads no model or image.

    absent: options that the calling script does not have, each with the reason. Else as `load_command_config`.
    """
    line = read_command(argv, absent=absent)
    return load_command_config(line, defaults=defaults, skip_rules=skip_rules, check_files=check_files)


def load_command_config(
    line: CommandLine,
    *,
    defaults: Mapping[str, Any] = EMPTY,
    skip_rules: Collection[str] = (),
    check_files: bool = True,
) -> Config:
    """The checked config of a command line and of the files that it names.

    Precedence: command line, --config_file, --preset, `defaults` (a launcher's), what accelerate's launcher has put
    into the environment, then the built-in defaults.
    skip_rules: codes of rules that do not hold for the calling command. check_files: whether paths must exist.
    Raises one UserError, or SeveralErrors for all faults together: unknown, mistyped, wrong or missing values,
    missing files, and options that contradict each other.
    """
    problems = Problems()
    problems.found += line.problems.found
    merged = merge_sources(line, defaults, problems)
    merged.notes += drop_zero_periods(merged.values)
    merged.notes += clean_output_name(merged.values, merged.sources)
    for switch, included in IMPLIED.items():
        if merged.values.get(switch) and not merged.values.get(included):
            merged.values[included], merged.sources[included] = True, f"--{switch}"
    config = build_config(merged.values, merged.sources, merged.notes)
    config = config.model_copy(update={"notes": (*config.notes, *describe_environment(config))})
    if check_files:
        unchecked = merged.suspects | list_unchecked_paths(config)
        check_paths(config, unchecked, lambda name: merged.places.get(name, f"--{name}"), problems)
    config = check_rules(config, merged.suspects, problems, skip_rules)
    problems.raise_all()
    return config


@dataclass(kw_only=True)
class MergedSources:
    """The options of all sources together. sources, places: option -> which one it is of, and where it stands there."""

    values: dict[str, Any]
    sources: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    suspects: set[str] = field(default_factory=set)  # OptionSource.suspects
    notes: list[str] = field(default_factory=list)

    def add(self, source: OptionSource) -> None:
        """A source that takes precedence over those that were added before."""
        for name in source.values:
            self.places[name] = source.place(name)
            if name in self.values:
                self.sources[name] = source.source
        self.suspects |= source.suspects
        self.notes += source.notes


def merge_sources(line: CommandLine, defaults: Mapping[str, Any], problems: Problems) -> MergedSources:
    """Read every source of options and check it by itself; the arguments are those of `load_command_config`."""
    assert not set(defaults) - set(vocabulary()), "a launcher's default names no option"
    launcher = OptionSource(source="launcher", typed=True, values=dict(defaults))
    file = read_file_source(line.values, problems)
    refuse_absent(file, line.absent, problems)
    preset = read_preset_options(line.values.get("preset"), defaults, problems)
    refuse_absent(preset, line.absent, problems)
    given: dict[str, Any] = {}
    for source in (launcher, preset, file):
        given |= check_values(source, problems)
    given |= line.values
    environment = read_launcher_options(problems)
    from_environment = check_values(environment, problems)
    check_contradictions(from_environment, environment, given, problems)
    merged = MergedSources(values=from_environment | given)
    for source in (environment, launcher, preset, file, line.source):
        merged.add(source)
    merged.notes += report_loose_keys((file, line.source), merged.values, problems)
    merged.notes += find_exposed_secrets(line.source)
    return merged


def list_unchecked_paths(config: Config) -> set[str]:
    """Options whose path may be missing."""
    names = {"config_file"}  # reported when it was read; with --output_config it must not exist
    if config.hub.resume_from_huggingface:
        names.add("resume")  # a name on the hub
    return names


def read_file_source(from_line: Mapping[str, Any], problems: Problems) -> OptionSource:
    """The options of --config_file; none without one, and with --output_config, which is about to write it."""
    name: Path | None = from_line.get("config_file")
    if name is None and from_line.get("output_config"):
        problems.add(
            "--output_config has no file to write", code="output-config-without-file", fix="give --config_file"
        )
    if name is None or from_line.get("output_config"):
        return OptionSource(source="", typed=True)
    path = resolve_config_path(name)
    if not path.exists():
        problems.add(f"--config_file: {path} does not exist", code="config-file-missing", fix=suggest_path(path))
        source = None
    else:
        source = read_config_file(path, problems)
    if source is None:  # what is missing may well be in that file, so nothing else is called missing
        return OptionSource(source=path.name, typed=True, suspects=set(vocabulary()) - set(from_line))
    return source


def report_loose_keys(sources: Sequence[OptionSource], values: Mapping[str, Any], problems: Problems) -> list[str]:
    """One line for each source with keys that --strict refuses; with it, problems instead."""
    if values.get("strict"):
        for source in sources:
            refuse_loose_keys(source.loose, problems)
        return []
    return [line for source in sources for line in describe_loose_keys(source.source, source.loose)]


def build_config(values: Mapping[str, Any], sources: Mapping[str, str], notes: Sequence[str]) -> Config:
    """The config of values that are checked already."""
    known = vocabulary()
    themes: dict[str, Any] = {}
    for theme, options in group_options(known[name] for name in values).items():
        themes[theme] = THEMES[theme].model_construct(**{option.name: values[option.name] for option in options})
    every_source = {name: sources.get(name, "default") for name in known}
    return Config(**themes, sources=every_source, notes=tuple(notes))


def find_exposed_secrets(line: OptionSource) -> list[str]:
    """A secret on the command line is readable by others on the machine and is logged by some trackers."""
    return [
        f"--{name} is on the command line, where others can read it; a configuration file or a login hides it"
        for name in line.values
        if vocabulary()[name].secret
    ]


def drop_zero_periods(values: dict[str, Any]) -> list[str]:
    """Turn periods of zero and below into None; gives the notes about it."""
    notes = []
    for name in PERIODS:
        period = values.get(name)
        if period is not None and period <= 0:
            values[name] = None
            notes.append(f"--{name} {period} is ignored: a period is at least 1")
    return notes


def clean_output_name(values: dict[str, Any], sources: dict[str, str]) -> list[str]:
    """Of an --output_name that is a path the last part counts, and an empty one is not given; gives the note about it.

    Otherwise files would be hidden, or lie outside --output_dir.
    """
    name = values.get("output_name", "last")
    last = get_last_part(name)
    if not last:
        del values["output_name"]
        sources.pop("output_name", None)
        return [f"--output_name is empty: files are called {vocabulary()['output_name'].default!r}"]
    if name == last:
        return []
    values["output_name"] = last
    return [f"--output_name is a path: files are called {last!r} and go to --output_dir, whatever it says before"]


def check_rules(config: Config, suspects: set[str], problems: Problems, skip_rules: Collection[str]) -> Config:
    """Apply the rules between options; gives the config with the notes that they add."""
    notes = list(config.notes)
    idle = collect_idle_options(config, problems)
    errors = {"conflict"}
    if not config.run.output_config:
        errors.add("required")
    if config.log.strict:
        errors.add("no effect")
    for rule in broken_rules(config, suspects):
        if rule.code in skip_rules:
            continue
        if rule.severity in errors:
            problems.add(rule.sentence, code=rule.code, fix=rule.fix)
        elif rule.severity == "no effect":
            idle.append((rule.what, rule.reason))
        elif rule.severity != "required":
            notes.append(f"{rule.what} ({rule.fix})" if rule.fix else rule.what)
    return config.model_copy(update={"notes": (*notes, *describe_idle(idle))})


def collect_idle_options(config: Config, problems: Problems) -> list[tuple[str, str]]:
    """(option, why) for those that never change anything here; with --strict they are problems instead."""
    idle: list[tuple[str, str]] = []
    for option in vocabulary().values():
        if option.facts.no_effect and config.is_changed(option.name):
            if config.log.strict:
                what = f"--{option.name} has no effect: {option.facts.no_effect}"
                problems.add(what, code="option-without-effect")
            else:
                idle.append((f"--{option.name}", option.facts.no_effect))
    return idle


def describe_idle(idle: Sequence[tuple[str, str]]) -> list[str]:
    """At most one line with all options that change nothing in this run, those of one reason together."""
    parts: list[str] = []
    for reason in dict.fromkeys(reason for _, reason in idle):
        names = ", ".join(what for what, why in idle if why == reason)
        parts.append(f"{names} ({reason})")
    return [join_parts("no effect in this run: ", parts)] if parts else []
