"""`sfumato demo`: teach a small model something new, and show samples from before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sfumato.cli.options_command import run_with_options
from sfumato.common.files import write_text
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath, Seed

SAVE_EVERY = "120"  # steps


class DemoOptions(Options):
    """Teaches a small model a thing it has never seen by a LoRA, and shows before and after."""

    output_dir: FilePath = option(Path("demo"), "the folder for everything")
    seed: Seed = option(42, "seed of the training")


def compare_checkpoints(output: Path, options: Mapping[str, str]) -> Path:
    """The page of `sfumato compare` about the demo's run, judged by its classifier."""
    from sfumato.config import load_config
    from sfumato.demo.base import tiny_base
    from sfumato.demo.demo import OTHER_SUBJECTS, SUBJECT, SUBJECTS, make_command_line
    from sfumato.demo.judge import ClassifierEncoder
    from sfumato.tools.compare.compare import compare_run
    from sfumato.tools.compare.setup import Wanted, plan_comparison

    base = tiny_base()
    files = {"prompts": SUBJECTS, "neutral_prompts": OTHER_SUBJECTS}
    for name, prompts in files.items():
        write_text(output / f"{name}.txt", "\n".join(prompts) + "\n")
    wanted = Wanted(
        prompts=output / "prompts.txt",
        neutral_prompts=output / "neutral_prompts.txt",
        steps=base.steps,
        scale=base.scale,
    )
    config = load_config(make_command_line(base, output, {**options, "sample_batch_size": "6"}))
    request = plan_comparison(config, output, SUBJECT, wanted)
    compare_run(request, ClassifierEncoder())
    return request.page


def main(argv: Sequence[str]) -> int:
    """Run `sfumato demo`; exit code 1 where the classifier does not recognize the subject afterwards."""
    return run_with_options("sfumato demo", argv, DemoOptions, run)


def run(options: DemoOptions) -> int:
    import torch

    from sfumato.demo.demo import SUBJECT, run_demo

    torch.set_num_threads(1)  # a network this small is slower with more, and many times slower on a busy machine
    given = {"seed": str(options.seed), "save_every_n_steps": SAVE_EVERY}
    result = run_demo(options.output_dir, options=given)
    shares = f"{result.before:.0%} of its images before, {result.after:.0%} after"
    print(f"\nA small classifier sees a {SUBJECT} in {shares}.")
    shares = f"{result.others_before:.0%} show what they should before, {result.others_after:.0%} after"
    print(f"Of the other images {shares}.")
    print(f"  the LoRA          {result.lora}")
    print(f"  its loss          {result.plot}")
    print(f"  before and after  {result.sheet}")
    print(f"  which checkpoint? {compare_checkpoints(options.output_dir, given)}")
    return 0 if result.learned else 1
