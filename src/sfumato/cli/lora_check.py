"""`sfumato lora check`: the tensors of an adapter file, and whether it can be used."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.exits import USER_ERROR
from sfumato.cli.options_command import run_with_options
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class LoraCheckOptions(Options):
    """Shows the matrices of an adapter file in numbers, and what is wrong with it; the exit code is then 2."""

    file: FilePath = option(
        None, "the adapter: a file, or a folder of PEFT or diffusers", positional=True, required=True
    )
    show_all_keys: bool = option(False, "show every tensor, not only the matrices of low rank")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato lora check`."""
    return run_with_options("sfumato lora check", argv, LoraCheckOptions, run_check)


def run_check(options: LoraCheckOptions) -> int:
    """Print the report; gives the exit code."""
    from sfumato.tools.adapter_files.check import check_adapter

    lines, is_good = check_adapter(options.file, all_keys=options.show_all_keys)
    print("\n".join(lines))
    return 0 if is_good else USER_ERROR
