"""Writes docs/options.md: `python -m sfumato.compat.table > docs/options.md`."""

from __future__ import annotations

import sys

from sfumato.common.names import FOREIGN_KEYS, NETWORK_MODULES, OPTION_ALIASES, PLANNED_NETWORK_MODULES
from sfumato.compat.scripts import SCRIPTS, option_table
from sfumato.config.base import Option
from sfumato.config.rules import RULES
from sfumato.config.schema import by_theme, title, vocabulary

HEAD = """# Options

*Generated: `python -m sfumato.compat.table > docs/options.md`. Do not edit.*

Every option has one name: `--network_dim 16` on the command line, `network_dim = 16` in the file of `--config_file`,
whose section headings are free. The command line goes before the file, the file before what a script sets, and that
before the defaults below. A switch stands alone on the command line (`--cache_latents`, off again with
`--no_cache_latents`) and is `true` or `false` in the file. Names are never abbreviated.

Status: **yes**: works. **later**: known and typed, refused until the named part is there.
**no effect**: accepted and reported. *Scripts*: the scripts of the field that have the option; `sfumato train` has all.
"""

GROUPS = {"adapter": "adapter scripts", "full": "whole-model scripts"}
COLUMNS = """| Option | Takes | Default | Status | Scripts | Meaning |
|---|---|---|---|---|---|"""
RULES_HEAD = """*required* and *conflict* end the program before it starts; *no effect* is a line in the report,
or an error with `--strict`.
"""


def table() -> str:
    """The whole page."""
    options = vocabulary()
    open_now = sum(not option.facts.planned for option in options.values())
    parts = [HEAD, f"{len(options)} options, {open_now} of them available.\n"]
    for theme, group in by_theme(options.values()).items():
        parts += [f"## {title(theme)}\n", COLUMNS]
        parts.append("\n".join(row(option) for option in group) + "\n")
    return "\n".join([*parts, rules(), names()])


def row(option: Option) -> str:
    takes = "switch" if option.kind == "flag" else code(option.takes)
    default = "" if option.default in (None, "", (), {}, False) else code(shown(option.default))
    return f"| `{option.flag}` | {takes} | {default} | {status(option)} | {scripts(option)} | {cell(option.help)} |"


def status(option: Option) -> str:
    if option.facts.planned:
        return f"later: {option.facts.planned}"
    return f"no effect: {option.facts.no_effect}" if option.facts.no_effect else "yes"


def scripts(option: Option) -> str:
    """Which scripts of the field have the option."""
    table = option_table()
    if option.name in table["every script"]:
        return "all"
    homes = [GROUPS[group] for group in GROUPS if option.name in table[group]]
    homes += [name.removesuffix("_train_network") for name in SCRIPTS if option.name in table[name]]
    return ", ".join(homes) if homes else "ours"


def rules() -> str:
    lines = [f"| {rule.name} | {rule.kind} | {cell(rule.what)} | {cell(rule.fix)} |" for rule in RULES]
    return "\n".join(
        [
            "## Rules between options\n",
            RULES_HEAD,
            "| Rule | Kind | What | What to do |\n|---|---|---|---|",
            *lines,
            "",
        ]
    )


def names() -> str:
    modules = [f"| `{name}` | {adapter} |" for name, adapter in NETWORK_MODULES.items()]
    modules += [f"| `{name}` | later: {room} |" for name, room in PLANNED_NETWORK_MODULES.items()]
    aliases = [f"* `--{old}` is `--{new}`." for old, new in OPTION_ALIASES.items()]
    foreign = [f"* `{name}`: {why}." for name, why in FOREIGN_KEYS.items()]
    return "\n".join(
        [
            "## Names in use elsewhere\n",
            "| `--network_module` | Adapter |\n|---|---|",
            *modules,
            "",
            *aliases,
            "",
            "Keys that front ends write into the configuration file are reported and ignored:\n",
            *foreign,
            "",
        ]
    )


def code(text: str) -> str:
    return f"`{cell(text)}`" if text else ""


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.stdout.write(table())
