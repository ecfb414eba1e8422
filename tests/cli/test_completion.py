"""`sfumato completion`, asked as the shells ask: each completes commands, options and values."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from sfumato.cli.completion import SHELLS, list_entries, parse_help
from sfumato.cli.main import COMMANDS, CommandGroup
from sfumato.config.schema import vocabulary

ASKED = {  # line, up to the cursor -> what completes its last word, in part
    "sfumato lo": {"lora"},
    "sfumato lora me": {"merge"},
    "sfumato lora merge --save_t": {"--save_to"},
    "sfumato train --loss_type h": {"huber"},
    "sfumato train --network_di": {"--network_dim"},
    "sfumato generate --network_mu": {"--network_mul"},
    "sfumato dataset cache --pretr": {"--pretrained_model_name_or_path"},
}
BASH = """
source {script}
ask() {{ COMP_WORDS=($1); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); _sfumato; echo "${{COMPREPLY[@]}}"; }}
"""


def test_every_command_and_every_option_of_training_is_known() -> None:
    entries = {entry.words: entry for entry in list_entries()}
    expected = {
        (name, *inner)
        for name, command in COMMANDS.items()
        for inner in ([(each,) for each in command.commands] if isinstance(command, CommandGroup) else [()])
    }
    assert set(entries) == expected
    names = {flag.name for flag in entries["train",].flags}
    assert names == set(vocabulary())


def test_values_and_placeholders_are_told_apart() -> None:
    text = (
        "  --a x|y_1                       one of two\n"
        "  --e p|\n      q|\n      r\n      many\n"
        "  --b N|X%  some\n  --c\n      a switch\n  --d PATH ...  paths\n"
    )
    a, e, b, c, d = parse_help(text)
    assert (a.choices, a.help) == (("x", "y_1"), "one of two")
    assert (e.choices, e.help) == (("p", "q", "r"), "many")
    assert (b.choices, b.is_switch) == ((), False)
    assert (c.is_switch, c.help) == (True, "a switch")
    assert (d.is_switch, d.help) == (False, "paths")


@pytest.mark.full
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / f"_sfumato.{shell}"
    script.write_text(SHELLS[shell](list_entries()))
    subprocess.run([shell, "-n", script], check=True)
    if shell == "zsh":  # completes only in a terminal
        return
    for line, expected in ASKED.items():
        if shell == "bash":
            asked = f'{BASH.format(script=script)}ask "{line}"'
        else:
            asked = f'source {script}; complete -C "{line}"'
        shown = subprocess.run([shell, "-c", asked], capture_output=True, text=True, check=True)
        assert not shown.stderr
        found = {row.split("\t")[0] for row in (shown.stdout.split() if shell == "bash" else shown.stdout.splitlines())}
        assert expected <= found, (line, found)
