"""The options of a run as text: for the plan, for reports, for files."""

from __future__ import annotations

from collections.abc import Iterator

from sfumato.common.text import strip_paths
from sfumato.config.schema import Config, vocabulary
from sfumato.config.secrets import collect_secrets, redact


def option_lines(config: Config) -> Iterator[str]:
    """Every option that is not at its default, and where it came from."""
    secrets = collect_secrets(config)
    yield "options"
    for name in config.sources:
        if config.is_changed(name):
            yield f"  {name:<32} {redact(format_value(config.value(name)), secrets):<36} {config.source(name)}"


def public_options(config: Config) -> dict[str, str]:
    """Every option that is not at its default, as text, without secrets and with names instead of paths."""
    known, secrets = vocabulary(), collect_secrets(config)
    return {
        name: redact(strip_paths(format_value(config.value(name))), secrets)
        for name in known
        if config.is_changed(name) and not known[name].secret
    }


def format_value(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(str(each) for each in value)
    if isinstance(value, dict):
        return " ".join(f"{name}={each}" for name, each in value.items())
    return str(value)
