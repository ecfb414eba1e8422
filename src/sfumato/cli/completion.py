"""`sfumato completion`: what a shell needs to complete the commands, made of their own help texts."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sfumato.cli.main import COMMANDS, Command, run_command
from sfumato.cli.options_command import run_with_options
from sfumato.config.base import Options, option

HELP_LINE = re.compile(r"^  --(\w+)(?: (\S+))?(?: \.\.\.)?(?:  +(.*))?$")  # --name, its values, the start of its help
CHOICES = re.compile(r"[a-z0-9_.+-]+(\|[a-z0-9_.+-]+)+")  # words in capitals are placeholders
SHARES_TRAINING = "options of `sfumato train`"  # said in the help of the commands that take those too


class CompletionOptions(Options):
    """Prints what a shell needs to complete commands, options and their values with the tab key.

        bash: sfumato completion bash >> ~/.bashrc
        zsh:  sfumato completion zsh > a file _sfumato in a folder of $fpath
        fish: sfumato completion fish > ~/.config/fish/completions/sfumato.fish

    It takes effect in the next shell that is opened.
    """

    shell: Literal["bash", "zsh", "fish"] = option(None, "the shell", positional=True, required=True)


@dataclass(frozen=True, kw_only=True)
class Flag:
    """An option as its help shows it. choices: its values, where they are few. is_switch: whether it takes none."""

    name: str
    help: str
    choices: tuple[str, ...] = ()
    is_switch: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A command with its options. words: lora merge, or train."""

    words: tuple[str, ...]
    description: str
    flags: tuple[Flag, ...]


def main(argv: Sequence[str]) -> int:
    """Run `sfumato completion`."""
    return run_with_options("sfumato completion", argv, CompletionOptions, run)


def run(options: CompletionOptions) -> int:
    print(SHELLS[options.shell](list_entries()), end="")
    return 0


def list_entries() -> list[Entry]:
    """Every command, in the order of the help."""
    commands: dict[tuple[str, ...], Command] = {}
    for name, command in COMMANDS.items():
        if isinstance(command, Command):
            commands[name,] = command
        else:
            commands |= {(name, inner): each for inner, each in command.commands.items()}
    texts = {words: read_help(command) for words, command in commands.items()}
    training = list(parse_help(texts["train",]))
    entries: list[Entry] = []
    for words, text in texts.items():
        flags = list(parse_help(text))
        if SHARES_TRAINING in " ".join(text.split()):
            flags += training
        unique = {flag.name: flag for flag in reversed(flags)}  # a command's own come first
        entries.append(
            Entry(words=words, description=commands[words].description, flags=tuple(reversed(unique.values())))
        )
    return entries


def read_help(command: Command) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        run_command(command, ["--help"])
    return shown.getvalue()


def parse_help(text: str) -> Iterator[Flag]:
    """The options that a help text lists, each with the first line of its help."""
    lines = text.splitlines()
    for place, line in enumerate(lines):
        if match := HELP_LINE.match(line):
            name, values, said = match.groups()
            while values and values.endswith("|"):  # many choices go on in the next line
                place += 1
                values += lines[place].strip()
            said = said or (lines[place + 1].strip() if place + 1 < len(lines) else "")
            choices = tuple(values.split("|")) if values and CHOICES.fullmatch(values) else ()
            yield Flag(name=name, help=said, choices=choices, is_switch=values is None)


def make_bash(entries: Sequence[Entry]) -> str:
    """A function for bash, whose words are also split at `=`; files are completed where nothing else fits."""
    cases = "\n".join(
        f"    {'/'.join(entry.words)}) options='{' '.join(f'--{flag.name}' for flag in entry.flags)}' ;;"
        for entry in entries
    )
    choices = "\n".join(
        f"    {'/'.join(entry.words)}/--{flag.name}) values='{' '.join(flag.choices)}' ;;"
        for entry in entries
        for flag in entry.flags
        if flag.choices
    )
    names = "\n".join(
        f"    {first or '-'}) names='{' '.join(group)}' ;;" for first, group in name_groups(entries).items()
    )
    return f"""# Completion of sfumato for bash.
_sfumato() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" names= options= values= command=
  [[ $current == = ]] && current=
  [[ $before == = ]] && before="${{COMP_WORDS[COMP_CWORD-2]}}"
  COMPREPLY=()
  case "${{COMP_WORDS[1]}}" in
    {"|".join(first for first in name_groups(entries) if first)}) command="${{COMP_WORDS[1]}}/${{COMP_WORDS[2]}}" ;;
    *) command="${{COMP_WORDS[1]}}" ;;
  esac
  if [[ $COMP_CWORD == 1 ]]; then before=-; elif [[ $COMP_CWORD == 2 ]]; then before="${{COMP_WORDS[1]}}"; fi
  if [[ $COMP_CWORD -le 2 && $current != -* ]]; then case "$before" in
{names}
  esac; fi
  case "$command/$before" in
{choices}
  esac
  if [[ -n $names$values ]]; then
    COMPREPLY=($(compgen -W "$names $values" -- "$current"))
    return
  fi
  case "$command" in
{cases}
  esac
  [[ $current == -* ]] && COMPREPLY=($(compgen -W "$options --help" -- "$current"))
}}
complete -o default -F _sfumato sfumato
"""


def name_groups(entries: Sequence[Entry]) -> Mapping[str, list[str]]:
    """First word -> the words that may follow it; "" -> the first words."""
    groups: dict[str, list[str]] = {"": []}
    for entry in entries:
        if entry.words[0] not in groups[""]:
            groups[""].append(entry.words[0])
        if len(entry.words) == 2:
            groups.setdefault(entry.words[0], []).append(entry.words[1])
    return groups


def make_zsh(entries: Sequence[Entry]) -> str:
    """A function for zsh's own completion."""
    words = "\n".join(
        f"    '{'/'.join(entry.words)}') specs=({' '.join(map(format_zsh, entry.flags))}) ;;" for entry in entries
    )
    descriptions = {"/".join(entry.words): entry.description for entry in entries}
    groups = name_groups(entries)
    names = "\n".join(
        f"    '{first}') names=({' '.join(quote_word(name_zsh(first, name, descriptions)) for name in group)}) ;;"
        for first, group in groups.items()
    )
    return f"""#compdef sfumato
# Completion of sfumato for zsh.
_sfumato() {{
  local -a names specs
  local command="${{words[2]}}" place=2
  case "$command" in
    {"|".join(filter(None, groups))}) command="${{words[2]}}/${{words[3]}}"; place=3 ;;
  esac
  if (( CURRENT <= place )); then
    local first=""
    (( CURRENT == 3 )) && first="${{words[2]}}"
    case "$first" in
{names}
    esac
    _describe command names
    return
  fi
  case "$command" in
{words}
  esac
  shift $(( place - 1 )) words
  (( CURRENT -= place - 1 ))
  _arguments -S "${{specs[@]}}" '*:file:_files'
}}
if [[ $funcstack[1] == _sfumato ]]; then _sfumato "$@"; else compdef _sfumato sfumato; fi
"""


def name_zsh(first: str, name: str, descriptions: Mapping[str, str]) -> str:
    said = descriptions.get("/".join(filter(None, (first, name))), "tools")
    return f"{name}:{said}"


def format_zsh(flag: Flag) -> str:
    said = re.sub(r"([\[\]:])", r"\\\1", flag.help)
    if flag.is_switch:
        return quote_word(f"--{flag.name}[{said}]")
    values = f"({' '.join(flag.choices)})" if flag.choices else "_files"
    return quote_word(f"--{flag.name}=[{said}]:value:{values}")


def quote_word(text: str) -> str:
    """One word of a shell."""
    return "'" + text.replace("'", "'\\''") + "'"


def make_fish(entries: Sequence[Entry]) -> str:
    """One line for each word that may come next."""
    groups = name_groups(entries)
    descriptions = {"/".join(entry.words): entry.description for entry in entries}
    lines = ["# Completion of sfumato for fish.", "complete -c sfumato -f"]
    for first, group in groups.items():
        condition = f"__fish_seen_subcommand_from {first}" if first else "__fish_use_subcommand"
        if first:
            condition += f"; and not __fish_seen_subcommand_from {' '.join(group)}"
        for name in group:
            said = name_zsh(first, name, descriptions).partition(":")[2]
            lines.append(f"complete -c sfumato -n {quote_word(condition)} -a {name} -d {quote_fish(said)}")
    for entry in entries:
        seen = [f"__fish_seen_subcommand_from {word}" for word in entry.words]
        if len(entry.words) == 1:  # `compare` is also a command of `lora`
            seen.append(f"not __fish_seen_subcommand_from {' '.join(first for first in groups if first)}")
        condition = quote_word("; and ".join(seen))
        lines.append(f"complete -c sfumato -n {condition} -F")
        for flag in entry.flags:
            values = "" if flag.is_switch else f" -xa {quote_word(' '.join(flag.choices))}" if flag.choices else " -rF"
            lines.append(f"complete -c sfumato -n {condition} -l {flag.name}{values} -d {quote_fish(flag.help)}")
    return "\n".join(lines) + "\n"


def quote_fish(text: str) -> str:
    """fish reads \\' and \\\\ inside quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS = {"bash": make_bash, "zsh": make_zsh, "fish": make_fish}
