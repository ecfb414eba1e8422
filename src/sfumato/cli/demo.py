"""`sfumato demo`: teach a small model something new, and show samples from before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfumato.cli.help import asks_for_help, command_help
from sfumato.config.base import Options, option
from sfumato.config.command import read_options
from sfumato.config.values import FilePath, Seed


class DemoOptions(Options):
    """Teaches a small model a thing it has never seen by a LoRA, and shows before and after."""

    output_dir: FilePath = option(Path("demo"), "the folder for everything")
    seed: Seed = option(42, "seed of the training")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato demo`; exit code 1 where the classifier does not recognize the subject afterwards."""
    if asks_for_help(argv):
        print(command_help("sfumato demo", DemoOptions), end="")
        return 0
    options = read_options(argv, DemoOptions)
    import torch

    from sfumato.demo.demo import SUBJECT, run_demo

    torch.set_num_threads(1)  # a network this small is slower with more, and many times slower on a busy machine
    result = run_demo(options.output_dir, options={"seed": str(options.seed)})
    shares = f"{result.before:.0%} of its images before, {result.after:.0%} after"
    print(f"\nA small classifier sees a {SUBJECT} in {shares}.")
    shares = f"{result.others_before:.0%} show what they should before, {result.others_after:.0%} after"
    print(f"Of the other images {shares}.")
    print(f"  the LoRA          {result.lora}")
    print(f"  its loss          {result.plot}")
    print(f"  before and after  {result.sheet}")
    return 0 if result.learned else 1
