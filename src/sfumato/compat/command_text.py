"""A command of sd-scripts as people keep it: a line, or a shell, batch or PowerShell file; to its words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePath

from sfumato.common.names import SCRIPT_ALIASES
from sfumato.compat.scripts import SCRIPTS
from sfumato.errors import UserError

CONTINUED = re.compile(r"[ \t]+(?:\\|\^|`)[ \t]*\r?\n[ \t]*")  # bash, cmd, PowerShell; a path may end in a backslash
COMMENT = re.compile(r"^\s*(?:#|::|REM\b|@?echo\b)", re.IGNORECASE)
SETTING = re.compile(r"""^\s*(?:export\s+|set\s+(")?|\$env:|\$)?([A-Za-z_]\w*)\s*=\s*(.*?)(?(1)")\s*$""", re.IGNORECASE)
VARIABLE = re.compile(r"\$\{(\w+)\}|\$(?:env:)?(\w+)|%(\w+)%")
WORD = re.compile(r"""(?:[^\s"';]|"(?:\\"|[^"])*"|'[^']*')+|;""")
ENDS = ("&&", "||", "|", ";", "&", ">", ">>", "2>", "2>&1")  # of a command in a shell


@dataclass(frozen=True, kw_only=True)
class OldCommand:
    """A script and its options. launcher: the words before the script, e.g. of accelerate."""

    script: str
    options: list[str]
    launcher: list[str]


def find_old_commands(text: str) -> list[OldCommand]:
    """Every command of the text that runs a script that trains.

    Variables that the text sets are put in. Raises UserError for one that it does not set.
    """
    variables: dict[str, str] = {}
    found: list[OldCommand] = []
    for line in CONTINUED.sub(" ", text).splitlines():
        if COMMENT.match(line):
            continue
        commands = [read_old_command(words, variables) for words in iterate_commands(split_words(line))]
        found += [command for command in commands if command is not None]
        setting = SETTING.match(line)
        if setting and not any(commands):
            variables[setting[2].lower()] = fill_variables(unquote(setting[3]), variables)
    return found


def iterate_commands(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line, each without what ends it."""
    for is_end, group in groupby(words, key=ENDS.__contains__):
        if not is_end:
            yield list(group)


def read_old_command(words: list[str], variables: dict[str, str]) -> OldCommand | None:
    """None for a command that runs no script that trains."""
    place = next((place for place, word in enumerate(words) if name_script(word)), None)
    if place is None or words[0] == "cd":
        return None
    filled = [fill_variables(word, variables) for word in words]
    return OldCommand(script=name_script(words[place]), launcher=filled[:place], options=filled[place + 1 :])


def split_words(line: str) -> list[str]:
    """Words as every shell splits them; a backslash is one, since paths of Windows have them."""
    return [unquote(word) for word in WORD.findall(line)]


def unquote(word: str) -> str:
    """Without the quotes around it or around a part of it, as in --name="a b"; those inside other quotes stay."""

    def strip(match: re.Match[str]) -> str:
        return match[2] if match[1] is None else match[1].replace('\\"', '"')

    return re.sub(r""""((?:\\"|[^"])*)"|'([^']*)'""", strip, word)


def name_script(word: str) -> str:
    """The script that trains that a word names, with or without a folder; empty for other words."""
    plain = PurePath(word.replace("\\", "/")).name.removesuffix(".py")
    plain = SCRIPT_ALIASES.get(plain, plain)
    return plain if plain in SCRIPTS else ""


def fill_variables(word: str, variables: dict[str, str]) -> str:
    def find_value(match: re.Match[str]) -> str:
        name = next(iter(filter(None, match.groups())))
        if name.lower() not in variables:
            raise UserError(
                f"the command names the variable {name}, which the text does not set",
                code="import-variable-unset",
                fix=f"write its value in place of {match[0]}",
            )
        return variables[name.lower()]

    return VARIABLE.sub(find_value, word)


def list_launcher_options(words: list[str]) -> Iterator[str]:
    """The options among the words before a script, each with its value."""
    for place, word in enumerate(words):
        if word.startswith("--"):
            following = words[place + 1 : place + 2]
            has_value = "=" not in word and following and not following[0].startswith("-")
            yield f"{word} {following[0]}" if has_value else word
