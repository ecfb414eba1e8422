"""Run from a wheel: every command and every script explains itself, every preset is there."""

from __future__ import annotations

import contextlib
import io
import sys

import sfumato
from sfumato.cli.completion import list_entries
from sfumato.cli.main import main
from sfumato.compat.launch import list_script_names
from sfumato.compat.launch import main as run_script
from sfumato.config.presets import list_presets


def explains(run, words: list[str]) -> bool:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        return run([*words, "--help"]) == 0 and "usage:" in shown.getvalue()


checkout = sys.argv[1]
assert checkout not in sfumato.__file__, f"{sfumato.__file__} is not of the wheel"
silent = [" ".join(entry.words) for entry in list_entries() if not explains(main, list(entry.words))]
silent += [name for name in list_script_names() if not explains(run_script, [name])]
assert not silent, silent
assert list_presets()
assert all(main(["presets", name]) == 0 for name in list_presets())
assert main(["doctor", "--device", "24GB"]) == 0
