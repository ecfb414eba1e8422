"""`sfumato import`: an old command line or configuration as our configuration file, and what changed in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sfumato.cli.options_command import run_with_options
from sfumato.common.text_files import read_text_file
from sfumato.compat.command_text import find_old_commands, list_launcher_options, name_script
from sfumato.compat.scripts import SCRIPTS, Script, find_script, list_absent_options
from sfumato.config import Config, load_config
from sfumato.config.base import Options, option
from sfumato.config.schema import vocabulary
from sfumato.config.values import FilePath
from sfumato.config.write import check_new_config, format_toml, write_options
from sfumato.errors import UserError

CONFIGURATIONS = (".toml", ".json")


class ImportOptions(Options):
    """Turns a command line or a configuration of sd-scripts into a configuration file for `sfumato train`.

    Nothing is read but that text and the dataset file that it names: paths in it need not exist here. What a run would
    ignore, read another way or refuse is said.
    """

    command: tuple[str, ...] = option(
        (), "a .toml or .json file, a file with a command (.sh, .bat, .ps1, .txt), or the command itself in quotes",
        positional=True, required=True,
    )  # fmt: skip
    script: str | None = option(None, "the script that a .toml or .json was for, e.g. sdxl_train_network")
    save_to: FilePath | None = option(None, "the .toml file to write; it is printed by default")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato import`."""
    return run_with_options("sfumato import", argv, ImportOptions, run_import)


def run_import(options: ImportOptions) -> int:
    """Print the options or write them; gives the exit code."""
    path = options.save_to and check_new_config(options.save_to, option="--save_to")
    script, words, notes = read_source(options)
    config = load_config(words, defaults=script.presets, absent=list_absent_options(script), check_files=False)
    sys.stdout.write("".join(f"# {note}\n" for note in (*notes, *list_changes(config))))
    if path is None:
        sys.stdout.write(format_toml(config))
        return 0
    write_options(config, path, option="--save_to")
    sys.stdout.write(f"options written to {path}\ntrain with: sfumato train --config_file {path}\n")
    return 0


def read_source(options: ImportOptions) -> tuple[Script, list[str], list[str]]:
    """The script, the words of its command line, and what is to be said of the words around them."""
    source = Path(options.command[0])
    is_file = len(options.command) == 1 and source.is_file()
    if is_file and source.suffix.lower() in CONFIGURATIONS:
        return find_named_script(options, source), ["--config_file", str(source)], []
    if options.script:
        raise UserError(
            "--script is for a .toml or .json: a command names its script itself",
            code="import-script-named-twice",
            fix="remove --script",
        )
    commands = find_old_commands(read_text_file(source) if is_file else " ".join(map(quote_words, options.command)))
    if len(commands) != 1:
        raise_no_command(options, [command.script for command in commands], is_file=is_file)
    command = commands[0]
    return find_script(command.script), command.options, [*describe_launcher(command.launcher)]


def quote_words(word: str) -> str:
    """A whole command in one word is taken as it is."""
    return f'"{word}"' if " " in word and not name_script(word) and "--" not in word else word


def find_named_script(options: ImportOptions, source: Path) -> Script:
    if options.script is None:
        raise UserError(
            f"{source} does not say which script it was for",
            code="import-script-missing",
            fix=f"--script NAME, one of {', '.join(SCRIPTS)}",
        )
    return find_script(options.script)


def raise_no_command(options: ImportOptions, scripts: Sequence[str], *, is_file: bool) -> None:
    where = options.command[0] if is_file else "the command"
    if scripts:
        raise UserError(
            f"{where} runs several scripts: {', '.join(scripts)}",
            code="import-several-commands",
            fix="give one command in quotes",
        )
    missing = "" if is_file else f", and {options.command[0]} is no file"
    raise UserError(
        f"{where} runs no script of sd-scripts that trains{missing}",
        code="import-without-command",
        fix=f"one of {', '.join(SCRIPTS)}",
    )


def describe_launcher(words: Sequence[str]) -> Iterator[str]:
    """accelerate's options stay with accelerate."""
    options = list(list_launcher_options(list(words)))
    if options:
        yield (
            f"not part of the file: {', '.join(options)}; `sfumato train` needs no launcher on one GPU, and the same "
            "launcher starts it on several (with -m sfumato train)"
        )


def list_changes(config: Config) -> Iterator[str]:
    """What the run would say of its options before it starts, and what is not written."""
    yield from config.notes
    for name, known in vocabulary().items():
        if known.secret and config.is_changed(name):
            yield f"--{name} is a secret and is not written: log in, or add it to the file yourself"
    if config.dataset.dataset_config is not None:
        yield f"the file of --dataset_config, {config.dataset.dataset_config}, stays as it is"
