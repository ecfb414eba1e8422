"""The command `sfumato` and its sub-commands. Each imports only what it needs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from sfumato import __version__
from sfumato.cli.exits import run_guarded
from sfumato.cli.help import HELP_FLAGS, format_names, wrap_lines
from sfumato.common.stop_signals import exit_process
from sfumato.errors import UserError


class Command(NamedTuple):
    """A sub-command."""

    module: str  # of the package's folder
    description: str
    function: str = "main"  # of the module; takes the arguments and gives the exit code
    folder: str = "cli"


class CommandGroup(NamedTuple):
    """A sub-command with sub-commands of its own."""

    commands: Mapping[str, Command]
    description: str


DATASET_COMMANDS = {
    "inspect": Command("dataset_inspect", "Show what is in a dataset and what training would refuse."),
    "cache": Command("dataset_cache", "Fill the caches without training, or count, check or prune them."),
    "canny": Command("dataset_canny", "Write the edges of images, white on black."),
    "caption": Command("dataset_caption", "Write captions of images by a model that describes them."),
    "clean": Command("dataset_clean", "Clean the tags and captions of a metadata file."),
    "dedupe": Command("dataset_dedupe", "Name near-duplicates, bad images, and texts that cannot be right."),
    "edit": Command("dataset_edit", "Look through images and edit their captions in the browser."),
    "face-crop": Command("dataset_face_crop", "Write crops around faces, named after where the face is."),
    "merge-captions": Command(
        "dataset_merge", "Gather the captions beside images in a metadata file.", "merge_captions"
    ),
    "merge-tags": Command("dataset_merge", "Gather the tags beside images in a metadata file.", "merge_tags"),
    "resize": Command("dataset_resize", "Write smaller copies of images."),
    "upscale-latents": Command("dataset_upscale", "Write images of twice the size by a network on their latents."),
    "tag": Command("dataset_tag", "Write the tags that a tagger model sees in images."),
}
LORA_COMMANDS = {
    "merge": Command("lora_merge", "Merge adapters into a checkpoint, or several into one."),
    "extract": Command("lora_extract", "Make an adapter of the difference of two models."),
    "resize": Command("lora_resize", "Write a LoRA at a smaller rank."),
    "compare": Command("lora_compare", "Show whether two adapters work together or against each other."),
    "inspect": Command("lora_inspect", "Show what an adapter file does to which blocks, and what is wrong with it."),
    "tokens": Command("lora_tokens", "Show which tokens an adapter of a text encoder changes most."),
    "check": Command("lora_check", "Show the tensors of an adapter file, and what is wrong with it."),
    "convert": Command("lora_convert", "Write a LoRA under the names of another program."),
}
MODEL_COMMANDS = {
    "merge": Command("model_merge", "Add checkpoints of one family up."),
    "convert": Command("model_convert", "Write a model as a single file or as a folder of diffusers."),
    "inspect": Command("model_inspect", "Show which networks a checkpoint holds, in which precision, and what else."),
    "quantize": Command("model_quantize", "Write a checkpoint in eight bits, and show what that changes."),
}
METADATA_COMMANDS = {
    "show": Command("metadata_show", "Show the metadata of a safetensors file."),
    "set": Command("metadata_set", "Set entries of it, or remove them."),
    "strip": Command("metadata_strip", "Keep only what programs need to use the file."),
}
COMMANDS: dict[str, Command | CommandGroup] = {
    "train": Command("train", "Train an adapter, or the whole model, on your images."),
    "generate": Command("generate", "Make images of prompts, with a model alone or with adapters."),
    "compare": Command("compare", "Show the saved checkpoints of a run side by side, and which of them to take."),
    "plan": Command("plan", "Show what `train` would do with the same options, without training."),
    "dataset": CommandGroup(
        DATASET_COMMANDS, "Inspect a dataset, fill its caches, tag and caption its images, edit captions."
    ),
    "lora": CommandGroup(
        LORA_COMMANDS, "Tools for LoRA files: merge, extract, resize, convert, compare, inspect, check, tokens."
    ),
    "model": CommandGroup(MODEL_COMMANDS, "Tools for checkpoints: merge, convert, inspect, quantize."),
    "metadata": CommandGroup(METADATA_COMMANDS, "The metadata of safetensors files: show, set, strip."),
    "presets": Command("presets", "List options that come along for a model, a task and a card, or print them."),
    "doctor": Command("doctor", "Show what this machine has and lacks, and what its card can train."),
    "import": Command("import_run", "Turn a command line or configuration of sd-scripts into ours.", folder="compat"),
    "report": Command("report", "Make the report page of a run again, from the files in its folder."),
    "ema": Command("ema", "Make a power-function EMA of another width out of saved ones."),
    "toy": Command("toy", "Make a toy model and images to try things on."),
    "completion": Command("completion", "Print what bash, zsh or fish needs to complete these commands."),
    "demo": Command("demo", "Teach the small model that comes along a new thing, and show before and after."),
}
OVERVIEW_HEAD = """usage: sfumato COMMAND [--option value ...]

Trains, fine-tunes and samples image diffusion models.
"""
OVERVIEW_FOOT = "\nsfumato COMMAND --help explains one; sfumato --version shows the version."


def entry() -> None:
    """The console script."""
    exit_process(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run a command line; gives the exit code: 0, 2 for what the user can fix, 1 for our faults, 130 after Ctrl-C."""
    return run_guarded(lambda: dispatch(argv), debug="--debug" in argv)


def dispatch(argv: Sequence[str]) -> int:
    """Find the sub-command and run it."""
    if argv and argv[0] == "--version":
        print(f"sfumato {__version__}")
        return 0
    if not argv or argv[0] in HELP_FLAGS:
        print("\n".join([OVERVIEW_HEAD, *list_commands(COMMANDS), OVERVIEW_FOOT]))
        return 0
    command = find_command("sfumato", argv[0], COMMANDS)
    if isinstance(command, Command):
        return run_command(command, argv[1:])
    program = f"sfumato {argv[0]}"
    if len(argv) == 1 or argv[1] in HELP_FLAGS:
        head = [f"usage: {program} COMMAND [--option value ...]", "", *wrap_lines(command.description), ""]
        foot = ["", f"{program} COMMAND --help explains one."]
        print("\n".join([*head, *list_commands(command.commands), *foot]))
        return 0
    return run_command(find_command(program, argv[1], command.commands), argv[2:])


def list_commands(commands: Mapping[str, Command | CommandGroup]) -> list[str]:
    return format_names({name: command.description for name, command in commands.items()})


AnyCommand = TypeVar("AnyCommand", bound=Command | CommandGroup)


def find_command(program: str, name: str, commands: Mapping[str, AnyCommand]) -> AnyCommand:
    """Raises UserError with the nearest known name."""
    if name not in commands:
        from sfumato.common.registry import did_you_mean

        raise UserError(f"{program} has no command {name!r}", code="command-unknown", fix=did_you_mean(name, commands))
    return commands[name]


def run_command(command: Command, argv: Sequence[str]) -> int:
    """Import the module of a command and run it; gives the exit code."""
    module = importlib.import_module(f"sfumato.{command.folder}.{command.module}")
    return getattr(module, command.function)(argv)
