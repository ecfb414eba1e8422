"""The command `sfumato` and what it can be followed by. Each command imports only what it needs."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sfumato import __version__
from sfumato.errors import SeveralErrors, UserError

if TYPE_CHECKING:
    from sfumato.config import Config

NOTHING: Mapping[str, Any] = MappingProxyType({})
HELP = ("--help", "-h")


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run a command line; gives the exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    return guarded(lambda: dispatch(argv), debug="--debug" in argv)


def dispatch(argv: Sequence[str]) -> int:
    """Find the sub-command and run it."""
    if not argv or argv[0] in HELP:
        print(overview(), end="")
        return 0
    if argv[0] == "--version":
        print(f"sfumato {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        from sfumato.common.registry import did_you_mean

        raise UserError(f"sfumato has no command {argv[0]!r}", fix=did_you_mean(argv[0], COMMANDS))
    return COMMANDS[argv[0]](argv[1:])


def overview() -> str:
    lines = [f"  {name:<10}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sfumato COMMAND [--option value ...]",
            "",
            "Trains, fine-tunes and samples image diffusion models.",
            "",
            *lines,
            "",
            "sfumato COMMAND --help explains one; sfumato --version shows the version.",
            "",
        ]
    )


def train(
    argv: Sequence[str],
    *,
    program: str = "sfumato train",
    summary: str = "Trains an adapter, or the whole model, on your pictures.",
    defaults: Mapping[str, Any] = NOTHING,
    absent: Mapping[str, str] = NOTHING,
) -> int:
    """Train an adapter, or the whole model, on your pictures."""
    config = configured(argv, program=program, summary=summary, defaults=defaults, absent=absent)
    if config is None:
        return 0
    if config.dataset.debug_dataset:
        from sfumato.tools.dataset_inspect import show_dataset

        return guarded(lambda: show_dataset(config), debug=config.log.debug)
    from sfumato.train import train as run

    return guarded(lambda: run(config), debug=config.log.debug)


def plan(argv: Sequence[str]) -> int:
    """Say what `train` would do with the same options, without doing it."""
    config = configured(argv, program="sfumato plan", summary="Says what a run will do, before it does it.")
    if config is None:
        return 0
    from sfumato.plan import plan as run

    return guarded(lambda: run(config), debug=config.log.debug)


def generate(argv: Sequence[str]) -> int:
    """Make pictures of prompts, with a model alone or with adapters."""
    from sfumato.cli.generate import main as run

    return run(argv)


def run_report(argv: Sequence[str]) -> int:
    """Make the page of a run again, from the files in its folder."""
    from sfumato.cli.report import main as run

    return run(argv)


def dataset(argv: Sequence[str]) -> int:
    """Look into a dataset, fill its caches, look after them."""
    from sfumato.cli.dataset import main as run

    return run(argv)


def lora(argv: Sequence[str]) -> int:
    """Tools for LoRA files: write one under the names of another program."""
    from sfumato.cli.lora import main as run

    return run(argv)


def ema(argv: Sequence[str]) -> int:
    """Make a power-function average of another width out of saved ones."""
    from sfumato.cli.ema import main as run

    return run(argv)


def toy(argv: Sequence[str]) -> int:
    """Make a toy model and pictures to try things on."""
    from sfumato.demo.toy import main as run

    return run(argv)


def demo(argv: Sequence[str]) -> int:
    """Teach the small model that comes along a new thing, and show before and after."""
    from sfumato.demo.demo import main as run

    return run(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "generate": generate,
    "plan": plan,
    "dataset": dataset,
    "lora": lora,
    "report": run_report,
    "ema": ema,
    "toy": toy,
    "demo": demo,
}


def configured(
    argv: Sequence[str],
    *,
    program: str,
    summary: str,
    defaults: Mapping[str, Any] = NOTHING,
    absent: Mapping[str, str] = NOTHING,
) -> Config | None:
    """The config that a command line asks for; None where it only asks for help or for its file to be written."""
    if any(word in HELP for word in argv):
        from sfumato.cli.help import help_text

        print(help_text(program, summary, without=absent), end="")
        return None
    from sfumato.config import load_config

    config = load_config(argv, defaults=defaults, absent=absent)
    if config.run.output_config:
        from sfumato.config.write import write_config

        print(f"options written to {write_config(config)}")
        return None
    return config


def guarded(run: Callable[[], int | None], *, debug: bool) -> int:
    """Turn what can go wrong into an exit code and a last line that says what it was."""
    try:
        return run() or 0
    except UserError as error:
        if debug:
            traceback.print_exc()
        report(error)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `sfumato train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def report(error: UserError) -> None:
    """One line for each fault, and as the last line what it was about."""
    if isinstance(error, SeveralErrors):
        for each in error.errors:
            print(f"- {one_line(each)}", file=sys.stderr)
    print(f"error: {one_line(error)}", file=sys.stderr)


def one_line(error: UserError) -> str:
    return " ".join(str(error).split())
