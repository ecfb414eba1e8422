"""The note about options that a command does not use, since one file of options serves training, too."""

from __future__ import annotations

from collections.abc import Collection

from sfumato.config import Config
from sfumato.config.schema import vocabulary


def describe_ignored_options(
    config: Config, *, themes: Collection[str], options: Collection[str], purpose: str
) -> list[str]:
    """At most one line, naming every option that the user changed and the command ignores.

    themes: groups of options that the command uses whole. options: further ones that it uses. purpose: what it makes.
    """
    ignored = []
    for name, option in vocabulary().items():
        if option.theme in themes or name in options:
            continue
        if config.is_changed(name) and config.source(name) != "launcher":
            ignored.append(f"--{name}")
    return [f"note: no effect on {purpose}: {', '.join(ignored)}"] if ignored else []
