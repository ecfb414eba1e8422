"""`sfumato train`, and the same under the names of scripts: options to a config, and the config to a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sfumato.cli.exits import run_guarded
from sfumato.cli.help import asks_for_help, training_help
from sfumato.common.text import EMPTY

if TYPE_CHECKING:
    from sfumato.config import Config

PLAN_FLAG = "--plan"
PLAN_NOTE = f"With {PLAN_FLAG}, everything is checked and shown, and nothing is trained or written."


def main(argv: Sequence[str]) -> int:
    """Run `sfumato train`."""
    return run_training(argv, program="sfumato train", summary="Trains an adapter, or the whole model, on your images.")


def run_training(
    argv: Sequence[str],
    *,
    program: str,
    summary: str,
    defaults: Mapping[str, Any] = EMPTY,
    absent: Mapping[str, str] = EMPTY,
) -> int:
    """Train with the options of a command line, or show the plan with --plan; gives the exit code.

    For the arguments see `read_run_config`.
    """
    if PLAN_FLAG in argv and is_further_process():
        return 0
    config = read_run_config(argv, program=program, summary=summary, defaults=defaults, absent=absent)
    if config is None:
        return 0
    if config.run.plan:
        return run_plan(config)
    if config.run.show_timesteps is not None:
        from sfumato.tools.plan import show_timesteps

        return 0 if is_further_process() else run_guarded(lambda: show_timesteps(config), debug=config.log.debug)
    if config.dataset.debug_dataset:
        from sfumato.tools.dataset_inspect import show_dataset

        return run_guarded(lambda: show_dataset(config), debug=config.log.debug)
    return run_guarded(lambda: train_or_try(config), debug=config.log.debug)


def train_or_try(config: Config) -> None:
    """Train, where the GPU that is there has memory enough; or take one step with --dry_run."""
    if config.run.dry_run:
        from sfumato.tools.dry_run import show_dry_run

        show_dry_run(config)
        return
    from sfumato.tools.memory_check import check_memory
    from sfumato.train import train

    check_memory(config)
    saved, rank = train(config), config.save.extract_lora_at_end
    if saved is not None and rank is not None and not is_further_process():
        from sfumato.tools.adapter_files.at_end import extract_at_end

        output = saved.with_name(f"{config.save.output_name}_lora.safetensors")
        print("\n".join(extract_at_end(config, saved, output, rank)))


def run_plan(config: Config) -> int:
    """Show the plan; gives the exit code that training would begin with."""
    if is_further_process():
        return 0
    from sfumato.tools.plan import show_plan

    def show() -> None:
        show_plan(config)

    return run_guarded(show, debug=config.log.debug)


def is_further_process() -> bool:
    """Whether another process of this launch is the first, which does what is done once.

    With --plan the others end at once and well: torchrun stops all of them when one fails, before the first has said
    why.
    """
    from sfumato.config.environment import read_launch

    return read_launch().rank > 0


def read_run_config(
    argv: Sequence[str],
    *,
    program: str,
    summary: str,
    defaults: Mapping[str, Any] = EMPTY,
    absent: Mapping[str, str] = EMPTY,
) -> Config | None:
    """The config of a command line; None where it only asks for help or for its file to be written.

    program, summary: for the help. defaults: values that a script sets. absent: options that it does not have.
    """
    if asks_for_help(argv):
        print(training_help(program, f"{summary}\n{PLAN_NOTE}", absent=absent), end="")
        return None
    from sfumato.config import load_config

    config = load_config(argv, defaults=defaults, absent=absent)
    return None if write_output_config(config) else config


def write_output_config(config: Config) -> bool:
    """Write the options to the file of --output_config; whether that was all there is to do."""
    if not config.run.output_config:
        return False
    from sfumato.config.write import write_config

    print(f"options written to {write_config(config)}")
    return True
