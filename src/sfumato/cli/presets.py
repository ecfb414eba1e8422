"""`sfumato presets`: the configuration files that come along, and one of them to copy."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.options_command import run_with_options
from sfumato.common.text import format_bytes
from sfumato.common.text_files import read_text_file
from sfumato.config.base import Options, option
from sfumato.config.presets import find_preset, list_presets


class PresetListOptions(Options):
    """Lists the presets, which `--preset NAME` of every training command takes, or prints one to copy and change.

    Each is for a model, a task and a card: good practice, and the options with which a rehearsal of the run fits.
    """

    name: str | None = option(None, "a preset to print", positional=True)


def main(argv: Sequence[str]) -> int:
    """Run `sfumato presets`."""
    return run_with_options("sfumato presets", argv, PresetListOptions, run)


def run(options: PresetListOptions) -> int:
    if options.name is not None:
        print(read_text_file(find_preset(options.name).path), end="")
        return 0
    title = ""
    for preset in list_presets().values():
        if preset.title != title:
            title = preset.title
            print(title)
        print(f"  {preset.name:<26}{preset.card:>3} GB card, needs {format_bytes(preset.needs)}")
    return 0
