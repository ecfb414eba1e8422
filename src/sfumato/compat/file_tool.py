"""A script of sd-scripts that works on files: its options, and the command of ours that it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sfumato.cli.help import asks_for_help, command_help
from sfumato.config.base import Options
from sfumato.config.command import read_command


@dataclass(frozen=True, kw_only=True)
class FileTool:
    """One script. run: prints its report, and gives the exit code."""

    name: str  # networks/merge_lora
    options: type[Options]
    run: Callable[[Any], int]
    no_effect: Mapping[str, str] = field(default_factory=dict)  # option -> why it changes nothing here
    short: Mapping[str, str] = field(default_factory=dict)  # short form -> option
    aliases: Mapping[str, str] = field(default_factory=dict)  # other spelling -> option

    def start(self, argv: Sequence[str]) -> int:
        """Read the command line and run; gives the exit code."""
        if asks_for_help(argv):
            sys.stdout.write(command_help(f"{self.name}.py", self.options))
            return 0
        words = [self.short.get(word, word) for word in argv]
        line = read_command(words, self.options, training=False, aliases=self.aliases)
        line.raise_faults()
        for name, reason in self.no_effect.items():
            if name in line.own and line.own[name] != self.options.model_fields[name].default:
                sys.stderr.write(f"note: --{name} has no effect: {reason}\n")
        return self.run(line.options(self.options))
